"""What `optimize` gives back."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt.core import places
from graphopt.core.contract import Artifact, Session, Target
from graphopt.core.errors import GraphoptError
from graphopt.graph.opset import versions as opset
from graphopt.io import save
from graphopt.report.report import Measured, Report, Timing
from graphopt.run import race as bench
from graphopt.run.samples import Samples


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
            places.check_places((path, places.data_file(path), Path(report)), save.sources_of(self.original))
        with contextlib.nullcontext() if report is None else self.report.staged(report):
            artifact = self.save_input(path) if self._is_input() else self.target.save(self.model, path)
            self.report.output = dataclasses.replace(self.report.output, bytes=artifact.nbytes)
        return artifact

    def _is_input(self) -> bool:
        """No pass changed anything, and the target allows what the input is written in."""
        limit = getattr(self.target, "opset", None)
        return self.model is self.original and (limit is None or opset.origin(self.original)[0] <= limit)

    def save_input(self, path: str | Path) -> Artifact:
        """Write the input as it came: the given file, or the plain export of a module or folder."""
        return save.save_as_is(self.original, Path(path), self.source)

    def session(self) -> Session:
        """Run the artifact by its target."""
        return self.target.session(self.model)

    def measure(self, shapes: str | None = None, *, quick: bool = False, progress: Callable[[float], None] | None = None) -> Report:
        """Time input and output side by side and put the result into the report; a target that cannot run here leaves the reason.

        Args:
            shapes: BATCHxSEQUENCE sizes such as `1x16,8x64`; by default those of measure.default_shapes, or the user's samples.
            quick: few rounds; for a smoke test, not for a number to quote.
            progress: called with the fraction done.

        Raises:
            GraphoptError: `shapes` does not parse.
        """
        sizes = None if shapes is None else bench.parse_shapes(shapes)
        try:
            feeds = self._feeds(sizes)
            sessions = {"input": self.target.session(self.original), "output": self.session()}
            timings = bench.race(sessions, feeds, quick=quick, progress=progress)
        except GraphoptError as error:
            self.report.speed_up = Measured(None, str(error))
            return self.report
        rows = zip(timings.shapes, timings.seconds["input"], timings.seconds["output"], strict=True)
        self.report.latency = [Timing(shape, a * 1e3, b * 1e3) for shape, a, b in rows]
        self.report.speed_up = Measured(timings.speedup("output"), None, f"geometric mean over {', '.join(timings.shapes)}")
        return self.report

    def _feeds(self, sizes: Sequence[tuple[int, ...]] | None) -> Mapping[str, Mapping[str, Any]]:
        if self.samples is not None and sizes is None:
            first = next(iter(self.samples))
            return {"x".join(map(str, next(iter(first.values())).shape)) if first else "sample": first}
        return bench.feeds_for([self.graph], sizes)
