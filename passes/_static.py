"""Activations on a fixed grid: QuantizeLinear and DequantizeLinear with constants that calibration found."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from graphopt.analysis.ranges import Ranges, grid
from graphopt.core import Context
from graphopt.rewrite import Builder
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
    scale, zero = grid(found.low, found.high)
    return ActivationGrid(scale, zero, found.seen)


def on_grid(op: Builder, x: ir.Value, g: ActivationGrid) -> ir.Value:
    """x, float32 of any shape, rounded to the grid."""
    scale, zero = op.const(np.array(g.scale, np.float32), f"{x.name}_scale"), op.const(np.array(g.zero_point, np.uint8), f"{x.name}_zero_point")
    value: ir.Value = op.DequantizeLinear(op.QuantizeLinear(x, scale, zero), scale, zero)
    return value
