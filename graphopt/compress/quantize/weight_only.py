"""quantize{mode=weight-only}: stored weights as blocks of 4 or 8 bits, or as codes of a codebook, between float activations."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from graphopt.analysis.linear import Embedding, Linear, StoredOperands
from graphopt.calibration.moments import input_moments
from graphopt.compress.quantize.awq import scale_inputs
from graphopt.compress.quantize.codebooks import CodebookGrid, kmeans, nf4
from graphopt.compress.quantize.forms import Form, blocked, tabled
from graphopt.compress.quantize.gptq import Inputs, gptq
from graphopt.compress.quantize.grids import Steps, steps
from graphopt.compress.quantize.stored import QuantizeStored, unfit_linear
from graphopt.compress.weights import numbers, tied_table
from graphopt.core.contract import Array, Context
from graphopt.graph.questions import static_dim
from graphopt.run.observe import observable


@dataclasses.dataclass(frozen=True, eq=False)
class WeightOnly(QuantizeStored):
    """`block`: 0 for one scale a row."""

    bits: int
    block: int
    codes: str
    method: str
    _coded: dict[tuple[ir.Value, int], Form] = dataclasses.field(default_factory=dict, init=False)

    def run(self, model: ir.Model, ctx: Context) -> int:
        scaled = 0
        if "awq" in self.method:
            scaled = scale_inputs(model, ctx, lambda x: not x.quantized and self.unfit(x) is None and self._own(x, ctx), self._rounded)
        if self.method != "nearest" or (self.codes == "kmeans" and ctx.samples is not None):
            self._look(model, ctx)
        return scaled + super().run(model, ctx)

    def code(self, operand: Linear | Embedding, source: ir.Value, ctx: Context) -> Form:
        """Codes along the input features; without a look at its inputs where there was none."""
        key = source, _input_axis(operand) if isinstance(operand, Linear) and source is operand.weight else 1
        if key not in self._coded:
            rows = _rows(numbers(source), key[1])
            grid = self._grid(rows, None)
            self._coded[key] = _form(*key, rows, grid, grid.round(rows))
        return self._coded[key]

    def _rounded(self, rows: Array, moments: Array) -> Array:
        grid = self._grid(rows, moments)
        return grid.decode(grid.round(rows))

    def _grid(self, rows: Array, moments: Array | None) -> Steps | CodebookGrid:
        importance = None if moments is None else np.diag(moments)
        if self.codes == "nf4":
            return nf4(rows, self.block)
        if self.codes == "kmeans":
            return kmeans(rows, 1 << self.bits, self.block, importance)
        return steps(
            rows,
            self.block,
            self.bits,
            symmetric=self.symmetric,
            importance=importance,
            moments=moments if self.method == "awq" else None,
        )

    def _look(self, model: ir.Model, ctx: Context) -> None:
        """Codes for every weight of a multiply that fits, by the second moments of its inputs; multiplies of one input share them."""
        groups: dict[ir.Value, dict[ir.Value, Linear]] = {}
        hidden: list[Linear] = []
        for operand in ctx.get(StoredOperands(casts=True)).values():
            if not isinstance(operand, Linear) or operand.quantized or self.unfit(operand) is not None:
                continue
            if not self._own(operand, ctx):
                continue  # the lookup would pay for the errors that the multiply no longer makes
            if operand.batch or operand.trans_x or not observable(model, operand.x) or static_dim(operand.x, -1) is None:
                hidden.append(operand)
                continue
            groups.setdefault(operand.x, {}).setdefault(operand.weight, operand)
        for x, moments in input_moments(ctx, list(groups)):
            if isinstance(moments, str):  # `code` rounds them by themselves
                for linear in groups[x].values():
                    ctx.remarks.missed(linear.node.name or "", f"rounded by its weights alone: {moments}")
                continue
            inputs = Inputs.of(moments) if "gptq" in self.method else None
            for linear in groups[x].values():
                key = linear.weight, _input_axis(linear)
                if key in self._coded:
                    continue
                rows = _rows(numbers(linear.weight), key[1])
                grid = self._grid(rows, moments)
                self._coded[key] = _form(*key, rows, grid, grid.round(rows) if inputs is None else gptq(rows, inputs, grid))
        for linear in hidden:
            if (linear.weight, _input_axis(linear)) not in self._coded:
                ctx.remarks.missed(linear.node.name or "", "rounded to nearest: its input cannot be observed as rows of features")

    def _own(self, linear: Linear, ctx: Context) -> bool:
        """No lookup reads the same numbers."""
        return tied_table(linear, ctx, self.unfit) is None and not any(
            isinstance(e, Embedding) and e.table is linear.weight for e in ctx.get(StoredOperands(casts=True)).values()
        )

    def unfit_linear(self, linear: Linear) -> str | None:
        if self.codes == "linear" and linear.batch and not self.block:
            return "it is a batch of matrices, which wants a block"
        if self.codes != "linear" and self.block and linear.in_features % self.block:
            return f"its {linear.in_features} input features are no multiple of block={self.block}"
        return unfit_linear(linear, integer=False)

    def unfit_table(self, e: Embedding) -> str | None:
        if self.block and e.width % self.block:
            return f"rows of {e.width} numbers are no multiple of block={self.block}"
        return super().unfit_table(e)


def _input_axis(linear: Linear) -> int:
    return len(linear.batch) + (1 if linear.transposed else 0)


def _rows(array: Array, axis: int) -> Array:
    """[..., in] as [rows, in], float32."""
    return np.ascontiguousarray(np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis]), dtype=np.float32)


def _form(value: ir.Value, axis: int, rows: Array, grid: Steps | CodebookGrid, codes: Array) -> Form:
    assert value.const_value is not None
    shape = tuple(value.const_value.shape.numpy())
    return blocked(shape, axis, rows, grid, codes) if isinstance(grid, Steps) else tabled(shape, axis, rows, grid, codes)
