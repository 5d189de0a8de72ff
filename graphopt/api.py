"""`optimize`: load, run the passes, lower for the target, and report. The caller's object or file is never changed."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter as clock
from typing import TYPE_CHECKING, Any, NoReturn

import onnx
import onnx_ir as ir

from graphopt import bench, frontend, instruments, measure, reading, registry, save
from graphopt.core import Budget, Context, Pass, Session, Target
from graphopt.errors import GraphoptError, LoadError, PipelineError, SampleError, VerifyError
from graphopt.fuel import Fuel
from graphopt.loss import NO_SAMPLES, Loss, Metric, model_bytes
from graphopt.normalize import normalize
from graphopt.opset import OLDEST, Rise
from graphopt.options import check_limits, near
from graphopt.pipeline import Instrument, PassManager, PassRecord, parse, render
from graphopt.promise import History, Keeper, Outcome, feeds_of
from graphopt.remarks import Remark, Remarks
from graphopt.report import Report, Size, megabytes
from graphopt.result import Result
from graphopt.samples import Samples
from graphopt.transaction import TransactionManager
from graphopt.verify import Interface, interface, verify

if TYPE_CHECKING:
    from graphopt.frontend import Source

Progress = Callable[[str, float], None]


def optimize(
    source: Source,
    pipeline: str | None = None,
    *,
    level: int = 1,
    target: str | Target = "cpu",
    samples: Any = None,
    tokenizer: Any = None,
    metric: Metric | None = None,
    max_loss: float | None = None,
    require: Sequence[str] = (),
    plugins: Sequence[str] = (),
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    input_shapes: Mapping[str, Sequence[int | str]] | None = None,
    task: str | None = None,
    with_past: bool = False,
    verify_each: bool = False,
    check_numerics: bool = False,
    time: bool = False,
    print_changed: bool = False,
    dump: str | Path | None = None,
    fuel: int | None = None,
    promise: bool | None = None,
    shapes: str | None = None,
    progress: Progress | None = None,
    writes: Sequence[str | Path] = (),
) -> Result:
    """Load a model, run a pipeline over it, and lower it for a target.

    Args:
        source: what `graphopt.load` takes; it is not changed. The next options down to `with_past` that `load` has mean the same here.
        pipeline: passes as text, such as `canonicalize, fuse-attention`, or `@FILE`; by default those of `level` for the target.
        level: 0 = normal form, 1 = exact passes, 2 = also dynamic int8, 3 = also compression that needs samples.
        target: text such as `cpu{threads=2}`, or a Target.
        samples: what `Samples.load` takes; `tokenizer` is for text (by default the one of a Hugging Face folder).
        metric: from a session to a number, larger for better models; judges lossy passes instead of the distance of the outputs.
        max_loss: the loss that all passes together may cost, as a fraction (0.01 = 1 %): the relative fall of the metric, or the relative L2
            distance of the outputs. A lossy pass that goes over it is weakened or undone.
        require: names of passes that must change something.
        plugins: files or modules that bring passes or targets.
        verify_each, check_numerics, time, print_changed, dump: instruments (see docs/cli.md); `dump` is a folder.
        fuel: how many changes may happen at most, for bisecting.
        promise: time the artifact against the input, and take lossless changes back where it is slower (docs/tuning.md). By default for a
            level of 1 or more, and not for a `pipeline` of your own, for `fuel`, or for a target that cannot run here.
        shapes: BATCHxSEQUENCE sizes to measure at, such as `1x16,8x64`; they become the option `shapes` of the target, if it has one.
        progress: called with what is done now and the fraction of all steps.
        writes: files that will be written from the result; whether they can be is checked before any pass runs.

    Raises:
        PipelineError: the pipeline or target text is wrong, or a required pass is not in it.
        LoadError: the source cannot be read.
        PassError: a pass raised; it names the pass, its place and the cause.
        SampleError: a lossy pass has a budget, and there is neither a metric nor a sample.
        VerifyError: what the passes left is no legal graph, or has another interface.
        SaveError: a file of `writes` or of `dump` cannot be written, or belongs to the input.
        GraphoptError: a required pass changed nothing, or the metric failed.
    """
    plan = _Plan.make(pipeline, level, target, tuple(plugins), tuple(require), shapes)
    tell = progress or (lambda text, done: None)
    tell("load", 0.0)
    remarks, start = Remarks(), clock()
    original, model = load_both(
        source,
        example_inputs=example_inputs,
        example_kwargs=example_kwargs,
        dynamic_shapes=dynamic_shapes,
        input_shapes=input_shapes,
        task=task,
        with_past=with_past,
        remarks=remarks,
    )
    dumped = () if dump is None else instruments.Dump(dump).places(plan.steps)
    save.check_places(map(Path, writes), save.sources_of(original), dumped)
    repaired = sum("repaired" in remark.facts for remark in remarks)
    records = [PassRecord("load", repaired, clock() - start, list(remarks))]
    file = Path(source) if isinstance(source, (str, os.PathLike)) and Path(source).is_file() and not input_shapes else None
    fed = _samples(samples, tokenizer, model, source)
    judge = None if metric is None else _Judge(metric)
    loss = Loss(plan.target, original, fed, judge)
    history = History(len(plan.passes) + 1, len(plan.passes) + len(plan.lowerings), tell)
    budget = None if max_loss is None else Budget(max_loss)

    def context(graph: ir.Model, spoken: Remarks, limit: int | None = None) -> Context:
        return Context(graph, target=plan.target, samples=fed, remarks=spoken, fuel=Fuel(limit), original=original, budget=budget)

    public = interface(model)
    watchers = [*_instruments(verify_each, check_numerics, time, print_changed, dump), history]
    done = _manager(plan.steps, watchers, loss, max_loss).run(model, context(model, remarks, fuel))
    outcome = Outcome(model, history.graph or model, done, None, "not measured; leave out --no-measure, or call Result.measure()")
    if any(record.changes for record in done) and _promised(promise, pipeline, level, fuel):
        keeper = Keeper(
            plan.target, plan.steps, history, lambda steps, watcher: _manager(steps, (watcher,), loss, max_loss),
            lambda graph: context(graph, Remarks()), plan.required, tell, repaired > 0,
        )  # fmt: skip
        outcome = _keep(keeper, original, outcome, fed, shapes)
    if outcome.model is not None:
        _check(outcome.model, public)
    records += outcome.records
    _require(plan.required, records)
    changed = any(record.changes for record in records)
    lowered = original if outcome.model is None or not changed else outcome.model
    report = _report(plan, original, lowered, file, records, loss)
    if judge is not None and judge.failure is not None:
        raise judge.failure
    report.speed_up, report.latency = outcome.speed_up(), outcome.latency()
    tell("done", 1.0)
    return Result(lowered, outcome.graph or original, original, plan.target, report, fed, file)


def _promised(promise: bool | None, pipeline: str | None, level: int, fuel: int | None) -> bool:
    return (pipeline is None and level >= 1 and fuel is None) if promise is None else promise


def _keep(keeper: Keeper, original: ir.Model, whole: Outcome, samples: Samples | None, shapes: str | None) -> Outcome:
    """The outcome with its timings; where nothing can be timed, the reason."""
    if getattr(keeper.target, "processor", None) is not None:
        whole.reason = f"not measured: it is for another processor, {keeper.target}"
        return whole
    try:
        assert whole.graph is not None
        feeds = feeds_of(keeper.target, whole.graph, samples, None if shapes is None else bench.parse_shapes(shapes))
        return keeper.keep(original, _lowered(whole), whole.records, feeds)
    except GraphoptError as error:
        whole.reason = f"not measured: {error}"
        return whole


def _lowered(outcome: Outcome) -> ir.Model:
    assert outcome.model is not None
    return outcome.model


class _Judge:
    """The metric of a user, who may have made a mistake: `failure` is the first one, in one line."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.failure: GraphoptError | None = None

    def __call__(self, session: Session) -> float:
        try:
            score: Any = self.metric(session)
            score = float(score)
        except (Exception, SystemExit) as error:  # noqa: BLE001 -- whatever a user's function raises is the user's to read
            self._fail(f"{type(error).__name__}: {' '.join(str(error).split())}", error)
        if not math.isfinite(score):
            self._fail(f"it gave {score}, and must give a finite number", None)
        return float(score)

    def _fail(self, why: str, cause: BaseException | None) -> NoReturn:
        error = GraphoptError(f"the metric failed: {why}")
        self.failure = self.failure or error
        raise error from cause


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What will run, parsed before anything is loaded."""

    target: Target
    passes: tuple[Pass, ...]
    lowerings: tuple[Pass, ...]
    required: tuple[str, ...]

    @property
    def steps(self) -> tuple[Pass, ...]:
        return (*self.passes, *self.lowerings)

    @classmethod
    def make(
        cls, text: str | None, level: int, target: str | Target, plugins: tuple[str, ...], required: tuple[str, ...], shapes: str | None = None
    ) -> _Plan:
        where = parse_target(target, plugins) if isinstance(target, str) else _limited(target)
        if shapes is not None:
            bench.parse_shapes(shapes)
            if any(field.name == "shapes" for field in dataclasses.fields(where)):  # type: ignore[arg-type]
                where = dataclasses.replace(where, shapes=tuple(shapes.replace(" ", "").split(",")))  # type: ignore[type-var]
        classes = registry.passes(plugins)
        passes: list[Pass] = parse(where.pipeline(level) if text is None else text, classes)
        lowerings = tuple(where.lowerings())
        names = {step.name for step in (*passes, *lowerings)}
        for name in required:
            if name not in names:
                known = f"it has {', '.join(sorted(names)) or 'no pass'}"
                raise PipelineError(f"{name} is required and is not in the pipeline `{render(passes)}`{near(name, names)}; {known}")
        return cls(where, tuple(passes), lowerings, required)


def parse_target(text: str, plugins: tuple[str, ...] = ()) -> Target:
    """A target from its text.

    Raises:
        PipelineError: unknown name or option, a number out of its range, or not exactly one target.
    """
    found: list[Target] = parse(text, registry.targets(plugins), "target")
    if len(found) != 1:
        raise PipelineError(f"expected one target such as cpu or cpu{{threads=2}}, found `{text}`")
    return _limited(found[0])


def _limited(target: Target) -> Target:
    check_limits(target, {"threads": (1, None), "opset": (OLDEST, onnx.defs.onnx_opset_version())})
    return target


def load_both(
    source: Source,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    input_shapes: Mapping[str, Sequence[int | str]] | None = None,
    task: str | None = None,
    with_past: bool = False,
    remarks: Remarks,
) -> tuple[ir.Model, ir.Model]:
    """The input as it came (with `input_shapes` bound), and its normal form; arguments as for `graphopt.load`."""
    original, name, files = frontend.read(source, example_inputs, example_kwargs, dynamic_shapes, task, with_past, remarks)
    frontend.remember(original, name, files)
    model, _, _ = reading.from_model(original)
    try:
        frontend.check_outputs(original)
        if input_shapes:
            frontend.override_shapes(original, input_shapes)
            frontend.override_shapes(model, input_shapes)
        normalize(model, remarks)
    except LoadError as error:
        raise LoadError(f"{name}: {error}") from None
    return original, model


def _samples(data: Any, tokenizer: Any, model: ir.Model, source: Any) -> Samples | None:
    if data is None:
        return None
    if tokenizer is None and isinstance(source, (str, os.PathLike)):
        beside = Path(source) / "tokenizer.json"
        tokenizer = beside if beside.is_file() else None
    return Samples.load(data, model, tokenizer=tokenizer)


def _instruments(verify_each: bool, check_numerics: bool, time: bool, print_changed: bool, dump: str | Path | None) -> list[Instrument]:
    chosen: list[Instrument] = []
    if verify_each:
        chosen.append(instruments.VerifyEach())
    if check_numerics:
        chosen.append(instruments.CheckNumerics())
    if time:
        chosen.append(instruments.Time())
    if print_changed:
        chosen.append(instruments.PrintChanged())
    if dump is not None:
        chosen.append(instruments.Dump(dump))
    return chosen


def _manager(steps: Sequence[Pass], watchers: Sequence[Instrument], loss: Loss, max_loss: float | None) -> PassManager:
    lossy = [step for step in steps if not step.exact]
    if max_loss is None or not lossy:
        return PassManager(steps, watchers)
    if not loss.known:
        raise SampleError(f"max-loss needs something to judge {lossy[0].name} by: {NO_SAMPLES}")
    return TransactionManager(steps, watchers, loss=loss.of_graph, max_loss=max_loss)


def _check(model: ir.Model, public: Interface) -> None:
    """What comes out is a legal graph with the interface that came in, whatever the passes were."""
    try:
        verify(model, interface=public)
    except VerifyError as error:
        head, _, rest = str(error).partition("\n")
        text = f"the passes left a broken graph, and nothing was written; --verify-each names the pass: {head}\n{rest}"
        raise VerifyError(text.rstrip()) from error


def _require(names: Sequence[str], records: Sequence[PassRecord]) -> None:
    """Every named pass must have changed something; the error has the first reason that it gave."""
    for name in names:
        own = [record for record in records if record.name.partition("{")[0] == name]
        if not any(record.changes for record in own):
            missed = [remark for record in own for remark in record.remarks if remark.kind == "missed"]
            why = f": {missed[0].message} (at `{missed[0].node}`)" if missed else "; no candidate was found"
            raise GraphoptError(f"{name} is required and changed nothing{why}")


def _report(plan: _Plan, original: ir.Model, lowered: ir.Model, file: Path | None, records: list[PassRecord], loss: Loss) -> Report:
    before = Size.of(original, model_bytes(original) if file is None else measure.size(file))
    after: Size = before
    rises: Sequence[Rise] = ()
    if lowered is not original:
        finished, rises = save.finish(lowered, getattr(plan.target, "opset", None))
        after = Size.of(finished, model_bytes(finished))
    if after.bytes > before.bytes:
        larger = f"the output has {after.bytes - before.bytes} bytes more than the input ({megabytes(before.bytes)})"
        records.append(PassRecord("save", 0, 0.0, [Remark("warning", "save", "", larger)]))
    described = {"name": str(plan.target)} | plan.target.report(lowered)
    judged = loss.report(lambda: plan.target.session(lowered))
    return Report(render(plan.passes), described, before, after, records, judged, rises=[rise.as_dict() for rise in rises])
