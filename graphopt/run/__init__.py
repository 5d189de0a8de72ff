"""Execute a graph: `run.ort` (onnxruntime), `run.reference` (the ONNX reference evaluator), `run.torch` (differentiable).

This file holds what they share. Each engine is imported by name, so that none costs anything before it is used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from graphopt.core.contract import Array
from graphopt.core.errors import TargetError

Feeds = Mapping[str, Array]
Dim = int | str | None


@dataclasses.dataclass(frozen=True)
class Port:
    """One input or output of a session. `dtype` is None where it is no tensor, or a type that numpy lacks."""

    name: str
    dtype: np.dtype[Any] | None
    shape: tuple[Dim, ...]


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


def in_width(feeds: Feeds, inputs: Iterable[Port]) -> dict[str, Array]:
    """The feeds with floats in the width of the inputs: a pass may have made an input narrower than the user's data (to-half{keep-io=false})."""
    fed = dict(feeds)
    for port in inputs:
        array = fed.get(port.name)
        if array is not None and port.dtype is not None and array.dtype != port.dtype and array.dtype.kind == port.dtype.kind == "f":
            fed[port.name] = array.astype(port.dtype)
    return fed
