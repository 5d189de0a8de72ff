"""One run: what was asked for, checked and resolved, and the parts that carry it out."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import onnx
import onnx_ir as ir

from graphopt.core import registry
from graphopt.core.contract import Metric, Pass, Session, Target
from graphopt.core.errors import GraphoptError, PipelineError, SampleError, VerifyError
from graphopt.core.options import check_limits, near
from graphopt.core.pipeline import Instrument, PassManager, PassRecord, parse, render
from graphopt.core.remarks import Remark
from graphopt.driver import instruments
from graphopt.driver.loss import NO_SAMPLES, Loss
from graphopt.driver.transaction import TransactionManager
from graphopt.graph import size
from graphopt.graph.interface import Interface
from graphopt.graph.opset.versions import OLDEST, Rise
from graphopt.graph.serialize import model_bytes
from graphopt.graph.size import Size
from graphopt.graph.verify import verify
from graphopt.io import save
from graphopt.report.report import Report
from graphopt.report.words import megabytes
from graphopt.run import race as bench
from graphopt.run.samples import Samples


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
    lossy = [step for step in steps if not (step.exact or step.binding)]
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
    before = Size.of(original, model_bytes(original) if file is None else size.size(file))
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
