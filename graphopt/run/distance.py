"""How far apart two sets of outputs are. NaN equals NaN only where the baseline has it; another shape or dtype is infinitely far."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from graphopt.core.contract import Array

# max |d| <= tolerance * (1 + max |baseline|), by the dtype of the output; anything that is no float must be equal
TOLERANCE = {"float16": 2e-3, "bfloat16": 1.6e-2, "float32": 1e-5, "float64": 1e-9}
_SHARE = 5e-3  # of elements that are no floats (a class, a rank): so many may be decided otherwise by rounding
_FLIPS = 1e-2  # relative L2 distance that codes make which rounding flips
_FILL = 1e3  # so many times larger than (1 +) the smaller elements: a fill such as "minus infinity", which is no scale for the others


@dataclasses.dataclass(frozen=True)
class Difference:
    """The worst element of the first output that differs by more than its bound; `reason` instead, where arrays cannot be compared."""

    output: str
    index: tuple[int, ...] = ()
    expected: object = None
    found: object = None
    error: float = math.inf
    bound: float = 0.0
    reason: str = ""

    def __str__(self) -> str:
        if self.reason:
            return f"output `{self.output}` {self.reason}"
        place = f" at {list(self.index)}" if self.index else ""
        return f"output `{self.output}`{place} is {self.found}, expected {self.expected}: off by {self.error:.3g}, allowed {self.bound:.3g}"


def arrays_in(value: Any, name: str = "") -> Iterator[tuple[str, Array]]:
    """The arrays of an output, each with where it is: an array itself, those of a sequence as `y[0]`, the values of a map as `y{keys}`, and none of
    an optional that is empty. Two outputs have one form if these names are the same."""
    if isinstance(value, (list, tuple)):
        for k, element in enumerate(value):
            yield from arrays_in(element, f"{name}[{k}]")
    elif isinstance(value, Mapping):
        keys = sorted(value, key=str)
        values = np.array([value[key] for key in keys])
        yield f"{name}{{{','.join(map(str, keys))}}}", values.astype(np.float32) if values.dtype == np.float64 else values  # Python has one float
    elif value is not None:
        yield name, np.asarray(value)


def flat(outputs: Mapping[str, Any]) -> dict[str, Array]:
    """Every array of the outputs, by the names of `arrays_in`."""
    return dict(found for name, value in outputs.items() for found in arrays_in(value, name))


def relative_l2(base: Iterable[Mapping[str, Any]], other: Iterable[Mapping[str, Any]]) -> float:
    """||d|| / ||baseline|| over all batches, of the output where it is largest; inf where outputs cannot be compared."""
    squares = Squares()
    for expected, found in zip(base, other, strict=True):
        squares.add(expected, found)
    return squares.relative


def compare_outputs(base: Mapping[str, Any], other: Mapping[str, Any], tolerance: float | None = None) -> Difference | None:
    """The first output of `other` that is not the baseline's, or None; of a sequence or a map, the first array.

    Floats may differ by `tolerance` * (1 + max |baseline|), by default TOLERANCE of the dtype. The maximum leaves out fills (elements
    a thousand times larger than the others), each of which is measured against itself: a mask of -3e38 excuses nothing.
    """
    ours, theirs = flat(base), flat(other)
    for name, expected in ours.items():
        if name not in theirs:
            return Difference(name, reason="is missing")
        found = _compare(name, expected, theirs[name], tolerance)
        if found is not None:
            return found
    extra = [name for name in theirs if name not in ours]
    return Difference(extra[0], reason="is new; the baseline has no such output") if extra else None


@dataclasses.dataclass(frozen=True)
class Excess:
    """How many `times` more than rounding two sets of outputs are apart, and where that is most."""

    times: float
    text: str = ""

    def __str__(self) -> str:
        return self.text


def excess(base: Mapping[str, Any], other: Mapping[str, Any], grain: str = "") -> Excess:
    """How far `other` is off, in units of rounding: of TOLERANCE for floats, of _SHARE of the elements for what is no float.

    Args:
        grain: the coarsest that the graph rounds to on its way, where that is coarser than its outputs: a float type, or `codes`. Rounding
            flips some codes, so the floats of such a graph are measured as a whole, by relative L2 distance, in units of _FLIPS.
    """
    base, other = flat(base), flat(other)
    found = [_excess(name, array, other.get(name), grain) for name, array in base.items()]
    found += [Excess(math.inf, f"output `{name}` is new; the baseline has no such output") for name in other if name not in base]
    return max(found, key=lambda e: e.times, default=Excess(0.0))


def _excess(name: str, base: Array, other: Array | None, grain: str) -> Excess:
    if other is None:
        return Excess(math.inf, f"output `{name}` is missing")
    difference = _compare(name, base, other, None)
    if difference is None:
        return Excess(0.0)
    if difference.reason:
        return Excess(math.inf, str(difference))
    if base.dtype.name not in TOLERANCE:
        share = float(np.mean(_errors(base, other) > 0))
        return Excess(share / _SHARE, f"output `{name}`: {share:.1%} of its elements are others")
    if grain == "codes":
        far = relative_l2([{name: base}], [{name: other}])
        return Excess(far / _FLIPS, f"output `{name}` is off by a relative L2 distance of {far:.3g}")
    coarser = max(1.0, TOLERANCE.get(grain, 0.0) / TOLERANCE[base.dtype.name])
    return Excess(difference.error / difference.bound / coarser, str(difference))


def _compare(name: str, base: Array, other: Array, tolerance: float | None) -> Difference | None:
    if base.dtype != other.dtype or base.shape != other.shape:
        return Difference(name, reason=f"is {other.dtype}{list(other.shape)}, expected {base.dtype}{list(base.shape)}")
    errors = _errors(base, other)
    relative = TOLERANCE.get(base.dtype.name, 0.0) if tolerance is None else tolerance
    bounds = relative * (1 + _scale(base)) if base.dtype.name in TOLERANCE else np.zeros(base.shape)
    over = errors > bounds
    if not over.any():
        return None
    worst = np.unravel_index(int(np.argmax(np.where(over, errors / (bounds + 1e-300), -1.0))), base.shape)
    index = tuple(int(i) for i in worst)
    return Difference(name, index, base[index], other[index], float(errors[index]), float(bounds[index]))


def _errors(base: Array, other: Array) -> Array:
    """|other - base| as float64; 0 where both are the same infinity or NaN, inf where only one is."""
    if base.dtype.kind in "OUS":
        return np.where(base == other, 0.0, math.inf)
    with np.errstate(invalid="ignore", over="ignore"):
        a, b = base.astype(np.float64), other.astype(np.float64)
        errors = np.abs(b - a)
        same = (base == other) | (np.isnan(a) & np.isnan(b))
    if base.dtype.kind in "iu":
        errors = np.maximum(errors, 1.0)  # float64 cannot tell large neighbours apart; `same` can
    return np.where(same, 0.0, np.where(np.isnan(errors), math.inf, errors))


def _scale(base: Array) -> Array:
    """For each element, the magnitude that its error is measured by: the largest that is no fill, or its own."""
    numbers = np.abs(_finite(base))
    present = numbers[numbers > 0]
    if present.size == 0:
        return numbers
    ceiling = _FILL * (1 + float(np.quantile(present, 0.1)))
    largest = float(numbers.max(initial=0.0, where=numbers <= ceiling))
    return np.maximum(numbers, largest)


def _finite(array: Array) -> Array:
    return np.nan_to_num(array.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)


def _norm(array: Array) -> float:
    return float(np.sqrt(np.square(array).sum()))


def _ratio(error: float, scale: float) -> float:
    return error / scale if scale else (math.inf if error else 0.0)


def _cosines(a: Array, b: Array) -> Array:
    a, b = (x.reshape(-1, x.shape[-1]) if x.ndim else x.reshape(1, 1) for x in (a, b))
    lengths = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    product = lengths[0] * lengths[1]
    cosines = (a * b).sum(1) / np.where(product > 0, product, 1.0)
    return np.where((lengths[0] == 0) & (lengths[1] == 0), 1.0, cosines)


class Running:
    """The distance of two values over many batches, each batch seen once: memory does not grow with their number.

    The last axis runs along the channels. The same infinity on both sides is no difference; strings count as 1 where they differ.

    Attributes:
        max_abs: max |d|, in units of the output.
        l2: ||d|| / ||baseline||.
        cosine: mean cosine of the rows (last axis); `cosine_min`: the smallest.
    """

    def __init__(self) -> None:
        self._signal = self._noise = self._cosines = 0.0
        self._rows = 0
        self.max_abs, self.cosine_min = 0.0, 1.0
        self._channels: Array | None = np.zeros((2, 0))  # squares of the noise and of the signal by channel; None: their number changes

    def add(self, base: Any, other: Any) -> None:
        """Take in one batch; both have one form, and one shape."""
        for (_, ours), (_, theirs) in zip(arrays_in(base), arrays_in(other), strict=True):
            self._add(ours, theirs)

    def _add(self, base: Array, other: Array) -> None:
        errors = _errors(base, other)
        if base.dtype.kind in "OUS":
            errors = np.minimum(errors, 1.0)
            numbers, others = np.ones(base.shape), 1 - errors
        else:
            numbers, others = _finite(base), _finite(other)
        self._signal += float(np.square(numbers).sum())
        self._noise += float(np.square(errors).sum())
        self.max_abs = max(self.max_abs, float(errors.max(initial=0.0)))
        if base.size:
            cosines = _cosines(numbers, others)
            self._cosines, self._rows = self._cosines + float(cosines.sum()), self._rows + len(cosines)
            self.cosine_min = min(self.cosine_min, float(cosines.min()))
        self._by_channel(errors, numbers)

    def _by_channel(self, errors: Array, numbers: Array) -> None:
        if self._channels is None or errors.ndim < 2:
            return
        now = np.stack([np.square(x).reshape(-1, x.shape[-1]).sum(0) for x in (errors, numbers)])
        if self._channels.shape[1] not in (0, now.shape[1]):
            self._channels = None
            return
        self._channels = now + (self._channels if self._channels.shape[1] else 0.0)

    @property
    def l2(self) -> float:
        return _ratio(math.sqrt(self._noise), math.sqrt(self._signal))

    @property
    def snr(self) -> float:
        """10 log10(||baseline||^2 / ||d||^2), in dB; inf where nothing differs."""
        if self._noise == 0:
            return math.inf
        return 10 * math.log10(self._signal / self._noise) if self._signal and math.isfinite(self._noise) else -math.inf

    @property
    def cosine(self) -> float:
        return self._cosines / self._rows if self._rows else 1.0

    def worst_channels(self, count: int) -> list[tuple[int, float]]:
        """(channel, ||d|| / ||baseline|| of it), the largest share of the error first; none where all are equal."""
        if self._channels is None or not self._channels.shape[1]:
            return []
        noise, signal = self._channels
        order = [int(k) for k in np.argsort(-noise, kind="stable")[:count] if noise[k] > 0]
        return [(k, _ratio(math.sqrt(noise[k]), math.sqrt(signal[k]))) for k in order]


class Squares:
    """`relative_l2` of outputs that come batch by batch."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def add(self, base: Mapping[str, Any], other: Mapping[str, Any]) -> None:
        """Take in one batch. What a sequence or a map holds counts together."""
        for name, value in base.items():
            total = self._sums.setdefault(name, [0.0, 0.0])
            ours, theirs = dict(arrays_in(value)), dict(arrays_in(other.get(name)))
            if {at: x.shape for at, x in ours.items()} != {at: x.shape for at, x in theirs.items()}:
                total[0] = math.inf
                continue
            for at, array in ours.items():
                off, size = _squares(array, theirs[at])
                total[0], total[1] = total[0] + off, total[1] + size

    @property
    def relative(self) -> float:
        """||d|| / ||baseline|| over all batches, of the output where it is largest."""
        return max((_ratio(math.sqrt(d), math.sqrt(b)) for d, b in self._sums.values()), default=0.0)


def _squares(base: Array, other: Array) -> tuple[float, float]:
    """||d||^2 and ||baseline||^2."""
    if base.dtype == other.dtype == np.float32:  # a tenth of the time; only finite numbers give finite sums
        with np.errstate(invalid="ignore", over="ignore"):
            d = (other - base).reshape(-1)
            sums = float(np.dot(d, d)), float(np.dot(base.reshape(-1), base.reshape(-1)))
        if math.isfinite(sums[0]) and math.isfinite(sums[1]):
            return sums
    return _norm(_errors(base, other)) ** 2, _norm(_finite(base)) ** 2 if base.dtype.kind not in "OUS" else 0.0
