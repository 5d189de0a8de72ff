"""A graph as bytes and back: the one place that knows how much a protobuf message can hold, and where in a file the weights lie."""

from __future__ import annotations

import mmap
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from graphopt.core.errors import GraphoptError, SaveError
from graphopt.graph.questions import ISLAND, closed_nodes, nbytes

_LIMIT = 2**31 - 1  # bytes that one protobuf message can have
_HEADROOM = 2**27  # more than the nodes and shapes of any graph take: with so much space beside the weights, nothing is counted
_HEAVY = 1024  # bytes; weights above are counted, not copied
_STRANGE = "graphopt.strange"  # a domain that ONNX has no operator of, and so no opinion
DECLARED = "graphopt.declared"  # value.meta: the shape that the model's author wrote at an input or output
_GRAPH, _INITIALIZER = 7, 5  # the field of ModelProto, and that of GraphProto
_TYPE = "graphopt.type"  # meta of a value of the interface: the TypeProto of a map, which onnx_ir has no type for
_FIXED = {1: 8, 5: 4}  # wire type -> bytes


# ---- to bytes -------------------------------------------------------------------------------------------------------------------------


def proto_limit() -> int:
    """Bytes that one message may have: 2 GiB, or what the environment variable GRAPHOPT_PROTO_LIMIT says."""
    text = os.environ.get("GRAPHOPT_PROTO_LIMIT", str(_LIMIT))
    if not text.isdecimal():
        raise GraphoptError(f"GRAPHOPT_PROTO_LIMIT must be a number of bytes, found {text!r}")
    return int(text)


def fits(model: ir.Model) -> bool:
    """True if the model, with its weights inside, can be one protobuf message."""
    weights, limit = nbytes(model), proto_limit()
    return weights + _HEADROOM <= limit or (weights <= limit and model_bytes(model) <= limit)


def model_bytes(model: ir.Model) -> int:
    """Bytes of the model as one file with its weights inside, which are counted and neither read nor copied."""
    copy, heavy = model.clone(), 0
    for graph in copy.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.nbytes > _HEAVY and tensor.dtype != ir.DataType.STRING:
                value.const_value = ir.LazyTensor(_nothing, dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name)
                without = ir.to_proto(value.const_value).ByteSize()
                heavy += _field(_with_data(tensor, without)) - _field(without)
    proto = structure(copy)
    rest = proto.graph.ByteSize()
    return int(proto.ByteSize()) - _field(rest) + _field(rest + heavy)


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """The model as one ModelProto with every weight inside it, also those that lie in external files. The model is not changed.

    Raises:
        SaveError: it is larger than one message can be.
    """
    if not fits(model):
        raise SaveError(f"the model has {model_bytes(model)} bytes, and one protobuf message at most {proto_limit()}; save it with external data")
    proto = structure(model)
    join_islands(proto)
    tensors = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
    outside = {(t.name, str(t.location), t.offset or 0): t for t in tensors if isinstance(t, ir.ExternalTensor)}
    for stored in _initializers(proto.graph) if outside else ():
        if stored.data_location != onnx.TensorProto.EXTERNAL:
            continue
        place = {entry.key: entry.value for entry in stored.external_data}
        tensor = outside[stored.name, place["location"], int(place.get("offset", 0))]
        stored.ClearField("external_data")
        stored.ClearField("data_location")
        stored.raw_data = tensor.tobytes()
    return proto


def structure(model: ir.Model) -> onnx.ModelProto:
    """The model as it is, with references to weights that lie outside; inputs and outputs that are maps have their type again."""
    proto: onnx.ModelProto = ir.to_proto(model)
    _type_maps(model, proto.graph)
    return proto


def _type_maps(model: ir.Model, graph: onnx.GraphProto) -> None:
    maps = {str(v.name): v.meta[_TYPE] for v in (*model.graph.inputs, *model.graph.outputs) if _TYPE in v.meta}
    for described in (*graph.input, *graph.output) if maps else ():
        if described.name in maps:
            described.type.ParseFromString(maps[described.name])


def to_bytes(model: ir.Model) -> bytes:
    """The file of `to_proto`; equal models give equal bytes."""
    data: bytes = to_proto(model).SerializeToString(deterministic=True)
    return data


