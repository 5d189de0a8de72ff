"""Einsum as what it is: a (batched) matrix product, an elementwise product, a sum or a Transpose.

By algebra on the labels of the equation. A label of both operands is a batch (it stands in the result) or contracted (it does not); a label of one
operand is a row, a column, or summed first. Several labels of a kind are one axis of the product. Two things are left to Einsum, with the
reason: a diagonal (a label twice in one operand), and sizes that a Reshape cannot name. Einsum broadcasts an axis of size 1; so does the batch of
a product, but not the axis that it sums over: that one must be proved to be as long in both operands.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from graphopt.graph.questions import attr, is_constant, rank, same_dim
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.match import Miss

from ._algebra import Rewritten

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_TERM = re.compile(r"([A-Za-z]*)(\.\.\.)?([A-Za-z]*)")


class _Left(Exception):
    """Why an Einsum stays."""


@dataclasses.dataclass(frozen=True)
class _Term:
    """A value, the label of each of its axes, and their sizes by label."""

    value: ir.Value
    labels: tuple[str, ...]
    sizes: Mapping[str, object]

    def now(self, value: ir.Value, labels: Sequence[str]) -> _Term:
        return dataclasses.replace(self, value=value, labels=tuple(labels))


def einsum(node: ir.Node, op: Builder) -> Rewritten:
    """One operand: sums and a Transpose; two: a product, with Transposes and Reshapes around it."""
    try:
        terms, out = _parse(node)
        if len(terms) > 2:
            raise _Left(f"it multiplies {len(terms)} operands; a product has two")
        elsewhere = [{*out, *(label for other in terms if other is not term for label in other.labels)} for term in terms]
        reduced = [_summed(op, term, tuple(i for i in term.labels if i in kept)) for term, kept in zip(terms, elsewhere, strict=True)]
        if len(reduced) == 1:
            made = _transposed(op, reduced[0], out).value
            return [op.Identity(made) if made is terms[0].value else made]
        first, second = _oriented(reduced[0], reduced[1], out)
        if not set(first.labels) & set(second.labels) - set(out):
            return [op.Mul(_spread(op, first, out), _spread(op, second, out))]
        return [_product(op, first, second, out)]
    except _Left as reason:
        return Miss(node, f"Einsum `{attr(node, 'equation', '')}` stays, and no pass reads it: {reason}")


# ---- the equation -------------------------------------------------------------------------------------------------------------------------


def _parse(node: ir.Node) -> tuple[list[_Term], tuple[str, ...]]:
    """The operands and the labels of the result, with a label of its own for each axis that an ellipsis stands for."""
    equation = str(attr(node, "equation", "")).replace(" ", "")
    left, arrow, right = equation.partition("->")
    texts = left.split(",")
    if len(texts) != len(node.inputs):
        raise _Left(f"it has {len(node.inputs)} operands")
    terms = [_term(text, value) for text, value in zip(texts, node.inputs, strict=True)]
    twice = next((label for term in terms for label in term.labels if term.labels.count(label) > 1), None)
    if twice is not None:
        raise _Left(f"`{twice}` stands twice in one operand, which takes a diagonal")
    known = [label for term in terms for label in term.labels]
    spread = sorted({label for label in known if label.startswith(".")}, key=lambda label: -int(label[1:]))
    if not arrow:
        once = [label for label in known if known.count(label) == 1 and not label.startswith(".")]
        if not (all(map(str.islower, once)) or all(map(str.isupper, once))):
            raise _Left("it does not spell its result, and runtimes do not agree on the order of small and capital letters")
        return terms, (*spread, *sorted(once))
    found = _TERM.fullmatch(right)
    if found is None or (spread and found[2] is None):
        raise _Left("its result is not a list of labels that its operands have")
    out = (*found[1], *(spread if found[2] else ()), *found[3])
    if len(set(out)) < len(out) or set(out) - set(known):
        raise _Left("its result is not a list of labels that its operands have")
    return terms, out


def _term(text: str, value: ir.Value | None) -> _Term:
    found, size = _TERM.fullmatch(text), rank(value)
    if found is None or value is None or size is None:
        raise _Left("the rank of an operand is not known")
    more = size - len(found[1]) - len(found[3])
    if more < 0 or (more > 0 and found[2] is None):
        raise _Left(f"`{value.name}` has {size} axes, and not those of `{text}`")
    labels = (*found[1], *(f".{k}" for k in reversed(range(more))), *found[3])
    return _Term(value, labels, dict(zip(labels, value.shape or (), strict=True)))


# ---- operands -----------------------------------------------------------------------------------------------------------------------------


def _summed(op: Builder, term: _Term, kept: tuple[str, ...]) -> _Term:
    """Without the axes that only this operand has and the result has not."""
    if kept == term.labels:
        return term
    if term.value.dtype in _HALF:
        raise _Left("a sum over one operand alone may leave the range of 16 bits")
    axes = [k for k, label in enumerate(term.labels) if label not in kept]
    return term.now(op.ReduceSum(term.value, op.ints(*axes, name="axes"), keepdims=0), kept)


def _transposed(op: Builder, term: _Term, labels: Sequence[str]) -> _Term:
    if term.labels == tuple(labels):
        return term
    return term.now(op.Transpose(term.value, perm=[term.labels.index(i) for i in labels]), labels)


def _spread(op: Builder, term: _Term, out: Sequence[str]) -> ir.Value:
    """With an axis of size 1 for each label of the result that it lacks."""
    value = _transposed(op, term, [i for i in out if i in term.labels]).value
    missing = [k for k, label in enumerate(out) if label not in term.labels]
    return op.Unsqueeze(value, op.ints(*missing, name="axes")) if missing else value


def _oriented(a: _Term, b: _Term, out: Sequence[str]) -> tuple[_Term, _Term]:
    """A product commutes: a stored weight comes second, else what gives the rows first."""

    def wrong(first: _Term, second: _Term) -> tuple[bool, bool]:
        order = [out.index(i) for i in (*_own(first, second, out), *_own(second, first, out))]
        return is_constant(first.value), order != sorted(order)

    return (a, b) if wrong(a, b) <= wrong(b, a) else (b, a)


def _own(term: _Term, other: _Term, out: Sequence[str]) -> list[str]:
    return [i for i in out if i in term.labels and i not in other.labels]


# ---- the product --------------------------------------------------------------------------------------------------------------------------


def _product(op: Builder, a: _Term, b: _Term, out: tuple[str, ...]) -> ir.Value:
    """[batch, rows, contracted] @ [batch, contracted, columns]; rows stay axes of their own, the other two are one axis each."""
    summed = [i for i in a.labels if i in b.labels and i not in out]
    batch, rows, columns = _lead(a, b, out, summed)
    for label in summed:
        if not same_dim(a.sizes[label], b.sizes[label]):
            raise _Left(f"`{label}` is not proved to be as long in both operands")
    lead = [[i] for i in batch]
    beside: list[list[str]] = [[]] * (len(rows) - 1) if batch else []  # the batch of the second operand stands beside that of the first
    left = _grouped(op, a, [*lead, *([[i] for i in rows] or [[]]), summed])
    right = _grouped(op, b, [*lead, *beside, summed, columns])
    made = op.MatMul(left, right)
    count = len(batch) + max(len(rows), 1)  # of its axes before the columns
    if len(columns) > 1:
        widths = [n for label in columns if isinstance(n := b.sizes[label], int) and n]
        if len(widths) < len(columns):
            raise _Left(f"the sizes of {', '.join(columns)} are not constant")
        made = op.Reshape(made, op.ints(*[0] * count, *widths, name="shape"))
    gone = [*([] if rows else [len(batch)]), *([] if columns else [count])]
    if gone:
        made = op.Squeeze(made, op.ints(*gone, name="axes"))
    return _transposed(op, a.now(made, (*batch, *rows, *columns)), out).value


def _lead(a: _Term, b: _Term, out: tuple[str, ...], summed: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Batch, rows and columns; the first two in the order of the result, or of the first operand where that saves a Transpose."""
    columns, orders = _own(b, a, out), []
    for source in (out, tuple(i for i in a.labels if i in out)):
        batch, rows = [i for i in source if i in b.labels and i in a.labels], [i for i in source if i in a.labels and i not in b.labels]
        moves = (a.labels != (*batch, *rows, *summed)) + (out != (*batch, *rows, *columns))
        orders.append((moves, batch, rows))
    _, batch, rows = min(orders, key=lambda order: order[0])
    return batch, rows, columns


