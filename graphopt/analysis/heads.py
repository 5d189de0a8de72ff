"""What can be removed from a model, piece by piece: the heads of every attention and the neurons of every feed-forward block.

Read off the graph before or after fusion. Blocks are numbered in graph order, attentions and feed-forward blocks apart, from 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable

import numpy as np
import onnx_ir as ir

from graphopt.analysis.attention import AttentionFacts, Attentions
from graphopt.analysis.linear import Linear, Linears
from graphopt.analysis.structure import Structure
from graphopt.core.contract import Analysis, Array, Context
from graphopt.graph.questions import all_nodes, attr, consumers, downstream, producer, static_dim

_LAYOUT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Flatten", "Cast", "Dropout")
_FAR = 200  # nodes between an operand of attention and its projection, at most


@dataclasses.dataclass(frozen=True, eq=False)
class Heads:
    """The heads of one attention.

    Attributes:
        index: its number, as in LAYER:HEAD.
        value: the result of attention, before the output projection; `axis` runs over heads, or over heads * value_dim.
        group: query heads that share one key and value head.
        inside: the values that belong to this block and what follows it; what enters from elsewhere is not changed for others.
        output: the output projection, whose input has heads * value_dim features; None where there is none.
        projections: those of query, key and value.
    """

    index: int
    node: ir.Node
    value: ir.Value
    axis: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    inside: Collection[ir.Value]
    output: Linear | None
    projections: tuple[Linear, ...]

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def count(self) -> int:
        return self.heads

    @property
    def width(self) -> int:
        """Input features of the output projection for each head."""
        return self.value_dim

    def mask(self, gone: Iterable[int]) -> Array:
        """The removal of these heads along `axis` of `value`."""
        size = static_dim(self.value, self.axis) or self.heads
        mask = _removal(gone, self.heads)
        return np.tile(mask, size // self.heads) if self.axis == 0 else np.repeat(mask, size // self.heads)  # axis 0: batch * heads


@dataclasses.dataclass(frozen=True, eq=False)
class Neurons:
    """The inner features of one feed-forward block, gated or not: `value` [.., neurons] enters the projection `output`."""

    index: int
    node: ir.Node
    value: ir.Value
    axis: int
    neurons: int
    inside: Collection[ir.Value]
    output: Linear
    projections: tuple[Linear, ...]

    group = 1
    width = 1

    @property
    def count(self) -> int:
        return self.neurons

    def mask(self, gone: Iterable[int]) -> Array:
        return _removal(gone, self.neurons)


Unit = Heads | Neurons


@dataclasses.dataclass(frozen=True)
class Blocks:
    attention: tuple[Heads, ...]
    ffn: tuple[Neurons, ...]
    refused: tuple[tuple[ir.Node, str], ...]


@dataclasses.dataclass(frozen=True)
class Units(Analysis[Blocks]):
    """Heads and neurons, and the attentions whose heads are not known, with the reason."""

    def compute(self, model: ir.Model, ctx: Context) -> Blocks:
        made = {v: x for x in ctx.get(Linears(casts=True)) for v in (x.output, x.node.outputs[0])}
        facts = ctx.get(Attentions())
        found: list[Heads] = []
        refused: list[tuple[ir.Node, str]] = []
        for node in all_nodes(model):
            if node.domain or node.op_type not in ("Softmax", "Attention"):
                continue
            known = facts.get(node)
            place = _operator(node, known) if node.op_type == "Attention" else _primitive(known)
            if place is None:
                if node.op_type == "Attention" or isinstance(known, AttentionFacts):
                    refused.append((node, "its heads are not known" if not isinstance(known, str) else known))
                continue
            found.append(_heads(len(found), node, place, made))
        owned = {x.node for h in found for x in (*h.projections, *([h.output] if h.output else []))}
        ffn = [f for layer in ctx.get(Structure()).layers for f in layer.ffn if not owned & set(f.nodes)]
        neurons = [
            Neurons(k, f.down.node, f.down.x, -1, f.down.in_features, downstream([x.node.outputs[0] for x in f.up]), f.down, f.up)
            for k, f in enumerate(ffn)
            if not f.down.batch and not f.down.trans_x
        ]
        return Blocks(tuple(found), tuple(neurons), tuple(refused))


@dataclasses.dataclass(frozen=True)
class _Place:
    value: ir.Value
    axis: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    operands: tuple[ir.Value, ...]


def _operator(node: ir.Node, facts: AttentionFacts | str | None) -> _Place | None:
    q, k, v, out = *node.inputs[:3], node.outputs[0]
    if q is None or k is None or v is None or q.shape is None:
        return None
    flat = len(q.shape) == 3
    heads = attr(node, "q_num_heads") or (static_dim(q, 1) if not flat else None)
    kv_heads = attr(node, "kv_num_heads") or (static_dim(k, 1) if not flat else None)
    widths = [static_dim(x, -1) for x in (q, v)]
    if not heads or not kv_heads or None in widths:
        return None
    if isinstance(facts, AttentionFacts):
        kv_heads = facts.kv_heads  # fewer than the operator sees where the graph repeats them in front of it
    head_dim, value_dim = (int(w or 0) // (n if flat else 1) for w, n in zip(widths, (heads, kv_heads), strict=True))
    return _Place(out, 2 if flat else 1, heads, kv_heads, head_dim, value_dim, (q, k, v))


def _primitive(facts: AttentionFacts | str | None) -> _Place | None:
    """The axis of the product with the value that has its heads; they may be spread over two (groups, and heads of a group)."""
    if facts is None or isinstance(facts, str) or facts.output.shape is None:
        return None
    operands = (facts.q.view.steps[-1].value, facts.k.view.steps[-1].value, facts.v.view.steps[-1].value)
    lead = list(facts.output.shape)[:-2]
    sizes = [n for n in lead[1:] if isinstance(n, int)] if len(lead) > 1 else []
    if len(lead) == 1 or (sizes and len(sizes) == len(lead) - 1 and int(np.prod(sizes)) == facts.heads):
        axis = 0 if len(lead) == 1 else next((k for k, n in enumerate(lead) if k and n != 1), 1)
        if len(lead) <= 2 or lead[axis] == facts.heads:
            return _Place(facts.output, axis, facts.heads, facts.kv_heads, facts.head_dim, facts.value_dim, operands)
    return None


def _heads(index: int, node: ir.Node, p: _Place, made: dict[ir.Value, Linear]) -> Heads:
    projections = _behind(p.operands, made)
    output = _ahead(p.value, made)
    if output is not None and (output.in_features != p.heads * p.value_dim or output.batch or output.trans_x):
        output = None
    within = downstream([x.node.outputs[0] for x in projections] or list(p.operands))
    return Heads(index, node, p.value, p.axis, p.heads, p.kv_heads, p.head_dim, p.value_dim, within, output, projections)


def _behind(operands: Iterable[ir.Value], made: dict[ir.Value, Linear]) -> tuple[Linear, ...]:
    """The projections that the operands of an attention are computed from, with no other in between."""
    found: dict[Linear, None] = {}
    todo, seen = list(operands), set[ir.Value]()
    while todo and len(seen) < _FAR:
        value = todo.pop()
        if value in seen:
            continue
        seen.add(value)
        linear = made.get(value)
        if linear is not None and linear.in_features > 1:
            found[linear] = None
            continue
        node = value.producer()
        todo += [v for v in (node.inputs if node is not None else ()) if v is not None]
    return tuple(found)


def _ahead(value: ir.Value, made: dict[ir.Value, Linear]) -> Linear | None:
    """The projection that alone reads the result of an attention, re-laid."""
    for _ in range(_FAR):
        readers = consumers(value)
        if len(readers) != 1 or value.is_graph_output():
            return None
        node = readers[0]
        linear = made.get(node.outputs[0])
        if linear is not None and linear.node is node:
            return linear if linear.x is value else None
        if producer(node.outputs[0], *_LAYOUT) is None:
            return None
        value = node.outputs[0]
    return None


def _removal(gone: Iterable[int], units: int) -> Array:
    mask = np.zeros(units, bool)
    mask[list(gone)] = True
    return mask
