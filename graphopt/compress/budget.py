"""Budgets: each of many things takes one setting of its menu, so that one sum stays within a limit and another becomes least."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

import numpy as np

from graphopt.core.contract import Array

T = TypeVar("T")
Trade = tuple[Array, Array]  # of one menu: what counts against the limit, and what becomes least

_WORK = 2**26  # of solving exactly: units of the limit times settings
_TRIALS = 6  # choices that are measured, at most
_CLOSE = 0.95  # of the limit; what is nearer is not worth another trial
_ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True, eq=False)
class Menu(Generic[T]):
    """What one thing may be set to. Of settings with equal numbers the first is taken.

    Attributes:
        settings: [n], in the words of the caller.
        cost: [n] what each takes, such as operations or bytes.
        loss: [n] what each does to the result, in a unit that adds up over the things (squared errors, not errors); infinite: never taken.
    """

    settings: Sequence[T]
    cost: Array
    loss: Array


@dataclasses.dataclass(frozen=True)
class Allocation(Generic[T]):
    """One setting of each menu.

    Attributes:
        picks: the indices of the settings.
        cost, loss: of all together.
        gap: what the best choice may be better by, at most; 0 where it was found exactly.
    """

    picks: tuple[int, ...]
    settings: tuple[T, ...]
    cost: float
    loss: float
    gap: float


def solve(menus: Sequence[Menu[T]], *, cost: float | None = None, loss: float | None = None) -> Allocation[T] | None:
    """The least loss whose cost is at most `cost`; or, where `loss` is given instead, the least cost whose loss is at most that.

    Exact, by dynamic programming, where what is limited comes in units that are not too many (whole numbers; their common divisor is the unit).
    Otherwise along the lower convex hulls (the linear relaxation of a multiple-choice knapsack), and what is left over is spent on the change
    that helps most, until none fits: at most the one step at the border from the best, and `gap` says how much that is.

    Returns:
        None if even the settings that take least are over the limit.
    """
    assert (cost is None) != (loss is None), "one limit, of cost or of loss"
    limit = cost if cost is not None else loss if loss is not None else 0.0
    trades = [_finite(*((m.cost, m.loss) if loss is None else (m.loss, m.cost))) for m in menus]
    spare = limit - sum(float(spent.min()) for spent, _ in trades)
    if spare < -_ROUNDING * max(1.0, abs(limit)):
        return None
    spare = max(spare, 0.0)
    picks, gap = _exact(trades, spare) or _along_hulls(trades, spare)
    chosen = list(zip(menus, picks, strict=True))
    sums = (sum(float(m.cost[k]) for m, k in chosen), sum(float(m.loss[k]) for m, k in chosen))
    return Allocation(tuple(picks), tuple(m.settings[k] for m, k in chosen), *sums, gap)


def _finite(spent: Array, won: Array) -> Trade:
    """What would win infinitely little takes infinitely much."""
    spent, won = np.asarray(spent, np.float64), np.asarray(won, np.float64)
    return np.where(np.isfinite(won), spent, np.inf), won


def settle(menus: Sequence[Menu[T]], limit: float, measure: Callable[[Allocation[T]], float]) -> tuple[Allocation[T], float]:
    """The choice of least cost whose measured error is within `limit`, and that error; what is predicted is only where to look.

    The predicted error, the root of the loss, is right where the errors of the things do not know of each other. Its limit is corrected by
    what the whole really loses, between the largest that was met and the least that was not.

    Args:
        menus: losses are squared errors; each has a setting with the loss 0.
    """

    def predicted(error: float) -> Allocation[T]:
        found = solve(menus, loss=error**2)
        assert found is not None, "a menu without a setting of the loss 0"
        return found

    best = (predicted(0.0), 0.0)
    cheapest, known = predicted(math.inf), {best[0].picks: 0.0}
    low, high, now = 0.0, math.inf, limit
    for _ in range(_TRIALS):
        chosen = predicted(now)
        if chosen.picks not in known:
            known[chosen.picks] = measure(chosen)
        error = known[chosen.picks]
        if error <= limit:
            low = now
            best = min(best, (chosen, error), key=lambda found: found[0].cost)
            if error >= _CLOSE * limit or cheapest.picks == chosen.picks:
                break
        else:
            high = now
        guess = now * limit / error if 0 < error < math.inf else now / 2
        now = guess if low < guess < high else (low + high) / 2 if high < math.inf else 2 * now
    return best


def together(menus: Sequence[Menu[tuple[T, ...]]]) -> Menu[tuple[T, ...]]:
    """Several things as one: every combination of their settings that no other beats in both cost and loss."""
    found = menus[0]
    for other in menus[1:]:
        cost, loss = (np.add.outer(a, b).ravel() for a, b in ((found.cost, other.cost), (found.loss, other.loss)))
        kept = _front(cost, loss)
        pairs = zip(*np.divmod(kept, len(other.cost)), strict=True)
        found = Menu([(*found.settings[i], *other.settings[j]) for i, j in pairs], cost[kept], loss[kept])
    return found


def either(menus: Sequence[Menu[T]]) -> Menu[T]:
    """A choice between alternatives."""
    settings = list(itertools.chain.from_iterable(m.settings for m in menus))
    return Menu(settings, np.concatenate([m.cost for m in menus]), np.concatenate([m.loss for m in menus]))


# ---- exact ------------------------------------------------------------------------------------------------------------------------------


def _exact(trades: Sequence[Trade], spare: float) -> tuple[list[int], float] | None:
    """The picks, and no gap; None where there are too many units for that."""
    extra = [spent - spent.min() for spent, _ in trades]
    unit = _unit(extra)
    if unit is None:
        return None
    most = sum(float(x.max()) for x in extra)
    size = math.floor(min(spare, most) / unit + _ROUNDING)
    if (size + 1) * sum(map(len, extra)) > _WORK:
        return None
    best, taken = np.zeros(size + 1), list[Array]()  # best[j]: the least within j units
    for spent, (_, won) in zip(extra, trades, strict=True):
        best, picks = _with(best, np.rint(spent / unit).astype(np.int64), won)
        taken.append(picks)
    found, left = list[int](), size
    for spent, picks in zip(reversed(extra), reversed(taken), strict=True):
        found.append(int(picks[left]))
        left -= round(float(spent[found[-1]]) / unit)
    return found[::-1], 0.0


def _unit(extra: Sequence[Array]) -> int | None:
    """The common divisor of whole numbers."""
    numbers = np.unique(np.concatenate([*extra, np.zeros(1)]))
    if not np.isfinite(numbers).all() or numbers[-1] >= 2**53 or (numbers != np.rint(numbers)).any():
        return None
    return int(np.gcd.reduce(numbers.astype(np.int64))) or 1


def _with(best: Array, units: Array, won: Array) -> tuple[Array, Array]:
    lowest, taken = np.full(len(best), np.inf), np.zeros(len(best), np.int32)
    for pick, (need, value) in enumerate(zip(units, won, strict=True)):
        total = best[: len(best) - need] + value if need < len(best) else best[:0]
        better = total < lowest[need:]
        lowest[need:][better], taken[need:][better] = total[better], pick
    return lowest, taken


# ---- along convex hulls -----------------------------------------------------------------------------------------------------------------


def _along_hulls(trades: Sequence[Trade], left: float) -> tuple[list[int], float]:
    """Picks, and the gap to what the linear relaxation reaches, which no choice goes below."""
    chosen, steps = list[int](), list[tuple[float, int, int, int]]()
    for number, table in enumerate(trades):
        hull = _hull(*table)
        chosen.append(hull[0])
        steps += [(_slope(*table, a, b), number, a, b) for a, b in itertools.pairwise(hull)]
    bound: float | None = None
    for slope, number, a, b in sorted(steps):
        need = float(trades[number][0][b] - trades[number][0][a])
        if chosen[number] == a and need <= left:
            chosen[number], left = b, left - need
        elif bound is None:
            bound = _won(trades, chosen) + slope * left
    _fill(trades, chosen, left)
    return chosen, 0.0 if bound is None else max(_won(trades, chosen) - bound, 0.0)


def _won(trades: Sequence[Trade], chosen: Iterable[int]) -> float:
    return sum(float(won[k]) for (_, won), k in zip(trades, chosen, strict=True))


def _front(spent: Array, won: Array) -> Array:
    """Indices of the settings that no other beats, from the one that takes least on."""
    order = np.lexsort((won, spent))
    order = order[np.isfinite(spent[order]) & np.isfinite(won[order])]
    before = np.minimum.accumulate(np.concatenate([[np.inf], won[order]]))[:-1]
    return np.asarray(order[won[order] < before])


def _hull(spent: Array, won: Array) -> list[int]:
    """Of `_front`, those on its lower convex hull."""
    hull = list[int]()
    for k in _front(spent, won).tolist():
        while len(hull) > 1 and _slope(spent, won, hull[-2], k) <= _slope(spent, won, hull[-2], hull[-1]):
            hull.pop()
        hull.append(k)
    return hull


def _slope(spent: Array, won: Array, a: int, b: int) -> float:
    return float((won[b] - won[a]) / (spent[b] - spent[a]))


def _fill(trades: Sequence[Trade], chosen: list[int], left: float) -> None:
    """The single change that gains most for what it takes, until none fits."""
    while True:
        best: tuple[float, int, int] | None = None
        for number, (spent, won) in enumerate(trades):
            extra, gain = spent - spent[chosen[number]], won[chosen[number]] - won
            rate = np.divide(gain, extra, out=np.full(len(extra), -np.inf), where=(extra > 0) & (extra <= left) & (gain > 0))
            k = int(np.argmax(rate))
            if rate[k] > 0 and (best is None or rate[k] > best[0]):
                best = (float(rate[k]), number, k)
        if best is None:
            return
        _, number, k = best
        left -= float(trades[number][0][k] - trades[number][0][chosen[number]])
        chosen[number] = k
