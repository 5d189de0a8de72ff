"""The one place that measures: latency, size, parameters, FLOPs, and how far two sets of outputs are apart."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from graphopt.core.contract import Array, Session
from graphopt.graph.questions import parameters
from graphopt.graph.size import Flops, flops, size
from graphopt.run.distance import Difference, Distance, compare_outputs, distance, relative_l2

if TYPE_CHECKING:
    pass

__all__ = [
    "Difference", "Distance", "Flops", "Timings", "compare_outputs", "distance", "flops", "latency", "parameters", "relative_l2", "size",
    "steady_clock",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Timings:
    """Median seconds of each model at each shape; the first model is the baseline of every ratio."""

    shapes: tuple[str, ...]
    seconds: Mapping[str, tuple[float, ...]]

    @property
    def baseline(self) -> str:
        return next(iter(self.seconds))

    def ratios(self, name: str) -> tuple[float, ...]:
        """How many times faster than the baseline, at each shape."""
        return tuple(b / t for b, t in zip(self.seconds[self.baseline], self.seconds[name], strict=True))

    def speedup(self, name: str) -> float:
        """The geometric mean of the ratios."""
        return math.exp(statistics.fmean(math.log(r) for r in self.ratios(name)))

    def not_slower(self, name: str) -> bool:
        """Geometric mean >= 0.98 and no shape < 0.95: what noise allows an equally fast model."""
        return self.speedup(name) >= 0.98 and min(self.ratios(name)) >= 0.95

    def as_dict(self) -> dict[str, Any]:
        return {
            "shapes": list(self.shapes),
            "models": {
                name: {"milliseconds": [round(t * 1e3, 4) for t in seconds], "speedup": round(self.speedup(name), 4)}
                for name, seconds in self.seconds.items()
            },
        }


def latency(
    sessions: Mapping[str, Session],
    feeds: Mapping[str, Mapping[str, Array]],
    *,
    rounds: int = 5,
    block: int = 4,
    progress: Callable[[float], None] | None = None,
    clock: Callable[[], float] | None = None,
) -> Timings:
    """Time models side by side, in interleaved warm blocks.

    In each round every model runs `block` + 1 times in a row and the first run is not counted: a model that is served stays in the caches.
    Rounds take turns over all models, so that a drift of the machine hits all alike. Reported is the median over all counted runs.

    Args:
        sessions: name -> model; the first is the baseline.
        feeds: label of a shape, such as "8x64" -> inputs.
        progress: called with the fraction done.
        clock: gives seconds; by default the wall clock. See `steady_clock`.
    """
    names, done, total = list(sessions), 0, len(feeds) * rounds * len(sessions)
    medians: dict[str, list[float]] = {name: [] for name in names}
    for feed in feeds.values():
        runs: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                runs[name] += _block(sessions[name], feed, block, clock or time.perf_counter)
                done += 1
                if progress is not None:
                    progress(done / total)
        for name in names:
            medians[name].append(statistics.median(runs[name]))
    return Timings(tuple(feeds), {name: tuple(seconds) for name, seconds in medians.items()})


def steady_clock(threads: int | None) -> Callable[[], float]:
    """The clock for a runtime that computes in `threads` threads of this process (None: elsewhere, or not known).

    For one thread it is the processor time of this process, which is the wall clock of an idle machine: what other processes take does not
    count. Nothing else in the process may compute meanwhile.
    """
    return time.process_time if threads == 1 else time.perf_counter


def _block(session: Session, feed: Mapping[str, Array], runs: int, clock: Callable[[], float]) -> list[float]:
    session.run(feed)
    times = []
    for _ in range(runs):
        start = clock()
        session.run(feed)
        times.append(clock() - start)
    return times
