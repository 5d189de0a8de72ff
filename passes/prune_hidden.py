"""prune-hidden: the residual stream gets fewer channels, and everything that reads or writes it with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.heads import Units
from graphopt.analysis.linear import Linear, Linears
from graphopt.calibration.moments import input_moments
from graphopt.compress.prune.units import carry_out
from graphopt.core.contract import Array, Context, Pass
from graphopt.core.options import exclusive, option
from graphopt.core.strength import Dial
from graphopt.graph.questions import static_dim
from graphopt.rewrite.slicing.close import Slicing
from graphopt.rewrite.slicing.plan import Refusal
from graphopt.run.observe import observable


@dataclasses.dataclass(frozen=True)
class PruneHidden(Pass):
    """Remove channels of the hidden state: columns of embeddings, scales and biases of norms, rows and columns of projections, the head.

    A channel is worth what leaving it out changes in the results of the projections that read its stream, E[x_c^2] ||W_c||^2 relative to the whole,
    added over the projections (the activation-based width importance of Muralidharan et al. 2024, weighted by the readers). The norms see fewer
    channels afterwards, so that this costs more than pruning heads or neurons, and wants training behind it.

    Args:
        width: channels that stay.
        ratio: the fraction that goes.
        multiple: with `ratio`, what stays is rounded up to a multiple of this.
        resize: names of outputs that may get narrower (a hidden state that the model returns).

    Raises:
        PipelineError: none or both of width and ratio.
        SampleError: there are no samples.
    """

    width: int | None = option(None, least=1)
    ratio: float | None = option(None, above=0, below=1, what="a fraction")
    multiple: int = option(32, least=1)
    resize: tuple[str, ...] = ()
    exact: ClassVar[bool] = False
    samples = "needs"
    ways = exclusive("width", "ratio", says="how many channels stay")
    dials = (Dial("ratio"),)

    def run(self, model: ir.Model, ctx: Context) -> int:
        self.ways.require(self)
        streams = {h.projections[0].x: h.node for h in ctx.get(Units()).attention if h.projections}
        s, changes = Slicing(model, resize=self.resize), 0
        for x, node in streams.items():
            size = static_dim(x, -1)
            if size is None or s.removed.get(x, {}).get(len(x.shape or ()) - 1) is not None:
                continue  # the same stream as before
            stays = self._stays(size)
            if not 0 < stays < size:
                ctx.remarks.missed(node.name or "", f"the hidden state has {size} channels; {stays} would stay")
                continue
            ctx.require_samples()
            try:
                readers = self._readers(model, ctx, x, size - stays)
            except Refusal as refusal:
                ctx.remarks.missed(node.name or "", f"not pruned: {refusal}")
                continue
            order = np.argsort(_worth(ctx, readers, size), kind="stable")
            mask = np.isin(np.arange(size), order[: size - stays])
            try:
                with s.together():
                    s.remove(x, -1, mask)
                    if not ctx.fuel.burn():
                        raise Refusal(ctx.fuel.why)
            except Refusal as refusal:
                ctx.remarks.missed(node.name or "", f"not pruned: {refusal}")
                continue
            ctx.remarks.applied(node.name or "", f"hidden state: {size} -> {stays} channels", before=size, after=stays)
            changes += 1
        if not streams:
            ctx.remarks.missed("", "found no attention whose projections read a hidden state")
        if changes:
            carry_out(s, ctx)
        return changes

    def _stays(self, size: int) -> int:
        if self.width is not None:
            return self.width
        return min(size, -(-int(size * (1 - float(self.ratio or 0))) // self.multiple) * self.multiple)

    def _readers(self, model: ir.Model, ctx: Context, x: ir.Value, gone: int) -> dict[ir.Value, list[Linear]]:
        """The multiplies that read the stream of x, or a norm of it, by their input: those whose input gets narrower with it.

        Raises:
            Refusal: it cannot get narrower.
        """
        trial = Slicing(model, resize=self.resize)
        size = static_dim(x, -1) or 0
        trial.remove(x, -1, np.arange(size) < gone)
        found: dict[ir.Value, list[Linear]] = {}
        for linear in ctx.get(Linears()):
            own = linear.x
            narrower = trial.removed.get(own, {}).get(len(own.shape or ()) - 1) is not None
            if narrower and linear.in_features == size and not linear.batch and not linear.trans_x and observable(model, own):
                found.setdefault(own, []).append(linear)
        return found


def _worth(ctx: Context, readers: Mapping[ir.Value, Sequence[Linear]], size: int) -> Array:
    """Of each channel of a stream, over all projections that read it."""
    total = np.zeros(size)
    for value, moments in input_moments(ctx, list(readers)):
        if isinstance(moments, str):
            ctx.remarks.missed(readers[value][0].node.name or "", f"what its channels are worth is judged by its weights alone: {moments}")
        power = np.ones(size) if isinstance(moments, str) else np.diag(moments).astype(np.float64)
        for linear in readers[value]:
            effect = power * np.square(linear.matrix().astype(np.float64)).sum(1)
            total += effect / max(float(effect.sum()), 1e-30)
    return total
