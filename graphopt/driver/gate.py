"""The gate: nothing is written that its target cannot open and run, or that the runtime computes wrongly.

The finished artifact is opened and run once as its target does it, where a crash ends no process of the user (`Target.probe`). If it fails
while the input does not, the guilty change is found by bisection and taken back with its reason: alone, or with its whole step. What the user
asked for by name (lossy passes, `--require`) is never dropped; then nothing is written, and the error says which change it was.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphopt.core.contract import Array, Session
from graphopt.core.errors import GraphoptError, TargetError
from graphopt.core.remarks import Remark
from graphopt.driver.bisect import bisect
from graphopt.driver.history import Ran, without
from graphopt.driver.instruments import FEEDS, CheckNumerics, broken
from graphopt.driver.promise import Outcome, input_itself
from graphopt.graph.interface import RESIZED
from graphopt.graph.questions import grain
from graphopt.report.report import Gated
from graphopt.run import Feeds, guarded, ort, race
from graphopt.run.distance import Difference, compare_outputs, excess

if TYPE_CHECKING:
    from graphopt.driver.job import Job

_TRIES = 8  # changes and steps that are taken back, before the input itself is the answer
_ALONE = 2  # of them single changes of one step; then the whole step goes
_ROUNDING = 10.0  # in units of `excess`: what the runtime's default level may be off, or so many times as far as it is for the input


class Gate:
    """Judges graphs of one job. What the input does is asked once, and only where it matters.

    Attributes:
        off: why nothing can be judged; empty if it can.
        feed: what everything is run on; None = it is only opened, and `unfed` says why.
    """

    def __init__(self, job: Job, feed: Feeds | None = None) -> None:
        self.job, self.off = job, _off(job)
        self.feed, self.unfed = (feed, "") if self.off or feed is not None else _feed(job)
        self._said: list[tuple[ir.Model, Gated]] = []
        checked = feed is None and not self.off and job.samples is not None and any(isinstance(w, CheckNumerics) for w in job.watchers)
        self._more = [Gate(job, sample) for sample in itertools.islice(job.samples or (), 1, FEEDS)] if checked else []

    # ---- verdicts -------------------------------------------------------------------------------------------------------------------------

    def verdict(self, outcome: Outcome) -> Gated:
        """What the gate says of an outcome; `passed` is False where it must not be written. Asked again about the same graph, it remembers."""
        if outcome.model is None:
            return Gated(True, "the output is the input itself")
        if self.off:
            return Gated(None, self.off)
        known = next((said for model, said in self._said if model is outcome.model), None)
        if known is None:
            known = self._on_all(outcome.model, self.job.exact(outcome.records))
            self._said.append((outcome.model, known))
        return known

    def session(self, outcome: Outcome, feed: Feeds) -> Session:
        """A session in this process of what may be written; what was not judged is probed first.

        Raises:
            TargetError: it cannot be opened or run, or must not be written; one line.
        """
        assert outcome.model is not None
        said, target = self.verdict(outcome), self.job.target
        if said.passed is False:
            raise TargetError(said.reason)
        finished, _ = target.finish(outcome.model)
        return target.session(finished) if said.passed else guarded.opened(target, finished, feed)

    def input_session(self, feeds: Mapping[str, Feeds]) -> Session:
        """A session in this process of the input, which may not run either.

        Args:
            feeds: label of a size -> inputs.

        Raises:
            TargetError: see `session`.
            SampleError: it runs at none of the sizes.
        """
        if not self.off and isinstance(self.input, dict):
            return self.job.target.session(self.job.original)
        return race.opened(self.job.target, self.job.original, feeds)

    def _on_all(self, model: ir.Model, exact: bool) -> Gated:
        """On the first sample; with --check-numerics on others, too."""
        said = self._judge(model, exact)
        for gate in self._more:
            said = gate._judge(model, exact) if said.passed else said
        return said

    def _judge(self, model: ir.Model, exact: bool) -> Gated:
        """
        Args:
            exact: the numbers must be those of the input; else those of the graph itself, with runtime optimizations off.
        """
        finished, _ = self.job.target.finish(model)
        feed = _feed(dataclasses.replace(self.job, model=model, samples=None))[0] if model.graph.meta.get(RESIZED) else self.feed
        try:
            found = tensors(self.job.target.probe(finished, feed))
        except TargetError as error:
            return self._failed(finished, str(error))
        if self.feed is None:
            return Gated(True, f"loaded, and not run: {self.unfed}")
        if not exact and (worse := self._became_nan(found)) is not None:
            return Gated(False, str(worse))
        if exact and isinstance(self.input, dict) and excess(self.input, found, self._grain).times <= _ROUNDING:
            return Gated(True, "loaded and run; its numbers are those of the input")
        return self._compared(self.job.original if exact else finished, feed, found, self._grain if exact else grain(model))

    def _failed(self, finished: ir.Model, why: str) -> Gated:
        """It does not load or run: that counts where the input does."""
        if not isinstance(self.input, str):
            return Gated(False, why)
        probe = self.job.target.probe
        if self.feed is None or _refusal(lambda: probe(self.job.original)) is not None:
            return Gated(None, f"the input does not load here either: {self.input}")
        refused = _refusal(lambda: probe(finished))
        if refused is not None:
            return Gated(False, refused)
        return Gated(None, f"loaded, and not run: the input does not run on this feed either: {self.input}")

    def _compared(self, base: ir.Model, feed: Feeds | None, found: Mapping[str, Array], grain: str) -> Gated:
        """Its numbers at the default level against a baseline with runtime optimizations off; the input's own error sets what is too far."""
        expected = _plain(base, feed)
        whose = f"{'those of the input' if base is self.job.original else 'its own'} with runtime optimizations off"
        if isinstance(expected, str):
            return Gated(None, f"loaded and run; there is nothing to judge its numbers by: {expected}")
        if excess(expected, found, grain).times > _ROUNDING:
            steady = _steady(base, feed, expected)
            off = excess(steady, {name: found[name] for name in found if name in steady or name not in expected}, grain)
            if isinstance(self.input, str):
                return Gated(None, f"loaded and run; the input does not run: {self.input}; the numbers of its own are others: {off}")
            if off.times > _ROUNDING * max(1.0, self._own_error):
                return Gated(False, f"its numbers as the target runs it are not {whose}: {off}")
        return Gated(True, f"loaded and run; its numbers are {whose}")

    def _became_nan(self, found: Mapping[str, Array]) -> Difference | None:
        """A NaN is no loss but a broken model; the input is asked only where there is one."""
        if any(array.dtype.kind == "f" and np.isnan(array).any() for array in found.values()):
            return broken(self.input, dict(found), free=found) if isinstance(self.input, dict) else None
        return None

    @functools.cached_property
    def input(self) -> dict[str, Array] | str:
        """The outputs of the input as its target opens it, or why there are none."""
        try:
            return tensors(self.job.target.probe(self.job.original, self.feed))
        except GraphoptError as error:
            return str(error)

    @functools.cached_property
    def _own_error(self) -> float:
        """How far the default level is off for the input, in units of rounding; 0 where that is not known."""
        expected = _plain(self.job.original, self.feed)
        if isinstance(expected, str) or isinstance(self.input, str):
            return 0.0
        steady = _steady(self.job.original, self.feed, expected)
        return excess(steady, {name: self.input[name] for name in self.input if name in steady}, self._grain).times

    @functools.cached_property
    def _grain(self) -> str:
        return grain(self.job.original)

    # ---- taking back ----------------------------------------------------------------------------------------------------------------------

    def kept(self, ran: Ran) -> Ran:
        """The run without what its target cannot open.

        Raises:
            TargetError: what is to blame was asked for by name: nothing may be written.
        """
        tried: Counter[int] = Counter()
        told: list[tuple[int, Remark]] = []
        for _ in range(_TRIES):
            why, job = self.verdict(ran.outcome).reason, ran.job
            if self.verdict(ran.outcome).passed is not False:
                break
            try:
                found = bisect(job, functools.partial(self.check, exact=job.exact(ran.outcome.records)))
            except GraphoptError as error:
                return self._input(ran, f"{why} (no single step is to blame: {error})")
            if not job.lossless(job.steps[found.position - 1]):
                raise TargetError(f"nothing was written: {found}; it was asked for; --no-gate writes it for a runtime that is not here")
            tried[found.position] += 1
            change, reason = (found.fuel if tried[found.position] <= _ALONE else None), f"taken back: {found}"
            ran = without(job, found.position, reason, change).once()
            if change is not None:
                told.append((found.position, Remark("missed", job.steps[found.position - 1].name, "", reason)))
        if self.verdict(ran.outcome).passed is False:
            return self._input(ran, why)
        for position, remark in told:
            ran.outcome.records[position - 1].remarks.append(remark)
        return ran

    def check(self, graph: ir.Model, exact: bool) -> str | None:
        """For the bisection: what is wrong with a graph between two steps."""
        try:
            said = self._on_all(graph, exact)
        except GraphoptError as error:
            return str(error)
        return said.reason if said.passed is False else None

    def _input(self, ran: Ran, why: str) -> Ran:
        """The input as it came, if nothing stands against it."""
        asked = self.job.asked(ran.outcome.records)
        if asked:
            raise TargetError(f"nothing was written: {why}; {', '.join(asked)} was asked for, so the input itself is no answer")
        return dataclasses.replace(ran, outcome=input_itself(ran.outcome, "gate", why, {}))


