"""Files timed side by side, for `graphopt bench`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from graphopt.core.errors import GraphoptError
from graphopt.run.clock import Timings, steady_clock
from graphopt.run.race import QUOTE, SHAPES, Picky, Progress, feeds_for, parse_shapes, race


def bench_files(paths: Sequence[Path], shapes: str | None, *, threads: int = 1, progress: Progress | None = None) -> Timings:
    """Time .onnx files side by side on ONNX Runtime; the first is the baseline.

    Raises:
        LoadError, TargetError: a file cannot be read or run.
        SampleError: the models have different inputs.
    """
    from graphopt.io.load import load
    from graphopt.run.ort import session

    wanted = SHAPES if shapes is None else parse_shapes(shapes)
    names = [str(path) for path in paths]
    if len(set(names)) < len(names):
        raise GraphoptError("a model is given twice; each needs a name of its own")
    feeds = feeds_for([load(path) for path in paths], wanted)
    sessions = {name: Picky(session(path, threads=threads)) for name, path in zip(names, paths, strict=True)}
    return race(sessions, feeds, clock=steady_clock(threads), effort=QUOTE, progress=progress)
