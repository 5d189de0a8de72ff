"""The promise: the artifact is not slower than its input. Both are timed side by side; if the artifact is slower, lossless changes are taken back.

Changes are taken back pass by pass from the end, so the choices of the lowering go first; one that was not to blame comes back. The last
resort is the input itself, byte for byte. What the user asked for by name (lossy passes, `--require`) stays, and a warning tells what it costs.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from graphopt.core.contract import Array, Context, Pass, Session, Target
from graphopt.core.errors import GraphoptError, TargetError
from graphopt.core.machine import free_memory
from graphopt.core.pipeline import PassManager, PassRecord
from graphopt.core.remarks import Remark
from graphopt.driver.instruments import Observer
from graphopt.graph.questions import nbytes
from graphopt.io import save
from graphopt.report.report import Measured, Timing
from graphopt.run import race as bench
from graphopt.run.clock import Timings, latency, steady_clock
from graphopt.run.race import SHAPES, shapes_of

Progress = Callable[[str, float], None]
Feeds = dict[str, Mapping[str, Array]]
BUDGET = 30.0  # seconds of timing after which nothing more is tried, and the input itself is the answer
_MEAN, _WORST = 0.98, 0.95  # "not slower": geometric mean over the shapes, and every single shape
_CLOCK = 5e-6  # seconds: a difference below this is that of two calls, not of two models
_GUILTY = 1.03  # taking a pass back must help this much, or it comes back
_EFFORT = ((0.0005, 10, 20), (0.005, 8, 8), (0.02, 5, 5), (0.05, 4, 3), (0.2, 3, 2), (float("inf"), 2, 1))  # seconds a run: rounds, block
_COPIES = 5  # of the weights, that two sessions need while they are made
_PATIENCE = 3  # times the rounds below, before an artifact counts as slower
_LONG = 20.0  # seconds of one shape that are not spent again


class History(Observer):
    """The graph as it was before every step (clones that share the weights), and how far the run is."""

    def __init__(self, first_lowering: int, total: int, tell: Progress) -> None:
        self.first, self.total, self.tell = first_lowering, max(1, total), tell
        self.at: dict[int, ir.Model] = {}
        self._fresh: ir.Model | None = None  # a clone that is still what the graph is

    def before(self, step: Pass, position: int, model: ir.Model, ctx: Context) -> None:
        self.tell(f"{position}/{self.total} {step}", (position - 1) / self.total)
        self._fresh = model.clone() if self._fresh is None else self._fresh
        self.at.setdefault(position, self._fresh)

    def after(self, step: Pass, position: int, changes: int, seconds: float, model: ir.Model, ctx: Context) -> None:
        if changes:
            self._fresh = None

    @property
    def graph(self) -> ir.Model | None:
        """The graph before the first lowering."""
        return self.at.get(self.first)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Medians over all rounds; and whether the artifact is slower, which both the paired ratios and the best rounds must say."""

    timings: Timings
    slower: bool


