"""A float constant on an integer grid, and how far off it is."""

from __future__ import annotations

import dataclasses

import numpy as np

from graphopt.core.contract import Array

REDUCED = 64  # codes up to this size are safe where a CPU adds two products with uint8 in 16 bits
_CHUNK = 1 << 22  # elements that are coded at a time, so that a large table needs little memory beside its codes


@dataclasses.dataclass(frozen=True)
class Coded:
    """(codes - zero_point) * scale stands for the constant; one scale for each index of `axis`, or one for all.

    Attributes:
        codes: int8, in the shape of the constant.
        scale: float32 [channels], or [] where `axis` is None.
        zero_point: int8 like `scale`, or None for zero.
        worst: the largest ||w - decoded|| / ||w|| of any channel, also where all share one scale: with white inputs, the relative error that
            it brings to an output.
        channel: which channel that is.
        rest: the largest such error of a channel if its largest weight is left out.
        block: 0, as no scale is for a part of a channel.
    """

    codes: Array
    scale: Array
    zero_point: Array | None
    axis: int | None
    worst: float
    channel: int
    rest: float
    block: int = 0

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes + (0 if self.zero_point is None else self.zero_point.nbytes)


def encode(array: Array, axis: int, *, per_channel: bool = True, symmetric: bool = True, reduced: bool = False) -> Coded:
    """Round to int8: codes in [-127, 127] around zero, or (not symmetric) in [-128, 127] with a zero point.

    Args:
        array: numbers, finite and not empty.
        axis: runs along the channels; each gets its own scale, a channel of zeros the scale 1.
        per_channel: False gives one scale for all.
        reduced: codes in [-64, 64] in both cases: then two products with uint8 add up within 16 bits (2 * 255 * 64 < 2^15).
    """
    codes_from, codes_to = (-REDUCED, REDUCED) if reduced else (-127 if symmetric else -128, 127)
    rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
    scale, zero = _grid(rows if per_channel else rows.reshape(1, -1), symmetric, codes_from, codes_to)
    scales, zeros = (np.broadcast_to(x, len(rows)) for x in (scale, zero))
    codes = np.empty(rows.shape, np.int8)
    error, norm, rest, left = (np.empty(len(rows), np.float64) for _ in range(4))
    step = max(1, _CHUNK // rows.shape[1])
    for k in range(0, len(rows), step):
        now = slice(k, k + step)
        part, s, z = rows[now].astype(np.float32), scales[now, None], zeros[now, None].astype(np.float32)
        code = np.clip(np.rint(part / s) + z, codes_from, codes_to)
        codes[now] = code.astype(np.int8)
        off, weight = np.square((code - z) * s - part), np.square(part)
        error[now], norm[now] = off.sum(1), weight.sum(1)
        top = weight.argmax(1)[:, None]
        rest[now] = error[now] - np.take_along_axis(off, top, 1)[:, 0]
        left[now] = norm[now] - np.take_along_axis(weight, top, 1)[:, 0]
    moved = (array.shape[axis], *array.shape[:axis], *array.shape[axis + 1 :])
    codes = np.ascontiguousarray(np.moveaxis(codes.reshape(moved), 0, axis))
    if not per_channel:
        scale, zero = scale[0], zero[0]
    relative = _ratio(error, norm)
    worst = int(relative.argmax())
    return Coded(
        codes,
        np.asarray(scale),
        None if symmetric else np.asarray(zero),
        axis if per_channel else None,
        float(relative[worst]),
        worst,
        float(_ratio(rest, left).max()),
    )


def _grid(rows: Array, symmetric: bool, codes_from: int, codes_to: int) -> tuple[Array, Array]:
    """Scale (float32) and zero point (int8) of each row."""
    low, high = np.minimum(rows.min(1), 0).astype(np.float32), np.maximum(rows.max(1), 0).astype(np.float32)
    width = np.maximum(-low, high) / codes_to if symmetric else (high - low) / (codes_to - codes_from)
    scale = np.where(width < np.finfo(np.float32).tiny, 1, width).astype(np.float32)
    zero = np.zeros(len(rows)) if symmetric else np.clip(np.rint(codes_from - low / scale), codes_from, codes_to)
    return scale, zero.astype(np.int8)


def _ratio(part: Array, whole: Array) -> Array:
    """sqrt(part / whole), 0 where there is nothing."""
    ratio: Array = np.sqrt(np.maximum(part, 0) / np.where(whole > 0, whole, 1))
    return np.where(whole > 0, ratio, 0)
