"""`optimize`: load, run the passes, lower for the target, and report. The caller's object or file is never changed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter as clock
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from graphopt.core import places
from graphopt.core.contract import Budget, Context, Metric, Target
from graphopt.core.errors import GraphoptError
from graphopt.core.fuel import Fuel
from graphopt.core.pipeline import PassRecord
from graphopt.core.remarks import Remarks
from graphopt.driver import instruments
from graphopt.driver.job import _check, _instruments, _Judge, _manager, _Plan, _report, _require, _samples
from graphopt.driver.loss import Loss
from graphopt.driver.promise import History, Keeper, Outcome, feeds_of
from graphopt.driver.result import Result
from graphopt.graph.interface import interface
from graphopt.io import save
from graphopt.io.load import load_both
from graphopt.report.words import called
from graphopt.run import race as bench
from graphopt.run.samples import Samples

if TYPE_CHECKING:
    from graphopt.io.load import Source

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
    places.check_places(map(Path, writes), save.sources_of(original), dumped)
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
    report.model, report.threads = called(source), getattr(plan.target, "threads", None)
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
