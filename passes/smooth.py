"""smooth: the magnitude of activation channels moves into the weights behind them, so that 8 bits suffice for both."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from graphopt.analysis.linear import Linears
from graphopt.calibration.activations import LinearInputs
from graphopt.calibration.enough import too_few
from graphopt.compress.quantize.folding import fold
from graphopt.compress.quantize.smoothing import ChannelGroup, groups, scales
from graphopt.core.contract import Context, Pass
from graphopt.core.options import option_error
from graphopt.rewrite.insert import Inserter


@dataclasses.dataclass(frozen=True)
class Smooth(Pass):
    """SmoothQuant (Xiao et al. 2022): x / s and s * W for each channel, s = max|x|^a / max|W|^(1-a), folded into what makes x.

    That is the scale and bias of a norm, or the weight before a gate (up -> Mul -> down). s is rounded to powers of two, by which floats
    multiply without rounding, so that the graph computes the same numbers as before. It stands before `quantize`, and needs samples.

    Args:
        strength: a, from 0 to 1; `search` tries several for each place, and leaves it alone where none lowers the error of the quantized output.
        multiply: also where nothing takes the factor, as others read x, too (every norm of a post-norm encoder feeds a residual): a
            multiplication is put in front of the weights, where the error falls by a tenth at least.
        rows: what follows is `quantize{rows=true}`, so that the error is that of one activation scale for each row.

    Raises:
        PipelineError: a strength that is neither `search` nor a number from 0 to 1.
        SampleError: there are no samples.
    """

    strength: str = "search"
    multiply: bool = False
    rows: bool = False
    samples = "needs"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._strength()

    def run(self, model: ir.Model, ctx: Context) -> int:
        ctx.require_samples()
        seen = ctx.get(LinearInputs())
        linears = [x for x in ctx.get(Linears()) if x.node.graph is model.graph]
        found = groups(linears)
        fitting = [g for g in found if not g.stiff and (g.source is not None or self.multiply)]
        for group in (g for g in found if g.stiff or (g.source is None and not self.multiply)):
            hint = "" if group.stiff else "; `multiply=true` puts a multiplication there"
            ctx.remarks.missed(group.readers[0].node.name or "", f"not smoothed: {group.reason}{hint}")
        inserter, changes = Inserter(model), 0
        for group in fitting:
            where = group.readers[0].node.name or ""
            few = too_few(seen[group.x].seen if group.x in seen else 0, group.readers[0].in_features)
            if few is not None:
                ctx.remarks.missed(where, f"not smoothed: {few}")
                continue
            s, strength, before, after = scales(group, seen[group.x], self._strength(), self.rows)
            if (s == 1).all():
                ctx.remarks.missed(where, f"not smoothed: {self._even(group, before)}")
                continue
            if not ctx.fuel.burn():
                continue
            fold(inserter, group, s, "smooth")
            ctx.remarks.applied(
                where, f"strength {strength:g}: output error {before:.4f} -> {after:.4f}", strength=strength, before=before, after=after
            )
            changes += 1
        return changes

    def _even(self, group: ChannelGroup, before: float) -> str:
        """Why every factor is 1."""
        fixed = self._strength()
        if fixed is not None and group.source is not None:
            return f"at strength {fixed:g} every factor is 1, as its channels are even"
        which = "no strength lowers" if fixed is None else f"strength {fixed:g} does not lower"
        return f"{which} the output error of {before:.4f}" + ("" if group.source is not None else " by a tenth")

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
