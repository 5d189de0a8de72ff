"""The repeated kinds of subgraph that a target may spell in several ways: each is an analysis that finds all pieces of its kind.

A piece holds the nodes that a spelling may replace, and the anchor that its pass looks at. Pieces of one kind do not overlap.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import onnx_ir as ir

from graphopt.analysis.linear import Embedding, Linear, Linears, StoredOperands
from graphopt.analysis.stream import Residuals
from graphopt.core.contract import Analysis, Context, Piece
from graphopt.graph.attention_node import AttentionNode
from graphopt.graph.questions import all_nodes, consumers, graphs, is_constant, producer, used_once

_ELEMENTWISE = ("Gelu", "Relu", "Sigmoid", "Tanh", "Elu", "Softplus", "HardSwish", "HardSigmoid", "Mish", "LeakyRelu", "Identity", "Mul")


@dataclasses.dataclass(frozen=True)
class ResidualNorm(Analysis[tuple[Piece, ...]]):
    """A sum and the LayerNormalization or RMSNormalization that reads it."""

    def compute(self, model: ir.Model, ctx: Context) -> tuple[Piece, ...]:
        return _pieces(model, ((*r.adds, r.norm) for r in ctx.get(Residuals())))


@dataclasses.dataclass(frozen=True)
class Activation(Analysis[tuple[Piece, ...]]):
    """A Gelu, with the bias that is added in front of it."""

    def compute(self, model: ir.Model, ctx: Context) -> tuple[Piece, ...]:
        return _pieces(model, ((*_bias_before(n), n) for n in all_nodes(model) if n.domain == "" and n.op_type == "Gelu"))


@dataclasses.dataclass(frozen=True)
class AttentionCore(Analysis[tuple[Piece, ...]]):
    """A standard Attention node; its mask is one of its inputs, so that the kind of mask is part of the piece."""

    def compute(self, model: ir.Model, ctx: Context) -> tuple[Piece, ...]:
        return _pieces(model, ((n,) for n in all_nodes(model) if AttentionNode.of(n) is not None))


@dataclasses.dataclass(frozen=True)
class Projections(Analysis[tuple[Piece, ...]]):
    """Float projections of one input that one Attention, or one gating product, reads; with that reader."""

    def compute(self, model: ir.Model, ctx: Context) -> tuple[Piece, ...]:
        made_by = {x.output: x for x in ctx.get(Linears()) if not x.quantized}
        anchors = (n for n in all_nodes(model) if n.domain == "" and n.op_type in ("Attention", "Mul"))
        return _pieces(model, (found for n in anchors if (found := _projected(n, made_by)) is not None))


@dataclasses.dataclass(frozen=True)
class IntegerMatmul(Analysis[tuple[Piece, ...]]):
    """Every multiply of int8 weights that reads one activation, quantized at run time or on a fixed grid; with the quantization and the biases."""

    def compute(self, model: ir.Model, ctx: Context) -> tuple[Piece, ...]:
        operands = ctx.get(StoredOperands())
        made = [n for n in all_nodes(model) if n.domain == "" and n.op_type in ("DynamicQuantizeLinear", "QuantizeLinear")]
        return _pieces(model, (found for n in made if (found := _integer(n, operands)) is not None))


@dataclasses.dataclass(frozen=True)
class BlockedMatmul(Analysis[tuple[Piece, ...]]):
    """A multiply of a float activation with a weight that is stored as integers."""

    def compute(self, model: ir.Model, ctx: Context) -> tuple[Piece, ...]:
        linears = (x for x in ctx.get(Linears()) if x.quantized and producer(x.x, "DequantizeLinear") is None)
        return _pieces(model, ((*x.path, x.node) for x in linears))


@dataclasses.dataclass(frozen=True)
class Lookup(Analysis[tuple[Piece, ...]]):
    """Rows gathered from a stored table of 8-bit codes."""

    def compute(self, model: ir.Model, ctx: Context) -> tuple[Piece, ...]:
        found = ctx.get(StoredOperands()).values()
        return _pieces(model, ((*e.path, e.node) for e in found if isinstance(e, Embedding) and e.quantized))


def _pieces(model: ir.Model, found: Iterable[Iterable[ir.Node]]) -> tuple[Piece, ...]:
    """In topological order; a piece that crosses graphs, or shares a node with an earlier one, is left out."""
    place = {node: k for graph in graphs(model) for k, node in enumerate(graph)}
    taken: set[ir.Node] = set()
    pieces = []
    for nodes in found:
        ordered = tuple(sorted(dict.fromkeys(nodes), key=place.__getitem__))
        if len({n.graph for n in ordered}) == 1 and taken.isdisjoint(ordered):
            taken.update(ordered)
            pieces.append(Piece(ordered))
    return tuple(pieces)


def _bias_before(node: ir.Node) -> Iterator[ir.Node]:
    value = node.inputs[0]
    add = producer(value, "Add")
    if value is not None and add is not None and used_once(value) and any(is_constant(v) for v in add.inputs):
        yield add


def _projected(anchor: ir.Node, made_by: dict[ir.Value, Linear]) -> list[ir.Node] | None:
    nodes, linears = [anchor], list[Linear]()

    def walk(value: ir.Value | None, depth: int) -> None:
        if value is None:
            return
        if value in made_by:
            linears.append(made_by[value])
            return
        node = producer(value, *_ELEMENTWISE) if anchor.op_type == "Mul" and depth else None
        if node is not None and node not in nodes and any(_reaches(v, made_by, depth) for v in node.inputs):
            nodes.append(node)
            for v in node.inputs:
                walk(v, depth - 1)

    for value in anchor.inputs[:3]:
        walk(value, 4)
    found = list({x.output: x for x in linears}.values())
    if len(found) < 2 or len({x.x for x in found}) > 1:
        return None
    return [*nodes, *(n for x in found for n in (*x.path, x.node, x.bias_node) if n is not None)]


def _reaches(value: ir.Value | None, made_by: dict[ir.Value, Linear], depth: int) -> bool:
    if value is None or value in made_by or depth == 0:
        return value in made_by
    node = producer(value, *_ELEMENTWISE)
    return node is not None and any(_reaches(v, made_by, depth - 1) for v in node.inputs)


def _integer(quantize: ir.Node, operands: object) -> list[ir.Node] | None:
    assert hasattr(operands, "get")
    nodes = [quantize]
    for decode in consumers(quantize.outputs[0]):
        if decode.op_type != "DequantizeLinear" or decode.domain != "":
            return None
        nodes.append(decode)
        for reader in consumers(decode.outputs[0]):
            linear = operands.get(reader)
            if not isinstance(linear, Linear) or linear.grid is None:
                return None
            nodes += [n for n in (*linear.path, linear.node, linear.bias_node) if n is not None]
    return nodes if len(nodes) > 2 else None
