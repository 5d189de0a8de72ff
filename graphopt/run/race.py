"""The one race, of models side by side: at which sizes, on which feeds, with how much effort, and when it is clear. The clock is in clock.py."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from graphopt.core.contract import Array, Session, Target
from graphopt.core.errors import GraphoptError, SampleError, TargetError
from graphopt.graph.dims import limits, symbols
from graphopt.run import Feeds, Port, guarded
from graphopt.run.clock import Clock, Done, Timings, latency, steady_clock
from graphopt.run.distance import arrays_in
from graphopt.run.samples import random_samples

SHAPES = ((1, 16), (1, 128), (8, 64))  # batch, length: where nothing else is asked for
QUICK, CHOICE, VERDICT, QUOTE = 0.2, 0.7, 1.0, 2.0  # efforts: for a smoke test, between kernels, about an artifact, for a number to quote
# Up to so many seconds a run: rounds (at an effort of 1; two at least), and counted runs of a block.
_EFFORT = ((0.0005, 10, 20), (0.005, 8, 8), (0.02, 5, 5), (0.05, 4, 3), (0.2, 3, 2), (float("inf"), 2, 1))
_PATIENCE = 3  # times the rounds, before a model counts as slower
_LONG = 20.0  # seconds of one shape that are not spent again


# ---- the race -------------------------------------------------------------------------------------------------------------------------


def race(
    sessions: Mapping[str, Session],
    feeds: Mapping[str, Feeds],
    *,
    clock: Clock | None = None,
    effort: float = VERDICT,
    progress: Done | None = None,
) -> Timings:
    """Interleaved timing; short runs get more rounds than long ones. The first session is the baseline.

    Args:
        feeds: label of a size, such as "8x64" -> inputs.
        clock: that of `clock_of`, or by default the wall clock.

    Raises:
        GraphoptError: a model does not run; see `refusals`.
    """
    base = next(iter(sessions.values()))
    found = {}
    for done, (label, feed) in enumerate(feeds.items()):
        base.run(feed)
        rounds, block = _effort(_once(base, feed), effort)
        share = None if progress is None else _share(progress, done, len(feeds))
        found[label] = latency(sessions, feed, rounds=rounds, block=block, progress=share, clock=clock)
    return Timings(found)


def patient_race(sessions: Mapping[str, Session], feeds: Mapping[str, Feeds], *, clock: Clock | None = None) -> Timings:
    """Rounds until the last model is not slower than the first, or until it is clear that it is: a slow moment of the machine is no verdict."""
    name = list(sessions)[-1]
    timed = race(sessions, feeds, clock=clock)
    for _ in range(_PATIENCE - 1):
        costs = zip(feeds, timed.seconds[timed.baseline], strict=True)
        short = {label: feeds[label] for label, once in costs if _seconds(once, len(sessions)) <= _LONG}
        if timed.not_slower(name) or not short:
            break
        timed = timed.plus(race(sessions, short, clock=clock))
    return timed


def refusals(sessions: Mapping[str, Session], feeds: Iterable[Feeds]) -> dict[str, str]:
    """The sessions that do not run all of these feeds, and why."""
    return {name: why for name, session in sessions.items() if (why := next(filter(None, (_refusal(session, f) for f in feeds)), None))}


def opened(target: Target, model: ir.Model, feeds: Mapping[str, Feeds]) -> Session:
    """A session in this process of a finished model that was probed first, at the first of the sizes at which it runs.

    Raises:
        SampleError: there is none.
        TargetError: the target cannot run here.
    """
    reasons: list[str] = []
    for feed in feeds.values():
        try:
            return guarded.opened(target, model, feed)
        except TargetError as error:
            if not target.runs_here():
                raise
            reasons.append(str(error))
    raise _no_size(feeds, reasons)


def runnable(session: Session, feeds: Mapping[str, Feeds]) -> dict[str, Feeds]:
    """The sizes at which a model runs.

    Raises:
        SampleError: there is none.
    """
    reasons = {label: _refusal(session, feed) for label, feed in feeds.items()}
    found = {label: feed for label, feed in feeds.items() if reasons[label] is None}
    if not found:
        raise _no_size(feeds, [str(why) for why in reasons.values()])
    return found


def _no_size(feeds: Mapping[str, Feeds], reasons: Sequence[str]) -> SampleError:
    sizes, why = ", ".join(feeds), "".join(reasons[:1])
    return SampleError(f"the input runs at none of the sizes {sizes} ({why}); add --samples DATA, or --shapes with sizes that it takes")


def clock_of(target: Target) -> Clock:
    """The clock for sessions of this target."""
    machine = target.machine()
    return steady_clock(None if machine is None else machine.own_threads)


def _refusal(session: Session, feed: Feeds) -> str | None:
    try:
        session.run(feed)
    except GraphoptError as error:
        return str(error)
    return None


def _effort(once: float, effort: float) -> tuple[int, int]:
    rounds, block = next((r, b) for limit, r, b in _EFFORT if once <= limit)
    return max(2, round(rounds * effort)), block


def _once(session: Session, feed: Feeds) -> float:
    start = time.perf_counter()
    session.run(feed)
    return time.perf_counter() - start


def _seconds(once: float, models: int) -> float:
    rounds, block = _effort(once, VERDICT)
    return once * rounds * (block + 1) * models


def _share(progress: Done, done: int, total: int) -> Done:
    return lambda fraction: progress((done + fraction) / total)


class Picky:
    """A session that takes what it needs from a feed made for several models, in the integer width that it wants.

    Args:
        inputs: what it needs; by default what it says.
    """

    def __init__(self, session: Any, inputs: Sequence[Port] | None = None) -> None:
        self.session, self.inputs = session, session.inputs if inputs is None else inputs

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        missing = [p.name for p in self.inputs if p.name not in feeds]
        if missing:
            raise SampleError(f"input {', '.join(missing)} missing; the models must have the same inputs")
        outputs: dict[str, Array] = self.session.run({p.name: _as(feeds[p.name], p.dtype) for p in self.inputs})
        return outputs


def _as(array: Array, dtype: Any) -> Array:
    return array if dtype is None or array.dtype == dtype or array.dtype.kind not in "iu" else array.astype(dtype)


# ---- sizes and feeds ------------------------------------------------------------------------------------------------------------------


def parse_shapes(text: str) -> list[tuple[int, ...]]:
    """`1x16,8x64` -> [(1, 16), (8, 64)]: batch, then length.

    Raises:
        GraphoptError: anything else.
    """
    if not re.fullmatch(r"\s*[1-9]\d*(x[1-9]\d*)?\s*(,\s*[1-9]\d*(x[1-9]\d*)?\s*)*", text):
        raise GraphoptError(f"shapes are BATCHxSEQUENCE, such as 1x16,8x64; found `{text}`")
    return [tuple(map(int, part.split("x"))) for part in text.replace(" ", "").split(",")]


def shapes_of(target: Target) -> Sequence[tuple[int, ...]]:
    """The sizes that the target was asked for, such as `cpu{shapes=1x16+8x64}`, or the default ones."""
    return parse_shapes(",".join(target.shapes)) if target.shapes else SHAPES


def sizes_for(model: ir.Model, shapes: Sequence[tuple[int, ...]] = SHAPES) -> dict[str, dict[str, int]]:
    """Label -> a size for every symbol of the inputs: the first axis is the batch, every other one the length, within the position table.

    Raises:
        GraphoptError: a shape is a batch alone, and the model has a length, too.
    """
    bound, axes = limits(model), symbols(model)
    inner = [name for name, axis in axes.items() if axis]
    for shape in shapes if inner else ():
        if len(shape) < 2:
            raise GraphoptError(f"the shape `{shape[0]}` is a batch without a length, which the model has in `{inner[0]}`; write 1x{shape[0]}")
    rows = [{n: shape[0] if axis == 0 else min(shape[-1], bound.get(n, shape[-1])) for n, axis in axes.items()} for shape in shapes]
    return {label(model, row): row for row in rows}


def label(model: ir.Model, sizes: Mapping[str, int]) -> str:
    """`8x64`, or `as declared` for a model without symbols."""
    axes = symbols(model)
    parts = sorted({(min(axes[name], 1), size) for name, size in sizes.items()})
    return "x".join(str(size) for _, size in parts) or "as declared"


def feeds_for(models: Sequence[ir.Model], shapes: Sequence[tuple[int, ...]] = SHAPES) -> dict[str, Feeds]:
    """Label -> one feed that serves all models: inputs of the same name get the values that suit the first model that has them.

    Raises:
        SampleError: an input has no shape.
    """
    first, *others = models
    feeds: dict[str, Feeds] = {}
    for name, sizes in sizes_for(first, shapes).items():
        feed = next(iter(random_samples(first, [sizes])))
        batch = max((s for n, s in sizes.items() if symbols(first)[n] == 0), default=1)
        length = max((s for n, s in sizes.items() if symbols(first)[n] != 0), default=1)
        for model in others:
            row = next(iter(sizes_for(model, [(batch, length)]).values()))
            feed = next(iter(random_samples(model, [row]))) | feed
        feeds[name] = feed
    return feeds


def feeds_of(target: Target, model: ir.Model, samples: Any, wanted: Sequence[tuple[int, ...]] | None = None) -> dict[str, Feeds]:
    """What to time with: the sizes asked for (`wanted`, or by the target), the user's first sample, or the default sizes.

    Raises:
        SampleError: an input has no shape.
    """
    if samples is not None and not wanted and not target.shapes:
        first = next(iter(samples))
        shape = next((a.shape for _, a in arrays_in(list(first.values()))), ())
        return {"x".join(map(str, shape)) or "sample": first}
    return feeds_for([model], wanted or shapes_of(target))