@dataclasses.dataclass
class Race:
    """Times input and candidates at the same feeds; the input's session is kept."""

    target: Target
    original: ir.Model
    feeds: Feeds

    def __post_init__(self) -> None:
        need, free = _COPIES * nbytes(self.original), free_memory()
        if free is not None and need > free:
            raise TargetError(f"two sessions would need about {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
        machine = self.target.machine()
        self.clock = steady_clock(None if machine is None else machine.own_threads)
        self.base = self.target.session(self.original)
        self.feeds = {label: feed for label, feed in self.feeds.items() if _runs(self.base, feed)}

    def run(self, model: ir.Model) -> Verdict | None:
        """None where the candidate does not run."""
        try:
            finished, _ = save.finish(model, getattr(self.target, "opset", None))
            session = self.target.session(finished)
            for feed in self.feeds.values():
                session.run(feed)
            return self._judge({"input": self.base, "output": session})
        except GraphoptError:
            return None

    def _judge(self, sessions: Mapping[str, Session]) -> Verdict:
        """Rounds until the artifact is not slower, or until it is clear that it is: a slow moment of the machine takes nothing back."""
        rows: dict[str, list[tuple[float, float]]] = {label: [] for label in self.feeds}
        costs = {label: _once(self.base, feed) for label, feed in self.feeds.items()}
        slower = True
        for patience in range(_PATIENCE):
            for label, feed in self.feeds.items():
                rounds, block = next((r, b) for limit, r, b in _EFFORT if costs[label] <= limit)
                if patience and costs[label] * rounds * (block + 1) * 2 > _LONG:
                    continue
                for turn in range(rounds):
                    order = dict(sorted(sessions.items(), reverse=bool(turn % 2)))
                    seconds = latency(order, {label: feed}, rounds=1, block=block, clock=self.clock).seconds
                    rows[label].append((seconds["input"][0], seconds["output"][0]))
            paired = [statistics.median(a / b for a, b in row) for row in rows.values()]
            best = [min(a for a, _ in row) / min(b for _, b in row) for row in rows.values()]
            saved = [statistics.median(a - b for a, b in row) for row in rows.values()]
            slower = not (not_slower(paired, saved) or not_slower(best, saved))
            if not slower:
                break
        medians = {name: tuple(statistics.median(pair[k] for pair in row) for row in rows.values()) for k, name in enumerate(("input", "output"))}
        return Verdict(Timings(tuple(rows), medians), slower)


def _once(session: Session, feed: Mapping[str, Array]) -> float:
    start = time.perf_counter()
    session.run(feed)
    return time.perf_counter() - start


def not_slower(ratios: Sequence[float], saved: Sequence[float]) -> bool:
    """The design's numbers, of ratios (input over output) per shape; a loss below what the clock itself varies by (`saved`, seconds) is none."""
    fair = [max(ratio, 1.0) if -_CLOCK <= difference < 0 else ratio for ratio, difference in zip(ratios, saved, strict=True)]
    return math.exp(statistics.fmean(math.log(r) for r in fair)) >= _MEAN and min(fair) >= _WORST


@dataclasses.dataclass
class Outcome:
    """What is left: `model` is None where it is the input itself. `verdict`: how fast `model` is."""

    model: ir.Model | None
    graph: ir.Model | None
    records: list[PassRecord]
    verdict: Verdict | None
    reason: str = ""

    @property
    def timings(self) -> Timings | None:
        return None if self.verdict is None else self.verdict.timings

    @property
    def slower(self) -> bool:
        """Also where it does not run."""
        return self.verdict is None or self.verdict.slower

    def speed_up(self) -> Measured:
        timed = self.timings
        return (
            Measured(None, self.reason)
            if timed is None
            else Measured(timed.speedup("output"), None, f"geometric mean over {', '.join(timed.shapes)}")
        )

    def latency(self) -> list[Timing]:
        if self.timings is None:
            return []
        rows = zip(self.timings.shapes, self.timings.seconds["input"], self.timings.seconds["output"], strict=True)
        return [Timing(shape, a * 1e3, b * 1e3) for shape, a, b in rows]


@dataclasses.dataclass
class Keeper:
    """Keeps the promise for one run of the pipeline.

    Attributes:
        steps: passes, then lowerings, in the order of `records`; what `history` saw before each.
        manager: makes the pass manager that repeats the rest of the pipeline, watched by a history of its own.
        named: names of passes that must stay.
        repaired: the door mended the input, so that its own bytes are no answer, however fast.
    """

    target: Target
    steps: Sequence[Pass]
    history: History
    manager: Callable[[Sequence[Pass], History], PassManager]
    context: Callable[[ir.Model], Context]
    named: Sequence[str]
    tell: Progress
    repaired: bool = False

    def keep(self, original: ir.Model, model: ir.Model, records: list[PassRecord], feeds: Feeds) -> Outcome:
        """Time, and take back what is slow.

        Raises:
            TargetError: the target cannot run here.
        """
        self.start = time.perf_counter()
        self.tell("timing input and output, interleaved", 0.0)
        race = Race(self.target, original, feeds)
        whole = Outcome(model, self.history.graph, records, None, "the input runs at none of the sizes; add --shapes or --samples")
        if not race.feeds:
            return whole
        whole.verdict = race.run(model)
        return whole if not whole.slower else self._take_back(race, original, whole)

    def _take_back(self, race: Race, original: ir.Model, whole: Outcome) -> Outcome:
        current, dropped = whole, set[int]()
        suspects = [k for k, (step, r) in enumerate(zip(self.steps, whole.records, strict=True), start=1) if r.changes and self._lossless(step)]
        for position in reversed(suspects):
            if time.perf_counter() - self.start > BUDGET:
                break
            trial = self._without(position, dropped, current)
            trial.verdict = race.run(_required(trial.model))
            better = _speed(trial.timings) / _speed(current.timings)
            if trial.slower and better < _GUILTY:
                continue
            dropped.add(position)
            why = f"taken back: {_told(current.timings)}; without it {_told(trial.timings)}"
            trial.records[position - 1] = _undone(trial.records[position - 1], why, _facts(current.timings, trial.timings))
            current = trial
            if not trial.slower:
                return current
        return self._last_resort(race, original, current, suspects)

    def _lossless(self, step: Pass) -> bool:
        return step.exact and not step.binding and step.name not in self.named

    def _without(self, position: int, dropped: set[int], current: Outcome) -> Outcome:
        """The pipeline repeated without the step at `position` and those in `dropped`: from there, or from the first lowering, which chooses."""
        first = self.history.first
        start = min(position, first)
        model = self.history.at[start].clone()
        again = History(first, len(self.steps), lambda text, done: None)
        rest = [(k, step) for k, step in enumerate(self.steps, start=1) if k >= start and k != position and k not in dropped]
        lowering = next((n for n, (k, _) in enumerate(rest, start=1) if k >= first), 0)
        again.first = lowering
        made = self.manager([step for _, step in rest], again).run(model, self.context(model))
        numbered = dict(zip((k for k, _ in rest), made, strict=True))
        records = [numbered.get(k, record) for k, record in enumerate(current.records, start=1)]
        return Outcome(model, again.graph or model, records, None)

    def _last_resort(self, race: Race, original: ir.Model, current: Outcome, suspects: Sequence[int]) -> Outcome:
        kept = [r for step, r in zip(self.steps, current.records, strict=True) if r.changes and not self._lossless(step)]
        told = f"slower than its input ({_told(current.timings)})"
        if kept or self.repaired:
            names = ", ".join([r.name for r in kept] + (["the repair of the input"] if self.repaired else []))
            warning = Remark("warning", "promise", "", f"the artifact is {told}, and {names} stays as it was asked for")
            current.records.append(PassRecord("promise", 0, 0.0, [warning]))
            return current
        facts = _facts(current.timings, None)
        records = list(current.records)
        for position in suspects:
            if records[position - 1].changes:
                records[position - 1] = _undone(records[position - 1], f"taken back with everything: the artifact was {told}", facts)
        warning = Remark("warning", "promise", "", f"the artifact was {told}; the output is the input itself", facts)
        timed = current.timings
        same = None if timed is None else Timings(timed.shapes, dict.fromkeys(("input", "output"), timed.seconds["input"]))
        verdict = None if same is None else Verdict(same, False)
        return Outcome(None, None, [*records, PassRecord("promise", 0, 0.0, [warning])], verdict, "the output is the input itself")


def _undone(record: PassRecord, why: str, facts: Mapping[str, Any]) -> PassRecord:
    return PassRecord(record.name, 0, record.seconds, [*record.remarks, Remark("missed", record.name.partition("{")[0], "", why, facts)])


def _required(model: ir.Model | None) -> ir.Model:
    assert model is not None
    return model


def _speed(timed: Timings | None) -> float:
    return 1e-9 if timed is None else timed.speedup("output")


def _told(timed: Timings | None) -> str:
    if timed is None:
        return "it does not run"
    return f"{timed.speedup('output'):.2f}x the speed of the input, {min(timed.ratios('output')):.2f}x at worst"


def _facts(before: Timings | None, after: Timings | None) -> dict[str, Any]:
    return {"with": None if before is None else before.as_dict(), "without": None if after is None else after.as_dict()}


def _runs(session: Session, feed: Mapping[str, Array]) -> bool:
    try:
        session.run(feed)
    except GraphoptError:
        return False
    return True


def feeds_of(target: Target, model: ir.Model, samples: Any, wanted: Sequence[tuple[int, ...]] | None) -> Feeds:
    """What to time with: the sizes asked for, the user's first sample, or the default sizes.

    Raises:
        SampleError: an input has no shape.
    """
    shapes = wanted or shapes_of(target)
    if samples is not None and not shapes:
        first = next(iter(samples))
        return {"x".join(map(str, next(iter(first.values())).shape)) if first else "sample": first}
    return dict(bench.feeds_for([model], shapes or SHAPES))