def _grouped(op: Builder, term: _Term, groups: Sequence[Sequence[str]]) -> ir.Value:
    """One axis for each group of labels; an empty group is an axis of size 1."""
    flat = [label for group in groups for label in group]
    value = _transposed(op, term, flat).value
    full = [group for group in groups if group]
    if len(full) < len(flat):
        value = op.Reshape(value, op.ints(*_target(term, full, flat), name="shape"))
    empty = [k for k, group in enumerate(groups) if not group]
    return op.Unsqueeze(value, op.ints(*empty, name="axes")) if empty else value


def _target(term: _Term, groups: Sequence[Sequence[str]], flat: Sequence[str]) -> list[int]:
    """Of a Reshape that merges groups of neighbours. A 0 copies an axis at its place; a -1 beside it would fail where that axis is empty."""
    target = []
    for k, group in enumerate(groups):
        sizes = [term.sizes[label] for label in group]
        numbers = [n for n in sizes if isinstance(n, int)]
        if len(numbers) == len(sizes) and all(numbers):
            target.append(math.prod(numbers))
        else:
            target.append(0 if flat[: k + 1] == [i for g in groups[: k + 1] for i in g] and len(group) == 1 else -1)
    if target.count(-1) > 1 or (-1 in target and 0 in target):
        raise _Left(f"the sizes of {', '.join(i for g in groups if len(g) > 1 for i in g)} are not constant")
    return target
