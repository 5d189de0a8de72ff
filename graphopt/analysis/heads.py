"""What can be removed from a model, piece by piece: the heads of every attention and the neurons of every feed-forward block.

Read off the graph before or after fusion. Blocks are numbered in graph order, attentions and feed-forward blocks apart, from 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping

import numpy as np
import onnx_ir as ir

from graphopt.analysis.attention import AttentionFacts, Attentions
from graphopt.analysis.linear import Linear, Linears
from graphopt.analysis.projections import Feed, Made, Operands, ahead, behind, made_by, origin, read_operand, removal
from graphopt.analysis.structure import Structure
from graphopt.core.contract import Analysis, Array, Context
from graphopt.graph.attention_node import AttentionNode
from graphopt.graph.layout import Atom, Group, Tracer, merged
from graphopt.graph.questions import downstream, rank, static_dim


@dataclasses.dataclass(frozen=True, eq=False)
class Heads:
    """The heads of one attention, a Softmax or an Attention `node`.

    Attributes:
        index: its number, as in LAYER:HEAD.
        value: the result of attention, before the output projection; `axis` runs over heads, or over heads * value_dim.
        group: query heads that share one key and value head.
        inside: the values that belong to this block and what follows it; what enters from elsewhere is not changed for others.
        output: the output projection, whose input has heads * value_dim features, head by head; None where there is none.
        projections: those of query, key and value.
        operands: query, key and value.
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
    operands: Operands

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
        mask = removal(gone, self.heads)
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
        return removal(gone, self.neurons)


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
        known = ctx.get(AttentionHeads())
        found = tuple(h for h in known.values() if isinstance(h, Heads))
        owned = {x.node for h in found for x in (*h.projections, *([h.output] if h.output else []))}
        ffn = [f for layer in ctx.get(Structure()).layers for f in layer.ffn if not owned & set(f.nodes)]
        neurons = [
            Neurons(k, f.down.node, f.down.x, -1, f.down.in_features, downstream([x.node.outputs[0] for x in f.up]), f.down, f.up)
            for k, f in enumerate(ffn)
            if not f.down.batch and not f.down.trans_x
        ]
        return Blocks(found, tuple(neurons), tuple((node, h) for node, h in known.items() if isinstance(h, str)))


@dataclasses.dataclass(frozen=True)
class AttentionHeads(Analysis[Mapping[ir.Node, "Heads | str"]]):
    """Softmax or Attention node -> its heads, or why they are not known; a Softmax that is no attention is left out."""

    def compute(self, model: ir.Model, ctx: Context) -> Mapping[ir.Node, Heads | str]:
        made, plain, tracer = made_by(ctx.get(Linears(casts=True))), {x.output: x for x in ctx.get(Linears())}, Tracer()
        known: dict[ir.Node, Heads | str] = {}
        for node, facts in ctx.get(Attentions()).items():
            a = AttentionNode.of(node)
            place = _primitive(facts) if node.op_type == "Softmax" else None if a is None else _operator(a, facts, tracer)
            if place is not None:
                values = [f.value for f in place.feeds]
                projections = behind(values, made)
                within = downstream([x.node.outputs[0] for x in projections] or values)
                q, k, v = (read_operand(f, place.nodes, plain, tracer) for f in place.feeds)
                index = sum(isinstance(h, Heads) for h in known.values())
                known[node] = Heads(index, node, place.value, place.axis, *place.sizes, within, _output(place, made, tracer), projections, (q, k, v))
            elif node.op_type == "Attention" or isinstance(facts, AttentionFacts):
                known[node] = facts if isinstance(facts, str) else "its heads are not known"
        return known


@dataclasses.dataclass(frozen=True)
class _Place:
    """As in Heads. `sizes`: heads, kv_heads, head_dim, value_dim; `result`: where heads and features stand in `value`."""

    value: ir.Value
    axis: int
    sizes: tuple[int, int, int, int]
    nodes: tuple[ir.Node, ...]
    feeds: tuple[Feed, ...]
    result: Group


def _operator(a: AttentionNode, facts: AttentionFacts | str, tracer: Tracer) -> _Place | None:
    if not a.heads or not a.kv_heads or not a.head_dim or not a.value_dim or rank(a.q) is None:
        return None
    feeds = []
    for value, heads, dim in zip(a.operands, (a.heads, a.kv_heads, a.kv_heads), (a.head_dim, a.head_dim, a.value_dim), strict=True):
        view = tracer.view(value)
        group = () if view is None else view.axes[2] if a.packed else (*view.axes[1], *view.axes[3])
        feeds.append(Feed(value, 2 if a.packed else 3, None if a.packed else 1, heads, dim, a.packed, view, group))
    result = [(2, a.heads * a.value_dim)] if a.packed else [(1, a.heads), (3, a.value_dim)]
    kv_heads = a.kv_heads if isinstance(facts, str) else facts.kv_heads  # fewer where the graph repeats them in front of the operator
    return _Place(a.result, 2 if a.packed else 1, (a.heads, kv_heads, a.head_dim, a.value_dim), (a.node,), tuple(feeds), _atoms(result))


def _primitive(facts: AttentionFacts | str) -> _Place | None:
    """The axis of the product with the value that has its heads; they may be spread over two (groups, and heads of a group)."""
    if isinstance(facts, str) or facts.output.shape is None:
        return None
    lead = list(facts.output.shape)[:-2]
    sizes = [n for n in lead[1:] if isinstance(n, int)]
    if len(lead) > 1 and (not sizes or len(sizes) < len(lead) - 1 or int(np.prod(sizes)) != facts.heads):
        return None
    axis = 0 if len(lead) == 1 else next((k for k, n in enumerate(lead) if k and n != 1), 1)
    if len(lead) > 2 and lead[axis] != facts.heads:
        return None
    feeds = []
    for o, dim, back in zip((facts.q, facts.k, facts.v), (facts.head_dim, facts.head_dim, facts.value_dim), (1, 2, 1), strict=True):
        value = o.view.steps[-1].value
        size = rank(value) or 0
        heads = static_dim(value, 1) if size == 4 else None
        feeds.append(Feed(value, size - back, None if heads is None else 1, heads or 1, dim, False, o.view, (*o.heads, *o.dim)))
    counts = facts.heads, facts.kv_heads, facts.head_dim, facts.value_dim
    result = _atoms([(axis, facts.heads), (len(lead) + 1, facts.value_dim)])
    return _Place(facts.output, axis, counts, (facts.anchor, *facts.nodes), tuple(feeds), result)


def _atoms(axes: Iterable[tuple[int, int]]) -> Group:
    return tuple(Atom(axis, 1, size) for axis, size in axes if size != 1)


def _output(p: _Place, made: Made, tracer: Tracer) -> Linear | None:
    """The output projection, if it reads the features of the first head first, then those of the second."""
    found = ahead(p.value, made)
    view = None if found is None else tracer.view(found.x)
    if found is None or view is None or found.in_features != p.sizes[0] * p.sizes[3] or found.batch or found.trans_x:
        return None
    read = origin(view, view.axes[-1], tracer, {p.value}, lambda node, axes: node.op_type in ("Cast", "Dropout"))
    return found if read.root is p.value and not any(read.offset) and merged(read.group) == merged(p.result) else None
