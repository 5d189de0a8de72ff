"""Latency of several models side by side: which sizes, which feeds, how many rounds. The clock is in clock.py."""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from graphopt.core.contract import Array, Session, Target
from graphopt.core.errors import GraphoptError, SampleError
from graphopt.graph.dims import limits, symbols
from graphopt.run.clock import Timings, latency
from graphopt.run.samples import random_samples

Progress = Callable[[float], None]
_EFFORT = ((0.001, 15, 20), (0.02, 6, 6), (0.2, 5, 4), (float("inf"), 4, 3))  # up to so many seconds a run: rounds, counted runs of a block
_QUICK = (2, 2)


class Picky:
    """A session that takes what it needs from a feed made for several models, in the integer width that it wants."""

    def __init__(self, session: Any) -> None:
        self.session = session

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        missing = [p.name for p in self.session.inputs if p.name not in feeds]
        if missing:
            raise SampleError(f"input {', '.join(missing)} missing; the models must have the same inputs")
        outputs: dict[str, Array] = self.session.run({p.name: _as(feeds[p.name], p.dtype) for p in self.session.inputs})
        return outputs


def _as(array: Array, dtype: Any) -> Array:
    return array if dtype is None or array.dtype == dtype or array.dtype.kind not in "iu" else array.astype(dtype)


def parse_shapes(text: str) -> list[tuple[int, ...]]:
    """`1x16,8x64` -> [(1, 16), (8, 64)]: batch, then length.

    Raises:
        GraphoptError: anything else.
    """
    if not re.fullmatch(r"\s*[1-9]\d*(x[1-9]\d*)?\s*(,\s*[1-9]\d*(x[1-9]\d*)?\s*)*", text):
        raise GraphoptError(f"shapes are BATCHxSEQUENCE, such as 1x16,8x64; found `{text}`")
    return [tuple(map(int, part.split("x"))) for part in text.replace(" ", "").split(",")]


def sizes_for(model: ir.Model, shapes: Sequence[tuple[int, ...]] | None = None) -> dict[str, dict[str, int]]:
    """Label -> a size for every symbol of the inputs: the first axis is the batch, every other one the length, within the position table."""
    if shapes is None:
        rows = default_shapes(model)
    else:
        bound, axes = limits(model), symbols(model)
        rows = [{n: shape[0] if axis == 0 else min(shape[-1], bound.get(n, shape[-1])) for n, axis in axes.items()} for shape in shapes]
    return {label(model, row): row for row in rows}


def label(model: ir.Model, sizes: Mapping[str, int]) -> str:
    """`8x64`, or `as declared` for a model without symbols."""
    axes = symbols(model)
    parts = sorted({(min(axes[name], 1), size) for name, size in sizes.items()})
    return "x".join(str(size) for _, size in parts) or "as declared"


def feeds_for(models: Sequence[ir.Model], shapes: Sequence[tuple[int, ...]] | None = None) -> dict[str, dict[str, Array]]:
    """Label -> one feed that serves all models: inputs of the same name get the values that suit the first model that has them."""
    first, *others = models
    feeds: dict[str, dict[str, Array]] = {}
    for name, sizes in sizes_for(first, shapes).items():
        feed = next(iter(random_samples(first, [sizes])))
        batch = max((s for n, s in sizes.items() if symbols(first)[n] == 0), default=1)
        length = max((s for n, s in sizes.items() if symbols(first)[n] != 0), default=1)
        for model in others:
            row = next(iter(sizes_for(model, [(batch, length)]).values()))
            feed = next(iter(random_samples(model, [row]))) | feed
        feeds[name] = feed
    return feeds


def race(
    sessions: Mapping[str, Session],
    feeds: Mapping[str, Mapping[str, Array]],
    *,
    quick: bool = False,
    progress: Progress | None = None,
    clock: Callable[[], float] | None = None,
) -> Timings:
    """Interleaved timing; short runs get more rounds than long ones. `quick` is for a smoke test, not for a number to quote."""
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for done, (name, feed) in enumerate(feeds.items()):
        next(iter(sessions.values())).run(feed)
        start = time.perf_counter()
        next(iter(sessions.values())).run(feed)
        cost = time.perf_counter() - start
        rounds, block = _QUICK if quick else next((r, b) for limit, r, b in _EFFORT if cost <= limit)
        share = None if progress is None else _share(progress, done, len(feeds))
        timed = latency(sessions, {name: feed}, rounds=rounds, block=block, progress=share, clock=clock)
        for model, values in timed.seconds.items():
            seconds[model] += values
    return Timings(tuple(feeds), {name: tuple(values) for name, values in seconds.items()})


def _share(progress: Progress, done: int, total: int) -> Progress:
    return lambda fraction: progress((done + fraction) / total)


def default_shapes(model: ir.Model) -> list[dict[str, int]]:
    """Sizes to time a model at: (batch, length) of (1,16), (1,128), (8,64), (32,128), as far as it has such axes, within its position table."""
    bound, axes = limits(model), symbols(model)
    rows = [
        {name: batch if axis == 0 else min(length, bound.get(name, length)) for name, axis in axes.items()}
        for batch, length in ((1, 16), (1, 128), (8, 64), (32, 128))
    ]
    return [row for k, row in enumerate(rows) if row not in rows[:k]]


SHAPES = ((1, 16), (1, 128), (8, 64))  # batch, length: where nothing else is asked for


def shapes_of(target: Target) -> list[tuple[int, ...]]:
    """The sizes that the target was asked for, such as `cpu{shapes=1x16+8x64}`."""
    given: Sequence[str] = getattr(target, "shapes", ())
    return parse_shapes(",".join(given)) if given else []


def _mean(ratios: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(r) for r in ratios))
