"""What a run looked like on its way, and the same run without a part of it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import onnx_ir as ir

from graphopt.core.contract import Context, Pass
from graphopt.core.pipeline import Instrument
from graphopt.core.remarks import Progress

if TYPE_CHECKING:
    from graphopt.driver.job import Job
    from graphopt.driver.promise import Outcome


class History(Instrument):
    """The graph as it was before every step (clones that share the weights), the fuel burned until then, and how far the run is.

    Args:
        first_lowering, total: the position of the first lowering, and of the last step; positions count from 1.
    """

    def __init__(self, first_lowering: int, total: int, tell: Progress = lambda text, done: None) -> None:
        self.first, self.total, self.tell = first_lowering, max(1, total), tell
        self.at: dict[int, ir.Model] = {}
        self.burned: dict[int, int] = {}
        self._fresh: ir.Model | None = None  # a clone that is still what the graph is

    def before(self, step: Pass, position: int, model: ir.Model, ctx: Context) -> None:
        self.tell(f"{position}/{self.total} {step}", (position - 1) / self.total)
        self._fresh = model.clone() if self._fresh is None else self._fresh
        self.at.setdefault(position, self._fresh)
        self.burned.setdefault(position, ctx.fuel.burned)

    def after(self, step: Pass, position: int, changes: int, seconds: float, model: ir.Model, ctx: Context) -> None:
        if changes:
            self._fresh = None

    @property
    def graph(self) -> ir.Model | None:
        """The graph before the first lowering."""
        return self.at.get(self.first)


@dataclasses.dataclass(frozen=True)
class Ran:
    """A job that ran: the graph before each step, and what came out."""

    job: Job
    history: History
    outcome: Outcome


@dataclasses.dataclass(frozen=True)
class TakenBack(Pass):
    """Stands for a step that was taken back: it changes nothing, and says why."""

    step: Pass
    why: str

    def __str__(self) -> str:
        return str(self.step)

    def run(self, model: ir.Model, ctx: Context) -> int:
        ctx.remarks.current = self.step.name
        ctx.remarks.missed("", self.why)
        return 0


def without(job: Job, position: int, why: str, change: int | None = None) -> Job:
    """The job without one step, in whose place is the reason, or without one change, whose number of the whole run is `change`."""
    if change is not None:
        return dataclasses.replace(job, skip=job.skip | {change})
    steps, count = list(job.steps), len(job.passes)
    steps[position - 1] = TakenBack(steps[position - 1], why)
    return dataclasses.replace(job, passes=tuple(steps[:count]), lowerings=tuple(steps[count:]))
