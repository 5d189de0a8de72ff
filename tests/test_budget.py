"""One solver for every budget: against trying everything, exactly where costs are whole numbers, within the gap that it states elsewhere."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from graphopt.compress.budget import Allocation, Menu, either, settle, solve, together

Rng = np.random.Generator


def menu(cost: Sequence[float], loss: Sequence[float]) -> Menu[tuple[tuple[float, float], ...]]:
    return Menu([((c, x),) for c, x in zip(cost, loss, strict=True)], np.array(cost, float), np.array(loss, float))


def menus(rng: Rng, count: int = 4, settings: int = 4, whole: bool = False) -> list[Menu[Any]]:
    """Not convex, and with settings that others beat."""
    cost = rng.integers(0, 40, (count, settings)) if whole else rng.random((count, settings))
    return [menu(c, x) for c, x in zip(cost.tolist(), rng.random((count, settings)).tolist(), strict=True)]


def best(found: Sequence[Menu[Any]], limit: float) -> float | None:
    """The least loss within the cost, by trying everything."""
    every = itertools.product(*(range(len(m.cost)) for m in found))
    sums = [
        (sum(float(m.cost[k]) for m, k in zip(found, c, strict=True)), sum(float(m.loss[k]) for m, k in zip(found, c, strict=True))) for c in every
    ]
    return min((loss for cost, loss in sums if cost <= limit + 1e-9), default=None)


@pytest.mark.parametrize("whole", [True, False])
def test_against_trying_everything(whole: bool) -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        given = menus(rng, whole=whole)
        limit = float(rng.integers(0, 120)) if whole else float(rng.random() * 3)
        least, found = best(given, limit), solve(given, cost=limit)
        assert (least is None) == (found is None)
        if found is None or least is None:
            continue
        assert found.cost <= limit + 1e-9
        assert least - 1e-9 <= found.loss <= least + found.gap + 1e-9
        assert found.gap == 0 or not whole
        assert found.settings == tuple(m.settings[k] for m, k in zip(given, found.picks, strict=True))


def test_a_limit_of_loss_is_the_same_with_names_exchanged() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        given = menus(rng)
        turned = [Menu(m.settings, m.loss, m.cost) for m in given]
        one, other = solve(given, cost=1.5), solve(turned, loss=1.5)
        assert (None if one is None else one.picks) == (None if other is None else other.picks)


def test_many_units_have_a_common_divisor() -> None:
    """What layers take are millions of operations, but multiples of one number: that is exact, too."""
    rng = np.random.default_rng(2)
    given = [Menu(range(5), 12_345_678 * np.sort(rng.integers(0, 9, 5))[::-1], np.sort(rng.random(5))) for _ in range(5)]
    found = solve(given, cost=12_345_678 * 17 + 5)
    assert found is not None
    assert found.gap == 0
    assert found.loss == pytest.approx(best(given, 12_345_678 * 17 + 5))


def test_the_gap_is_at_most_one_step() -> None:
    rng = np.random.default_rng(3)
    given = menus(rng, count=50, settings=6)
    for limit in (10.0, 14.0, 20.0):
        found = solve(given, cost=limit)
        assert found is not None
        assert 0 <= found.gap <= max(float(np.ptp(m.loss)) for m in given)
        assert found.cost > limit - 0.2, "what is left over is spent"


def test_no_more_goes_than_must() -> None:
    given = [Menu(range(13), -np.arange(13), np.arange(13.0)) for _ in range(12)]
    for saved, wanted in ((36.0, 36), (132.0, 132), (35.5, 36)):
        found = solve(given, cost=-saved)
        assert found is not None
        assert sum(found.settings) == wanted
    assert solve(given, cost=-145.0) is None


def test_settings_that_are_never_worth_it_are_never_taken() -> None:
    given = [menu([10, 10, 5, 6, 1], [0.0, 0.1**2, 0.2**2, 0.3**2, math.inf])]
    assert [solve(given, loss=b**2).picks for b in (0.1, 0.2, 10.0)] == [(0,), (2,), (2,)]  # type: ignore[union-attr]
    assert solve(given, cost=5.0).picks == (2,)  # type: ignore[union-attr]
    assert solve(given, cost=1.0) is None


def test_several_things_as_one_lose_nothing() -> None:
    """Two joined and one apart, and an alternative to the two: the same as trying both ways."""
    rng = np.random.default_rng(4)
    for _ in range(20):
        first, second, third, joint = menus(rng, whole=True)
        group = either([joint, together([first, second])])
        limit = float(rng.integers(20, 90))
        ways = [w for w in (best([joint, third], limit), best([first, second, third], limit)) if w is not None]
        found = solve([group, third], cost=limit)
        assert (found is None) == (not ways)
        if found is not None:
            assert found.loss == pytest.approx(min(ways))
            assert sum(c for setting in found.settings for c, _ in setting) == found.cost


@pytest.mark.parametrize("factor", [0.3, 1.0, 3.0])
def test_the_measured_error_decides_not_the_predicted_one(factor: float) -> None:
    given = [menu([4, 2, 1], [0.0, (0.002 * (k + 1)) ** 2, (0.01 * (k + 1)) ** 2]) for k in range(24)]

    def measured(choice: Allocation[Any]) -> float:
        return factor * math.sqrt(choice.loss)

    chosen, error = settle(given, 0.1, measured)
    assert error == pytest.approx(measured(chosen))
    assert 0.08 < error <= 0.1
    chosen, error = settle(given, 0.1, lambda choice: 1.0 if choice.loss else 0.0)
    assert (chosen.picks, error) == ((0,) * 24, 0.0)


def test_a_hair_over_the_limit_is_within_it() -> None:
    big = [menu([6e11, 1e12], [1.0, 0.0]), menu([4e11 + 500, 1e12], [1.0, 0.0])]
    found = solve(big, cost=1e12)
    assert found is not None
    assert found.picks == (0, 0)
    assert solve(big, cost=0.9e12) is None
