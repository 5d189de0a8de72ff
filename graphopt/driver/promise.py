"""The promise: the artifact is not slower than its input. Both are timed side by side; if the artifact is slower, lossless changes are taken back.

Changes are taken back pass by pass from the end, so the choices of the lowering go first; one that was not to blame comes back. The last
resort is the input itself, byte for byte. What the user asked for by name (lossy passes, `--require`) stays, and a warning tells what it costs.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from graphopt.core.contract import Pass
from graphopt.core.errors import GraphoptError, TargetError
from graphopt.core.machine import free_memory
from graphopt.core.pipeline import PassRecord
from graphopt.core.remarks import Remark
from graphopt.driver.history import History
from graphopt.driver.result import told
from graphopt.graph.questions import nbytes
from graphopt.report.report import Measured, Timing
from graphopt.run import Feeds, race
from graphopt.run.clock import NOISE, Timings

if TYPE_CHECKING:
    from graphopt.driver.job import Job

PATIENCE = 30.0  # seconds of timing after which nothing more is tried, and the input itself is the answer
# of the weights, beyond what is held already: 5.2 (MiniLM) and 5.6 (a stack of products) were measured at -O1, and taking back wants more
_COPIES = 7


@dataclasses.dataclass
class Outcome:
    """What is left: `model` is None where it is the input itself. `timings` of `input` and `output`; None: not timed, or it does not run."""

    model: ir.Model | None
    graph: ir.Model | None
    records: list[PassRecord]
    timings: Timings | None = None
    reason: str = "not measured; leave out --no-measure, or call Result.measure()"

    @property
    def slower(self) -> bool:
        """Also where it does not run."""
        return self.timings is None or not self.timings.not_slower("output")

    def told(self) -> tuple[Measured, list[Timing]]:
        """For the report."""
        return (Measured(None, self.reason), []) if self.timings is None else told(self.timings)


def kept(job: Job, whole: Outcome, history: History) -> Outcome:
    """The outcome with its timings, and without what is slow; where nothing can be timed, the reason.

    Args:
        history: the graph before each step of the job.
    """
    if job.target.processor is not None:
        whole.reason = f"not measured: it is for another processor, {job.target}"
        return whole
    try:
        assert whole.graph is not None
        return _Promise(job, history, race.feeds_of(job.target, whole.graph, job.samples, job.shapes)).keep(whole)
    except GraphoptError as error:
        whole.reason = f"not measured: {error}"
        return whole


class _Promise:
    """Keeps the promise for one run of a job. The input's session is kept, and races every candidate.

    Raises:
        TargetError: the target cannot run here.
    """

    def __init__(self, job: Job, history: History, feeds: Mapping[str, Feeds]) -> None:
        need, free = _COPIES * nbytes(job.original), free_memory()
        if free is not None and need > free:
            raise TargetError(f"two sessions would need about {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
        self.job, self.history, self.start = job, history, time.perf_counter()
        job.tell("timing input and output, interleaved", 0.0)
        self.clock = race.clock_of(job.target)
        self.base = job.target.session(job.original)
        self.feeds = {label: feed for label, feed in feeds.items() if not race.refusals({"input": self.base}, [feed])}

    def keep(self, whole: Outcome) -> Outcome:
        """Time, and take back what is slow."""
        whole.reason = "the input runs at none of the sizes; add --shapes or --samples"
        if not self.feeds:
            return whole
        whole.timings = self._time(whole.model)
        return whole if not whole.slower else self._take_back(whole)

    def _time(self, model: ir.Model | None) -> Timings | None:
        """None where the candidate does not run."""
        assert model is not None
        try:
            finished, _ = self.job.target.finish(model)
            sessions = {"input": self.base, "output": self.job.target.session(finished)}
            return race.patient_race(sessions, self.feeds, clock=self.clock)
        except GraphoptError:
            return None

    def _take_back(self, whole: Outcome) -> Outcome:
        current, dropped, steps = whole, set[int](), self.job.steps
        suspects = [k for k, (step, r) in enumerate(zip(steps, whole.records, strict=True), start=1) if r.changes and self._lossless(step)]
        for position in reversed(suspects):
            if time.perf_counter() - self.start > PATIENCE:
                break
            trial = self._without(position, dropped, current)
            trial.timings = self._time(trial.model)
            if trial.slower and _speed(trial.timings) / _speed(current.timings) < NOISE:
                continue
            dropped.add(position)
            why = f"taken back: {_told(current.timings)}; without it {_told(trial.timings)}"
            trial.records[position - 1] = _undone(trial.records[position - 1], why, _facts(current.timings, trial.timings))
            current = trial
            if not trial.slower:
                return current
        return self._last_resort(current, suspects)

    def _lossless(self, step: Pass) -> bool:
        return step.exact and not step.binding and step.name not in self.job.required

    def _without(self, position: int, dropped: set[int], current: Outcome) -> Outcome:
        """The pipeline repeated without the step at `position` and those in `dropped`: from there, or from the first lowering, which chooses."""
        first, steps = self.history.first, self.job.steps
        start = min(position, first)
        model = self.history.at[start].clone()
        rest = [(k, step) for k, step in enumerate(steps, start=1) if k >= start and k != position and k not in dropped]
        again = History(next((n for n, (k, _) in enumerate(rest, start=1) if k >= first), 0), len(steps))
        made = self.job.manager([step for _, step in rest], [again]).run(model, self.job.context(model))
        numbered = dict(zip((k for k, _ in rest), made, strict=True))
        records = [numbered.get(k, record) for k, record in enumerate(current.records, start=1)]
        return Outcome(model, again.graph or model, records)

    def _last_resort(self, current: Outcome, suspects: Sequence[int]) -> Outcome:
        kept = [r for step, r in zip(self.job.steps, current.records, strict=True) if r.changes and not self._lossless(step)]
        told = f"slower than its input ({_told(current.timings)})"
        if kept or self.job.loaded.changes:  # the door mended the input: its own bytes are no answer, however fast
            names = ", ".join([r.name for r in kept] + (["the repair of the input"] if self.job.loaded.changes else []))
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
        same = None if timed is None else Timings({label: dict.fromkeys(row, row["input"]) for label, row in timed.rounds.items()})
        return Outcome(None, None, [*records, PassRecord("promise", 0, 0.0, [warning])], same, "the output is the input itself")


def _undone(record: PassRecord, why: str, facts: Mapping[str, Any]) -> PassRecord:
    return PassRecord(record.name, 0, record.seconds, [*record.remarks, Remark("missed", record.name.partition("{")[0], "", why, facts)])


def _speed(timed: Timings | None) -> float:
    return 1e-9 if timed is None else timed.speedup("output")


def _told(timed: Timings | None) -> str:
    if timed is None:
        return "it does not run"
    return f"{timed.speedup('output'):.2f}x the speed of the input, {min(timed.ratios('output')):.2f}x at worst"


def _facts(before: Timings | None, after: Timings | None) -> dict[str, Any]:
    return {"with": None if before is None else before.as_dict(), "without": None if after is None else after.as_dict()}
