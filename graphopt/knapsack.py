"""The cheapest setting for each of many parts whose errors add up as squares."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

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
