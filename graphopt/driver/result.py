"""What `optimize` gives back."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from graphopt.core import places
from graphopt.core.contract import Artifact, Pass, Session, Target
from graphopt.core.errors import GraphoptError
from graphopt.core.pipeline import PassRecord, render
from graphopt.core.remarks import Remark, plural
from graphopt.graph import size
from graphopt.graph.opset import versions
from graphopt.graph.questions import all_nodes
from graphopt.graph.serialize import model_bytes
from graphopt.graph.size import Size
from graphopt.io import save
from graphopt.report.report import Measured, Report, Timing
from graphopt.report.words import megabytes
from graphopt.run import guarded, race
from graphopt.run.clock import Done, Timings
from graphopt.run.observe import extent
from graphopt.run.samples import Samples

if TYPE_CHECKING:
    from graphopt.driver.job import Job


_FINELY, _COARSELY = 1e-3, 2e-2  # loss that rounding explains: in float32; in 16 bits, with codes that may flip, or of a metric
_COARSE = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.INT8, ir.DataType.UINT8)


@dataclasses.dataclass
class Result:
    """What `optimize` gives.

    Attributes:
        model: the lowered graph; the input's own graph where no pass changed anything.
        graph: the optimized graph before lowering, in standard ONNX.
        original: the graph of the input as it came.
        target: the target that it was made for.
        report: sizes, changes, remarks, loss, and latency once `measure` was called.
        samples: what it was judged on, if anything.
    """

    model: ir.Model
    graph: ir.Model
    original: ir.Model
    target: Target
    report: Report
    samples: Samples | None = None
    source: Path | None = None

    def save(self, path: str | Path, report: str | Path | None = None) -> Artifact:
        """Write the artifact, and the report with it: all or nothing. Where no pass changed anything, the artifact is the input itself.

        Raises:
            SaveError: something cannot be written; nothing was left behind.
            TargetError: the target allows no opset as new as the artifact needs.
        """
        path = Path(path)
        if report is not None:
            places.check_places((*self.target.files(path), Path(report)), save.sources_of(self.original))
        with contextlib.nullcontext() if report is None else self.report.staged(report):
            artifact = self.save_input(path) if self._is_input() else self.target.save(self.model, path)
            self.report.output = dataclasses.replace(self.report.output, bytes=artifact.nbytes)
        return artifact

    def _is_input(self) -> bool:
        """No pass changed anything, and the target can do with the file that came."""
        limit = self.target.opset
        return self.model is self.original and self.target.writes_onnx and (limit is None or versions.origin(self.original)[0] <= limit)

    def save_input(self, path: str | Path) -> Artifact:
        """Write the input as it came: the given file, or the plain export of a module or folder."""
        return save.save_as_is(self.original, Path(path), self.source)

    def session(self) -> Session:
        """Run the artifact by its target, as it is shipped."""
        return self.target.session(self._shipped())

    def _shipped(self) -> ir.Model:
        return self.original if self.model is self.original else self.target.finish(self.model)[0]

    def measure(self, shapes: str | None = None, *, quick: bool = False, progress: Done | None = None) -> Report:
        """Time input and output side by side and put the result into the report; a target that cannot run here leaves the reason.

        Args:
            shapes: BATCHxSEQUENCE sizes such as `1x16,8x64`; by default those of the target, the user's first sample, or race.SHAPES.
            quick: few rounds; for a smoke test, not for a number to quote.
            progress: called with the fraction done.

        Raises:
            GraphoptError: `shapes` does not parse.
        """
        sizes = None if shapes is None else race.parse_shapes(shapes)
        effort = race.QUICK if quick else race.QUOTE
        try:
            feeds = race.feeds_of(self.target, self.graph, self.samples, sizes)
            base = race.opened(self.target, self.original, feeds)
            feeds = race.runnable(base, feeds)
            first = next(iter(feeds.values()))
            output = self.session() if self.report.gate.passed else guarded.opened(self.target, self._shipped(), first)
            sessions = {"input": base, "output": output}
            timed = race.race(sessions, feeds, clock=race.clock_of(self.target), effort=effort, progress=progress)
        except GraphoptError as error:
            self.report.speed_up = Measured(None, str(error))
            return self.report
        self.report.speed_up, self.report.latency = told(timed)
        return self.report


def told(timed: Timings) -> tuple[Measured, list[Timing]]:
    """The speed-up of `output` over `input` for the report, and both their latencies."""
    rows = zip(timed.shapes, timed.seconds["input"], timed.seconds["output"], strict=True)
    latency = [Timing(shape, a * 1e3, b * 1e3) for shape, a, b in rows]
    how = f"geometric mean over {', '.join(timed.shapes)}"
    return Measured(timed.speedup("output"), None, how, _below(timed)), latency


def _below(timed: Timings) -> str | None:
    """What to say of speeds below that of the input."""
    if min(timed.ratios("output")) >= 0.995:  # 1.00x as it is printed
        return None
    if timed.not_slower("output"):
        return "what is below 1.00x is within the noise of the timing"
    return f"slower than the input beyond the noise of the timing, {min(timed.ratios('output')):.2f}x at worst"


def report_of(job: Job, lowered: ir.Model, records: list[PassRecord]) -> Report:
    """What the run of a job did; `lowered` is the input itself where no pass changed anything. A larger output is one more record."""
    target, original = job.target, job.original
    before = Size.of(original, model_bytes(original) if job.source is None else size.size(job.source))
    after: Size = before
    shipped = original
    rises: Sequence[versions.Rise] = ()
    if lowered is not original:
        shipped, rises = target.finish(lowered)
        own = target.size(shipped)
        after = Size.of(shipped, model_bytes(shipped) if own is None else own)
    if after.bytes > before.bytes:
        larger = f"the output has {after.bytes - before.bytes} bytes more than the input ({megabytes(before.bytes)})"
        records.append(PassRecord("save", 0, 0.0, [Remark("warning", "save", "", larger)]))
    described = {"name": str(target)} | target.report(lowered)
    if warnings := described.pop("warnings", []):
        records.append(PassRecord("report", 0, 0.0, [Remark("warning", "report", "", text) for text in warnings]))
    judged = job.loss.report(lambda: target.session(shipped))
    _say_inexact(job, records, judged)
    told = [rise.as_dict() for rise in rises]
    read = None if job.samples is None else extent(job.samples)
    return Report(render(job.passes), described, before, after, records, judged, rises=told, model=job.name, threads=target.threads, samples=read)


def _say_inexact(job: Job, records: list[PassRecord], judged: Measured) -> None:
    """A loss beyond rounding, where every pass that changed something claims to have none, is a defect of one of them."""
    lossy = {step.name for step in job.steps if not step.exact}
    done = [record for record in records if record.changes and record.name.partition("{")[0] != "load"]
    if judged.value is None or not done or any(record.name.partition("{")[0] in lossy for record in done):
        return
    narrow = any(v.dtype in _COARSE for node in all_nodes(job.model) for v in node.outputs)
    limit = _COARSELY if narrow or job.loss.metric is not None else _FINELY
    if not judged.value <= limit:  # also where it is no number
        told = f"the loss is {judged.value:.3g}, and every pass that changed something claims to be exact; --check-numerics names the one that is not"
        records.append(PassRecord("loss", 0, 0.0, [Remark("warning", "loss", "", told, {"loss": judged.value})]))


def say_rounded(job: Job, records: Sequence[PassRecord]) -> None:
    """Exact means up to the rounding of floats; of an input that rounds to codes itself that is less than bit for bit."""
    roundings = sum(node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear") and not node.domain for node in all_nodes(job.model))
    changed = [record for step, record in zip(job.steps, records, strict=False) if step.exact and record.changes]
    if roundings and changed:
        told = (
            f"the input rounds to codes in {plural(roundings, 'place')}; exact passes move floats by their last digits, which may turn single codes"
        )
        changed[-1].remarks.append(Remark("warning", changed[-1].name.partition("{")[0], "", told))


def say_idle(passes: Sequence[Pass], records: Sequence[PassRecord]) -> None:
    """A lossy pass is asked for to gain something; one that did nothing is a warning, with the first reason that it gave."""
    for step, record in zip(passes, records, strict=False):
        if not (step.exact or record.changes):
            record.remarks.append(Remark("warning", step.name, "", f"`{step}` was asked for and changed nothing{reason([record])}"))


def reason(records: Sequence[PassRecord]) -> str:
    missed = [remark for record in records for remark in record.remarks if remark.kind == "missed"]
    if not missed:
        return "; no candidate was found"
    first = next((remark for remark in missed if remark.node), missed[0])
    return f": {first.message}" + (f" (at `{first.node}`)" if first.node else "")