def join_islands(proto: onnx.ModelProto) -> None:
    """Write nodes that have no form at the working opset as what they are, in place; the file has their opset, where the others mean the same."""
    versions = {o.domain: o.version for o in proto.opset_import}
    if ISLAND not in versions:
        return
    kept = [o for o in proto.opset_import if o.domain != ISLAND]
    del proto.opset_import[:]
    proto.opset_import.extend(kept)
    for entry in proto.opset_import:
        entry.version = versions[ISLAND] if entry.domain == "" else entry.version
    todo = [proto.graph]
    while todo:
        for node in todo.pop().node:
            node.domain = "" if node.domain == ISLAND else node.domain
            for attribute in node.attribute:
                todo += [attribute.g] if attribute.HasField("g") else attribute.graphs


def light(model: ir.Model) -> onnx.ModelProto:
    """What ONNX itself can judge of a model: its graph without the heavy weights, which are inputs, and without what the file only claims.

    Closed bodies are left out, and so are shapes of inputs and outputs that are not known, as the checker wants one there. What only we know of
    a value, behind an operator that ONNX does not know, is stated. Nothing is copied but what is small.
    """
    graph = onnx.GraphProto(name=model.graph.name or "graph")
    graph.input.extend(ir.serde.serialize_value(v) for v in model.graph.inputs)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes <= _HEAVY:
            stored = ir.serde.serialize_tensor(inside(tensor) if isinstance(tensor, ir.ExternalTensor) else tensor)
            stored.name = str(value.name)
            graph.initializer.append(stored)
        elif tensor is not None and not value.is_graph_input():
            graph.input.append(ir.serde.serialize_value(value))
    graph.node.extend(map(ir.serde.serialize_node, model.graph))
    graph.value_info.extend(ir.serde.serialize_value(v) for n in model.graph for v in n.outputs if v.type is not None and not v.is_graph_output())
    _forget(graph, {str(n.name) for n in closed_nodes(model)})
    graph.output.extend(info for v in model.graph.outputs if (info := _declared(v)) is not None)
    _give_shapeless(graph)
    _type_maps(model, graph)
    imports = [onnx.helper.make_opsetid(domain, version) for domain, version in {**model.opset_imports, _STRANGE: 1}.items()]
    proto = onnx.ModelProto(ir_version=model.ir_version, graph=graph, opset_import=imports)
    proto.functions.extend(map(ir.serde.serialize_function, model.functions.values()))
    join_islands(proto)
    return proto


def _forget(graph: onnx.GraphProto, closed: Collection[str]) -> None:
    """Take closed bodies out, and the shapes of what operators make that ONNX knows itself."""
    strange = set()
    for node in graph.node:
        if node.name in closed:
            kept = [a for a in node.attribute if not (a.HasField("g") or a.graphs)]
            del node.attribute[:]
            node.attribute.extend(kept)
            node.domain = _STRANGE
        if node.domain not in ("", "ai.onnx", ISLAND):
            strange.update(node.output)
        if node.op_type == "Attention":  # its rule reads 0 from a size that it does not know
            strange.update(node.input)
        for attribute in node.attribute:
            for body in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                _forget(body, closed)
    for info in graph.value_info:
        if info.name not in strange and info.type.HasField("tensor_type"):
            info.type.tensor_type.ClearField("shape")


def _declared(value: ir.Value) -> onnx.ValueInfoProto | None:
    """An output with the shape that its author declared, or the one that is known; None where there is none."""
    info: onnx.ValueInfoProto = ir.serde.serialize_value(value)
    declared: ir.Shape | None = value.meta.get(DECLARED)
    if declared is not None and info.type.HasField("tensor_type"):
        named = ir.Value(name=value.name, type=value.type, shape=declared)
        info = ir.serde.serialize_value(named)
    return info if value.shape is not None or declared is not None else None


