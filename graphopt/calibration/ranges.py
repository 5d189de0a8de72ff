"""The range of every activation that a stored weight multiplies, on the user's samples, and how much of it eight bits should cover."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analysis.linear import Linears
from graphopt.calibration.observe import Observed, Reducer
from graphopt.core.contract import Array, Context
from graphopt.graph.questions import is_constant
from graphopt.run.observe import observable

_HALF = 1 << 13  # bins on each side of zero
_LEVELS = 256
_STEPS = np.geomspace(1 / 8, 1, 48)  # the parts of a side that the searches try


@dataclasses.dataclass(frozen=True)
class ActivationRange:
    """What a uint8 activation should cover: [low, high], zero included. `seen`: the smallest and the largest value; `finite`: all were finite;
    `rows`: those that there were."""

    low: float
    high: float
    seen: tuple[float, float]
    finite: bool = True
    rows: int = 0


@dataclasses.dataclass(frozen=True)
class Ranges(Observed[Mapping[ir.Value, ActivationRange]]):
    """The range of the activation of each multiply with a stored weight, as far as it is float32 and can be observed on some sample.

    One pass over the samples, a fixed histogram for each value: memory does not grow with the samples, and what comes out depends neither on
    their order nor on how they are batched. Padding does not count: it may be clipped.

    Args:
        method: `minmax`; `percentile`; `mse`, the range with the least squared error of rounding and clipping; `entropy`, the one with the
            least Kullback-Leibler divergence of the rounded values (Migacz, 8-bit inference with TensorRT, GTC 2017), searched on both sides.
            It counts how many values are cut and not by how much, so it cuts the few large channels that a LayerNorm makes: not for Transformers.
        percentile: how many percent of the values the range holds, half of the others on each side.

    Raises:
        SampleError: there are no samples.
    """

    method: str = "minmax"
    percentile: float = 99.999

    def watch(self, model: ir.Model, ctx: Context) -> tuple[Sequence[Reducer], Callable[[], Mapping[ir.Value, ActivationRange]]]:
        wanted = (x for x in ctx.get(Linears(casts=True)) if x.x.dtype == ir.DataType.FLOAT and not is_constant(x.x) and observable(model, x.x))
        across = {x.x: x.trans_x for x in wanted}
        found = {value: ValueHistogram() for value in across}
        reducers = [Reducer((value,), h.add, _columns if across[value] else None) for value, h in found.items()]
        return reducers, lambda: {value: h.range(self.method, self.percentile) for value, h in found.items() if h.count}


def _columns(array: Array) -> Array:
    """[.., K, rows] -> [rows, K]"""
    turned = np.swapaxes(array, -1, -2)
    return turned.reshape(-1, turned.shape[-1])


class ValueHistogram:
    """Counts of values in 2 x 8192 bins around zero, whose width doubles until the largest value fits.

    The width is a power of two, so that merged bins are what would have been counted at once.
    """

    def __init__(self) -> None:
        self.count, self.rows, self.low, self.high, self.finite = 0, 0, math.inf, -math.inf, True
        self.width = 0.0
        self.counts = np.zeros(2 * _HALF, np.int64)

    def add(self, array: Array) -> None:
        if not array.size:
            return
        self.rows += len(array)
        low, high = float(array.min()), float(array.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            self.finite = False
            array = array[np.isfinite(array)]
            if not array.size:
                return
            low, high = float(array.min()), float(array.max())
        self.count += array.size
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._widen(max(-low, high))
        bins = np.floor(array.reshape(-1) * (1 / self.width)).astype(np.int32) if self.width else np.zeros(array.size, np.int32)
        self.counts += np.bincount(np.minimum(bins, _HALF - 1) + _HALF, minlength=2 * _HALF)

    def range(self, method: str, percentile: float) -> ActivationRange:
        """The part of the values to cover, by one of the methods of `Ranges`."""
        sides = min(self.low, 0.0), max(self.high, 0.0)
        if self.width and method == "percentile":
            sides = self._percentile(percentile)
        elif self.width and method in ("mse", "entropy"):
            centers, counts = self._filled()
            cost = _squared_error if method == "mse" else _divergence
            sides = _search(sides, lambda low, high: cost(centers, counts, low, high))
        return ActivationRange(*sides, (self.low, self.high), self.finite, self.rows)

    def _widen(self, largest: float) -> None:
        wanted = 2.0 ** math.ceil(math.log2(largest / _HALF)) if largest > 0 else 0.0
        wanted = max(wanted, 2.0**-100) if wanted else 0.0
        if not self.width:  # all values up to now were zero, which every width puts into the same bin
            self.width = wanted
            return
        while self.width < wanted:
            self.width *= 2
            pairs = self.counts.reshape(-1, 2).sum(1)
            self.counts[:] = 0
            self.counts[_HALF // 2 : _HALF // 2 + _HALF] = pairs

    def _percentile(self, percentile: float) -> tuple[float, float]:
        """Bounds between which that many percent lie, to one bin."""
        tail = (1 - percentile / 100) / 2 * self.count
        below = self.counts.cumsum()
        first = int(np.searchsorted(below, tail, side="right"))
        last = int(np.searchsorted(below, self.count - tail, side="left"))
        low, high = (first - _HALF) * self.width, (last + 1 - _HALF) * self.width
        return min(max(low, self.low), 0.0), max(min(high, self.high), 0.0)

    def _filled(self) -> tuple[Array, Array]:
        at = np.flatnonzero(self.counts)
        return (at - _HALF + 0.5) * self.width, self.counts[at].astype(np.float64)


def grid(low: float, high: float) -> tuple[float, int]:
    """Scale (a float32 number) and uint8 zero point that cover [low, high], zero being one of the levels."""
    scale = float(np.float32((high - low) / (_LEVELS - 1)))
    if scale < np.finfo(np.float32).tiny:
        return 1.0, 0
    return scale, int(np.clip(np.rint(-low / scale), 0, _LEVELS - 1))


def _search(sides: tuple[float, float], cost: Callable[[float, float], float]) -> tuple[float, float]:
    """The best part of each side in turn, twice over: together both sides are too many to try."""
    low, high = sides
    best = cost(low, high)
    for _ in range(2):
        for candidates in ([(low, high * s) for s in _STEPS], [(low * s, high) for s in _STEPS]):
            for now in _kept(candidates, sides):
                if (found := cost(*now)) < best:
                    best, (low, high) = found, now
    return low, high


def _kept(candidates: list[tuple[float, float]], sides: tuple[float, float]) -> Iterator[tuple[float, float]]:
    """Only those that cover an eighth of each side, whatever the turn: a histogram says nothing about much less."""
    return (c for c in candidates if c != sides and c[0] <= sides[0] / 8 and c[1] >= sides[1] / 8)


def _codes(centers: Array, low: float, high: float) -> tuple[Array, float, int]:
    scale, zero = grid(low, high)
    return np.clip(np.rint(centers / scale) + zero, 0, _LEVELS - 1), scale, zero


def _squared_error(centers: Array, counts: Array, low: float, high: float) -> float:
    codes, scale, zero = _codes(centers, low, high)
    return float(np.dot(counts, np.square((codes - zero) * scale - centers)))


def _divergence(centers: Array, counts: Array, low: float, high: float) -> float:
    """KL(P || Q): P has what is cut off at its ends, Q spreads each level evenly over its bins and has lost it."""
    inside = (centers >= low) & (centers <= high)
    kept = counts[inside]
    if not kept.size:
        return math.inf
    codes, _, _ = _codes(centers[inside], low, high)
    level = codes.astype(np.int64)
    spread = (np.bincount(level, kept, _LEVELS) / np.maximum(np.bincount(level, minlength=_LEVELS), 1))[level]
    p = kept.copy()
    p[0] += counts[centers < low].sum()
    p[-1] += counts[centers > high].sum()
    p, q = p / p.sum(), spread / spread.sum()
    return float(np.dot(p, np.log(p / q)))
