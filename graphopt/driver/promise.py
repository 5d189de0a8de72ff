"""The promise: the artifact is not slower than its input. Both are timed side by side; if the artifact is slower, lossless changes are taken back.

Changes are taken back pass by pass from the end, so the choices of the lowering go first; one that was not to blame comes back. The last
resort is the input itself, byte for byte. What the user asked for by name (lossy passes, `--require`) stays, and a warning tells what it costs.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from graphopt.core.errors import GraphoptError, TargetError
from graphopt.core.fuel import Fuel
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
    from graphopt.driver.gate import Gate
    from graphopt.driver.history import Ran

PATIENCE = 30.0  # seconds of timing after which nothing more is tried, and the input itself is the answer
# of the weights, beyond what is held already: 5.2 (MiniLM) and 5.6 (a stack of products) were measured at -O1, and taking back wants more
_COPIES = 7


@dataclasses.dataclass
class Outcome:
    """What is left: `model` is None where it is the input itself. `timings` of `input` and `output`; None: not timed, or it does not run, and
    `failure` says why."""

    model: ir.Model | None
    graph: ir.Model | None
    records: list[PassRecord]
    timings: Timings | None = None
    failure: str = ""
    reason: str = "not measured; leave out --no-measure, or call Result.measure()"

    @property
    def slower(self) -> bool:
        """Also where it does not run."""
        return self.timings is None or not self.timings.not_slower("output")

    def told(self) -> tuple[Measured, list[Timing]]:
        """For the report."""
        return (Measured(None, self.reason), []) if self.timings is None else told(self.timings)


def kept(ran: Ran, gate: Gate) -> Outcome:
    """The outcome with its timings, and without what is slow; where nothing can be timed, the reason.

    Args:
        gate: what is timed runs in this process, so it must have come through.
    """
    job, whole = ran.job, ran.outcome
    if job.target.processor is not None:
        whole.reason = f"not measured: it is for another processor, {job.target}"
        return whole
    try:
        assert whole.graph is not None
        return _Promise(ran, gate, race.feeds_of(job.target, whole.graph, job.samples, job.shapes)).keep(whole)
    except GraphoptError as error:
        whole.reason = f"not measured: {error}"
        return whole


class _Promise:
    """Keeps the promise for one run of a job. The input's session is kept, and races every candidate.

    Raises:
        TargetError: the target cannot run here.
        SampleError: the input runs at none of the sizes.
    """

    def __init__(self, ran: Ran, gate: Gate, feeds: Mapping[str, Feeds]) -> None:
        job = ran.job
        need, free = _COPIES * nbytes(job.original), free_memory()
        if free is not None and need > free:
            raise TargetError(f"two sessions would need about {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
        self.job, self.history, self.gate, self.start = job, ran.history, gate, time.perf_counter()
        job.tell("timing input and output, interleaved", 0.0)
        self.clock = race.clock_of(job.target)
        self.base = gate.input_session(feeds)
        self.feeds = race.runnable(self.base, feeds)

    def keep(self, whole: Outcome) -> Outcome:
        """Time, and take back what is slow."""
        self._time(whole)
        return whole if not whole.slower else self._take_back(whole)

    def _time(self, candidate: Outcome) -> None:
        try:
            sessions = {"input": self.base, "output": self.gate.session(candidate, next(iter(self.feeds.values())))}
            candidate.timings = race.patient_race(sessions, self.feeds, clock=self.clock)
        except GraphoptError as error:
            candidate.failure = str(error)

    def _take_back(self, whole: Outcome) -> Outcome:
        current, dropped, steps = whole, set[int](), self.job.steps
        suspects = [k for k, (step, r) in enumerate(zip(steps, whole.records, strict=True), start=1) if r.changes and self.job.lossless(step)]
        for position in reversed(suspects):
            if time.perf_counter() - self.start > PATIENCE:
                break
            trial = self._without(position, dropped, current)
            self._time(trial)
            if trial.slower and _speed(trial.timings) / _speed(current.timings) < NOISE:
                continue
            dropped.add(position)
            why = f"taken back: {_told(current)}; without it {_told(trial)}"
            trial.records[position - 1] = _undone(trial.records[position - 1], why, _facts(current.timings, trial.timings))
            current = trial
            if not trial.slower:
                return current
        return self._last_resort(current)

    def _without(self, position: int, dropped: set[int], current: Outcome) -> Outcome:
        """The pipeline repeated without the step at `position` and those in `dropped`: from there, or from the first lowering, which chooses."""
        first, steps = self.history.first, self.job.steps
        start = min(position, first)
        model = self.history.at[start].clone()
        rest = [(k, step) for k, step in enumerate(steps, start=1) if k >= start and k != position and k not in dropped]
        again = History(next((n for n, (k, _) in enumerate(rest, start=1) if k >= first), 0), len(steps))
        fuel = Fuel(self.job.fuel, self.job.skip)
        fuel.back_to(self.history.burned[start])
        made = self.job.manager([step for _, step in rest], [again]).run(model, self.job.context(model, fuel))
        numbered = dict(zip((k for k, _ in rest), made, strict=True))
        records = [numbered.get(k, record) for k, record in enumerate(current.records, start=1)]
        return Outcome(model, again.graph or model, records)

    def _last_resort(self, current: Outcome) -> Outcome:
        told = f"slower than its input ({_told(current)})"
        asked = self.job.asked(current.records)
        if asked:
            warning = Remark("warning", "promise", "", f"the artifact is {told}, and {', '.join(asked)} stays as it was asked for")
            current.records.append(PassRecord("promise", 0, 0.0, [warning]))
            return current
        timed = current.timings
        same = None if timed is None else Timings({label: dict.fromkeys(row, row["input"]) for label, row in timed.rounds.items()})
        found = input_itself(current, "promise", f"the artifact was {told}", _facts(timed, None))
        return dataclasses.replace(found, timings=same)


def input_itself(outcome: Outcome, who: str, why: str, facts: Mapping[str, Any]) -> Outcome:
    """The last resort: everything is taken back, and the output is the input as it came."""
    records = [_undone(r, f"taken back with everything: {why}", facts) if r.changes else r for r in outcome.records]
    warning = Remark("warning", who, "", f"{why}; the output is the input itself", facts)
    return Outcome(None, None, [*records, PassRecord(who, 0, 0.0, [warning])], reason="the output is the input itself")


def _undone(record: PassRecord, why: str, facts: Mapping[str, Any]) -> PassRecord:
    """The record of a pass whose changes are not in the result, and so nothing is applied."""
    remarks = [remark for remark in record.remarks if remark.kind != "applied"]
    return dataclasses.replace(record, changes=0, remarks=[*remarks, Remark("missed", record.name.partition("{")[0], "", why, facts)])


def _speed(timed: Timings | None) -> float:
    return 1e-9 if timed is None else timed.speedup("output")


def _told(outcome: Outcome) -> str:
    timed = outcome.timings
    if timed is None:
        return f"it does not run: {outcome.failure}"
    return f"{timed.speedup('output'):.2f}x the speed of the input, {min(timed.ratios('output')):.2f}x at worst"


def _facts(before: Timings | None, after: Timings | None) -> dict[str, Any]:
    return {"with": None if before is None else before.as_dict(), "without": None if after is None else after.as_dict()}
