"""Where the weights of an attention stand, and what a change of them is written with: a Softmax with its product, or the operator Attention."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from graphopt.analysis.attention import AttentionFacts, Attentions
from graphopt.core.contract import Context
from graphopt.graph.attention_node import AttentionNode
from graphopt.graph.questions import producer, rank, same_dim, static_dim
from graphopt.rewrite.attention import joined, repeated, split, weights, why_not_unfused
from graphopt.rewrite.builder import Builder

_HARDLY = -1e3  # what a mask adds to hidden scores is below: exp of it is 0 beside any ordinary score


@dataclasses.dataclass(frozen=True)
class Mask:
    """`value` in the axes of the scores: true where a key may be read ("keep"), or may not ("drop"), or, times `factor`, added to the scores."""

    value: ir.Value
    kind: Literal["keep", "drop", "add"]
    factor: float = 1.0

    def visible(self, op: Builder) -> ir.Value:
        if self.kind == "keep":
            return self.value
        if self.kind == "drop":
            return op.Not(self.value)
        dtype = (self.value.dtype or ir.DataType.FLOAT).numpy()
        summand = self.value if self.factor == 1.0 else op.Mul(self.value, op.const(np.array(self.factor, dtype), "factor"))
        return op.Greater(summand, op.const(np.array(_HARDLY, dtype), "hardly"))


@dataclasses.dataclass(frozen=True)
class Place(ABC):
    """Where the weights of one attention stand.

    Attributes:
        anchor: the Softmax or Attention node.
        node: what a change replaces: the product with the values, or the Attention node.
        by_head: whether the weights have an axis for the heads: [batch, heads, rows, keys].
        operands: query and key.
    """

    anchor: ir.Node
    node: ir.Node
    heads: int
    by_head: bool
    causal: bool
    operands: tuple[ir.Value | None, ir.Value | None]

    @abstractmethod
    def weights(self, op: Builder) -> ir.Value:
        """The weights of the softmax."""

    @abstractmethod
    def result(self, op: Builder, p: ir.Value) -> ir.Value:
        """What `node` gives with the weights p."""

    @abstractmethod
    def sizes(self, op: Builder) -> tuple[ir.Value, ir.Value]:
        """The numbers of rows and keys, each [1]."""

    @abstractmethod
    def masks(self) -> Sequence[Mask] | str:
        """What hides keys, or why that cannot be told head by head."""


@dataclasses.dataclass(frozen=True)
class Spelled(Place):
    """Softmax, and the MatMul with the values."""

    facts: AttentionFacts
    probabilities: ir.Value

    def weights(self, op: Builder) -> ir.Value:
        return self.probabilities

    def result(self, op: Builder, p: ir.Value) -> ir.Value:
        return op.MatMul(p, self.node.inputs[1])

    def sizes(self, op: Builder) -> tuple[ir.Value, ir.Value]:
        query, _ = self.operands
        return _size(op, self.node, query, -2), _size(op, self.node, self.node.inputs[1], -2)

    def masks(self) -> Sequence[Mask] | str:
        out, v = self.node.outputs[0].shape, self.node.inputs[1]
        if not self.by_head:
            return "its weights have no axis for the heads; put threshold-attention behind fuse-attention"
        if v is None or v.shape is None or out is None or len(v.shape) != 4 or not all(map(same_dim, v.shape[:2], out[:2])):
            return "its values have no axes for batch and heads; put threshold-attention behind fuse-attention"
        if self.facts.masked_before_cap:
            return "its mask is added before the soft cap"
        for term in self.facts.terms:
            size = rank(term.value)
            if size is None or size > 4 or (size > 2 and (term.scores_rank != 4 or term.scores_heads != self.heads)):
                return f"its mask `{term.value.name}` is added to scores of other axes; put threshold-attention behind fuse-attention"
        return [Mask(_narrow(t.value), t.kind, t.factor) for t in self.facts.terms]


@dataclasses.dataclass(frozen=True)
class Operator(Place):
    """A standard Attention node."""

    attention: AttentionNode

    def weights(self, op: Builder) -> ir.Value:
        return weights(op, self.attention)

    def result(self, op: Builder, p: ir.Value) -> ir.Value:
        a = self.attention
        return joined(op, a, op.MatMul(p, repeated(op, a, split(op, a, a.v, a.kv_heads))))

    def sizes(self, op: Builder) -> tuple[ir.Value, ir.Value]:
        return _size(op, self.node, self.attention.q, -2), _size(op, self.node, self.attention.v, -2)

    def masks(self) -> Sequence[Mask] | str:
        mask = self.attention.mask
        if self.attention.v.shape is None:
            return "the shape of its values is not known"
        return [] if mask is None else [Mask(_narrow(mask), "keep" if mask.dtype == ir.DataType.BOOL else "add")]


def place_of(node: ir.Node, ctx: Context) -> Place | str | None:
    """Where the weights of a Softmax or Attention node can be changed; else the reason, or None for those that were cut before."""
    a = AttentionNode.of(node)
    if a is not None:
        return _operator(a)
    facts = ctx.get(Attentions())[node]
    if isinstance(facts, str):
        return None if _is_cut(node.outputs[0]) else facts
    product, p = producer(facts.output, "MatMul"), facts.probabilities
    if product is None or p is None or product.inputs[0] is not p or p.dtype != ir.DataType.FLOAT:
        return "its weights do not meet the values in a MatMul of FLOAT"
    by_head = rank(p) == 4 and static_dim(p, 1) == facts.heads
    query, key = facts.nodes[0].inputs
    return Spelled(facts.anchor, product, facts.heads, by_head, False, (query, key), facts, p)


def _operator(a: AttentionNode) -> Operator | str:
    if a.cached:
        return "it keeps a cache"
    if a.shown is not None:
        return "its weights or scores are an output"
    dtype = a.result.dtype
    if dtype != ir.DataType.FLOAT:
        return f"it computes in {'an unknown type' if dtype is None else dtype.name}; put threshold-attention before to-half"
    return why_not_unfused(a) or Operator(a.node, a.node, a.heads, True, a.causal, (a.q, a.k), a)


def _is_cut(p: ir.Value) -> bool:
    """threshold-attention was here before; rows that see no key may have been set to zero in between."""
    readers = {use.node.op_type: use.node for use in p.uses()}
    if readers.keys() in ({"Where"}, {"IsNaN", "Where"}):
        return _is_cut(readers["Where"].outputs[0])
    return {"GreaterOrEqual", "Where", "ReduceMax"} <= readers.keys()


def _narrow(mask: ir.Value) -> ir.Value:
    """A mask before it was repeated for all rows, which may ask a query for their number."""
    node = producer(mask, "Expand")
    return mask if node is None or node.inputs[0] is None else _narrow(node.inputs[0])


def _size(op: Builder, node: ir.Node, value: ir.Value | None, axis: int) -> ir.Value:
    """The size of one axis, [1]: a number, or asked of an input of the graph, so that `value` need not be computed for it."""
    assert value is not None
    assert value.shape is not None
    axis %= len(value.shape)
    dim, graph = value.shape[axis], node.graph
    if isinstance(dim, int):
        return op.const(np.array([dim], np.int64), "size")
    inputs = graph.inputs if isinstance(graph, ir.Graph) else ()
    known = next(((v, k) for v in inputs for k, other in enumerate(v.shape or ()) if same_dim(dim, other)), None)
    source, place = known or (value, axis)
    return op.shared(("size", source, place), lambda: op.Shape(source, start=place, end=place + 1))
