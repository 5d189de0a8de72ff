"""Execute a graph: `run.ort` (onnxruntime), `run.reference` (the ONNX reference evaluator), `run.torch` (differentiable).

This file holds what they share. Each engine is imported by name, so that none costs anything before it is used.
"""

from __future__ import annotations

import dataclasses
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.core.contract import Array
from graphopt.core.errors import TargetError

Feeds = Mapping[str, Any]  # name -> array; for an input that is no tensor: a list of arrays, a dict, or None


@dataclasses.dataclass(frozen=True)
class Port:
    """One input or output of a session. `dtype` is None where it is no tensor, or a type that numpy lacks."""

    name: str
    dtype: np.dtype[Any] | None
    shape: tuple[int | str | None, ...]

    @classmethod
    def of(cls, value: ir.Value) -> Port:
        """That of an input or output of a graph."""
        dims = () if value.shape is None else tuple(d if isinstance(d, int) else d.value for d in value.shape)
        try:
            dtype = value.dtype.numpy() if isinstance(value.type, ir.TensorType) and value.dtype is not None else None
        except TypeError:
            dtype = None
        return cls(str(value.name), dtype, dims)


class Runner(ABC):
    """A loaded model. `inputs` are what `run` must be fed; an overridable initializer may be fed as well."""

    engine: ClassVar[str]  # its name in errors

    def __init__(self, inputs: Iterable[Port], outputs: Iterable[Port], defaults: Iterable[Port]) -> None:
        self.inputs, self.outputs, self._defaults = tuple(inputs), tuple(outputs), tuple(defaults)

    def run(self, feeds: Feeds) -> dict[str, Any]:
        """The outputs by name, in order: arrays; a list for a sequence, a dict for a map, None for an optional without anything.

        Raises:
            TargetError: an input is missing or unknown, or the engine failed; one line.
        """
        defaults = {port.name for port in self._defaults}
        check_feeds({k: v for k, v in feeds.items() if k not in defaults}, self.inputs)
        names = [port.name for port in self.outputs]
        try:
            arrays = self._call(names, in_size(in_width(feeds, (*self.inputs, *self._defaults)), self.inputs))
        except Exception as error:
            raise TargetError(f"{self.engine} failed to run the model: {one_line(error)}") from error
        return dict(zip(names, arrays, strict=True))

    @abstractmethod
    def _call(self, outputs: list[str], feeds: dict[str, Any]) -> Sequence[Any]: ...


def saved(path: str | os.PathLike[str]) -> str:
    """The path of a saved model.

    Raises:
        TargetError: there is no such file.
    """
    if not os.path.isfile(path):
        raise TargetError(f"{os.fspath(path)} is not a file; give a saved .onnx model")
    return os.fspath(path)


def one_line(error: BaseException) -> str:
    """What a library said, as one line without its own tags such as `[ONNXRuntimeError] : 1 : FAIL : `."""
    text = " ".join(str(error).split()) or type(error).__name__
    head, found, tail = text.partition("[ONNXRuntimeError] : ")
    if found and not head:
        text = tail.split(" : ", 2)[-1]
    return text if len(text) <= 400 else text[:397] + "..."


def check_feeds(feeds: Feeds, inputs: tuple[Port, ...]) -> None:
    """Raises TargetError, in one line, if an input is missing or unknown."""
    known = {port.name for port in inputs}
    missing, extra = sorted(known - set(feeds)), sorted(set(feeds) - known)
    if missing:
        raise TargetError(f"input {', '.join(missing)} missing; the model needs {', '.join(p.name for p in inputs)}")
    if extra:
        raise TargetError(f"the model has no input {', '.join(extra)}; it needs {', '.join(p.name for p in inputs) or 'none'}")


def each(value: Any, change: Callable[[Array], Array]) -> Any:
    """What is fed, with `change` of every array: of an array itself, or of those of a sequence; a map, and nothing, stay."""
    if isinstance(value, list):
        return [each(x, change) for x in value]
    return value if value is None or isinstance(value, Mapping) else change(value)


def in_width(feeds: Feeds, inputs: Iterable[Port]) -> dict[str, Any]:
    """The feeds with floats in the width of the inputs: a pass may have made an input narrower than the user's data (to-half{keep-io=false})."""
    fed = dict(feeds)
    for port in inputs:
        array = fed.get(port.name)
        if isinstance(array, np.ndarray) and port.dtype is not None and array.dtype != port.dtype and array.dtype.kind == port.dtype.kind == "f":
            fed[port.name] = array.astype(port.dtype)
    return fed


def in_size(feeds: dict[str, Any], inputs: Iterable[Port]) -> dict[str, Any]:
    """The feeds with what is empty in the sizes of the inputs: a pass may have given an empty cache fewer heads than the user's has."""
    for port in inputs:
        array = feeds.get(port.name)
        if isinstance(array, np.ndarray) and not array.size and array.ndim == len(port.shape):
            shape = tuple(d if isinstance(d, int) else n for d, n in zip(port.shape, array.shape, strict=True))
            feeds[port.name] = array if shape == array.shape or 0 not in shape else np.zeros(shape, array.dtype)
    return feeds
