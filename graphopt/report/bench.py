"""Files timed side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from graphopt.core.errors import GraphoptError
from graphopt.io.load import load
from graphopt.report.document import Document
from graphopt.report.elements import Table
from graphopt.report.words import head
from graphopt.run.clock import Done, Timings, steady_clock
from graphopt.run.race import QUOTE, SHAPES, Picky, feeds_for, parse_shapes, race


@dataclasses.dataclass(frozen=True)
class Bench(Document):
    """What `bench` gives: the first model is the baseline of every speed-up."""

    title: ClassVar[str] = "graphopt bench"

    timings: Timings
    threads: int

    def as_dict(self) -> dict[str, Any]:
        return self.timings.as_dict()

    def elements(self) -> Sequence[Table]:
        timed = self.timings
        rows = [(name, *(f"{t * 1e3:.2f}" for t in seconds), f"{timed.speedup(name):.2f}x") for name, seconds in timed.seconds.items()]
        columns = ("model", *timed.shapes, "speed-up")
        return [head(threads=self.threads), Table(columns, rows, "median latency in ms", "l" + "r" * (len(columns) - 1))]


def bench(paths: Sequence[Path], shapes: str | None = None, *, threads: int = 1, progress: Done | None = None) -> Bench:
    """Time .onnx files side by side on ONNX Runtime; the first is the baseline.

    Args:
        shapes: BATCHxSEQUENCE sizes such as `1x16,8x64`.
        threads: of the runtime; 0 = its choice.

    Raises:
        LoadError, TargetError: a file cannot be read or run.
        SampleError: the models have different inputs.
    """
    from graphopt.run.guarded import session

    wanted = SHAPES if shapes is None else parse_shapes(shapes)
    names = [str(path) for path in paths]
    if len(set(names)) < len(names):
        raise GraphoptError("a model is given twice; each needs a name of its own")
    feeds = feeds_for([load(path) for path in paths], wanted)
    sessions = {name: Picky(session(path, threads=threads)) for name, path in zip(names, paths, strict=True)}
    return Bench(race(sessions, feeds, clock=steady_clock(threads), effort=QUOTE, progress=progress), threads)
