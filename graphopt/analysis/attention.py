"""Every Softmax, and every standard Attention node, that is attention: recognized by what it computes.

Anchored at the Softmax: the scores must be a product of two activations and the probabilities must feed a product with a third (scores.py).
Then the axes are traced to where they come from (layout.py): the contraction must run over the features, the rows over the sequence,
and the heads must be a piece of the feature axis (or an axis of their own). Equal sizes prove nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import onnx_ir as ir

from graphopt.analysis.scores import MaskTerm, NotAttention, probabilities_of, scores_of
from graphopt.core.contract import Analysis, Context
from graphopt.graph.attention_node import AttentionNode
from graphopt.graph.dims import Dim
from graphopt.graph.layout import Atom, Group, Tracer, View, ViewStep, merged, size_of
from graphopt.graph.questions import all_nodes


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """A value of the graph, the permutation that gives the wanted axis order, and the shape that joins heads and features, or that is
    [batch, heads, rows, head_dim] of elements which stand in that order in other axes (or None)."""

    step: ViewStep
    perm: tuple[int, ...]
    shape: tuple[int, ...] | None = None

    @property
    def regrouped(self) -> bool:
        """The axes of the value are not those of the shape: batch and heads stand in one of them, say."""
        return self.shape is not None and len(self.shape) == 4


@dataclasses.dataclass(frozen=True)
class Operand:
    """Query, key or value: where its batch, heads, rows and features come from. `repeats`: atoms that repeat each of its heads."""

    view: View
    batch: Group
    heads: Group
    rows: Group
    dim: Group
    repeats: Group = ()

    @property
    def repeat(self) -> int:
        """Query heads that share one of its heads."""
        size = size_of(self.repeats)
        return size if isinstance(size, int) else 0

    def spread(self) -> Operand:
        """The same operand with its repeated heads as heads of their own."""
        return dataclasses.replace(self, heads=(*self.heads, *self.repeats), repeats=())

    def packed(self) -> Arrangement | None:
        """A value of shape [batch, rows, heads * head_dim]; [batch, rows, heads, head_dim] is one after a free Reshape."""
        exact = self._in_order((self.batch, self.rows, (*self.heads, *self.dim)))
        apart = self._in_order((self.batch, self.rows, self.heads, self.dim))
        width = size_of((*self.heads, *self.dim))
        if exact is None and apart is not None and isinstance(width, int):
            return dataclasses.replace(apart, shape=(0, 0, width))
        return exact or self._permuted((self.batch, self.rows, (*self.heads, *self.dim)))

    def split(self) -> Arrangement | None:
        """A value of shape [batch, heads, rows, head_dim]."""
        wanted = (self.batch, self.heads, self.rows, self.dim)
        return self._in_order(wanted) or self._permuted(wanted) or self._regrouped(wanted)

    def _regrouped(self, wanted: tuple[Group, ...]) -> Arrangement | None:
        """The last value with the wanted elements in the wanted order, if one Reshape can group them."""
        sizes, flat = [size_of(g) for g in wanted[1:]], merged(tuple(a for g in wanted for a in g))
        step = next((s for s in reversed(self.view.steps) if merged(tuple(a for g in s.axes for a in g)) == flat), None)
        if step is None or not all(isinstance(size, int) for size in sizes):
            return None
        return Arrangement(step, tuple(range(len(step.axes))), (-1, *(size for size in sizes if isinstance(size, int))))

    def _in_order(self, wanted: tuple[Group, ...]) -> Arrangement | None:
        target = [merged(g) for g in wanted]
        return next((Arrangement(s, tuple(range(len(target)))) for s in self.view.steps if [merged(g) for g in s.axes] == target), None)

    def _permuted(self, wanted: tuple[Group, ...]) -> Arrangement | None:
        found = self.view.find(wanted)
        return None if found is None else Arrangement(*found)


@dataclasses.dataclass(frozen=True)
class AttentionFacts:
    """One attention: softmax(scale * q k^T + mask terms) v.

    `anchor` is the Softmax or Attention node; `nodes` are all nodes from the product of query and key to `output`,
    the product with the value, of the axes [batch, heads, rows, value_dim] in `output_axes` terms.
    `guarded`: rows without any key are set to zero. `probabilities` [batch, heads, rows, keys] is what meets the value.
    """

    anchor: ir.Node
    nodes: tuple[ir.Node, ...]
    output: ir.Value
    q: Operand
    k: Operand
    v: Operand
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    terms: tuple[MaskTerm, ...] = ()
    softcap: float = 0.0
    masked_before_cap: bool = False
    guarded: bool = False
    probabilities: ir.Value | None = None
    factors: tuple[ir.Value, ...] = ()
    clamped: bool = False

    @property
    def summary(self) -> dict[str, Any]:
        return {
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "value_dim": self.value_dim,
            "scale": self.scale,
            "mask": [t.value.name for t in self.terms],
            "softcap": self.softcap,
            "guarded": self.guarded,
        }


@dataclasses.dataclass(frozen=True)
class Attentions(Analysis[Mapping[ir.Node, "AttentionFacts | str"]]):
    """Anchor node -> facts, or the reason why it is not attention."""

    def compute(self, model: ir.Model, ctx: Context) -> Mapping[ir.Node, AttentionFacts | str]:
        tracer = Tracer()
        anchors = [n for n in all_nodes(model) if n.domain == "" and n.op_type in ("Softmax", "Attention")]
        return {n: _facts(n, tracer) for n in anchors}


def _facts(node: ir.Node, tracer: Tracer) -> AttentionFacts | str:
    try:
        return _from_softmax(node, tracer) if node.op_type == "Softmax" else _from_operator(node, tracer)
    except NotAttention as reason:
        return str(reason)


def _from_softmax(softmax: ir.Node, tracer: Tracer) -> AttentionFacts:
    scores = scores_of(softmax)
    probabilities, terms = probabilities_of(softmax, scores), scores.terms
    if probabilities.cleared:
        terms = (*terms[:-1], dataclasses.replace(terms[-1], fill=float("-inf")))
    q = _operand("query", scores.product.inputs[0], tracer)
    k = _operand("key", scores.product.inputs[1], tracer, transposed=True)
    v = _operand("value", probabilities.product.inputs[1], tracer)
    k, v = (_repeated(o, q) for o in (k, v))
    nodes = tuple(dict.fromkeys((*scores.nodes, *probabilities.nodes)))
    return _checked(
        AttentionFacts(
            softmax, nodes, probabilities.product.outputs[0], q, k, v, _count("query", q.heads), 0, 0, 0, scores.scale, terms,
            scores.softcap, scores.masked_before_cap, probabilities.guarded or probabilities.cleared, probabilities.value, scores.factors,
            scores.clamped,
        )
    )  # fmt: skip


def _from_operator(node: ir.Node, tracer: Tracer) -> AttentionFacts:
    """The facts of a standard Attention node whose inputs are 4-D [batch, heads, rows, head_dim]; the 3-D form needs no tracing."""
    a = AttentionNode.of(node)
    if a is None:
        raise NotAttention("it is an Attention node that breaks the specification of the operator")
    if a.cached or a.shown is not None:
        raise NotAttention("it already is an Attention node with a key/value cache")
    if a.packed or not a.plain or not a.scale:
        raise NotAttention("it already is an Attention node")
    q, k, v = (_operand(name, value, tracer) for name, value in zip(("query", "key", "value"), a.operands, strict=True))
    kind: Literal["keep", "add"] = "keep" if a.mask is not None and a.mask.dtype == ir.DataType.BOOL else "add"
    terms = () if a.mask is None else (MaskTerm(a.mask, kind, 4, 1.0, float("-inf"), _count("query", q.heads)),)
    return _checked(AttentionFacts(node, (node,), a.result, q, k, v, _count("query", q.heads), 0, 0, 0, a.scale, terms))


def _operand(name: str, value: ir.Value | None, tracer: Tracer, transposed: bool = False) -> Operand:
    view = None if value is None else tracer.view(value)
    if view is None or len(view.axes) < 3:
        raise NotAttention(f"the shape of the {name} is unknown or has less than 3 axes")
    *lead, rows, dim = view.axes
    if transposed:
        rows, dim = dim, rows
    batch, heads = _batch_and_heads(lead, dim)
    repeats = [a for a in heads if a.axis < 0]
    heads = tuple(a for a in heads if a.axis >= 0)
    _count(name, tuple(repeats))
    operand = Operand(view, batch, heads, rows, dim, tuple(repeats))
    _check_provenance(name, operand, lead, repeats)
    return operand


def _repeated(o: Operand, query: Operand) -> Operand:
    """Key or value [batch, heads, 1, ..] beside a query [batch, heads, group, ..]: the product repeats each of its heads."""
    own, asked = o.view.axes, query.view.axes
    if o.repeats or len(own) != 5 or len(asked) != 5 or own[2] or not asked[2]:
        return o
    return dataclasses.replace(o, repeats=(Atom(-1, 0, size_of(asked[2])),))


def _batch_and_heads(lead: list[Group], dim: Group) -> tuple[Group, Group]:
    """Split the leading axes: [batch, heads...] as they stand, or one merged axis (batch * heads)."""
    if len(lead) > 1:
        return lead[0], tuple(a for g in lead[1:] for a in g)
    group = lead[0]
    if len(group) > 1:
        return group[:-1], group[-1:]
    own = group and dim and group[0].axis == dim[0].axis
    return ((), group) if own else (group, ())


def _check_provenance(name: str, o: Operand, lead: list[Group], repeats: list[Any]) -> None:
    """Heads may be cut from the feature axis, never from the sequence; rows never from the features."""
    features = {a.axis for a in o.dim}
    rows = {a.axis for a in o.rows}
    if rows & features:
        raise NotAttention(f"the rows of the {name} are cut from its feature axis (root `{o.view.root.name}`)")
    if {a.axis for a in o.batch} & features:
        raise NotAttention(f"the batch of the {name} is cut from its feature axis (root `{o.view.root.name}`)")
    if any(a.axis in rows and a.axis not in {b.axis for b in o.batch} for a in o.heads):
        raise NotAttention(f"the heads of the {name} are cut from its sequence axis (root `{o.view.root.name}`)")
    flat = [a for g in lead for a in g]
    if repeats and flat and flat[-len(repeats) :] != repeats:
        raise NotAttention(f"the heads of the {name} are tiled as a whole, not each repeated")


def _count(name: str, group: Group) -> int:
    size = size_of(group)
    if not isinstance(size, int):
        raise NotAttention(f"the number of heads of the {name} is not a constant ({size})")
    return size


def _checked(f: AttentionFacts) -> AttentionFacts:
    """Compare the three operands and fill in the sizes."""
    kv_heads, value_heads = _count("key", f.k.heads), _count("value", f.v.heads)
    if kv_heads != value_heads and kv_heads * f.k.repeat == value_heads * f.v.repeat:  # one of them is seen through to fewer heads
        f = dataclasses.replace(f, k=f.k.spread(), v=f.v.spread())
        kv_heads = value_heads = _count("key", f.k.heads)
    if kv_heads != value_heads:
        raise NotAttention(f"key and value have {kv_heads} and {value_heads} heads")
    if f.heads % kv_heads or (f.k.repeat * kv_heads != f.heads and kv_heads not in (1, f.heads)):
        raise NotAttention(f"{f.heads} query heads do not share {kv_heads} key heads evenly")
    sizes: list[Dim] = [size_of(o.batch) for o in (f.q, f.k, f.v)]
    if not sizes[0] == sizes[1] == sizes[2]:
        raise NotAttention(f"query, key and value have different batches ({', '.join(map(str, sizes))})")
    head_dim, value_dim = size_of(f.q.dim), size_of(f.v.dim)
    if not isinstance(head_dim, int) or not isinstance(value_dim, int):
        raise NotAttention(f"the head size is not a constant ({head_dim}, {value_dim})")
    return dataclasses.replace(f, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim)
