"""fuse-attention: every recognized attention becomes one standard Attention node (ONNX opset 23)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt import shapes
from graphopt.analysis.attention import AttentionFacts, Attentions, Choice
from graphopt.analysis.layout import Group, Tracer, merged
from graphopt.analysis.masks import MaskReader, Masks
from graphopt.analysis.scores import MaskTerm
from graphopt.core import Context
from graphopt.graph import constant, consumers, producer, rank, scalar, static_dim
from graphopt.rewrite import Builder, Match, Miss, RewritePass

_LOWEST = -1e30  # masks are clamped here: far below any score, and far enough from -FLT_MAX that a runtime still sees a number, not "no key"
_LAYOUT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Flatten")


@dataclasses.dataclass(frozen=True)
class AttentionMatch(Match):
    """`form` "packed" reads and writes [batch, rows, heads * dim], "split" [batch, heads, rows, dim]; `shape` is the shape of the output
    where that is another grouping of the same order of axes. A second output stands for the probabilities where they are read, too."""

    attention: AttentionFacts
    operands: tuple[Choice, Choice, Choice]
    form: str
    shape: tuple[Any, ...] | None

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.attention.summary


@dataclasses.dataclass(frozen=True)
class FuseAttention(RewritePass[AttentionMatch]):
    """Fuse attention into the standard Attention operator.

    Recognition is `graphopt.analysis.attention`; what it refuses is a missed remark with the reason. Masks stay additive, and rows that
    are masked everywhere keep what they gave: the average of all values for a finite mask, zero behind a NaN guard.
    Vaswani et al. 2017, "Attention Is All You Need"; ONNX operator Attention-23.
    """

    anchors: ClassVar[frozenset[str]] = frozenset({"Softmax", "Attention"})

    def match(self, node: ir.Node, ctx: Context) -> AttentionMatch | Miss | None:
        facts = ctx.get(Attentions())[node]
        if isinstance(facts, str):
            return Miss(node, f"not fused: {facts}") if node.op_type == "Softmax" else None
        facts = dataclasses.replace(facts, terms=tuple(t for t in facts.terms if not _idle(t, ctx.get(MaskReader()))))
        reason = _inexpressible(facts)
        if reason is not None:
            return Miss(node, f"not fused: {reason}")
        packed, split = self._operands(facts, "packed"), self._operands(facts, "split")
        for form, operands in (("packed", packed), ("split", split)):
            if operands is None or (form == "split" and node.op_type == "Attention" and facts.k.repeat == 1):
                continue  # such a node already reads [batch, heads, rows, dim]; only repeated key heads are worth taking back
            found = _output(facts, form)
            if found is not None:
                output, tail, shape = found
                nodes = (*facts.nodes, *tail)
                return AttentionMatch(nodes, (output, *_read_probabilities(facts)), facts, operands, form, shape)
        if node.op_type == "Attention":
            return None
        return Miss(node, "not fused: query, key, value or result are laid out in a way that Attention cannot read")

    def _operands(self, f: AttentionFacts, form: str) -> tuple[Choice, Choice, Choice] | None:
        found = [getattr(o, form)() for o in (f.q, f.k, f.v)]
        if any(c is None for c in found) or found[2].step.scale != 1.0:
            return None
        return found[0], found[1], found[2]

    def build(self, op: Builder, m: AttentionMatch) -> Sequence[ir.Value]:
        f = m.attention
        q, k, v = (_arranged(op, choice) for choice in m.operands)
        scale = f.scale * m.operands[0].step.scale * m.operands[1].step.scale
        mask = _mask(op, f, m)
        heads = {"q_num_heads": f.heads, "kv_num_heads": f.kv_heads} if m.form == "packed" else {}
        inputs = (q, k, v) if mask is None else (q, k, v, mask)
        extra = {"softcap": float(f.softcap)} if f.softcap else {}
        if len(m.outputs) > 1:
            made = op.Attention(*inputs, scale=float(scale), qk_matmul_output_mode=3, _outputs=4, **heads, **extra)
            made[1].name = made[2].name = ""  # no cache
        else:
            made = [op.Attention(*inputs, scale=float(scale), **heads, **extra)]
        out = made[0]
        if m.shape is not None:
            out = op.Reshape(out, op.const(np.array(m.shape, np.int64), "shape"))
        return [out, *made[3:]]


def _idle(term: MaskTerm, masks: Masks) -> bool:
    """A mask that hides nothing."""
    if term.kind == "keep":
        return masks.always(term.value)
    node = producer(term.value, "Where") if term.kind == "add" else None
    return node is not None and scalar(node.inputs[1]) == 0.0 and node.inputs[0] is not None and masks.always(node.inputs[0])


def _inexpressible(f: AttentionFacts) -> str | None:
    """What the Attention operator has no words for."""
    if f.softcap and f.masked_before_cap:
        return "the mask is added before the soft cap, and Attention adds it behind"
    for term in f.terms:
        shape = term.value.shape
        if shape is None or len(shape) > max(4, term.scores_rank) or term.scores_rank > 5:
            return f"the shape of the mask `{term.value.name}` is unknown, or has more axes than the scores"
        if shape and len(shape) and shape[-1] == 1 and f.probabilities is not None and static_dim(f.probabilities, -1) != 1:
            return f"the mask `{term.value.name}` is the same for every key"
        if term.scores_rank == 5 and len(shape) > 2 and (len(shape) != 5 or shape[0] != 1 or not isinstance(shape[1], int)):
            return f"the mask `{term.value.name}` is added to scores of 5 axes in a way that is not a window mask"
    return None


def _read_probabilities(f: AttentionFacts) -> tuple[ir.Value, ...]:
    """The probabilities, if something else reads them (or they are an output of the model) and they have four axes."""
    p = f.probabilities
    inside = set(f.nodes)
    if p is None or rank(p) != 4 or not (p.is_graph_output() or any(u.node not in inside for u in p.uses())):
        return ()
    return (p,)


def _arranged(op: Builder, choice: Choice) -> ir.Value:
    value, perm = choice.step.value, choice.perm
    if perm != tuple(range(len(perm))):
        source = value
        value = op.shared(("transpose", source, perm), lambda: op.Transpose(source, perm=list(perm)))
    if choice.shape is not None:
        value = op.Reshape(value, op.const(np.array(choice.shape, np.int64), "shape"))
    return value


def _output(f: AttentionFacts, form: str) -> tuple[ir.Value, tuple[ir.Node, ...], tuple[Any, ...] | None] | None:
    """Follow layout operators behind the attention to the value that the new node can make: (value, nodes on the way, final shape)."""
    tracer = Tracer()
    groups = _output_groups(f, tracer)
    if groups is None:
        return None
    batch, heads, rows, dim = groups
    wanted = (batch, rows, (*heads, *dim)) if form == "packed" else (batch, heads, rows, dim)
    exact = [merged(g) for g in wanted]
    flat = merged(tuple(a for g in wanted for a in g))
    tail: list[ir.Node] = []
    regrouped = None
    value = f.output
    for _ in range(8):
        view = tracer.view(value)
        if view is not None and view.root is f.output:
            if [merged(g) for g in view.axes] == exact:
                return value, tuple(tail), None
            shape = _one_unknown(value)
            if merged(tuple(a for g in view.axes for a in g)) == flat and shape is not None and (form == "packed" or len(shape) == 3):
                regrouped = value, tuple(tail), shape
        readers = consumers(value)
        if len(readers) != 1 or readers[0].op_type not in _LAYOUT or value.is_graph_output():
            break
        tail.append(readers[0])
        value = readers[0].outputs[0]
    return regrouped


def _output_groups(f: AttentionFacts, tracer: Tracer) -> tuple[Group, Group, Group, Group] | None:
    view = tracer.view(f.output)
    if view is None or view.root is not f.output:
        return None
    *lead, rows, dim = view.axes
    if len(lead) > 1:
        return lead[0], tuple(a for g in lead[1:] for a in g), rows, dim
    if f.heads == 1:
        return lead[0], (), rows, dim
    atom = lead[0][0]  # [batch * heads, rows, dim]
    outer = shapes.divide(atom.size, f.heads)
    if outer is None:
        return None
    inner = dataclasses.replace(atom, size=f.heads)
    batch = () if outer == 1 else (dataclasses.replace(atom, stride=f.heads, size=outer),)
    return batch, (inner,), rows, dim


def _one_unknown(value: ir.Value) -> tuple[int, ...] | None:
    dims = [d if isinstance(d, int) else -1 for d in value.shape or ()]
    return tuple(dims) if dims and dims.count(-1) <= 1 and 0 not in dims else None


def _mask(op: Builder, f: AttentionFacts, m: AttentionMatch) -> ir.Value | None:
    """The sum of all mask terms as one additive (or, for an Attention node that had it so, boolean) mask."""
    if not f.terms:
        return None
    if f.anchor.op_type == "Attention":
        return f.terms[0].value
    rows = m.operands[0].step.value
    axis = m.operands[0].perm[1 if m.form == "packed" else 2]
    key = ("mask", *((t.value, t.kind, t.factor, t.fill) for t in f.terms))
    dtype = f.output.dtype or ir.DataType.FLOAT
    total: ir.Value = op.shared(key, lambda: _sum(op, [_four_axes(op, _additive(op, t, dtype), t, f, rows) for t in f.terms]))
    if all((_query_size(t) or 1) == 1 for t in f.terms):
        size = rows.shape[axis] if rows.shape is not None else None
        return _expanded(op, total, rows, axis, size)
    return total


def _four_axes(op: Builder, mask: ir.Value, term: MaskTerm, f: AttentionFacts, rows: ir.Value) -> ir.Value:
    """A mask for scores [batch * heads, rows, keys] or [batch / windows, windows, heads, rows, keys], for scores of four axes."""
    shape = term.value.shape
    size = 0 if shape is None else len(shape)
    if size == 3 and term.scores_rank == 3 and shape is not None and shape[0] != 1:
        tail = op.Shape(mask, start=1, end=3)
        return op.Reshape(mask, op.Concat(op.const(np.array([-1, f.heads], np.int64), "heads"), tail, axis=0))  # type: ignore[no-any-return]
    if size == 5 and shape is not None:
        count = op.Div(op.Shape(rows, start=0, end=1), op.const(np.array([shape[1]], np.int64), "windows"))
        every = op.Expand(mask, op.Concat(count, op.const(np.ones(4, np.int64), "ones"), axis=0))
        tail = op.Shape(mask, start=2, end=5)
        return op.Reshape(every, op.Concat(op.const(np.array([-1], np.int64), "rest"), tail, axis=0))  # type: ignore[no-any-return]
    return mask


def _sum(op: Builder, parts: list[ir.Value]) -> ir.Value:
    total = parts[0]
    for part in parts[1:]:
        total = op.Add(total, part)
    return total


def _query_size(term: MaskTerm) -> Any:
    """The size of the mask along the query rows; 1 where it has no such axis."""
    shape = term.value.shape
    return None if shape is None else 1 if len(shape) < 2 else shape[-2]


def _expanded(op: Builder, mask: ir.Value, rows: ir.Value, axis: int, size: Any) -> ir.Value:
    """A mask that is the same for every query row, spelled for every row: runtimes ask for the axis."""

    def build() -> ir.Value:
        if isinstance(size, int):
            return op.Expand(mask, op.const(np.array([size, 1], np.int64), "rows"))  # type: ignore[no-any-return]
        count = op.Shape(rows, start=axis, end=axis + 1)
        return op.Expand(mask, op.Concat(count, op.const(np.array([1], np.int64), "one"), axis=0))  # type: ignore[no-any-return]

    out: ir.Value = op.shared(("expand", mask, str(size)), build)
    return out


def _additive(op: Builder, term: MaskTerm, dtype: ir.DataType) -> ir.Value:
    if term.kind != "add":
        return _choice(op, term.value, 0.0, term.fill, dtype, keep=term.kind == "keep")
    value, node = term.value, producer(term.value, "Where")
    if node is not None and term.factor == 1.0:  # Where(condition, 0, low) as exporters spell it: lower the constant, not the tensor
        x, y = scalar(node.inputs[1]), scalar(node.inputs[2])
        if x == 0.0 and y is not None and node.inputs[0] is not None:
            return value if y >= _LOWEST else _choice(op, node.inputs[0], 0.0, float(y), dtype, keep=True)
        if y == 0.0 and x is not None and node.inputs[0] is not None:
            return value if x >= _LOWEST else _choice(op, node.inputs[0], 0.0, float(x), dtype, keep=False)
    if term.factor != 1.0:
        value = op.Mul(value, op.const(np.array(term.factor, dtype.numpy()), "factor"))
    return value if _bounded(term.value, term.factor) else op.Max(value, op.const(np.array(_lowest(dtype), dtype.numpy()), "lowest"))


def _choice(op: Builder, condition: ir.Value, zero: float, fill: float, dtype: ir.DataType, keep: bool) -> ir.Value:
    finite = fill if np.isneginf(fill) else max(fill, _lowest(dtype))
    low, nought = op.const(np.array(finite, dtype.numpy()), "masked"), op.const(np.array(zero, dtype.numpy()), "zero")
    out: ir.Value = op.Where(condition, nought, low) if keep else op.Where(condition, low, nought)
    return out


def _lowest(dtype: ir.DataType) -> float:
    return _LOWEST if dtype != ir.DataType.FLOAT16 else float(np.finfo(np.float16).min)


def _bounded(value: ir.Value, factor: float) -> bool:
    """True if no clamp is wanted: a constant that is not below the limit, a bias (the product of no mask constant), or one that holds -inf."""
    array = constant(value)
    if array is not None:
        low = float(np.min(array * factor)) if array.size else 0.0
        return low >= _LOWEST or low == -np.inf
    lowest = _constants_behind(value)
    return not any(c <= _LOWEST for c in lowest) or any(np.isneginf(c) for c in lowest)


def _constants_behind(value: ir.Value, depth: int = 8) -> list[float]:
    """The scalar constants that elementwise and layout operators mixed into a value."""
    node = producer(value)
    c = scalar(value)
    if c is not None:
        return [-abs(float(c))]
    if node is None or depth == 0 or node.op_type not in (*_LAYOUT, "Add", "Sub", "Mul", "Where", "Expand", "Cast", "Slice", "Min", "Max", "Neg"):
        return []
    return [c for v in node.inputs if v is not None for c in _constants_behind(v, depth - 1)]
