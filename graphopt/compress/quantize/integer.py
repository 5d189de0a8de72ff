"""quantize{mode=dynamic} and {mode=static}: int8 weights between activations on a grid of 8 bits, so that products are those of integers."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from graphopt.analysis.linear import Embedding, Linear, StoredOperands
from graphopt.calibration.ranges import Ranges
from graphopt.compress.quantize.activation_grid import EVEN, calibrated, even_rows, on_grid, row_scale, wants_rows
from graphopt.compress.quantize.forms import Blocked
from graphopt.compress.quantize.stored import LONGEST_SUM, QuantizeMatch, QuantizeStored, product
from graphopt.compress.select import passed_over
from graphopt.compress.weights import numbers, tied_table
from graphopt.core.contract import Array, Context
from graphopt.graph.questions import attr, constant, producer
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.match import Miss

REDUCED = 64  # codes up to this size are safe where a CPU adds two products with uint8 in 16 bits
_CHUNK = 1 << 22  # elements that are coded at a time, so that a large table needs little memory beside its codes
_DOMINATED = 0.25  # relative error of a channel beside its largest weight, above which one input row rules its scale


@dataclasses.dataclass(frozen=True, eq=False)
class Integers(QuantizeStored):
    """`ranges`: what covers static activations; None: their scale is measured at run time."""

    per_channel: bool
    reduce_range: bool
    rows: str
    ranges: Ranges | None

    def run(self, model: ir.Model, ctx: Context) -> int:
        mark = len(ctx.remarks)
        changes = super().run(model, ctx)
        _warn_of_rulers(ctx, mark)
        return changes

    def match(self, node: ir.Node, ctx: Context) -> QuantizeMatch | Miss | None:
        found = super().match(node, ctx)
        if not isinstance(found, QuantizeMatch) or node.op_type == "Gather":
            return found
        if self.ranges is None:
            return dataclasses.replace(found, rows=wants_rows(node, self.rows, ctx))
        assert node.inputs[0] is not None
        grid = calibrated(node.inputs[0], self.ranges, ctx)
        return Miss(node, f"stays float: {grid}") if isinstance(grid, str) else dataclasses.replace(found, activation=grid)

    def match_decoded(self, operand: Linear | Embedding) -> QuantizeMatch | Miss | None:
        """A multiply of a float activation with a weight that is stored as integers: only the activation is still to be quantized."""
        if isinstance(operand, Embedding) or producer(operand.x, "DequantizeLinear") is not None:
            return None
        grid = operand.grid
        if grid is None or grid.block or operand.weight.dtype != ir.DataType.INT8 or grid.axis not in (None, operand.channel_axis):
            return Miss(operand.node, "stays float: its integer weight is not int8 with one scale for each output, or for all")
        reason = passed_over(operand.node, self.include, self.exclude)
        if reason is not None:
            return Miss(operand.node, f"stays float: {reason}")
        if operand.in_features > LONGEST_SUM or operand.x.dtype != ir.DataType.FLOAT:
            return Miss(operand.node, "stays float: its input is not FLOAT, or its sums may leave 32 bits")
        if self.reduce_range and np.abs(numbers(operand.weight).astype(np.int16)).max(initial=0) > REDUCED:
            return Miss(operand.node, f"stays float: reduce-range=true, and its stored codes leave [-{REDUCED}, {REDUCED}]")
        return QuantizeMatch((operand.node,), (operand.node.outputs[0],), operand.weight, None)

    def code(self, operand: Linear | Embedding, source: ir.Value, ctx: Context) -> Blocked:
        if isinstance(operand, Embedding):
            linears = (x for x in ctx.get(StoredOperands(casts=True)).values() if isinstance(x, Linear) and not x.quantized)
            multiplied = self.reduce_range and any(x.weight is source or tied_table(x, ctx, self.unfit) is operand for x in linears)
            return encode(numbers(source), 0, symmetric=self.symmetric, reduced=multiplied)
        if source is not operand.weight:  # the row scales of the table are the channel scales of the multiply
            return encode(numbers(source), 0, symmetric=self.symmetric, reduced=self.reduce_range)
        symmetric = self.symmetric or bool(operand.batch)  # runtimes fail on a zero point for each channel of a batch of matrices
        axis = operand.channel_axis
        return encode(numbers(source), axis, per_channel=self.per_channel, symmetric=symmetric, reduced=self.reduce_range)

    def multiply(self, op: Builder, m: QuantizeMatch, weight: ir.Value) -> ir.Value:
        node, x, graph = m.nodes[0], m.nodes[0].inputs[0], m.nodes[0].graph
        assert x is not None
        grid = EVEN if m.rows else m.activation
        back = row_scale(op, x, graph) if m.rows else None
        source = even_rows(op, x, graph) if m.rows else x
        rounded = op.shared(("activation", source, graph), lambda: _measured(op, source) if grid is None else on_grid(op, source, grid))
        result = product(op, m, rounded, weight, added=not m.rows)
        return result if back is None else _plus(op, op.Mul(result, back), node)


def _measured(op: Builder, x: ir.Value) -> ir.Value:
    """x rounded to a grid that is measured at run time."""
    value: ir.Value = op.DequantizeLinear(*op.node("DynamicQuantizeLinear", (x,), _outputs=3))
    return value


def _plus(op: Builder, product: ir.Value, gemm: ir.Node) -> ir.Value:
    """beta * C of a Gemm, added behind the scales of the rows."""
    third = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    if third is None:
        return product
    beta, array = attr(gemm, "beta", 1.0), constant(third)
    if beta != 1.0:
        factor = np.array(beta, np.float32)
        third = op.Mul(third, op.const(factor, "beta")) if array is None else op.const(array * factor, f"{third.name}_scaled")
    value: ir.Value = op.Add(product, third)
    return value


def _warn_of_rulers(ctx: Context, mark: int) -> None:
    """One scale for each output cannot help where one input row is much larger than the others: they round to nothing."""
    for remark in ctx.remarks.since(mark):
        facts = remark.facts
        if remark.kind == "applied" and facts.get("op", "Gather") != "Gather" and facts.get("error_without_largest", 0) > _DOMINATED:
            text = f"one input row of `{facts['weight']}` rules the scales: without it, a channel is {facts['error_without_largest']:.0%} off"
            ctx.remarks.warning(remark.node, text, **facts)


def encode(array: Array, axis: int, *, per_channel: bool = True, symmetric: bool = True, reduced: bool = False) -> Blocked:
    """Round to int8: codes in [-127, 127] around zero, or (not symmetric) in [-128, 127] with a zero point.

    Args:
        array: numbers, finite and not empty.
        axis: runs along the channels; each gets its own scale, a channel of zeros the scale 1.
        per_channel: False gives one scale for all.
        reduced: codes in [-64, 64] in both cases: then two products with uint8 add up within 16 bits (2 * 255 * 64 < 2^15).

    Returns:
        int8 codes. Its facts are the largest ||w - decoded|| / ||w|| of any channel, also where all share one scale (with white inputs, the relative
        error that it brings to an output); which channel that is; and the largest such error of a channel if its largest weight is left out.
    """
    codes_from, codes_to = (-REDUCED, REDUCED) if reduced else (-127 if symmetric else -128, 127)
    rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
    scale, zero = _grid(rows if per_channel else rows.reshape(1, -1), symmetric, codes_from, codes_to)
    scales, zeros = (np.broadcast_to(x, len(rows)) for x in (scale, zero))
    codes, relative, rest = _rounded(rows, scales, zeros, codes_from, codes_to)
    codes = np.moveaxis(codes.reshape(array.shape[axis], *array.shape[:axis], *array.shape[axis + 1 :]), 0, axis)
    if not per_channel:
        scale, zero = scale[0], zero[0]
    worst, where = int(relative.argmax()), axis if per_channel else None
    told = {"worst_error": round(float(relative[worst]), 6), "worst_channel": worst, "error_without_largest": round(float(rest.max()), 6)}
    return Blocked(np.ascontiguousarray(codes), where, 0, {"axis": where, **told}, np.asarray(scale), None if symmetric else np.asarray(zero))


def _rounded(rows: Array, scales: Array, zeros: Array, low: int, high: int) -> tuple[Array, Array, Array]:
    """int8 codes of rows [channels, n], and the relative error of each row, with all its numbers and without the largest."""
    codes = np.empty(rows.shape, np.int8)
    error, norm, rest, left = (np.empty(len(rows), np.float64) for _ in range(4))
    step = max(1, _CHUNK // rows.shape[1])
    for k in range(0, len(rows), step):
        now = slice(k, k + step)
        part, s, z = rows[now].astype(np.float32), scales[now, None], zeros[now, None].astype(np.float32)
        code = np.clip(np.rint(part / s) + z, low, high)
        codes[now] = code.astype(np.int8)
        off, weight = np.square((code - z) * s - part), np.square(part)
        error[now], norm[now] = off.sum(1), weight.sum(1)
        top = weight.argmax(1)[:, None]
        rest[now] = error[now] - np.take_along_axis(off, top, 1)[:, 0]
        left[now] = norm[now] - np.take_along_axis(weight, top, 1)[:, 0]
    return codes, _ratio(error, norm), _ratio(rest, left)


def _grid(rows: Array, symmetric: bool, codes_from: int, codes_to: int) -> tuple[Array, Array]:
    """Scale (float32) and zero point (int8) of each row."""
    low, high = np.minimum(rows.min(1), 0).astype(np.float32), np.maximum(rows.max(1), 0).astype(np.float32)
    width = np.maximum(-low, high) / codes_to if symmetric else (high - low) / (codes_to - codes_from)
    scale = np.where(width < np.finfo(np.float32).tiny, 1, width).astype(np.float32)
    zero = np.zeros(len(rows)) if symmetric else np.clip(np.rint(codes_from - low / scale), codes_from, codes_to)
    return scale, zero.astype(np.int8)


def _ratio(part: Array, whole: Array) -> Array:
    """sqrt(part / whole), 0 where there is nothing."""
    ratio: Array = np.sqrt(np.maximum(part, 0) / np.where(whole > 0, whole, 1))
    return np.where(whole > 0, ratio, 0)
