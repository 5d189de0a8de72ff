"""Run a model by ONNX Runtime."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphopt.core.contract import Array
from graphopt.core.errors import TargetError
from graphopt.graph.serialize import fits, graph_of, proto_limit, to_bytes, write
from graphopt.run import Port, Runner, one_line, saved
from graphopt.run.worker import Settings, inference

if TYPE_CHECKING:
    import onnx

_DTYPES = {
    "float": "float32", "double": "float64", "float16": "float16", "string": "object", "bool": "bool",
    "int8": "int8", "int16": "int16", "int32": "int32", "int64": "int64",
    "uint8": "uint8", "uint16": "uint16", "uint32": "uint32", "uint64": "uint64",
}  # fmt: skip


class OrtSession(Runner):
    engine = "onnxruntime"

    def __init__(self, inference: Any, keep: object = None) -> None:
        super().__init__(*(map(_port, get()) for get in (inference.get_inputs, inference.get_outputs, inference.get_overridable_initializers)))
        self._inference, self._keep = inference, keep

    def _call(self, outputs: list[str], feeds: dict[str, Array]) -> Sequence[Array]:
        arrays: list[Array] = self._inference.run(outputs, feeds)
        return arrays


def session(
    model: ir.Model | onnx.ModelProto | bytes | str | os.PathLike[str],
    *,
    threads: int = 1,
    optimize: bool = True,
    providers: Sequence[str | tuple[str, Mapping[str, str]]] = ("CPUExecutionProvider",),
    spinning: bool = False,
) -> OrtSession:
    """Load a model.

    Args:
        model: a graph, a ModelProto, its bytes, or a file. A graph above the protobuf limit goes through a temporary file.
        threads: intra-op threads; 0 lets the runtime choose.
        optimize: False = ORT_DISABLE_ALL, the only setting whose numbers are a baseline.
        providers: execution providers, best first; a pair is a name and the options of that provider.
        spinning: whether idle threads spin; off, many sessions can live side by side.

    Raises:
        TargetError: the runtime is not installed, lacks a provider, or refuses the model; one line.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise TargetError(f"onnxruntime cannot be imported ({error}); pip install onnxruntime") from error
    names = {p if isinstance(p, str) else p[0] for p in providers}
    absent = sorted(names - set(onnxruntime.get_available_providers()))
    if absent:
        raise TargetError(f"this onnxruntime has no {', '.join(absent)}; it has {', '.join(onnxruntime.get_available_providers())}")
    source, keep = loadable(model)
    try:
        return OrtSession(inference(source, settings(threads, optimize=optimize, providers=providers, spinning=spinning)), keep)
    except Exception as error:
        what = f"{os.fspath(source)}" if isinstance(source, str) else "the model"
        raise TargetError(f"onnxruntime cannot load {what}: {one_line(error)}") from error


def settings(
    threads: int = 1,
    *,
    optimize: bool = True,
    providers: Sequence[str | tuple[str, Mapping[str, str]]] = ("CPUExecutionProvider",),
    spinning: bool = False,
) -> Settings:
    """What `session` opens a model with, for those who open it in another process: `run.guarded`."""
    return Settings(threads, "all" if optimize else "off", providers, {"session.intra_op.allow_spinning": str(int(spinning))})


def loadable(model: Any) -> tuple[str | bytes, object]:
    """What InferenceSession takes, and what must live as long as the session does."""
    if isinstance(model, bytes):
        return model, None
    if isinstance(model, (str, os.PathLike)):
        return saved(model), None
    if not isinstance(model, ir.Model):
        if model.ByteSize() <= proto_limit():
            return model.SerializeToString(), None
        model = graph_of(model)
    if fits(model):
        return to_bytes(model), None
    folder = tempfile.TemporaryDirectory(prefix="graphopt-")
    path = Path(folder.name, "model.onnx")
    write(model, path)
    return str(path), folder


def _port(described: Any) -> Port:
    kind = str(described.type)
    inner = kind[len("tensor(") : -1] if kind.startswith("tensor(") else ""
    return Port(described.name, np.dtype(_DTYPES[inner]) if inner in _DTYPES else None, tuple(described.shape or ()))
