"""The mask of an attention in the words of the Attention operator: one additive tensor with an axis for the query rows."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.analysis.attention import Arrangement, AttentionFacts
from graphopt.analysis.scores import MaskTerm
from graphopt.graph.attention_node import LOWEST, fills, is_too_low, may_be_too_low
from graphopt.graph.questions import producer, same_dim, scalar
from graphopt.rewrite.builder import Builder


@dataclasses.dataclass(frozen=True)
class Rows:
    """The value that query or key are read from, and which axis of what Attention reads runs along the rows."""

    choice: Arrangement
    axis: int

    @property
    def value(self) -> ir.Value:
        return self.choice.step.value

    @property
    def place(self) -> int:
        """The axis of `value` that runs along the rows."""
        return self.choice.perm[self.axis]

    @property
    def size(self) -> Any:
        if self.choice.regrouped and self.choice.shape is not None:
            return self.choice.shape[self.axis]
        return self.value.shape[self.place] if self.value.shape is not None else None


def additive_mask(op: Builder, f: AttentionFacts, queries: Rows, keys: Rows) -> ir.Value | None:
    """The sum of all mask terms as one additive (or, for an Attention node that had it so, boolean) mask."""
    if not f.terms:
        return None
    if f.anchor.op_type == "Attention":
        return f.terms[0].value
    key = ("mask", f.clamped, *((t.value, t.kind, t.factor, t.fill) for t in f.terms))
    return _expanded(op, op.shared(key, lambda: _total(op, f, queries)), f, queries, keys)


def _total(op: Builder, f: AttentionFacts, queries: Rows) -> ir.Value:
    """All terms in the order in which they meet the scores: a summand joins what was there, and a fill takes its place.

    So a key that two summands hide at the lowest number is at -inf, or below what one of them hides, and one that two fills hide is not.
    """
    dtype = f.output.dtype or ir.DataType.FLOAT
    total: ir.Value | None = None
    for adds, run in itertools.groupby(f.terms, key=lambda t: t.kind == "add"):
        terms = list(run)
        if adds:
            parts = [_four_axes(op, _additive(op, t, dtype, f.clamped), t, f, queries) for t in terms]
            total = functools.reduce(op.Add, parts if total is None else [total, *parts])
            continue
        seen = [_four_axes(op, t.value if t.kind == "keep" else op.Not(t.value), t, f, queries) for t in terms]
        fill = terms[0].fill if np.isneginf(terms[0].fill) else -np.finfo(np.float64).max
        total = _choice(op, functools.reduce(op.And, seen), fill, dtype, True, f.clamped, total)
    assert total is not None
    if f.clamped and len(f.terms) > 1:
        total = op.Max(total, op.const(np.array(_lowest(dtype), dtype.numpy()), "lowest"))
    return total


def _four_axes(op: Builder, mask: ir.Value, term: MaskTerm, f: AttentionFacts, queries: Rows) -> ir.Value:
    """A mask for scores [batch * heads, rows, keys] or [batch / windows, windows, heads, rows, keys], for scores of four axes."""
    shape = term.value.shape
    size = 0 if shape is None else len(shape)
    if size == 3 and term.scores_rank == 3 and shape is not None and shape[0] != 1:
        tail = op.Shape(mask, start=1, end=3)
        return op.Reshape(mask, op.Concat(op.ints(-1, f.heads, name="heads"), tail, axis=0))
    if size == 5 and shape is not None and isinstance(shape[1], int):
        batch = queries.choice.perm[0]
        count = op.Div(op.Shape(queries.value, start=batch, end=batch + 1), op.ints(shape[1], name="windows"))
        every = op.Expand(mask, op.Concat(count, op.const(np.ones(4, np.int64), "ones"), axis=0))
        tail = op.Shape(mask, start=2, end=5)
        return op.Reshape(every, op.Concat(op.ints(-1, name="rest"), tail, axis=0))
    return mask


def _expanded(op: Builder, mask: ir.Value, f: AttentionFacts, queries: Rows, keys: Rows) -> ir.Value:
    """A mask that is not proved to have an axis for all query rows and all keys, spelled for every one of them: runtimes ask for both."""
    missing = [not any(same_dim(_size(t, axis), rows.size) for t in f.terms) for axis, rows in ((-2, queries), (-1, keys))]
    if not any(missing):
        return mask

    def build() -> ir.Value:
        numbers = [rows.size if wanted else 1 for wanted, rows in zip(missing, (queries, keys), strict=True)]
        if all(isinstance(n, int) for n in numbers):
            return op.Expand(mask, op.const(np.array(numbers, np.int64), "rows"))
        sizes = [_count(op, rows) if wanted else op.ints(1, name="rows") for wanted, rows in zip(missing, (queries, keys), strict=True)]
        return op.Expand(mask, op.Concat(*sizes, axis=0))

    return op.shared(("expand", mask, str(queries.size), str(keys.size), *missing), build)


def _size(term: MaskTerm, axis: int) -> Any:
    shape = term.value.shape
    return shape[axis] if shape is not None and len(shape) >= -axis else 1


def _count(op: Builder, rows: Rows) -> ir.Value:
    if isinstance(rows.size, int):
        return op.ints(rows.size, name="rows")
    return op.Shape(rows.value, start=rows.place, end=rows.place + 1)


def _additive(op: Builder, term: MaskTerm, dtype: ir.DataType, clamped: bool) -> ir.Value:
    value, node = term.value, producer(term.value, "Where")
    if node is not None and term.factor == 1.0:  # Where(condition, 0, low) as exporters spell it: lower the constant, not the tensor
        x, y = scalar(node.inputs[1]), scalar(node.inputs[2])
        for nought, low, keep in ((x, y, True), (y, x, False)):
            if nought == 0.0 and low is not None and node.inputs[0] is not None:
                return _choice(op, node.inputs[0], float(low), dtype, keep=keep, clamped=clamped) if is_too_low(low) else value
    if term.factor != 1.0:
        value = op.Mul(value, op.const(np.array(term.factor, dtype.numpy()), "factor"))
    return _clamped(op, value, term, dtype, clamped)


def _choice(op: Builder, condition: ir.Value, fill: float, dtype: ir.DataType, keep: bool, clamped: bool, before: ir.Value | None = None) -> ir.Value:
    """The fill, or what was there before (0)."""
    finite = fill if np.isneginf(fill) and not clamped else max(fill, _lowest(dtype))
    low = op.const(np.array(finite, dtype.numpy()), "masked")
    nought = op.const(np.array(0.0, dtype.numpy()), "zero") if before is None else before
    return op.Where(condition, nought, low) if keep else op.Where(condition, low, nought)


def _lowest(dtype: ir.DataType) -> float:
    return LOWEST if dtype != ir.DataType.FLOAT16 else float(np.finfo(np.float16).min)


def _clamped(op: Builder, value: ir.Value, term: MaskTerm, dtype: ir.DataType, always: bool) -> ir.Value:
    """`value` (`term.value` times its factor), not below the limit, if it may be; what holds -inf keeps it, unless the scores are floored."""
    if not always and not may_be_too_low(term.value, term.factor):
        return value
    finite: ir.Value = op.Max(value, op.const(np.array(_lowest(dtype), dtype.numpy()), "lowest"))
    lows, fed = fills(term.value, term.factor)
    if always or not (fed or sum(map(is_too_low, lows)) > 1):
        return finite
    least = op.const(np.array(np.finfo(dtype.numpy()).min, dtype.numpy()), "least")
    return op.Where(op.Less(value, least), value, finite)  # a caller may feed -inf, and two lowest numbers add up to it: "no key", not "very low"
