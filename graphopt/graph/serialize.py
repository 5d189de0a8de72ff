"""A graph as bytes: the one place that knows how much a protobuf message can hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir

from graphopt.core.errors import SaveError, TargetError
from graphopt.graph.questions import nbytes

_HEADROOM = 2**27  # the nodes and the shapes beside the weights


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


def _initializers(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _initializers(inner)


PROTOBUF_LIMIT = 2**31 - 1  # bytes that one protobuf message can have


def serialize(proto: onnx.ModelProto) -> bytes:
    """The one place where a model becomes bytes.

    Raises:
        SaveError: it is larger than protobuf allows.
    """
    size = proto.ByteSize()
    if size > PROTOBUF_LIMIT:
        raise SaveError(f"the model has {size} bytes, and one protobuf message at most {PROTOBUF_LIMIT}; save it with external data")
    data: bytes = proto.SerializeToString(deterministic=True)
    return data


def fits(model: ir.Model) -> bool:
    """True if the model with its weights can be one protobuf message."""
    return nbytes(model) <= PROTOBUF_LIMIT * 0.95
