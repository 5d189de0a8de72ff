"""Activations on a fixed grid: QuantizeLinear and DequantizeLinear with constants that calibration found."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from graphopt.calibration.activations import LinearInputs
from graphopt.calibration.enough import too_few
from graphopt.calibration.ranges import Ranges, grid
from graphopt.core.contract import Context
from graphopt.graph.questions import attr
from graphopt.rewrite.builder import Builder
from graphopt.run.observe import observable

METHODS = ("minmax", "percentile", "mse", "entropy")


@dataclasses.dataclass(frozen=True)
class ActivationGrid:
    """(code - zero_point) * scale, code a uint8; `low` and `high`: what it covers of the values `seen`."""

    scale: float
    zero_point: int
    seen: tuple[float, float]

    @property
    def low(self) -> float:
        return -self.zero_point * self.scale

    @property
    def high(self) -> float:
        return (255 - self.zero_point) * self.scale


def calibrated(x: ir.Value, ranges: Ranges, ctx: Context) -> ActivationGrid | str:
    """The grid of an activation, or why calibration gave none."""
    if not observable(ctx.model, x):
        return f"its input `{x.name}` is computed inside a subgraph, where calibration cannot see it; mode=dynamic quantizes it at run time"
    found = ctx.get(ranges).get(x)
    if found is None:
        return f"its input `{x.name}` was empty on every sample"
    if not found.finite:
        return f"its input `{x.name}` holds numbers on the samples that are not finite"
    few = too_few(found.rows, 1)
    if few is not None:
        return f"{few}; mode=dynamic needs none"
    scale, zero = grid(found.low, found.high)
    return ActivationGrid(scale, zero, found.seen)


def on_grid(op: Builder, x: ir.Value, g: ActivationGrid) -> ir.Value:
    """x, float32 of any shape, rounded to the grid."""
    name = x.name or "even"  # rows that were just divided have none yet
    scale, zero = op.const(np.array(g.scale, np.float32), f"{name}_scale"), op.const(np.array(g.zero_point, np.uint8), f"{name}_zero_point")
    value: ir.Value = op.DequantizeLinear(op.QuantizeLinear(x, scale, zero), scale, zero)
    return value


EVEN = ActivationGrid(1 / 127, 128, (-1.0, 1.0))  # of rows whose largest magnitude is 1: fixed, so that no row depends on the rest of its batch
_TINY = float(np.finfo(np.float32).tiny)  # a row of zeros is divided by it and stays zero
_UNEVEN = 1.5  # rows=auto: rounding error of one scale for all, in that of one scale for each row


def wants_rows(node: ir.Node, rows: str, ctx: Context) -> bool:
    """Whether each row of the activation of a MatMul or Gemm gets a scale of its own; `auto` asks the samples, and gives it where they are silent.

    Raises:
        SampleError: `auto` without samples.
    """
    x = node.inputs[0]
    if rows == "false" or attr(node, "transA", 0) or x is None or x.shape is None or len(x.shape) < 2:
        return False
    if rows == "true":
        return True
    seen = ctx.get(LinearInputs()).get(x)
    return seen is None or too_few(seen.seen, 1) is not None or seen.unevenness > _UNEVEN


def row_scale(op: Builder, x: ir.Value, graph: object) -> ir.Value:
    """max |x| over the last axis, [..., 1], made once for all readers in a graph."""

    def build() -> ir.Value:
        largest = op.ReduceMax(op.Abs(x), op.const(np.array([-1], np.int64), "axes"), keepdims=1)
        value: ir.Value = op.Max(largest, op.const(np.array(_TINY, np.float32), "tiny"))
        return value

    return op.shared(("row scale", x, graph), build)


def even_rows(op: Builder, x: ir.Value, graph: object) -> ir.Value:
    """x with every row divided by its largest magnitude."""
    return op.shared(("even rows", x, graph), lambda: op.Div(x, row_scale(op, x, graph)))
