"""A model file without its weights: what looks trained is made up, with the same shapes, types and statistics. It loads, and tells no secret."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx

from graphopt.core.contract import Array

_KEPT = 64  # elements up to which a tensor stays: sizes, axes, scales, epsilons
_FEW = 4  # distinct numbers up to which one stays: masks
_BLOCK = 4099  # made-up numbers, repeated: a file that holds them can be packed small
_INLINE = 2**30  # bytes of tensors above which they are written beside the model


def load(source: Path | onnx.ModelProto, *, weights: bool) -> onnx.ModelProto:
    """The model with made-up weights, or with its own; notes of exporters, which name files of the user, are gone.

    Args:
        source: weights outside of the file are read one by one.

    Raises:
        Exception: it is no model; the kind of error is that of the protobuf library.
    """
    if isinstance(source, Path):
        proto, folder = onnx.load(source, load_external_data=False), str(source.parent)
    else:
        proto, folder = onnx.ModelProto(), ""
        proto.CopyFrom(source)
    for tensor in tensors(proto):
        outside = tensor.data_location == onnx.TensorProto.EXTERNAL
        if outside or not weights:
            _replace(tensor, folder, weights)
    _strip(proto)
    return proto


def write(proto: onnx.ModelProto, path: Path) -> None:
    """One file; a large model's weights stand beside it."""
    size = sum(len(tensor.raw_data) for tensor in tensors(proto))
    onnx.save(proto, path, save_as_external_data=size > _INLINE, location=path.name + ".data")


def tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor: initializers and attributes, of subgraphs and functions too."""
    yield from _in_graph(proto.graph)
    for function in proto.functions:
        yield from _in_nodes(function.node)


def _in_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    yield from _in_nodes(graph.node)


def _in_nodes(nodes: object) -> Iterator[onnx.TensorProto]:
    for node in nodes:  # type: ignore[attr-defined]
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors) if attribute.HasField("t") else attribute.tensors
            for graph in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                yield from _in_graph(graph)


def _replace(tensor: onnx.TensorProto, folder: str, weights: bool) -> None:
    """With its contents inside; made-up ones unless `weights`. Where the contents cannot be read, only shape and type are known."""
    try:
        array: Array | None = onnx.numpy_helper.to_array(tensor, folder)
    except Exception:  # noqa: BLE001 -- data that is not there, or is no such data, may be the very fault; the shape is what is left
        array = None
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return
    if array is None:
        array = np.zeros(tuple(tensor.dims), onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    name, doc = tensor.name, tensor.doc_string
    made = array if weights else made_up(array)
    if made is array and tensor.data_location != onnx.TensorProto.EXTERNAL:
        return
    tensor.CopyFrom(onnx.numpy_helper.from_array(made, name))
    tensor.doc_string = doc


def made_up(array: Array) -> Array:
    """Seeded numbers of the same shape, type, mean and deviation, or in the same range; the array itself where it says how the graph works."""
    if array.size <= _KEPT or array.dtype.kind in "bOSU" or array.dtype == np.int64:
        return array  # sizes, positions, buckets, strings, flags
    flat = array.reshape(-1)
    flat = flat.astype(np.float32) if flat.dtype.kind == "V" else flat  # a type that numpy lacks
    if len(np.unique(flat[:_BLOCK])) <= _FEW and len(np.unique(flat)) <= _FEW:
        return array
    block: Array
    rng, finite = np.random.default_rng(0), flat[np.isfinite(flat)].astype(np.float64)
    if flat.dtype.kind in "iu" or (array.dtype.kind == "V" and bool((finite == finite.round()).all())):
        block = rng.integers(int(finite.min()), int(finite.max()), _BLOCK, endpoint=True)
    else:
        mean, deviation = (float(finite.mean()), float(finite.std())) if finite.size else (0.0, 1.0)
        block = mean + deviation * rng.standard_normal(_BLOCK)
    return np.resize(block.astype(array.dtype), array.shape)


def _strip(proto: onnx.ModelProto) -> None:
    del proto.metadata_props[:]
    proto.doc_string = ""
    _strip_graph(proto.graph)
    for function in proto.functions:
        function.doc_string = ""
        del function.metadata_props[:]
        _strip_nodes(function.node)


def _strip_graph(graph: onnx.GraphProto) -> None:
    for thing in (graph, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        thing.doc_string = ""
        del thing.metadata_props[:]
    _strip_nodes(graph.node)


def _strip_nodes(nodes: object) -> None:
    for node in nodes:  # type: ignore[attr-defined]
        node.doc_string = ""
        del node.metadata_props[:]
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                _strip_graph(graph)
