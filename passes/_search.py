"""How much to remove from each block, so that the model saves what is asked and loses the least."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from graphopt.analysis.importance import Ranking
from graphopt.analysis.removable import Candidate
from graphopt.core import Array

_CELLS = 4000  # the budget is counted in so many parts


def cheapest(rankings: Mapping[Candidate, Ranking], savings: Mapping[Candidate, Sequence[float]], budget: float) -> dict[Candidate, int] | None:
    """The number of steps to take in each candidate: at least `budget` is saved at the least total cost; None where everything saves less.

    A knapsack, solved exactly where savings are whole numbers up to `_CELLS`; else they are rounded down to parts of the budget.

    Args:
        savings: for each candidate what its first k steps save together, k = 0 .. steps.
    """
    if budget <= 0:
        return dict.fromkeys(rankings, 0)
    if sum(max(savings[c]) for c in rankings) < budget:
        return None
    counted = all(float(x).is_integer() for c in rankings for x in savings[c]) and budget <= _CELLS
    size = math.ceil(budget - 1e-9) if counted else _CELLS
    cell = 1.0 if counted else budget / _CELLS
    best = np.full(size + 1, np.inf)  # best[j]: the least cost of saving at least j cells
    best[0] = 0.0
    chosen: list[Array] = []
    for candidate, ranking in rankings.items():
        best, taken = _with(best, ranking.cost, [math.floor(s / cell + 1e-9) for s in savings[candidate]])
        chosen.append(taken)
    reached = np.flatnonzero(np.isfinite(best))[-1]
    if reached < size - len(rankings):  # each block loses less than a cell to rounding
        return None
    found, left = dict[Candidate, int](), int(reached)
    for candidate, taken in zip(reversed(list(rankings)), reversed(chosen), strict=True):
        found[candidate] = int(taken[left])
        left = max(left - math.floor(savings[candidate][found[candidate]] / cell + 1e-9), 0)
    return found


def _with(best: Array, cost: Array, cells: Sequence[int]) -> tuple[Array, Array]:
    places = np.arange(len(best))
    lower, taken = np.full(len(best), np.inf), np.zeros(len(best), np.int64)
    for steps, saved in enumerate(cells):
        total = best[np.maximum(places - saved, 0)] + cost[steps]
        better = total < lower
        lower[better], taken[better] = total[better], steps
    return lower, taken
