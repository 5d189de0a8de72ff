"""What an error inside one layer does to the outputs of the model."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from graphopt.calibration.padding import Paddings
from graphopt.compress.lowrank.cut import RankPlan
from graphopt.compress.lowrank.factorable import Item
from graphopt.core.contract import Array, Batches, Context
from graphopt.run import ort
from graphopt.run.distance import arrays_in, relative_l2

_ROWS = 2048  # elements of the first input that are run, at most: tokens, where it holds ids
_OPERATIONS = 2e12  # of all runs together, about; one batch at least
_FLOOR = 1e-9
_LEAST = 1e-6


def sensitivities(ctx: Context, plans: Sequence[RankPlan]) -> dict[Item, float]:
    """For each item (output error)^2 / (its own relative error)^2, where it alone is cut to half of the largest rank that saves something.

    Padding does not count. One session serves all: the weights are fed. An item whose weight cannot be fed (stored inside a subgraph) gets the median
    of the others.
    """
    copy, samples, padding = ctx.model.clone(), ctx.require_samples(), ctx.get(Paddings())
    stored = copy.graph.initializers
    fed = [p for p in plans if str(p.item.linears[0].weight.name) in stored]
    for name in dict.fromkeys(str(p.item.linears[0].weight.name) for p in fed):
        copy.graph.inputs.append(stored[name])
    session, feeds = ort.session(copy), _few(samples, _OPERATIONS / (2 * max(len(plans), 1) * max(sum(p.item.size for p in plans), 1)))
    kept = [padding.kept(feed) for feed in feeds]
    base = [k.counted(session.run(feed)) for feed, k in zip(feeds, kept, strict=True)]
    found: dict[Item, float] = {}
    for p in fed:
        half = dataclasses.replace(p, rank=max(p.item.largest // 2, 1))
        error = half.spectrum.error(half.rank)
        if error < _FLOOR:  # nothing is lost at this rank, whatever the outputs make of it
            continue
        changed = _changed(half)
        moved = relative_l2(base, [k.counted(session.run({**feed, **changed})) for feed, k in zip(feeds, kept, strict=True)])
        if np.isfinite(moved):
            found[p.item] = moved**2 / error
    usual = float(np.median(list(found.values()))) if found else 1.0
    least = _LEAST * max(found.values(), default=1.0) or 1.0  # a layer that nothing depends on still wants a number that can be divided by
    return {p.item: max(found.get(p.item, usual), least) for p in plans}


def _few(samples: Batches, enough: float) -> list[Mapping[str, Array]]:
    feeds: list[Mapping[str, Array]] = []
    seen = 0
    for feed in itertools.islice(samples, 64):
        feeds.append(feed)
        seen += next((array.size for _, array in arrays_in(list(feed.values()))), 0)
        if seen >= min(enough, _ROWS):
            break
    return feeds


def _changed(p: RankPlan) -> dict[str, Array]:
    """The product of the factors, in place of the weight."""
    cut, linear = p.cut(sampled=True), p.item.linears[0]
    array = cut.left @ cut.rights[0]
    array = np.swapaxes(array, -1, -2) if linear.transposed else array
    assert linear.weight.dtype is not None
    return {str(linear.weight.name): np.ascontiguousarray(array.astype(linear.weight.dtype.numpy()))}
