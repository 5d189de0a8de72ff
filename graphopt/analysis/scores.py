"""From a Softmax back to the product of query and key, and forward to the product with the value.

Elementwise operators on the way are collected by algebra: scalar factors multiply, mask terms keep the factor that stands above them,
a soft cap keeps its place. No order of operators is expected; an operator that does not fit ends the walk with its reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Literal

import numpy as np
import onnx_ir as ir

from graphopt.graph.attention_node import fills
from graphopt.graph.questions import attr, constant, consumers, is_constant, producer, rank, same_dim, scalar, static_dim

_REGROUPING = ("Reshape", "Squeeze", "Unsqueeze", "Identity")
_DEPTH = 24


@dataclasses.dataclass(frozen=True)
class MaskTerm:
    """One term of the mask, as it stands between the scores and the softmax.

    kind "add": `value` (times `factor`) is added to the scores; "keep": scores stay where the boolean `value` is true and become `fill`
    elsewhere; "drop": the other way round. `fill` is already multiplied by the factor above it. `scores_rank` is the rank of the scores there,
    and `scores_heads` the size of their axis before the rows (None: no constant).
    """

    value: ir.Value
    kind: Literal["add", "keep", "drop"]
    scores_rank: int
    factor: float = 1.0
    fill: float = 0.0
    scores_heads: int | None = None


@dataclasses.dataclass(frozen=True)
class AttentionScores:
    """softmax(scale * (query @ key) + terms), with scale * ... -> softcap * tanh(scale * ... / softcap) where softcap is not 0.

    `factors`: tensors that are the same for all rows and keys (one number for each head, say) and multiply the product of query and key.
    `clamped`: no score is below the lowest finite number, so that rows which are masked everywhere average.
    """

    product: ir.Node
    nodes: tuple[ir.Node, ...]
    scale: float = 1.0
    terms: tuple[MaskTerm, ...] = ()
    softcap: float = 0.0
    masked_before_cap: bool = False
    factors: tuple[ir.Value, ...] = ()
    clamped: bool = False

    def masked(
        self, value: ir.Value, kind: Literal["add", "keep", "drop"], scores: ir.Value, *, factor: float = 1.0, fill: float = 0.0
    ) -> AttentionScores:
        """The same with one more term, which stands where `scores` is read."""
        return dataclasses.replace(self, terms=(*self.terms, MaskTerm(value, kind, rank(scores) or 0, factor, fill, static_dim(scores, -3))))


@dataclasses.dataclass(frozen=True)
class Probabilities:
    """From the softmax to the product with the value: the nodes on the way, and whether NaN rows are set to zero.

    `cleared`: keys that the last mask of the scores hides are set to zero, so that rows which it hides throughout become zero.
    """

    product: ir.Node
    nodes: tuple[ir.Node, ...]
    guarded: bool
    cleared: bool
    value: ir.Value


class NotAttention(Exception):
    """Why a candidate is not attention, or not one that can be expressed."""


def scores_of(softmax: ir.Node) -> AttentionScores:
    """What a Softmax normalizes.

    Raises:
        NotAttention: it is not the scores of an attention.
    """
    source = softmax.inputs[0]
    last = (rank(source) or 0) - 1
    if source is None or last < 1:
        raise NotAttention("the rank of its input is unknown")
    if attr(softmax, "axis", -1) not in (-1, last):
        raise NotAttention(f"it normalizes axis {attr(softmax, 'axis', -1)}, not the last")
    return _walk(source, 1.0, _DEPTH)


def _walk(value: ir.Value, factor: float, depth: int) -> AttentionScores:
    """Read upwards; `factor` is what the value is multiplied by until the softmax."""
    node = producer(value)
    if node is None or depth == 0:
        raise NotAttention(f"its input `{value.name}` does not come from a product of query and key")
    if node.op_type == "MatMul":
        if any(is_constant(v) for v in node.inputs):
            raise NotAttention(f"its input `{value.name}` is a product with a constant weight")
        return AttentionScores(node, (node,), factor)
    if node.op_type in _REGROUPING and keeps_matrices(node):
        return _through(node, node.inputs[0], factor, depth)
    if node.op_type in _ELEMENTWISE:
        return _ELEMENTWISE[node.op_type](node, factor, depth)
    if node.op_type in ("Max", "Clip") and (source := _floored(node)) is not None:
        return dataclasses.replace(_through(node, source, factor, depth), clamped=True)
    joins = "; what joins more columns to the scores, a sink say, has no place in Attention" if node.op_type == "Concat" else ""
    raise NotAttention(f"unexpected {node.op_type} `{node.name}` between the scores and the softmax{joins}")


def keeps_matrices(node: ir.Node) -> bool:
    """True if an operator that keeps the order of elements only regroups the axes before the last two."""
    a, b = node.inputs[0], node.outputs[0]
    if a is None or a.shape is None or b.shape is None or len(a.shape) < 2 or len(b.shape) < 2:
        return False
    return same_dim(a.shape[-1], b.shape[-1]) and same_dim(a.shape[-2], b.shape[-2])


def _through(node: ir.Node, source: ir.Value | None, factor: float, depth: int) -> AttentionScores:
    if source is None:
        raise NotAttention(f"{node.op_type} `{node.name}` has no input")
    below = _walk(source, factor, depth - 1)
    return dataclasses.replace(below, nodes=(*below.nodes, node))


def _factor(node: ir.Node, factor: float, depth: int) -> AttentionScores:
    a, b = node.inputs
    if (c := scalar(b)) is not None and float(c) != 0.0:
        return _through(node, a, factor * (float(c) if node.op_type == "Mul" else 1 / float(c)), depth)
    if node.op_type == "Mul" and (c := scalar(a)) is not None:
        return _through(node, b, factor * float(c), depth)
    for side, other in ((a, b), (b, a)):
        if node.op_type != "Mul" or side is None or other is None or not _same_for_rows_and_keys(other, rank(side)):
            continue
        with contextlib.suppress(NotAttention):
            below = _through(node, side, factor, depth)
            if not below.terms and not below.softcap:
                return dataclasses.replace(below, factors=(*below.factors, other))
    text = "scales the scores by something that is not a constant number, nor one number for each head"
    if node.op_type == "Mul" and any(v is not None and v.shape is not None and len(v.shape) > 1 and not _is_one(v) for v in node.inputs):
        text += " (a mask that multiplies, w * m + c * (1 - m), sets hidden scores to c, which Attention cannot: it adds)"
    raise NotAttention(f"{node.op_type} `{node.name}` {text}")


def _is_one(value: ir.Value) -> bool:
    return value.shape is not None and all(d == 1 for d in value.shape[-2:])


def _same_for_rows_and_keys(value: ir.Value, scores_rank: int | None) -> bool:
    """[.., 1, 1] beside scores of four axes, or [1, 1, 1] beside scores [batch * heads, rows, keys]."""
    shape = value.shape
    if shape is None or not 2 <= len(shape) <= 4 or shape[-1] != 1 or shape[-2] != 1:
        return False
    return scores_rank == 4 or (scores_rank == 3 and (len(shape) == 2 or shape[0] == 1))


def _floored(node: ir.Node) -> ir.Value | None:
    """What a Max or Clip keeps above the lowest finite number, and otherwise leaves alone."""
    if node.op_type == "Clip":
        low, high = (node.inputs[k] if len(node.inputs) > k else None for k in (1, 2))
        return node.inputs[0] if high is None and _very_low(low) else None
    return next((x for x, low in (node.inputs, node.inputs[::-1]) if _very_low(low)), None) if len(node.inputs) == 2 else None


def _very_low(value: ir.Value | None) -> bool:
    low = scalar(value)
    return low is not None and float(low) <= -1e30


def _additive(node: ir.Node, factor: float, depth: int) -> AttentionScores:
    first: NotAttention | None = None
    for k, (side, other) in enumerate((node.inputs, node.inputs[::-1])):
        if side is None or other is None or (k == 1 and node.op_type == "Sub"):
            continue
        try:
            below = _through(node, side, factor, depth)
        except NotAttention as reason:
            first = first or reason
            continue
        return below.masked(other, "add", side, factor=-factor if node.op_type == "Sub" else factor)
    raise first or NotAttention(f"{node.op_type} `{node.name}` has no input")


def _where(node: ir.Node, factor: float, depth: int) -> AttentionScores:
    condition, x, y = node.inputs
    sides: tuple[tuple[ir.Value | None, float | None, Literal["keep", "drop"]], ...] = ((x, scalar(y), "keep"), (y, scalar(x), "drop"))
    for scores, fill, kind in sides:
        if fill is None or scores is None or condition is None:
            continue
        below = _through(node, scores, factor, depth)
        limit = -6e4 if scores.dtype == ir.DataType.FLOAT16 else -1e9  # exp(fill - max) must vanish beside any ordinary score, whatever is added
        if float(fill) * factor > limit:
            raise NotAttention(f"Where `{node.name}` fills the scores with {float(fill):g}, which is not low enough for a mask")
        return below.masked(condition, kind, scores, fill=float(fill) * factor)
    raise NotAttention(f"Where `{node.name}` does not choose between the scores and a constant")


def _capped(node: ir.Node, factor: float, depth: int) -> AttentionScores:
    """factor * tanh(s * x): a soft cap of `factor`, whose inner scale s counts as factor * s."""
    below = _through(node, node.inputs[0], 1.0, depth)
    if factor <= 0:
        raise NotAttention(f"Tanh `{node.name}` is multiplied by {factor:g}, which is no soft cap")
    if below.softcap:
        raise NotAttention(f"a second Tanh `{node.name}` between the scores and the softmax")
    return dataclasses.replace(below, scale=below.scale * factor, softcap=factor, masked_before_cap=bool(below.terms))


_ELEMENTWISE = {"Mul": _factor, "Div": _factor, "Add": _additive, "Sub": _additive, "Where": _where, "Tanh": _capped}


def probabilities_of(softmax: ir.Node, scores: AttentionScores) -> Probabilities:
    """Where the output of a Softmax over `scores` goes.

    Raises:
        NotAttention: that is not the product with the value.
    """
    value, nodes, guarded, cleared = softmax.outputs[0], [softmax], False, False
    for _ in range(_DEPTH):
        readers = consumers(value)
        guard = _nan_guard(value, readers)
        if guard is not None:
            nodes += guard
            value, guarded = guard[-1].outputs[0], True
            continue
        mask = _cleared(value, readers, scores.terms)
        if mask is not None:
            nodes.append(mask)
            value, cleared = mask.outputs[0], True
            continue
        product = next((n for n in readers if n.op_type == "MatMul" and n.inputs[0] is value), None)
        if product is not None:
            return Probabilities(product, (*nodes, product), guarded, cleared, value)
        regrouped = [n for n in readers if n.op_type in _REGROUPING and keeps_matrices(n)]
        if len(regrouped) != 1:
            break
        readers = regrouped
        nodes.append(readers[0])
        value = readers[0].outputs[0]
    found = ", ".join(f"{n.op_type} `{n.name}`" for n in consumers(value)) or "nothing"
    raise NotAttention(f"its probabilities do not feed a product with the value (found {found})")


def _nan_guard(value: ir.Value, readers: list[ir.Node]) -> list[ir.Node] | None:
    """Where(IsNaN(p), 0, p): rows without any key become zero."""
    test = next((n for n in readers if n.op_type == "IsNaN"), None)
    if test is None:
        return None
    for node in consumers(test.outputs[0]):
        if node.op_type == "Where" and node.inputs[0] is test.outputs[0] and node.inputs[2] is value:
            zero = constant(node.inputs[1])
            if zero is not None and not np.any(zero):
                return [test, node]
    return None


def _cleared(value: ir.Value, readers: list[ir.Node], terms: tuple[MaskTerm, ...]) -> ir.Node | None:
    """Where(mask, 0, p) by the mask that the scores were filled with last: nothing else may hide keys, or the rest of a row would not add up to 1."""
    if not terms or terms[-1].kind == "add" or any(t.kind != "add" or _may_hide(t) for t in terms[:-1]):
        return None
    zero, kept = (1, 2) if terms[-1].kind == "drop" else (2, 1)
    for node in readers:
        if node.op_type == "Where" and node.inputs[0] is terms[-1].value and node.inputs[kept] is value and scalar(node.inputs[zero]) == 0.0:
            return node
    return None


def _may_hide(term: MaskTerm) -> bool:
    low, fed = fills(term.value, term.factor)
    return fed or any(number < -1e3 for number in low)
