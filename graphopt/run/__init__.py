"""Execute a graph: `run.ort` (onnxruntime), `run.reference` (the ONNX reference evaluator), `run.torch` (differentiable).

This file holds what they share. Each engine is imported by name, so that none costs anything before it is used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphopt.core import Array
from graphopt.errors import TargetError
from graphopt.graph import nbytes

if TYPE_CHECKING:
    import onnx

Feeds = Mapping[str, Array]
Dim = int | str | None

PROTOBUF_LIMIT = 2**31 - 1
_HEADROOM = 2**27  # the nodes and the shapes beside the weights


@dataclasses.dataclass(frozen=True)
class Port:
    """One input or output of a session. `dtype` is None where it is no tensor, or a type that numpy lacks."""

    name: str
    dtype: np.dtype[Any] | None
    shape: tuple[Dim, ...]


def fits_protobuf(model: ir.Model) -> bool:
    """True if the model, with its weights inside, stays below the limit of 2 GiB."""
    return nbytes(model) + _HEADROOM < PROTOBUF_LIMIT


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """The model as one ModelProto with every weight inside it, also those that lie in external files. The model is not changed."""
    import onnx

    if not fits_protobuf(model):
        raise TargetError(f"the weights, {nbytes(model) / 1e9:.1f} GB, do not fit into one protobuf message; use a file with external data")
    proto: onnx.ModelProto = ir.to_proto(model)
    tensors = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
    outside = {(t.name, str(t.location), t.offset or 0): t for t in tensors if isinstance(t, ir.ExternalTensor)}
    for stored in _initializers(proto.graph) if outside else ():
        if stored.data_location != onnx.TensorProto.EXTERNAL:
            continue
        place = {entry.key: entry.value for entry in stored.external_data}
        tensor = outside[stored.name, place["location"], int(place.get("offset", 0))]
        del stored.external_data[:]
        stored.data_location = onnx.TensorProto.DEFAULT
        stored.raw_data = tensor.tobytes()
    return proto


def write(model: ir.Model, path: Path) -> None:
    """Write for a session or a dump: one file where it fits into a protobuf, else with its weights in `NAME.data` beside it."""
    if fits_protobuf(model):
        path.write_bytes(to_proto(model).SerializeToString())
    else:
        ir.save(model, path, external_data=path.name + ".data")


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


def _initializers(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _initializers(inner)