def _give_shapeless(graph: onnx.GraphProto) -> None:
    """An input of which nothing but the type is known comes out of an operator that nobody knows."""
    loose = [i for i in graph.input if i.type.WhichOneof("value") in ("tensor_type", None) and not i.type.tensor_type.HasField("shape")]
    if not loose:
        return
    kept = [i for i in graph.input if i not in loose]
    nodes = [onnx.NodeProto(op_type="Input", domain=_STRANGE, output=[i.name]) for i in loose]
    rest = list(graph.node)
    del graph.input[:], graph.node[:]
    graph.input.extend(kept)
    graph.node.extend([*nodes, *rest])
    graph.value_info.extend(i for i in loose if i.type.HasField("tensor_type"))


def inside(tensor: ir.ExternalTensor) -> ir.Tensor[Any]:
    """The same with its data in memory."""
    return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name)


def write(model: ir.Model, path: Path) -> None:
    """Write for a session or a dump: one file where it fits into a protobuf, else with its weights in `NAME.data` beside it."""
    if fits(model):
        path.write_bytes(to_bytes(model))
    else:
        ir.save(model, path, external_data=path.name + ".data")


def _initializers(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _initializers(inner)


def _nothing() -> ir.TensorProtocol:
    return ir.tensor([], dtype=ir.DataType.UINT8)


def _with_data(tensor: ir.TensorProtocol, without: int) -> int:
    """Bytes of the message of a tensor; `without`: with empty data, which are a tag and a length already."""
    if isinstance(tensor, ir.TensorProtoTensor):
        return int(tensor.raw.ByteSize())  # written as it came
    return without - 2 + _field(tensor.nbytes)


def _field(size: int) -> int:
    """Bytes of a field that holds so many: a tag, the length in groups of 7 bits, the contents."""
    return 1 + max(1, -(-size.bit_length() // 7)) + size


# ---- and back -------------------------------------------------------------------------------------------------------------------------


def graph_of(proto: onnx.ModelProto) -> ir.Model:
    """The graph of a ModelProto, which is not changed. A map has no type and no shape in it; `structure` gives its type back.

    Raises:
        Exception: what the deserializer raises, of any kind.
    """
    maps = {d.name: d.type.SerializeToString() for d in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info) if _holds_map(d.type)}
    if not maps:
        return ir.from_proto(proto)
    plain = onnx.ModelProto()
    plain.CopyFrom(proto)
    for described in (*plain.graph.input, *plain.graph.output, *plain.graph.value_info):
        if described.name in maps:
            described.ClearField("type")
    model = ir.from_proto(plain)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name in maps:
            value.meta[_TYPE] = maps[value.name]
    return model


def _holds_map(kind: onnx.TypeProto) -> bool:
    if kind.HasField("sequence_type"):
        return _holds_map(kind.sequence_type.elem_type)
    return _holds_map(kind.optional_type.elem_type) if kind.HasField("optional_type") else kind.HasField("map_type")


def read(path: Path, *, weights: bool = True) -> onnx.ModelProto:
    """The ModelProto of a file, of which no second copy is held; `weights=False` leaves the large ones that lie inside away.

    Raises:
        OSError: the file cannot be read.
        Exception: it is no model; the kind of error is that of the protobuf library.
    """
    proto = onnx.ModelProto()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        outer, inner = bytearray(), bytearray()
        for number, start, begin, end in _fields(data, 0, len(data)):
            if number != _GRAPH:
                outer += data[start:end]
                continue
            for kind, at, first, last in _fields(data, begin, end):
                if kind != _INITIALIZER:
                    inner += data[at:last]
                elif weights or last - first <= _HEAVY:
                    proto.graph.initializer.add().ParseFromString(data[first:last])
        proto.MergeFromString(bytes(outer))
        if inner:
            proto.graph.MergeFromString(bytes(inner))
    return proto


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(field number, where it starts, where its contents begin, where they end) of a message in the wire format of protobuf."""
    while at < end:
        start = at
        key, at = _varint(data, at, end)
        number, kind = key >> 3, key & 7
        begin = at
        if kind == 0:
            _, at = _varint(data, at, end)
        elif kind == 2:
            size, begin = _varint(data, at, end)
            at = begin + size
        else:
            at += _FIXED[kind]
        if at > end:
            raise ValueError(f"a field of {at - begin} bytes starts {end - begin} bytes before the end")
        yield number, start, begin, at


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end:
        byte = data[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("it ends within a number")
