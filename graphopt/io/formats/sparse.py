"""Sparse tensors of a file, read as dense ones: runtimes do the same."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx
from onnx import numpy_helper

from graphopt.core.errors import LoadError
from graphopt.graph.serialize import proto_limit


def densified(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model without sparse tensors: `proto` itself if it has none, else a copy.

    Raises:
        LoadError: indices that do not fit, or a tensor that would be too large as a dense one.
    """
    if not any(
        (isinstance(g, onnx.GraphProto) and g.sparse_initializer) or any(a.HasField("sparse_tensor") for n in g.node for a in n.attribute)
        for g in _graphs(proto)
    ):
        return proto
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for graph in _graphs(copy):
        if isinstance(graph, onnx.GraphProto):
            graph.initializer.extend(map(_dense, graph.sparse_initializer))
            graph.ClearField("sparse_initializer")
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("sparse_tensor") and node.op_type == "Constant":
                    attribute.t.CopyFrom(_dense(attribute.sparse_tensor))
                    attribute.name, attribute.type = "value", onnx.AttributeProto.TENSOR
                    attribute.ClearField("sparse_tensor")
    return copy


def _graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """Every graph of a model, and its functions, which have nodes as well."""
    todo: list[onnx.GraphProto] = [proto.graph, *proto.functions]
    while todo:
        graph = todo.pop()
        yield graph
        for attribute in (a for node in graph.node for a in node.attribute):
            todo += [attribute.g] if attribute.HasField("g") else attribute.graphs


def _dense(sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    """Indices count the elements ([n]), or the places on each axis ([n, rank])."""
    name, dims = sparse.values.name, list(sparse.dims)
    values = numpy_helper.to_array(sparse.values)
    if min(dims, default=1) < 0 or math.prod(dims) * values.itemsize > proto_limit():
        raise LoadError(f"the sparse tensor `{name}` of shape {dims} is too large as a dense one; store what is needed of it")
    indices = numpy_helper.to_array(sparse.indices)
    try:
        places = tuple(indices.T) if indices.ndim == 2 else np.unravel_index(indices, dims)
        dense = np.zeros(dims, values.dtype)
        if len(places) != len(dims) or (indices.size and indices.min() < 0):
            raise ValueError("they count from the front, on every axis")
        dense[places] = values
    except (ValueError, IndexError) as error:
        raise LoadError(f"the indices of the sparse tensor `{name}` do not fit its shape {dims}: {error}; export it again") from None
    return numpy_helper.from_array(dense, name)
