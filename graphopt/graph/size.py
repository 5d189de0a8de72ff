"""How large a model is: parameters, bytes, and floating-point operations."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import onnx_ir as ir

from graphopt.core.errors import LoadError
from graphopt.graph import questions as graph
from graphopt.graph.attention_node import AttentionNode
from graphopt.graph.dims import Bindings, size_of
from graphopt.graph.questions import all_nodes

if TYPE_CHECKING:
    import onnx


def size(path: str | os.PathLike[str]) -> int:
    """Bytes of a model on disk with its external data, each file once; of a folder, everything in it.

    Raises:
        LoadError: the file, or one that it refers to, is missing.
    """
    path = Path(path)
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if not path.is_file():
        raise LoadError(f"{path} does not exist")
    files = {path.resolve()}
    if path.suffix == ".onnx":
        from graphopt.graph.serialize import read

        try:
            proto = read(path, weights=False)
        except Exception as error:
            raise LoadError(f"{path} is not an ONNX file: {error}") from error
        files |= {(path.parent / place).resolve() for place in _external(proto.graph)}
    absent = sorted(str(file) for file in files if not file.is_file())
    if absent:
        raise LoadError(f"{path} refers to {', '.join(absent)}, which does not exist; put it beside the model")
    return sum(file.stat().st_size for file in files)


def _external(graph: onnx.GraphProto) -> Iterator[str]:
    tensors = list(graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            tensors += [attribute.t, *attribute.tensors]
            for inner in (attribute.g, *attribute.graphs):
                yield from _external(inner)
    for tensor in tensors:
        yield from (entry.value for entry in tensor.external_data if entry.key == "location")


class Flops(NamedTuple):
    """Floating-point (or integer) operations of one run, and the nodes whose shapes are not known at these sizes: not counted."""

    total: int
    unknown: tuple[str, ...]


def flops(model: ir.Model, bindings: Bindings) -> Flops:
    """Operations of MatMul, Gemm, Conv and Attention in standard ONNX, two for a multiply-add; a loop body counts once.

    Args:
        bindings: a size for every symbol of the inputs.
    """
    total, unknown = 0, []
    for node in all_nodes(model):
        count = node_flops(node, bindings)
        total += count or 0
        if count is None:
            unknown.append(node.name or node.op_type)
    return Flops(total, tuple(unknown))


def node_flops(node: ir.Node, bindings: Bindings) -> int | None:
    """Operations of one node as `flops` counts them; None where its shapes are not known at these sizes."""
    count = _COUNTS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    try:
        return 0 if count is None else count(node, bindings)
    except _UnknownShape:
        return None


class _UnknownShape(Exception):
    pass


def _shape(value: ir.Value | None, bindings: Bindings) -> tuple[int, ...]:
    sizes = [size_of(dim, bindings) for dim in value.shape] if value is not None and value.shape is not None else [None]
    if None in sizes:
        raise _UnknownShape
    return tuple(s for s in sizes if s is not None)


def _matmul(node: ir.Node, bindings: Bindings) -> int:
    inner = _shape(node.inputs[0], bindings)[-1]
    return 2 * inner * math.prod(_shape(node.outputs[0], bindings))


def _gemm(node: ir.Node, bindings: Bindings) -> int:
    transposed = "transA" in node.attributes and node.attributes["transA"].as_int()
    inner = _shape(node.inputs[0], bindings)[0 if transposed else 1]
    return 2 * inner * math.prod(_shape(node.outputs[0], bindings))


def _conv(node: ir.Node, bindings: Bindings) -> int:
    kernel = _shape(node.inputs[1], bindings)
    places = node.inputs[0] if node.op_type == "ConvTranspose" else node.outputs[0]
    return 2 * math.prod(kernel[1:]) * math.prod(_shape(places, bindings))


def _attention(node: ir.Node, bindings: Bindings) -> int:
    """Q K^T and P V, over past and present keys; [B,S,heads*dim] or [B,heads,S,dim]."""
    a = AttentionNode.of(node)
    if a is None:
        raise _UnknownShape
    query, key, value = (_shape(v, bindings) for v in a.operands)
    keys = key[-2] + (_shape(a.past[0], bindings)[-2] if a.past[0] is not None else 0)
    if not a.packed:
        return 2 * math.prod(query[:3]) * keys * (query[3] + value[3])
    return 2 * query[0] * query[1] * keys * (query[2] + value[2] // a.kv_heads * a.heads)


_COUNTS: Mapping[str, Callable[[ir.Node, Bindings], int]] = {
    "MatMul": _matmul, "MatMulInteger": _matmul, "QLinearMatMul": _matmul, "Gemm": _gemm, "Attention": _attention,
    "Conv": _conv, "ConvInteger": _conv, "QLinearConv": _conv, "ConvTranspose": _conv,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Size:
    """How large a model is: nodes (subgraphs counted), bytes as a file with its weights, stored weight elements, opset and IR version.

    `metadata`: bytes of the keys and texts that an exporter wrote to graphs, nodes and values (`strip-metadata` removes them).
    """

    nodes: int
    bytes: int
    parameters: int
    opset: int
    ir_version: int
    metadata: int

    @classmethod
    def of(cls, model: ir.Model, nbytes: int) -> Size:
        nodes = sum(1 for _ in graph.all_nodes(model))
        opset, metadata = model.opset_imports.get("", 0), graph.metadata_bytes(model)
        return cls(nodes, nbytes, graph.parameters(model), opset, model.ir_version, metadata)
