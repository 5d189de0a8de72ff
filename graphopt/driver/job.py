"""One run as an object: what was asked for, checked and resolved, and the parts that carry it out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from time import perf_counter as clock
from typing import TYPE_CHECKING, Any, Unpack

import onnx_ir as ir

from graphopt.core import pipeline as pipelines
from graphopt.core import registry
from graphopt.core.contract import Budget, Context, Pass, Target
from graphopt.core.errors import GraphoptError, PipelineError, SampleError, VerifyError
from graphopt.core.fuel import Fuel
from graphopt.core.options import near
from graphopt.core.pipeline import Instrument, PassManager, PassRecord, parse, render
from graphopt.core.places import check_places
from graphopt.core.remarks import Progress, Remarks
from graphopt.driver import instruments
from graphopt.driver import promise as promises
from graphopt.driver.gate import Gate
from graphopt.driver.history import History, Ran
from graphopt.driver.instruments import Dump
from graphopt.driver.loss import NO_SAMPLES, Loss
from graphopt.driver.options import RunOptions
from graphopt.driver.promise import Outcome
from graphopt.driver.result import Result, reason, report_of, say_idle, say_rounded
from graphopt.driver.transaction import TransactionManager
from graphopt.graph.interface import interface
from graphopt.graph.shapes import drop_contradicted
from graphopt.graph.verify import complaints, verify
from graphopt.io import advisories, closed
from graphopt.io.load import check_options, keeps_bytes, load_both, load_options
from graphopt.io.save import sources_of
from graphopt.report.words import called
from graphopt.run.race import parse_shapes, sizes_for
from graphopt.run.samples import Samples

if TYPE_CHECKING:
    from graphopt.io.load import Source


@dataclasses.dataclass(frozen=True)
class Job:
    """One run. It can be repeated, also with other settings: `dataclasses.replace(job, fuel=7).run()`; nothing is loaded again.

    Attributes:
        target: where the model will run.
        passes, lowerings: what runs, in this order.
        required: names of passes that must change something, and are never taken back.
        original, model: the input as it came, and its normal form; `run` changes neither.
        name: what the input is called.
        loaded: what loading did; its changes are repairs of the input.
        source: the file that the input came from as it is, if it did.
        samples: all of them, for fitting, for choosing and for the loss alike; who splits them splits here, and gives `loss` its own part.
        loss: what a model loses against the original.
        max_loss: what lossy passes may lose together, as a fraction; None = they are not judged.
        known: the classes of passes by name, with the user's plugins.
        watchers: instruments.
        fuel: how many changes may happen at most; None = all.
        skip: numbers of changes of the run, from 1, that are left out alone.
        promise: whether the artifact is timed against the input, and lossless changes are taken back where it is slower.
        gate: whether the artifact is opened and run as its target opens it before it may be written.
        shapes: (batch, length) to time at; none = the samples, or those of the target.
        tell: is told what is done now, and the fraction of all steps.
    """

    target: Target
    passes: tuple[Pass, ...]
    lowerings: tuple[Pass, ...]
    required: tuple[str, ...]
    original: ir.Model
    model: ir.Model
    name: str
    loaded: PassRecord
    source: Path | None
    samples: Samples | None
    loss: Loss
    max_loss: float | None
    known: Mapping[str, type[Pass]]
    watchers: tuple[Instrument, ...] = ()
    fuel: int | None = None
    promise: bool = False
    shapes: Sequence[tuple[int, ...]] = ()
    tell: Progress = lambda text, done: None
    skip: frozenset[int] = frozenset()
    gate: bool = True

    @classmethod
    def make(cls, source: Source, pipeline: str | None = None, **options: Unpack[RunOptions]) -> Job:
        """Check and resolve everything, and load the model. Arguments as for `optimize`.

        Raises:
            PipelineError, LoadError, SaveError: see `optimize`.
        """
        check_options(options, RunOptions)
        plugins, required, shapes = tuple(options.get("plugins", ())), tuple(options.get("require", ())), options.get("shapes")
        level, fuel, max_loss, out = options.get("level", 1), options.get("fuel"), options.get("max_loss"), options.get("out")
        _check_values(options)
        target = _shaped(parse_target(options.get("target", "cpu"), plugins), shapes)
        known = registry.passes(plugins)
        passes = tuple(parse(target.pipeline(level) if pipeline is None else pipeline, known))
        lowerings = tuple(target.lowerings())
        _check_required(required, passes, lowerings)
        files = [*(() if out is None else target.files(Path(out))), *map(Path, options.get("writes", ()))]
        given = Path(source) if isinstance(source, (str, os.PathLike)) else None
        tell = options.get("progress") or cls.tell
        tell("load", 0.0)
        check_places(files, () if given is None else [str(given)])
        remarks, start = Remarks(), clock()
        original, model = load_both(source, remarks=remarks, **load_options(options))
        if shapes:
            sizes_for(model, parse_shapes(shapes))
        target = closed.held(target, model, remarks)
        lowerings = tuple(target.lowerings())
        repaired = sum("repaired" in remark.facts for remark in remarks)
        loaded = PassRecord("load", repaired, clock() - start, list(remarks))
        watchers = tuple(instruments.chosen(options))
        dumped = (place for w in watchers if isinstance(w, Dump) for place in w.places((*passes, *lowerings)))
        check_places(files, sources_of(original), dumped)
        samples = _samples(options.get("samples"), options.get("tokenizer"), model, given)
        return cls(
            target, passes, lowerings, required, original, model, called(source), loaded,
            given if given is not None and keeps_bytes(given) and not options.get("input_shapes") else None,
            samples, Loss(target, original, samples, options.get("metric")), max_loss, known, watchers, fuel,
            _promised(options.get("promise"), pipeline, level, fuel), parse_shapes(shapes) if shapes else (), tell, gate=options.get("gate", True),
        )  # fmt: skip

    @property
    def steps(self) -> tuple[Pass, ...]:
        return (*self.passes, *self.lowerings)

    def context(self, model: ir.Model, fuel: Fuel | None = None) -> Context:
        """What the passes are given besides the graph; its remarks are empty, and `fuel` None never runs out."""
        budget = None if self.max_loss is None else Budget(self.max_loss)
        return Context(
            model, target=self.target, samples=self.samples, fuel=fuel, original=self.original, budget=budget, passes=self.known
        )  # fmt: skip

    def manager(self, steps: Sequence[Pass], watchers: Sequence[Instrument] = ()) -> PassManager:
        """Runs these steps; with a budget, lossy ones as transactions.

        Raises:
            SampleError: there is a budget and nothing to judge by.
        """
        lossy = [step for step in steps if not (step.exact or step.binding)]
        if self.max_loss is None or not lossy:
            return PassManager(steps, watchers)
        if not self.loss.known:
            raise SampleError(f"max-loss needs something to judge {lossy[0].name} by: {NO_SAMPLES}")
        return TransactionManager(steps, watchers, loss=self.loss.of_graph, max_loss=self.max_loss)

    def lower(self, model: ir.Model, *, tune: bool = True) -> ir.Model:
        """A copy of a graph of this job, as the target runs it."""
        return pipelines.lower(model, self.target, tune=tune, original=self.original)

    def run(self) -> Result:
        """Run the steps, keep the promise, and report.

        Raises:
            PassError, SampleError, VerifyError, GraphoptError: see `optimize`.
        """
        ran, gate = self.once(self.watchers), Gate(self)
        self._check(ran.outcome.model)
        if self.loaded.changes or any(record.changes for record in ran.outcome.records):
            ran = gate.kept(ran)
        outcome = ran.outcome
        if self.promise and any(record.changes for record in outcome.records):
            outcome = promises.kept(ran, gate)
        say_rounded(self, outcome.records)
        say_idle(self.passes, outcome.records if self.fuel is None else [])
        records = [self.loaded, *outcome.records]
        self._check(outcome.model)
        records += _settled(outcome.model)
        _require(self.required, records)
        changed = any(record.changes for record in records)
        plain = self.model.clone() if self.loaded.changes else self.original  # what the door mended is in the output
        lowered = plain if outcome.model is None or not changed else outcome.model
        report = report_of(self, lowered, records)
        report.gate = gate.verdict(outcome if lowered is not self.original else dataclasses.replace(outcome, model=None))
        if self.loss.failure is not None:
            raise self.loss.failure
        report.speed_up, report.latency = outcome.told()
        self.tell("done", 1.0)
        return Result(lowered, outcome.graph or self.original, self.original, self.target, report, self.samples, self.source)

    def once(self, watchers: Sequence[Instrument] = ()) -> Ran:
        """Run the steps, and nothing else."""
        model, history = self.model.clone(), History(len(self.passes) + 1, len(self.steps), self.tell)
        done = self.manager(self.steps, (*watchers, history)).run(model, self.context(model, Fuel(self.fuel, self.skip)))
        return Ran(self, history, Outcome(model, history.graph or model, done))

    def lossless(self, step: Pass) -> bool:
        """Whether it may be taken back: neither a loss nor a limit was asked for, nor the step by name."""
        return step.exact and not step.binding and step.name not in self.required

    def exact(self, records: Sequence[PassRecord]) -> bool:
        """Whether nothing lossy changed anything, so that the numbers must be those of the input."""
        return all(step.exact or not record.changes for step, record in zip(self.steps, records, strict=False))

    def asked(self, records: Sequence[PassRecord]) -> list[str]:
        """What changed something and must stay, so that the input as it came is no answer."""
        kept = [r.name for step, r in zip(self.steps, records, strict=False) if r.changes and not self.lossless(step)]
        return [*kept, "the repair of the input"] if self.loaded.changes else kept

    def _check(self, model: ir.Model | None) -> None:
        """What comes out is a legal graph with the interface that came in, whatever the passes were; None = the input itself."""
        if model is None:
            return
        declared = interface(self.model)
        try:
            verify(model, interface=declared)
            return
        except VerifyError:
            known = complaints(self.model)  # asked only now, as most inputs give rise to none
        try:
            verify(model, interface=declared, known=known)
        except VerifyError as error:
            head, _, rest = str(error).partition("\n")
            text = f"the passes left a broken graph, and nothing was written; --verify-each names the pass: {head}\n{rest}"
            raise VerifyError(text.rstrip()) from error


def _settled(model: ir.Model | None) -> list[PassRecord]:
    """What the passes made may have shapes that ONNX contradicts; the file states none of them."""
    if model is None:
        return []
    remarks = Remarks()
    advisories.contradicted(drop_contradicted(model), remarks)
    return [PassRecord("check", 0, 0.0, list(remarks))] if len(remarks) else []


def parse_target(text: str | Target, plugins: tuple[str, ...] = ()) -> Target:
    """A target from its text; one that is made stays as it is.

    Raises:
        PipelineError: unknown name or option, a number out of its range, or not exactly one target.
    """
    if isinstance(text, Target):
        return text
    found: list[Target] = parse(text, registry.targets(plugins), "target")
    if len(found) != 1:
        raise PipelineError(f"expected one target such as cpu or cpu{{threads=2}}, found `{text}`")
    return found[0]


def _shaped(target: Target, shapes: str | None) -> Target:
    """With its option `shapes`, if it has one."""
    if shapes is None:
        return target
    parse_shapes(shapes)
    if all(field.name != "shapes" for field in dataclasses.fields(target)):  # type: ignore[arg-type]
        return target
    return dataclasses.replace(target, shapes=tuple(shapes.replace(" ", "").split(",")))  # type: ignore[type-var]


def _promised(promise: bool | None, pipeline: str | None, level: int, fuel: int | None) -> bool:
    return (pipeline is None and level >= 1 and fuel is None) if promise is None else promise


def _samples(data: Any, tokenizer: Any, model: ir.Model, source: Path | None) -> Samples | None:
    if data is None:
        return None
    beside = None if source is None else source / "tokenizer.json"
    if tokenizer is None and beside is not None and beside.is_file():
        tokenizer = beside
    return Samples.load(data, model, tokenizer=tokenizer)


def _check_values(options: RunOptions) -> None:
    """What the command line checks by itself: numbers that are none, and names as one text, which would be read letter by letter."""
    level, fuel, max_loss = options.get("level", 1), options.get("fuel"), options.get("max_loss")
    if not isinstance(level, int):
        raise PipelineError(f"level expects a whole number, such as 2, found {level!r}")
    if fuel is not None and fuel < 0:
        raise PipelineError(f"fuel expects 0 or more changes, found {fuel}")
    if max_loss is not None and not max_loss >= 0:
        raise PipelineError(f"max_loss expects a fraction of 0 or more, such as 0.01 for 1 %, found {max_loss}")
    for key in ("require", "plugins"):
        if isinstance(found := options.get(key), str):
            raise PipelineError(f"{key} expects a list of names, such as [{found!r}], found one text")


def _check_required(required: Iterable[str], passes: Sequence[Pass], lowerings: Sequence[Pass]) -> None:
    names = {step.name for step in (*passes, *lowerings)}
    for name in required:
        if name not in names:
            known = f"it has {', '.join(sorted(names)) or 'no pass'}"
            raise PipelineError(f"{name} is required and is not in the pipeline `{render(passes)}`{near(name, names)}; {known}")


def _require(names: Sequence[str], records: Sequence[PassRecord]) -> None:
    """Every named pass must have changed something; the error has the first reason that it gave."""
    for name in names:
        own = [record for record in records if record.name.partition("{")[0] == name]
        if not any(record.changes for record in own):
            raise GraphoptError(f"{name} is required and changed nothing{reason(own)}")
