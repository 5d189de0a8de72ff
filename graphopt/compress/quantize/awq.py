"""AWQ: input channels with large activations are scaled up before their weights are rounded (Lin et al. 2023)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analysis.linear import Linear, Linears
from graphopt.calibration.activations import evenly
from graphopt.calibration.moments import input_moments
from graphopt.compress.quantize.folding import fold
from graphopt.compress.quantize.smoothing import ChannelGroup, groups
from graphopt.core.contract import Array, Context
from graphopt.graph.questions import static_dim
from graphopt.rewrite.insert import Inserter
from graphopt.run.observe import observable

STRENGTHS = tuple(k / 10 for k in range(1, 10))
_BETWEEN = 0.05  # from the best of these, once up and once down
_ROWS = 128  # output features of each weight on which a strength is judged
_GAIN = 0.99  # a smaller improvement is within what these tell

Rounded = Callable[[Array, Array], Array]  # (rows [out, in], moments [in, in]) -> the rows as they are after quantization


@dataclasses.dataclass(frozen=True)
class Scaling:
    """`scale` [in] for the channels of a group, rms(x)^strength around 1; errors are relative, of the outputs of all its readers."""

    scale: Array
    strength: float
    before: float
    after: float


def scale_inputs(model: ir.Model, ctx: Context, fits: Callable[[Linear], bool], rounded: Rounded) -> int:
    """Scales every group of multiplies whose input can be divided where it is made; returns how many.

    Args:
        fits: whether a multiply will be quantized.
        rounded: how.
    """
    found = groups([x for x in ctx.get(Linears()) if x.node.graph is model.graph])
    for group in found:
        if group.source is None and fits(group.readers[0]):
            ctx.remarks.missed(group.readers[0].node.name or "", f"its input channels are not scaled: {group.reason}")
    places: dict[ir.Value, ChannelGroup] = {}
    for group in (g for g in found if g.source is not None):
        fit = [x for x in group.readers if fits(x)]
        if len(fit) == len(group.readers) and observable(model, group.x) and static_dim(group.x, -1) is not None:
            places[group.x] = group
        elif fit:
            reason = f"all that read `{group.x.name}` would have to be quantized"
            ctx.remarks.missed(fit[0].node.name or "", f"its input channels are not scaled: {reason}, and its size known")
    planned: list[tuple[ChannelGroup, Scaling]] = []
    for x, moments in input_moments(ctx, list(places)) if places else ():
        if isinstance(moments, str):
            ctx.remarks.missed(places[x].readers[0].node.name or "", f"its input channels are not scaled: {moments}")
        else:
            planned.append((places[x], _search(places[x], moments, rounded)))
    inserter, changes = Inserter(model), 0
    for group, scaling in planned:
        where = group.readers[0].node.name or ""
        if scaling.strength == 0:
            ctx.remarks.missed(where, f"its input channels are not scaled: no strength lowers the output error of {scaling.before:.4f}")
            continue
        if not ctx.fuel.burn():
            continue
        fold(inserter, group, scaling.scale, "awq")
        text = f"input channels scaled, strength {scaling.strength:g}: output error {scaling.before:.4f} -> {scaling.after:.4f}"
        ctx.remarks.applied(where, text, strength=scaling.strength, before=scaling.before, after=scaling.after)
        changes += 1
    if changes:
        ctx.invalidate()
    return changes


def _search(group: ChannelGroup, moments: Array, rounded: Rounded) -> Scaling:
    weights = [evenly(np.ascontiguousarray(w.matrix().T, dtype=np.float32), _ROWS) for w in group.readers]
    plain, outputs = np.ones(len(moments), np.float32), sum(map(functools.partial(_energy, moments), weights))
    before = _error(weights, moments, plain, rounded, outputs)
    best = Scaling(plain, 0.0, before, before)

    def better(strength: float) -> Scaling:
        scale = channel_scale(moments, strength)
        after = _error(weights, moments, scale, rounded, outputs)
        return Scaling(scale, round(strength, 2), before, after) if after < min(best.after, _GAIN * before) else best

    for strength in STRENGTHS:
        best = better(strength)
    coarse = best.strength
    for strength in (coarse - _BETWEEN, coarse + _BETWEEN) if coarse else ():
        best = better(strength)
    return best


def channel_scale(moments: Array, strength: float) -> Array:
    """rms(x)^strength of each channel, with the largest and the smallest as far above 1 as below; float32 [in].

    The paper takes the mean of |x|; the root of the mean square is what the moments have.
    """
    size = np.sqrt(np.maximum(np.diag(moments).astype(np.float64), 0))
    if not size.any():
        return np.ones(len(size), np.float32)
    scale = np.maximum(size, 1e-4 * size.max()) ** strength
    scale /= np.sqrt(scale.max() * scale.min())
    found: Array = scale.astype(np.float32)
    return found


def _error(weights: Sequence[Array], moments: Array, scale: Array, rounded: Rounded, outputs: float) -> float:
    """||(W - decoded) x|| over all weights, x with these second moments, relative to the energy `outputs` of what they should give."""
    inner = moments / np.outer(scale, scale)
    off = sum(_energy(moments, rounded(rows * scale, inner) / scale - rows) for rows in weights)
    return float(np.sqrt(off / outputs)) if outputs > 0 else 0.0


def _energy(moments: Array, rows: Array) -> float:
    """The mean of ||rows @ x||^2."""
    return max(float(np.einsum("rk,rk->", rows @ moments, rows, dtype=np.float64)), 0.0)
