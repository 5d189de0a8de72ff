"""factorize{budget=...}: ranks of all layers together, by what each costs in output error."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.compress.budget import Menu, either, solve, together
from graphopt.compress.lowrank.cut import RankPlan, plan
from graphopt.compress.lowrank.factorable import Item, Whole
from graphopt.compress.lowrank.sensitivity import sensitivities
from graphopt.core.contract import Array, Context
from graphopt.graph.dims import Bindings, dim_at, fed_inputs
from graphopt.graph.size import flops, node_flops
from graphopt.run.race import sizes_for

Planned = Mapping[Item, tuple[RankPlan, float]]  # in the order in which they were made


def by_budget(
    ctx: Context, planned: Planned, single: Sequence[Item], combined: Sequence[Item], budget: float, multiple: int
) -> tuple[list[RankPlan], Whole]:
    """The plans that save `budget` of the operations of the whole model, and what stays whole.

    Args:
        planned: what `plans_of` gives for `single` and `combined`.
        multiple: see Factorize.
    """
    sizes = bindings(ctx.model, ctx)
    total = max(flops(ctx.model, sizes).total, 1)
    cost = {x.node: node_flops(x.node, sizes) or 0 for item in single for x in item.linears}
    unknown = [x for item in single for x in item.linears if not cost[x.node]]
    own = {item.linears[0].node: item for item in single}
    menus = {item: _menu(item, p, sum(cost[x.node] for x in item.linears), count, multiple) for item, (p, count) in planned.items()}
    whole = sum(float(menus[item].cost[0]) for item in single)
    groups = [either([menus[item], together([menus[own[x.node]] for x in item.linears])]) if item.joint else menus[item] for item in combined]
    choice = solve(groups, cost=whole - budget * total)
    if choice is None:
        least = sum(float(menus[item].cost[-1]) for item in single)
        reason = (
            f"budget={budget:g} is out of reach: the weights that can be cut take {whole / total:.0%} of the operations, and "
            f"{least / total:.0%} at rank {multiple}"
        )
        return [], {x.node: reason for item in single for x in item.linears}
    chosen = [cut for group in choice.settings for cut in group]
    kept = {x.node: "the budget is met with less error elsewhere" for item, rank in chosen if not rank for x in item.linears}
    kept |= {x.node: "how many operations it takes at the sizes of the samples is not known" for x in unknown}
    return [dataclasses.replace(planned[item][0], rank=rank) for item, rank in chosen if rank], kept


def plans_of(
    ctx: Context, single: Sequence[Item], combined: Sequence[Item], moments: Mapping[ir.Value, Array], method: str, sensitivity: bool
) -> Planned:
    """Plans without a rank, and how much their relative errors count, next to each other.

    Args:
        single: every item by itself.
        combined: the same, some of them joint: each of those is cut jointly or one by one, whichever loses less.
        method, sensitivity: see Factorize.
    """
    plans = {item: plan(item, moments, method) for item in single}
    counts = sensitivities(ctx, list(plans.values())) if sensitivity and ctx.samples is not None else dict.fromkeys(single, 1.0)
    own = {item.linears[0].node: item for item in single}
    found = {item: (p, counts[item]) for item, p in plans.items()}
    for item in combined:
        if item.joint:
            parts = [counts[own[x.node]] for x in item.linears]
            found[item] = plan(item, moments, method, parts), sum(parts)
    return found


def bindings(model: ir.Model, ctx: Context) -> Bindings:
    """The sizes of the first sample, or the largest that models are timed at."""
    if ctx.samples is None:
        return list(sizes_for(model).values())[-1]
    feed = next(iter(ctx.samples))
    found: dict[str, int] = {}
    for value in fed_inputs(model):
        array = feed.get(str(value.name))
        for axis in range(len(value.shape or ())) if isinstance(array, np.ndarray) else ():
            dim = dim_at(value, axis)
            if isinstance(dim, str):
                found.setdefault(dim, int(array.shape[axis]))
    return found


def _menu(item: Item, p: RankPlan, cost: int, count: float, multiple: int) -> Menu[tuple[tuple[Item, int], ...]]:
    """The item with its rank: whole (0), then from the largest that saves something down to `multiple`; only whole where its cost is not known."""
    highest = item.largest // multiple * multiple
    ranks = range(highest, 0, -multiple) if cost else range(0)
    taken = [cost * item.kept(r) / item.size for r in ranks]
    return Menu([((item, r),) for r in (0, *ranks)], np.array([cost, *taken]), np.array([0.0, *(count * p.spectrum.error(r) for r in ranks)]))
