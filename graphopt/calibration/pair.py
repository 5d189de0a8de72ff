"""A pupil and its teacher, side by side on the same samples: at any multiply what each is fed, how the two go together, and how far apart their
residual streams are. What is fitted to the teacher (refits, factors in sequence) reads it here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analysis.linear import Linear
from graphopt.calibration.padding import Kept, Padding
from graphopt.core.contract import Array
from graphopt.core.errors import SampleError
from graphopt.graph.questions import consumers, is_constant, same_shape
from graphopt.run import Feeds
from graphopt.run.observe import Limited
from graphopt.run.segments import State, Walk


@dataclasses.dataclass(frozen=True)
class Paired:
    """Means over the rows of x [rows, K] that the pupil is fed and z [rows, L] that the teacher is: x^T x, x^T z, z^T z, each float64.

    `drift` [K, H]: x^T (t - s), where s and t [rows, H] are the residual streams of pupil and teacher; None where there is none.
    """

    own: Array
    cross: Array
    other: Array
    drift: Array | None = None


class Pair:
    """Both models walk once over the samples, all batches at one place; they only go on.

    Args:
        pupil: may change behind the place where it stands.
        teacher: what it is fitted to.
        linears: multiplies of the teacher, those that `at` will ask about.
        rows: stop after the batch in which so many rows (tokens) were seen.

    Raises:
        SampleError: there was no sample.
    """

    def __init__(self, pupil: ir.Model, teacher: ir.Model, samples: Iterable[Feeds], linears: Iterable[Linear], rows: int | None = None) -> None:
        taken = samples if rows is None else Limited(samples, rows)
        padding = Padding(teacher).about(str(x.x.name) for x in linears)
        self._kept = [padding.kept(feed) for feed in taken]
        if not self._kept:
            raise SampleError("calibration gave 0 samples: the source is empty, or a generator that was used before")
        self._pupil, self._teacher = Walk(pupil, taken), Walk(teacher, taken)

    def at(self, own: Linear, other: Linear) -> Meeting:
        """Both in front of one multiply, `own` of the pupil and `other` of the teacher; not in front of where they were before."""
        return Meeting(own, other, self._pupil.until(own.node), self._teacher.until(other.node), self._kept)


class Meeting:
    """Pupil and teacher in front of one multiply. Iterate: for each batch x, z, and t - s or None (see `Paired`), float32, without padding."""

    def __init__(self, own: Linear, other: Linear, pupil: Sequence[State], teacher: Sequence[State], kept: Sequence[Kept]) -> None:
        self._names, self._states, self._kept = (str(own.x.name), str(other.x.name)), (pupil, teacher), kept
        self._streams = _stream(own), _stream(other)
        if any(name is None or name not in states[0] for name, states in zip(self._streams, self._states, strict=True)):
            self._streams = None, None

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[tuple[Array, Array, Array | None]]:
        own, other = self._names
        for ours, theirs, kept in zip(*self._states, self._kept, strict=True):
            counts = kept.counts(other, theirs[other].shape)

            def rows(array: Array, counts: Array | None = counts) -> Array:
                flat = array.reshape(-1, array.shape[-1]).astype(np.float32, copy=False)
                return flat if counts is None else flat[counts]

            s, t = self._streams
            yield rows(ours[own]), rows(theirs[other]), None if s is None or t is None else rows(theirs[t] - ours[s])

    def moments(self) -> Paired:
        """Over all batches."""
        sums: list[Array] = []
        count = 0
        for x, z, drift in self:
            pairs = [(x, x), (x, z), (z, z), *([] if drift is None else [(x, drift)])]
            parts = [(a.T @ b).astype(np.float64) for a, b in pairs]
            sums = [total + part for total, part in zip(sums, parts, strict=True)] if sums else parts
            count += len(x)
        return Paired(*(total / max(count, 1) for total in sums))


class LeastSquares:
    """What a fit of x [rows, in] @ W to y [rows, out] needs of the rows."""

    def __init__(self, moments: Array, cross: Array) -> None:
        self.moments, self.cross, self.squares = moments, cross, 0.0

    def add(self, x: Array, y: Array) -> None:
        self.moments += x.T @ x
        self.cross += x.T @ y
        self.squares += float(np.square(y, dtype=np.float64).sum())

    def __add__(self, other: LeastSquares) -> LeastSquares:
        total = LeastSquares(self.moments + other.moments, self.cross + other.cross)
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


def _stream(linear: Linear) -> str | None:
    """The other summand of the residual Add behind a projection, by name."""
    readers = consumers(linear.output)
    if len(readers) != 1 or readers[0].op_type != "Add" or readers[0].domain:
        return None
    other = next((v for v in readers[0].inputs if v is not None and v is not linear.output), None)
    return None if other is None or is_constant(other) or not same_shape(other, linear.output) else str(other.name)
