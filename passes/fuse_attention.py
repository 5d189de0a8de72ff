"""fuse-attention: every recognized attention becomes one standard Attention node (ONNX opset 23)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import onnx_ir as ir

from graphopt.analysis.attention import Arrangement, AttentionFacts, Attentions
from graphopt.analysis.formulas.masks import MaskReader, MeaningReader
from graphopt.analysis.scores import MaskTerm
from graphopt.core.contract import Context
from graphopt.graph import dims
from graphopt.graph.attention_node import PROBABILITIES, head_counts
from graphopt.graph.layout import Group, Tracer, merged
from graphopt.graph.questions import consumers, producer, rank, scalar
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.match import Match, Miss
from graphopt.rewrite.rules import RewritePass

from ._masking import Rows, additive_mask

_LAYOUT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Flatten")


@dataclasses.dataclass(frozen=True)
class AttentionResult:
    """`value` is the result of the attention after `perm` and a Reshape to `shape` (or None); `nodes` are the layout operators on the way."""

    value: ir.Value
    nodes: tuple[ir.Node, ...]
    perm: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class FusibleAttention(Match):
    """`form` "packed" reads and writes [batch, rows, heads * dim], "split" [batch, heads, rows, dim]; `result` says what becomes of that.
    A second output stands for the probabilities where they are read, too."""

    attention: AttentionFacts
    operands: tuple[Arrangement, Arrangement, Arrangement]
    form: str
    result: AttentionResult

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.attention.summary


@dataclasses.dataclass(frozen=True)
class FuseAttention(RewritePass[FusibleAttention]):
    """Fuse attention into the standard Attention operator.

    Recognition is `graphopt.analysis.attention`; what it refuses is a missed remark with the reason. Masks stay additive, and rows that
    are masked everywhere keep what they gave in float32: the average of the values that are masked once for a finite mask, zero behind a NaN
    guard. (In 16 bits a kernel that takes the lowest number for "no key" gives zero there; a row that gave NaN gives a number.)
    Vaswani et al. 2017, "Attention Is All You Need"; ONNX operator Attention-23.
    """

    anchors: ClassVar[frozenset[str]] = frozenset({"Softmax", "Attention"})

    def match(self, node: ir.Node, ctx: Context) -> FusibleAttention | Miss | None:
        facts = ctx.get(Attentions())[node]
        if isinstance(facts, str):
            return Miss(node, f"not fused: {facts}") if node.op_type == "Softmax" else None
        facts = dataclasses.replace(facts, terms=tuple(t for t in facts.terms if not _idle(t, ctx.get(MaskReader()))))
        reason = _inexpressible(facts)
        if reason is not None:
            return Miss(node, f"not fused: {reason}")
        packed, split = self._operands(facts, "packed"), self._operands(facts, "split")
        for form, operands in (("packed", packed), ("split", split)):
            if operands is None or (form == "packed" and facts.factors) or (form == "split" and node.op_type == "Attention" and facts.k.repeat == 1):
                continue  # such a node already reads [batch, heads, rows, dim]; only repeated key heads are worth taking back
            found = _output(facts, form)
            if found is not None:
                nodes = (*facts.nodes, *found.nodes)
                return FusibleAttention(nodes, (found.value, *_read_probabilities(facts)), facts, operands, form, found)
        if node.op_type == "Attention":
            return None
        return Miss(node, "not fused: query, key, value or result are laid out in a way that Attention cannot read")

    def _operands(self, f: AttentionFacts, form: str) -> tuple[Arrangement, Arrangement, Arrangement] | None:
        found = [getattr(o, form)() for o in (f.q, f.k, f.v)]
        if any(c is None for c in found) or found[2].step.scale != 1.0:
            return None
        if found[0].regrouped and any(t.scores_rank == 5 for t in f.terms):
            return None  # a window mask counts the batch of the query
        return found[0], found[1], found[2]

    def build(self, op: Builder, m: FusibleAttention) -> Sequence[ir.Value]:
        f = m.attention
        q, k, v = (_arranged(op, choice) for choice in m.operands)
        for factor in f.factors:
            q = op.Mul(q, factor)
        scale = f.scale * m.operands[0].step.scale * m.operands[1].step.scale
        axis = 1 if m.form == "packed" else 2
        mask = additive_mask(op, f, Rows(m.operands[0], axis), Rows(m.operands[1], axis))
        shown = len(m.outputs) > 1
        attributes: dict[str, Any] = {"scale": float(scale), "qk_matmul_output_mode": PROBABILITIES if shown else None}
        attributes |= head_counts(f.heads, f.kv_heads) if m.form == "packed" else {}
        attributes |= {"softcap": float(f.softcap)} if f.softcap else {}
        made = op.node("Attention", (q, k, v) if mask is None else (q, k, v, mask), _outputs=4 if shown else 1, **attributes)
        if shown:
            made[1].name = made[2].name = ""  # no cache
        out = made[0] if shown else made
        if m.result.perm is not None:
            out = op.Transpose(out, perm=list(m.result.perm))
        if m.result.shape is not None:
            out = op.Reshape(out, op.ints(*m.result.shape, name="shape"))
        return [out, made[3]] if shown else [out]


def _idle(term: MaskTerm, masks: MeaningReader) -> bool:
    """A mask that hides nothing."""
    if term.kind == "keep":
        return masks.always(term.value)
    node = producer(term.value, "Where") if term.kind == "add" else None
    return node is not None and scalar(node.inputs[1]) == 0.0 and node.inputs[0] is not None and masks.always(node.inputs[0])


def _inexpressible(f: AttentionFacts) -> str | None:
    """What the Attention operator has no words for."""
    if f.output.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        return f"it computes in {f.output.dtype}, for which runtimes have no kernel that keeps rows without keys"
    if f.scale <= 0:
        return f"the scores are scaled by {f.scale:g}, and Attention takes the root of the scale"
    if len({t.fill for t in f.terms if t.kind != "add"}) > 1:
        return "its masks fill the scores with different numbers"
    if f.softcap and f.masked_before_cap:
        return "the mask is added before the soft cap, and Attention adds it behind"
    for term in f.terms:
        shape = term.value.shape
        if shape is None or len(shape) > max(4, term.scores_rank) or term.scores_rank > 5:
            return f"the shape of the mask `{term.value.name}` is unknown, or has more axes than the scores"
        if term.scores_rank > 3 and len(shape) > 2 and term.scores_heads != f.heads:
            return f"the mask `{term.value.name}` is added to scores whose axis before the rows is not the heads"
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


def _arranged(op: Builder, choice: Arrangement) -> ir.Value:
    value, perm = choice.step.value, choice.perm
    if perm != tuple(range(len(perm))):
        source = value
        value = op.shared(("transpose", source, perm), lambda: op.Transpose(source, perm=list(perm)))
    if choice.shape is not None:
        value = op.Reshape(value, op.ints(*choice.shape, name="shape"))
    return value


def _output(f: AttentionFacts, form: str) -> AttentionResult | None:
    """Follow layout operators behind the attention to the value that the new node can make: exactly, in another grouping, or sequence first."""
    tracer = Tracer()
    groups = _output_groups(f, tracer)
    if groups is None:
        return None
    batch, heads, rows, dim = groups
    wanted = (batch, rows, (*heads, *dim)) if form == "packed" else (batch, heads, rows, dim)
    tail: list[ir.Node] = []
    other = None
    value = f.output
    for _ in range(8):
        view = tracer.view(value)
        if view is not None and view.root is f.output:
            if [merged(g) for g in view.axes] == [merged(g) for g in wanted]:
                return AttentionResult(value, tuple(tail))
            other = _regrouped(value, view.axes, wanted, tuple(tail)) or other
        readers = consumers(value)
        if len(readers) != 1 or readers[0].op_type not in _LAYOUT or value.is_graph_output():
            break
        tail.append(readers[0])
        value = readers[0].outputs[0]
    return other


def _regrouped(value: ir.Value, axes: Sequence[Group], wanted: Sequence[Group], tail: tuple[ir.Node, ...]) -> AttentionResult | None:
    """The same elements in the order of the attention's result, or with rows before batch, in any grouping that a Reshape can make."""
    shape = _one_unknown(value)
    have = merged(tuple(a for g in axes for a in g))
    if len(wanted) == 4:
        flat = merged(tuple(a for g in wanted for a in g))
        return AttentionResult(value, tail, None, shape) if have == flat and shape is not None else None
    for perm in ((0, 1, 2), (1, 0, 2)):
        order = [wanted[k] for k in perm]
        moved = None if perm == (0, 1, 2) else perm
        if [merged(g) for g in axes] == [merged(g) for g in order]:
            return AttentionResult(value, tail, moved)
        if have == merged(tuple(a for g in order for a in g)) and shape is not None:
            return AttentionResult(value, tail, moved, shape)
    return None


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
    outer = dims.divide(atom.size, f.heads)
    if outer is None:
        return None
    inner = dataclasses.replace(atom, size=f.heads)
    batch = () if outer == 1 else (dataclasses.replace(atom, stride=f.heads, size=outer),)
    return batch, (inner,), rows, dim


def _one_unknown(value: ir.Value) -> tuple[int, ...] | None:
    dims = [d if isinstance(d, int) else -1 for d in value.shape or ()]
    return tuple(dims) if dims and dims.count(-1) <= 1 and 0 not in dims else None
