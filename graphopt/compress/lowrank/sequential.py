"""factorize{sequential=true}: each layer is fitted to what the layers that were cut before it leave over."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from graphopt.analysis.linear import Linears
from graphopt.calibration.pair import LeastSquares, Pair, Paired
from graphopt.compress.lowrank.cut import RankPlan, split, wide
from graphopt.compress.lowrank.factorable import Item
from graphopt.compress.lowrank.factors import Cut, PutFactors
from graphopt.compress.lowrank.spectrum import factors, spectrum
from graphopt.core.contract import Context

_RIDGE = 1e-3  # of the mean second moment: how strongly a fitted weight is held to the original one


def refit(model: ir.Model, ctx: Context, plans: Sequence[RankPlan]) -> int:
    """Put the factors in place, one input after the other in graph order; ranks stay. Returns the number of changes.

    What a block adds to the residual stream is fitted to what it added in the original, and to what the stream has lost until then.
    """
    original, changes = model.clone(), 0
    teachers = {x.node.name: x for x in Linears(casts=True).compute(original, Context(original))}
    groups = _groups(model, plans)
    pair = Pair(model, original, ctx.require_samples(), [teachers[group[0].item.linears[0].node.name] for group in groups])
    for group in groups:
        now = [dataclasses.replace(p, item=_current(p.item)) for p in group]
        first = now[0].item.linears[0]
        seen = pair.at(first, teachers[first.node.name]).moments()
        alone = len(group) == 1 and len(group[0].item.linears) == 1 and first.alpha == 1.0
        changes += PutFactors([fitted(p, seen if alone else dataclasses.replace(seen, drift=None)) for p in now]).run(model, ctx)
        if ctx.fuel.empty:
            break
    return changes


def fitted(p: RankPlan, seen: Paired) -> Cut:
    """The factors of the best matrix of this rank that turns the inputs of the model as it is now into the outputs that the original had.

    A shared weight is fitted to the input of its first reader.
    """
    w = wide(p.item, p.scales)
    wanted = seen.cross @ w
    best = LeastSquares(seen.own, wanted if seen.drift is None else wanted + seen.drift).solve(w, _RIDGE)
    left, right = factors(best, spectrum(best, seen.own, "whitened"), p.rank)
    product = left @ right
    whole = float((w * (seen.other @ w)).sum())  # of the outputs; what the stream is off by is not in it
    off = whole - 2 * float((product * wanted).sum()) + float((product * (seen.own @ product)).sum())
    return Cut(p.item, *split(p.item, p.scales, left, right), max(off / whole, 0.0) ** 0.5 if whole > 0 else 0.0, sampled=True)


def _groups(model: ir.Model, plans: Sequence[RankPlan]) -> list[list[RankPlan]]:
    """Those of one input together, the one whose multiply comes first in front; in graph order."""
    order = {node: k for k, node in enumerate(model.graph)}
    by_input: dict[ir.Value, list[RankPlan]] = {}
    for p in sorted(plans, key=lambda p: order[p.item.linears[0].node]):
        by_input.setdefault(p.item.linears[0].x, []).append(p)
    return list(by_input.values())


def _current(item: Item) -> Item:
    """The same multiplies, reading what stands before them now."""
    linears = []
    for linear in item.linears:
        x = linear.node.inputs[0]
        assert x is not None
        linears.append(dataclasses.replace(linear, x=x))
    return dataclasses.replace(item, linears=tuple(linears))
