"""The cheapest setting for each of many parts whose errors add up as squares."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from graphopt.core.contract import Array

if TYPE_CHECKING:
    from graphopt.compress.prune.importance import Ranking
    from graphopt.compress.prune.removable import Candidate

_TRIALS = 6  # assembled models that are measured, at most
_CLOSE = 0.95  # of the budget; what is nearer is not worth another trial


@dataclasses.dataclass(frozen=True)
class Option:
    """One setting of a part: what it costs (bytes), and its error alone, a fraction; of two with equal numbers the first is taken."""

    cost: float
    error: float


Assignment = tuple[int, ...]  # for each part the index of its option


def cheapest(parts: Sequence[Sequence[Option]], budget: float) -> Assignment:
    """Options whose root of the sum of squared errors is at most `budget`, the cheapest that steps along the lower hulls of the parts find.

    From the most precise option of each part, the step that saves most for its squared error comes first (the greedy solution of the linear
    relaxation of a multiple-choice knapsack: optimal but for one part at the border); steps that no longer fit are passed over.

    Args:
        parts: for each part its options; one of them must have the error 0.
    """
    chosen, steps = [], []
    for number, options in enumerate(parts):
        hull = _hull(options)
        chosen.append(hull[0])
        for before, after in itertools.pairwise(hull):
            saved, added = options[before].cost - options[after].cost, options[after].error ** 2 - options[before].error ** 2
            steps.append((-saved / added if added else -math.inf, number, before, after, added))
    spent = 0.0
    for _, number, before, after, added in sorted(steps):
        if chosen[number] == before and spent + added <= budget**2:
            chosen[number], spent = after, spent + added
    return tuple(chosen)


def predicted(parts: Sequence[Sequence[Option]], chosen: Assignment) -> float:
    """The root of the sum of squared errors: right where the errors of the parts do not know of each other."""
    return math.sqrt(sum(options[k].error ** 2 for options, k in zip(parts, chosen, strict=True)))


def settle(parts: Sequence[Sequence[Option]], budget: float, measure: Callable[[Assignment], float]) -> tuple[Assignment, float]:
    """The cheapest assignment whose measured error is within the budget, and that error; what is predicted is only where to look.

    The predicted budget is corrected by what the assembled model really loses, between the largest that was met and the least that was not.
    """
    exact = cheapest(parts, 0.0)
    best = (exact, measure(exact) if predicted(parts, exact) else 0.0)
    known = {exact: best[1]}
    low, high, now = 0.0, math.inf, budget
    for _ in range(_TRIALS):
        chosen = cheapest(parts, now)
        if chosen not in known:
            known[chosen] = measure(chosen)
        error = known[chosen]
        if error <= budget:
            low = now
            best = min((best, (chosen, error)), key=lambda found: sum(p[k].cost for p, k in zip(parts, found[0], strict=True)))
            if error >= _CLOSE * budget or cheapest(parts, math.inf) == chosen:
                break
        else:
            high = now
        guess = now * budget / error if 0 < error < math.inf else now / 2
        now = guess if low < guess < high else (low + high) / 2 if high < math.inf else 2 * now
    return best


def _hull(options: Sequence[Option]) -> list[int]:
    """Indices along the lower convex hull of cost over squared error, from the cheapest of the most precise on; falling costs only."""
    order = sorted((k for k, o in enumerate(options) if o.error < math.inf), key=lambda k: (options[k].error, options[k].cost))
    hull: list[int] = []
    for k in order:
        if hull and options[k].cost >= options[hull[-1]].cost:
            continue
        while len(hull) > 1 and _slope(options, hull[-2], k) <= _slope(options, hull[-2], hull[-1]):
            hull.pop()
        hull.append(k)
    return hull


def _slope(options: Sequence[Option], a: int, b: int) -> float:
    """Negative: cost saved for each squared error."""
    added = options[b].error ** 2 - options[a].error ** 2
    return (options[b].cost - options[a].cost) / added if added else -math.inf


_HALVINGS = 60


@dataclasses.dataclass(frozen=True)
class Menu:
    """The settings of one item: rank 0 stands for the whole weight, and comes first.

    Attributes:
        ranks: [n].
        cost: [n] operations at each.
        loss: [n] what each adds to the loss that is minimized.
    """

    ranks: Array
    cost: Array
    loss: Array


def spread(groups: Sequence[Sequence[Sequence[Menu]]], limit: float) -> list[tuple[int, tuple[int, ...]]] | None:
    """For each group the alternative that is taken, and a rank for each menu of it.

    The sum of losses is minimized while the sum of costs stays within `limit`, by one price of an operation for all (a Lagrange multiplier,
    which finds the optimum of the convex hull); what is left over then raises ranks one after the other where that helps most.

    Args:
        groups: each a choice between alternatives (cut jointly, or one by one), each of those a list of menus.
        limit: operations of all together.

    Returns:
        None if even the lowest ranks cost more.
    """
    low, high = 0.0, 1.0
    while _cost(groups, _taken(groups, high)) > limit:
        high *= 16
        if high > 1e30:
            return None
    for _ in range(_HALVINGS):
        price = (low + high) / 2
        if _cost(groups, _taken(groups, price)) > limit:
            low = price
        else:
            high = price
    taken = _taken(groups, high)
    _fill(groups, taken, limit)
    return [(a, tuple(int(m.ranks[k]) for m, k in zip(groups[g][a], picks, strict=True))) for g, (a, picks) in enumerate(taken)]


def _taken(groups: Sequence[Sequence[Sequence[Menu]]], price: float) -> list[tuple[int, list[int]]]:
    """Of each group the alternative, and of each menu in it the setting, that is cheapest in loss + price * operations."""
    found = []
    for alternatives in groups:
        offers = []
        for number, menus in enumerate(alternatives):
            picks = [int(np.argmin(m.loss + price * m.cost)) for m in menus]
            offers.append((sum(float(m.loss[k] + price * m.cost[k]) for m, k in zip(menus, picks, strict=True)), number, picks))
        _, number, picks = min(offers)
        found.append((number, picks))
    return found


def _cost(groups: Sequence[Sequence[Sequence[Menu]]], taken: Sequence[tuple[int, list[int]]]) -> float:
    return sum(float(m.cost[k]) for g, (a, picks) in enumerate(taken) for m, k in zip(groups[g][a], picks, strict=True))


def _fill(groups: Sequence[Sequence[Sequence[Menu]]], taken: list[tuple[int, list[int]]], limit: float) -> None:
    """Spend what is left: the single change that gains most for what it costs, until none fits."""
    left = limit - _cost(groups, taken)
    while True:
        best: tuple[float, int, int, int] | None = None
        for g, (a, picks) in enumerate(taken):
            for j, menu in enumerate(groups[g][a]):
                now = picks[j]
                extra, gain = menu.cost - menu.cost[now], menu.loss[now] - menu.loss
                fits = (extra > 0) & (extra <= left) & (gain > 0)
                if fits.any():
                    rate = np.where(fits, gain / np.where(fits, extra, 1), -np.inf)
                    k = int(np.argmax(rate))
                    if best is None or rate[k] > best[0]:
                        best = (float(rate[k]), g, j, k)
        if best is None:
            return
        _, g, j, k = best
        menu = groups[g][taken[g][0]][j]
        left -= float(menu.cost[k] - menu.cost[taken[g][1][j]])
        taken[g][1][j] = k


_CELLS = 4000  # the budget is counted in so many parts


def cheapest_cut(rankings: Mapping[Candidate, Ranking], savings: Mapping[Candidate, Sequence[float]], budget: float) -> dict[Candidate, int] | None:
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
    found: dict[Candidate, int] = {}
    left = int(reached)
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
