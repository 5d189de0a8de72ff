"""The one clock: models timed side by side, and what noise allows an equally fast one."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from graphopt.core.contract import Array, Session

Clock = Callable[[], float]  # gives seconds
Done = Callable[[float], None]  # called with the fraction done
NOISE = 1.03  # what is not faster by more than this factor is not faster
_MEAN, _WORST = 0.98, 0.95  # "not slower": geometric mean over the shapes, and every single shape
_CLOCK = 5e-6  # seconds: a difference below this is that of two calls, not of two models


@dataclasses.dataclass(frozen=True)
class Timings:
    """Seconds a run: label of a shape -> model -> the median of each round. The first model is the baseline of every ratio."""

    rounds: Mapping[str, Mapping[str, tuple[float, ...]]]

    @property
    def shapes(self) -> tuple[str, ...]:
        return tuple(self.rounds)

    @property
    def seconds(self) -> dict[str, tuple[float, ...]]:
        """Model -> its median at each shape."""
        names = next(iter(self.rounds.values()), {})
        return {name: tuple(statistics.median(row[name]) for row in self.rounds.values()) for name in names}

    @property
    def baseline(self) -> str:
        return next(iter(self.seconds))

    def ratios(self, name: str) -> tuple[float, ...]:
        """How many times faster than the baseline, at each shape."""
        seconds = self.seconds
        return tuple(b / t for b, t in zip(seconds[self.baseline], seconds[name], strict=True))

    def speedup(self, name: str) -> float:
        """The geometric mean of the ratios."""
        return geometric_mean(self.ratios(name))

    def not_slower(self, name: str) -> bool:
        """Whether the paired rounds say so, or the best ones: a model is slower only where both say that it is."""
        pairs = [(row[self.baseline], row[name]) for row in self.rounds.values()]
        paired = [statistics.median(a / b for a, b in zip(*pair, strict=True)) for pair in pairs]
        best = [min(a) / min(b) for a, b in pairs]
        saved = [statistics.median(a - b for a, b in zip(*pair, strict=True)) for pair in pairs]
        return not_slower(paired, saved) or not_slower(best, saved)

    def plus(self, more: Timings) -> Timings:
        """With the rounds of another run of the same models, at some of the shapes or all."""
        added = {label: {name: own + more.rounds[label][name] for name, own in self.rounds[label].items()} for label in more.rounds}
        return Timings({**self.rounds, **added})

    def as_dict(self) -> dict[str, Any]:
        return {
            "shapes": list(self.shapes),
            "models": {
                name: {"milliseconds": [round(t * 1e3, 4) for t in seconds], "speedup": round(self.speedup(name), 4)}
                for name, seconds in self.seconds.items()
            },
        }


def geometric_mean(ratios: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(r) for r in ratios))


def not_slower(ratios: Sequence[float], saved: Sequence[float]) -> bool:
    """Geometric mean >= 0.98 and no shape < 0.95, of ratios (baseline over model) per shape; a loss below what the clock itself varies by
    (`saved`, seconds) is none."""
    fair = [max(ratio, 1.0) if -_CLOCK <= difference < 0 else ratio for ratio, difference in zip(ratios, saved, strict=True)]
    return geometric_mean(fair) >= _MEAN and min(fair) >= _WORST


def latency(
    sessions: Mapping[str, Session],
    feed: Mapping[str, Array],
    *,
    rounds: int = 5,
    block: int = 4,
    progress: Done | None = None,
    clock: Clock | None = None,
) -> dict[str, tuple[float, ...]]:
    """Time models side by side at one feed, in interleaved warm blocks: for each model its median of every round, in seconds.

    In each round every model runs `block` + 1 times in a row and the first run is not counted: a model that is served stays in the caches.
    Rounds take turns over all models, so that a drift of the machine hits all alike.

    Args:
        sessions: name -> model.
        progress: called with the fraction done.
        clock: gives seconds; by default the wall clock. See `steady_clock`.
    """
    names, done = list(sessions), 0
    medians: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            medians[name].append(statistics.median(_block(sessions[name], feed, block, clock or time.perf_counter)))
            done += 1
            if progress is not None:
                progress(done / (rounds * len(names)))
    return {name: tuple(found) for name, found in medians.items()}


def steady_clock(threads: int | None) -> Clock:
    """The clock for a runtime that computes in `threads` threads of this process (None: elsewhere, or not known).

    For one thread it is the processor time of this process, which is the wall clock of an idle machine: what other processes take does not
    count. Nothing else in the process may compute meanwhile.
    """
    return time.process_time if threads == 1 else time.perf_counter


def _block(session: Session, feed: Mapping[str, Array], runs: int, clock: Clock) -> list[float]:
    session.run(feed)
    times = []
    for _ in range(runs):
        start = clock()
        session.run(feed)
        times.append(clock() - start)
    return times
