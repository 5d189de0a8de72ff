"""How a budget of operations is spread over the layers: the ranks that lose least together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from graphopt.core import Array

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
