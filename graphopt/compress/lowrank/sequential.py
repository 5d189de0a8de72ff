"""factorize{sequential=true}: each layer is fitted to what the layers that were cut before it leave over."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analysis.stream import StreamLayer, Streams
from graphopt.calibration.pair import Paired, paired_moments
from graphopt.compress.lowrank.cut import Plan, split, wide
from graphopt.compress.lowrank.factorable import Item
from graphopt.compress.lowrank.factors import Cut, PutFactors
from graphopt.compress.lowrank.spectrum import factors, spectrum
from graphopt.core.contract import Array, Context

_RIDGE = 1e-3  # of the mean of the diagonal: how strongly a fitted weight is held to the original one


def refit(model: ir.Model, ctx: Context, plans: Sequence[Plan]) -> int:
    """Put the factors in place, one input after the other in graph order; ranks stay. Returns the number of changes.

    What a block adds to the residual stream is fitted to what it added in the original, and to what the stream has lost until then.
    """
    original, changes = model.clone(), 0
    layers: tuple[StreamLayer, ...] = ctx.get(Streams())
    streams = _streams(layers)
    groups: dict[ir.Node, list[Plan]] = {}
    first: dict[ir.Value, ir.Node] = {}
    for p in plans:
        groups.setdefault(first.setdefault(p.item.linears[0].x, p.item.linears[0].node), []).append(p)
    for group in groups.values():
        now = [dataclasses.replace(p, item=_current(p.item)) for p in group]
        first_linear = now[0].item.linears[0]
        alone = len(group) == 1 and len(group[0].item.linears) == 1 and first_linear.alpha == 1.0
        before = streams.get(first_linear.output) if alone else None
        seen = paired_moments(model, original, ctx.require_samples(), str(first_linear.x.name), before)
        changes += PutFactors([fitted(p, seen) for p in now]).run(model, ctx)
        if ctx.fuel.empty:
            break
    return changes


def fitted(p: Plan, seen: Paired) -> Cut:
    """The factors of the best matrix of this rank that turns the inputs of the model as it is now into the outputs that the original had.

    A shared weight is fitted to the input of its first reader.
    """
    w = wide(p.item, p.scales)
    best = least_squares(w, seen)
    left, right = factors(best, spectrum(best, seen.own, "whitened"), p.rank)
    product = left @ right
    whole = float((w * (seen.other @ w)).sum())  # of the outputs; what the stream is off by is not in it
    off = whole - 2 * float((product * (seen.cross @ w)).sum()) + float((product * (seen.own @ product)).sum())
    return Cut(p.item, *split(p.item, p.scales, left, right), max(off / whole, 0.0) ** 0.5 if whole > 0 else 0.0, sampled=True)


def least_squares(weight: Array, seen: Paired) -> Array:
    """argmin ||x W - (z weight + drift)||^2 over the samples, held a little to `weight`."""
    ridge = _RIDGE * np.maximum(np.diag(seen.own).mean(), np.finfo(np.float32).tiny)
    damped = seen.own + ridge * np.eye(len(seen.own))
    wanted = (seen.cross - seen.own) @ weight
    found: Array = weight + np.linalg.solve(damped, wanted if seen.drift is None else wanted + seen.drift)
    return found


def _streams(layers: Sequence[StreamLayer]) -> dict[ir.Value, str]:
    """Output of a block -> the name of the residual stream that it is added to: where the last layer of a block is fitted, it can take back what
    the stream is off by."""
    steps = [step for layer in layers for step in layer.steps]
    return {step.branches[0].value: str(step.before.name) for step in steps if len(step.branches) == 1}


def _current(item: Item) -> Item:
    """The same multiplies, reading what stands before them now."""
    linears = []
    for linear in item.linears:
        x = linear.node.inputs[0]
        assert x is not None
        linears.append(dataclasses.replace(linear, x=x))
    return dataclasses.replace(item, linears=tuple(linears))
