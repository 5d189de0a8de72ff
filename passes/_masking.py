"""The mask of an attention in the words of the Attention operator: one additive tensor with an axis for the query rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.analysis.attention import AttentionFacts
from graphopt.analysis.fills import LOWEST, fills, may_be_too_low
from graphopt.analysis.scores import MaskTerm
from graphopt.graph import producer, scalar
from graphopt.rewrite import Builder


def additive_mask(op: Builder, f: AttentionFacts, rows: ir.Value, axis: int) -> ir.Value | None:
    """The sum of all mask terms as one additive (or, for an Attention node that had it so, boolean) mask. `rows`: a value whose axis `axis`
    runs along the query rows."""
    if not f.terms:
        return None
    if f.anchor.op_type == "Attention":
        return f.terms[0].value
    key = ("mask", f.clamped, *((t.value, t.kind, t.factor, t.fill) for t in f.terms))
    dtype = f.output.dtype or ir.DataType.FLOAT
    total: ir.Value = op.shared(key, lambda: _sum(op, [_four_axes(op, _additive(op, t, dtype, f.clamped), t, f, rows) for t in f.terms]))
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


def _additive(op: Builder, term: MaskTerm, dtype: ir.DataType, clamped: bool) -> ir.Value:
    if term.kind != "add":
        return _choice(op, term.value, 0.0, term.fill, dtype, keep=term.kind == "keep", clamped=clamped)
    value, node = term.value, producer(term.value, "Where")
    if node is not None and term.factor == 1.0:  # Where(condition, 0, low) as exporters spell it: lower the constant, not the tensor
        x, y = scalar(node.inputs[1]), scalar(node.inputs[2])
        if x == 0.0 and y is not None and node.inputs[0] is not None:
            return value if y >= LOWEST else _choice(op, node.inputs[0], 0.0, float(y), dtype, keep=True, clamped=clamped)
        if y == 0.0 and x is not None and node.inputs[0] is not None:
            return value if x >= LOWEST else _choice(op, node.inputs[0], 0.0, float(x), dtype, keep=False, clamped=clamped)
    if term.factor != 1.0:
        value = op.Mul(value, op.const(np.array(term.factor, dtype.numpy()), "factor"))
    return _clamped(op, value, term, dtype, clamped)


def _choice(op: Builder, condition: ir.Value, zero: float, fill: float, dtype: ir.DataType, keep: bool, clamped: bool) -> ir.Value:
    finite = fill if np.isneginf(fill) and not clamped else max(fill, _lowest(dtype))
    low, nought = op.const(np.array(finite, dtype.numpy()), "masked"), op.const(np.array(zero, dtype.numpy()), "zero")
    out: ir.Value = op.Where(condition, nought, low) if keep else op.Where(condition, low, nought)
    return out


def _lowest(dtype: ir.DataType) -> float:
    return LOWEST if dtype != ir.DataType.FLOAT16 else float(np.finfo(np.float16).min)


def _clamped(op: Builder, value: ir.Value, term: MaskTerm, dtype: ir.DataType, always: bool) -> ir.Value:
    """`value` (`term.value` times its factor), not below the limit, if it may be; what holds -inf keeps it, unless the scores are floored."""
    if not always and not may_be_too_low(term.value, term.factor):
        return value
    finite: ir.Value = op.Max(value, op.const(np.array(_lowest(dtype), dtype.numpy()), "lowest"))
    if always or not fills(term.value)[1]:
        return finite
    least = op.const(np.array(np.finfo(dtype.numpy()).min, dtype.numpy()), "least")
    out: ir.Value = op.Where(op.Less(value, least), value, finite)  # a caller may feed -inf, which is "no key", not "a very low score"
    return out
