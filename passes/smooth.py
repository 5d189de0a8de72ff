"""smooth: the magnitude of activation channels moves into the weights behind them, so that 8 bits suffice for both."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from graphopt.analysis.activations import LinearInputs
from graphopt.analysis.linear import Linear, Linears
from graphopt.core import Array, Context, Pass
from graphopt.graph import Names, initializer
from graphopt.options import option_error

from ._eligible import numbers
from ._smoothing import Group, groups, scales


@dataclasses.dataclass(frozen=True)
class Smooth(Pass):
    """SmoothQuant (Xiao et al. 2022): x / s and s * W for each channel, s = max|x|^a / max|W|^(1-a), folded into what makes x.

    That is the scale and bias of a norm, or the weight before a gate (up -> Mul -> down). s is rounded to powers of two, by which floats
    multiply without rounding, so that the graph computes the same numbers as before. It stands before `quantize`, and needs samples.

    Args:
        strength: a, from 0 to 1; `search` tries several for each place, and leaves it alone where none lowers the error of the quantized output.
        rows: what follows is `quantize{rows=true}`, so that the error is that of one activation scale for each row.

    Raises:
        PipelineError: a strength that is neither `search` nor a number from 0 to 1.
        SampleError: there are no samples.
    """

    strength: str = "search"
    rows: bool = False

    def __post_init__(self) -> None:
        self._strength()

    def run(self, model: ir.Model, ctx: Context) -> int:
        ctx.require_samples()
        seen = ctx.get(LinearInputs())
        found, refused = groups([x for x in ctx.get(Linears()) if x.node.graph is model.graph])
        for linear, reason in refused:
            ctx.remarks.missed(linear.node.name or "", f"not smoothed: {reason}")
        names, changes = Names(model), 0
        for group in found:
            if group.x not in seen:
                continue
            s, strength, before, after = scales(group, seen[group.x], self._strength(), self.rows)
            where = group.readers[0].node.name or ""
            if (s == 1).all():
                ctx.remarks.missed(where, f"not smoothed: no strength lowers the output error of {before:.4f}")
                continue
            if not ctx.fuel.burn():
                break
            _fold(model, names, group, s)
            ctx.remarks.applied(
                where, f"strength {strength:g}: output error {before:.4f} -> {after:.4f}", strength=strength, before=before, after=after
            )
            changes += 1
        return changes

    def _strength(self) -> float | None:
        if self.strength == "search":
            return None
        try:
            value = float(self.strength)
        except ValueError:
            value = -1.0
        if 0 <= value <= 1:
            return value
        raise option_error(self.name, "strength", "`search` or a number from 0 to 1", self.strength)


def _fold(model: ir.Model, names: Names, group: Group, s: Array) -> None:
    if isinstance(group.source, Linear):
        _rescale(model, names, group.source, 1 / s, axis=1)
        _divide_bias(model, names, group.source, s)
    else:
        for k in range(1, len(group.source.inputs)):
            value = group.source.inputs[k]
            if value is not None:
                _exchange(model, names, value, group.source, numbers(value) / s)
    for reader in group.readers:
        _rescale(model, names, reader, s, axis=0)


def _rescale(model: ir.Model, names: Names, linear: Linear, factor: Array, axis: int) -> None:
    """Rows (axis 0, input features) or columns (axis 1) of W times `factor`; the constant keeps its layout."""
    along = 1 - axis if linear.transposed else axis
    spread = factor[:, None] if along == 0 else factor[None, :]
    reader = linear.path[0] if linear.path else linear.node
    now = reader.inputs[0 if linear.path else 1]  # `linear.weight`, unless the group before this one has exchanged it
    assert now is not None
    _exchange(model, names, now, reader, numbers(now) * spread)


def _divide_bias(model: ir.Model, names: Names, linear: Linear, s: Array) -> None:
    if linear.bias is not None:
        reader = linear.bias_node or linear.node
        old = numbers(linear.bias)
        _exchange(model, names, linear.bias, reader, old / s.reshape([1] * (old.ndim - 1) + [-1]))


def _exchange(model: ir.Model, names: Names, old: ir.Value, reader: ir.Node, array: Array) -> None:
    """`reader` reads `array` instead of the constant `old`, which goes if nothing else reads it."""
    value = initializer(array.astype(np.float32, copy=False), names.fresh(f"{old.name}_smooth"))
    model.graph.register_initializer(value)
    for k in range(len(reader.inputs)):
        if reader.inputs[k] is old:
            reader.replace_input_with(k, value)
    name = str(old.name)
    if not old.uses() and not old.is_graph_output() and name in model.graph.initializers:
        del model.graph.initializers[name]