# ---- asking ---------------------------------------------------------------------------------------------------------------------------


def _off(job: Job) -> str:
    if not job.gate:
        return "--no-gate"
    if job.target.processor is not None:
        return f"it is for another processor, {job.target}"
    return "" if job.target.runs_here() else f"target {job.target.name} cannot run here"


def _feed(job: Job) -> tuple[Feeds | None, str]:
    """The first sample, else the smallest of the sizes that would be timed; None and the reason where no feed can be made."""
    smallest = min(job.shapes or race.shapes_of(job.target), key=math.prod)
    try:
        return (next(iter(job.samples)) if job.samples is not None else race.feeds_for([job.model], [smallest]).popitem()[1]), ""
    except (GraphoptError, ValueError) as error:
        return None, str(error)


def _plain(model: ir.Model, feed: Feeds | None) -> dict[str, Array] | str:
    """What a graph gives with runtime optimizations off; or why it gives nothing."""
    try:
        return tensors(guarded.probe(model, feed, ort.settings(optimize=False)))
    except GraphoptError as error:
        return str(error)


def _steady(model: ir.Model, feed: Feeds | None, once: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs that a second run gives again: a graph may be random."""
    again = _plain(model, feed)
    return {} if isinstance(again, str) else {k: v for k, v in once.items() if compare_outputs({k: v}, {k: again[k]}) is None}


def tensors(outputs: Mapping[str, Any]) -> dict[str, Array]:
    """Those that are tensors."""
    return {name: value for name, value in outputs.items() if isinstance(value, np.ndarray)}


def _refusal(action: Any) -> str | None:
    try:
        action()
    except GraphoptError as error:
        return str(error)
    return None
