"""Two models side by side on the same samples: the pupil, and the teacher that it is fitted to."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analysis.linear import Linear, bias_of
from graphopt.calibration.padding import Kept, Padding
from graphopt.core.contract import Array
from graphopt.core.errors import SampleError
from graphopt.graph.questions import consumers, is_constant, same_shape
from graphopt.run import Feeds
from graphopt.run.observe import exposed, limited
from graphopt.run.segments import Segments, State


@dataclasses.dataclass(frozen=True)
class Paired:
    """Means over the rows of x [rows, K] in one model and of z, the same value in another: x^T x, x^T z and z^T z, each float64 [K, K].

    `drift` [K, H]: x^T (t - s), where s [rows, H] is a second value of the one and t that of the other model.
    """

    own: Array
    cross: Array
    other: Array
    drift: Array | None = None


def paired_moments(model: ir.Model, other: ir.Model, samples: Iterable[Feeds], value: str, second: str | None = None) -> Paired:
    """How a value [.., K] of `model` and the one of this name in `other` go together; one run of both over the samples, without padding.

    Args:
        value, second: names of values in the main graphs of both; `second` has the same rows.

    Raises:
        SampleError: there was no sample.
    """
    from graphopt.run import ort

    given = {str(v.name) for v in model.graph.inputs}
    names = [n for n in dict.fromkeys((value, second)) if n is not None]
    shown = [n for n in names if n not in given]
    sessions = [ort.session(exposed(m, shown)) for m in (model, other)] if shown else []
    sums: list[Array] = []
    count, padding = 0, Padding(other, [value])
    for feed in padding.watch(samples):
        runs = [session.run(feed) for session in sessions] or [{}, {}]
        (x, *s), (z, *t) = ([padding.now.rows(value, feed[n] if n in given else run[n]) for n in names] for run in runs)
        pairs = [(x, x), (x, z), (z, z), *((x, b - a) for a, b in zip(s, t, strict=True))]
        parts = [(a.T @ b).astype(np.float64) for a, b in pairs]
        sums = [total + part for total, part in zip(sums, parts, strict=True)] if sums else parts
        count += len(x)
    if not sums:
        raise SampleError("calibration gave 0 samples: the source is empty, or a generator that was used before")
    return Paired(*(total / max(count, 1) for total in sums))


class _Progress:
    """A model on its way through the samples, all batches at one place; what is in front of it may no longer change."""

    def __init__(self, model: ir.Model, linears: Sequence[Linear]) -> None:
        self.segments = Segments(model, [str(x.node.outputs[0].name) for x in linears])
        self.here, self.states, self.feeds = 0, list[State](), list[Feeds]()

    def begin(self, samples: Iterable[Feeds], rows: int) -> None:
        for feed in limited(samples, rows):
            self.feeds.append(feed)
            self.states.append(self.segments.begin(feed))

    def until(self, linear: Linear) -> list[State]:
        """The values in front of a multiply, for every batch."""
        piece = self.segments.piece_of(str(linear.node.outputs[0].name))
        while self.here < piece:
            self.states = [self.segments.step(self.here, state) for state in self.states]
            self.here += 1
        return self.states


class _Sums:
    """What a least-squares fit of x [rows, in] @ W to y [rows, out] needs of the rows."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.moments, self.cross, self.squares = np.zeros((inputs, inputs)), np.zeros((inputs, outputs)), 0.0

    def add(self, x: Array, y: Array) -> None:
        self.moments += x.T @ x
        self.cross += x.T @ y
        self.squares += float(np.square(y, dtype=np.float64).sum())

    def __add__(self, other: _Sums) -> _Sums:
        total = _Sums(*self.cross.shape)
        total.moments, total.cross = self.moments + other.moments, self.cross + other.cross
        total.squares = self.squares + other.squares
        return total

    def solve(self, start: Array, ridge: float) -> Array:
        """The best W, drawn to `start` by a part of the mean second moment."""
        damp = ridge * max(float(np.trace(self.moments)) / len(self.moments), 1e-30)  # without any row the start is the answer
        found: Array = np.linalg.solve(self.moments + damp * np.eye(len(self.moments)), self.cross + damp * start)
        return found

    def error(self, w: Array) -> float:
        """|x W - y| / |y|"""
        rest = self.squares - 2 * float((w * self.cross).sum()) + float(((self.moments @ w) * w).sum())
        return float(np.sqrt(max(rest, 0.0) / max(self.squares, 1e-30)))


def _rows(new: Linear, old: Linear, pupil: Sequence[State], master: Sequence[State], kept: Sequence[Kept]) -> Iterator[tuple[Array, Array]]:
    """For each batch what the pruned multiply is fed, a one behind it where it has a bias, and what should come out; without padding."""
    target, then, biased = old.matrix().astype(np.float32), bias_of(old), bias_of(new) is not None
    stream = _stream(new), _stream(old)
    if None in stream or any(str(stream[0]) not in s for s in pupil) or any(str(stream[1]) not in s for s in master):
        stream = (None, None)
    for ours, theirs, batch in zip(pupil, master, kept, strict=True):
        fed = theirs[str(old.x.name)]
        lead = batch.lead(str(old.x.name), fed.shape)
        counts = slice(None) if lead is None else lead.reshape(-1)
        x = ours[str(new.x.name)].reshape(-1, new.in_features)[counts]
        y = fed.reshape(-1, len(target))[counts] @ target
        if biased:
            x = np.concatenate([x, np.ones((len(x), 1), x.dtype)], 1)
        if then is not None:
            y = y + then.astype(np.float32)
        if stream[0] is not None:
            y = y + (theirs[str(stream[1])] - ours[str(stream[0])]).reshape(-1, y.shape[-1])[counts]
        yield x, y


def _stream(linear: Linear) -> str | None:
    """The other summand of the residual Add behind a projection, by name."""
    readers = consumers(linear.output)
    if len(readers) != 1 or readers[0].op_type != "Add" or readers[0].domain:
        return None
    other = next((v for v in readers[0].inputs if v is not None and v is not linear.output), None)
    return None if other is None or is_constant(other) or not same_shape(other, linear.output) else str(other.name)
