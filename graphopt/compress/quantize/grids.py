"""Rows of a weight on an integer grid of 4 or 8 bits, one scale for every `block` neighbours of a row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from graphopt.core.contract import Array

_CHUNK = 1 << 22  # elements that are coded at a time
_SHRINK = {4: np.linspace(1.06, 0.58, 13), 8: np.linspace(1.0, 0.94, 3)}  # of the range that just holds every number


@dataclasses.dataclass(frozen=True)
class Steps:
    """The grid of rows [rows, in]: `scale` float32 and `zero` float32 (whole numbers), both [rows, blocks]; codes in [low, high].

    `whole`: one scale was asked for each row, whatever its length.
    """

    scale: Array
    zero: Array
    block: int
    low: int
    high: int
    whole: bool = False

    @property
    def bits(self) -> int:
        return int(self.high - self.low + 1).bit_length() - 1

    def spread(self, width: int) -> tuple[Array, Array]:
        """Scale and zero point of each of `width` columns, [rows, width]."""
        scale, zero = (np.repeat(a, self.block, axis=1)[:, :width] for a in (self.scale, self.zero))
        return scale, zero

    def round(self, rows: Array) -> Array:
        """The nearest codes, int16 [rows, in]."""
        codes = np.empty(rows.shape, np.int16)
        step = max(1, _CHUNK // rows.shape[1])
        for k in range(0, len(rows), step):
            now = slice(k, k + step)
            scale, zero = dataclasses.replace(self, scale=self.scale[now], zero=self.zero[now]).spread(rows.shape[1])
            codes[now] = np.clip(np.rint(rows[now] / scale) + zero, self.low, self.high)
        return codes

    def decode(self, codes: Array) -> Array:
        scale, zero = self.spread(codes.shape[1])
        decoded: Array = (codes - zero) * scale
        return decoded

    def columns(self, order: Array) -> Callable[[int, Array], tuple[Array, Array]]:
        """For GPTQ: (j, column order[j] of all rows) -> its nearest codes, and what they stand for."""
        scale, zero = (np.ascontiguousarray(a[:, order].T) for a in self.spread(len(order)))

        def nearest(j: int, column: Array) -> tuple[Array, Array]:
            codes = np.clip(np.rint(column / scale[j]) + zero[j], self.low, self.high)
            return codes, (codes - zero[j]) * scale[j]

        return nearest


def steps(rows: Array, block: int, bits: int, *, symmetric: bool = True, importance: Array | None = None, moments: Array | None = None) -> Steps:
    """The grid of least squared error among shrunken ranges, block by block; a last block may be shorter.

    Args:
        rows: [rows, in], finite.
        block: neighbours that share a scale; 0: the whole row.
        symmetric: codes around zero, [-2^(b-1), 2^(b-1) - 1]; False: [0, 2^b - 1] with a zero point.
        importance: [in], the weight of each column in the error (mean square of the activation); None: all alike.
        moments: [in, in] of the inputs, instead: the error is that of the products with the columns of a block together.
    """
    count, width = rows.shape
    whole, block = not block, block or width
    blocks = -(-width // block)
    weights = _by_block(moments, block) if moments is not None else _diagonal(importance, width, block)
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if symmetric else (0, (1 << bits) - 1)
    scale, zero = np.empty((count, blocks), np.float32), np.zeros((count, blocks), np.float32)
    step = max(1, _CHUNK // (blocks * block))
    for k in range(0, count, step):
        now = slice(k, k + step)
        part = np.pad(rows[now].astype(np.float32), ((0, 0), (0, blocks * block - width))).reshape(-1, blocks, block)
        scale[now], zero[now] = _search(part, weights, bits, low, high)
    return Steps(scale, zero, block, low, high, whole)


def _search(part: Array, weights: Array, bits: int, low: int, high: int) -> tuple[Array, Array]:
    """Scale and zero point [rows, blocks] of part [rows, blocks, block]."""
    least, most = np.minimum(part.min(2), 0), np.maximum(part.max(2), 0)
    full = np.maximum(-least, most) / high if low < 0 else (most - least) / high
    best = np.full(full.shape, np.inf, np.float32)
    scale, zero = np.ones_like(full), np.zeros_like(full)
    for shrink in _SHRINK[bits]:
        s = full * np.float32(shrink)
        s = np.where(s < np.finfo(np.float32).tiny, np.float32(1), s)
        z = np.zeros_like(s) if low < 0 else np.clip(np.rint(-least * np.float32(shrink) / s), low, high)
        off = (np.clip(np.rint(part / s[..., None]) + z[..., None], low, high) - z[..., None]) * s[..., None] - part
        error = np.einsum("rbk,rbk,bk->rb", off, off, weights) if weights.ndim == 2 else _quadratic(off, weights)
        better = error < best
        best, scale, zero = np.where(better, error, best), np.where(better, s, scale), np.where(better, z, zero)
    return scale, zero


def _diagonal(importance: Array | None, width: int, block: int) -> Array:
    """[blocks, block], around 1; 0 behind the last column."""
    weight = np.ones(width, np.float32) if importance is None else np.maximum(importance / max(float(importance.mean()), 1e-30), 1e-6)
    blocks = -(-width // block)
    return np.pad(weight.astype(np.float32), (0, blocks * block - width)).reshape(blocks, block)


def _by_block(moments: Array, block: int) -> Array:
    """The blocks on the diagonal, [blocks, block, block], around 1."""
    width = len(moments)
    blocks = -(-width // block)
    padded = np.pad(moments.astype(np.float32), (0, blocks * block - width)) / np.float32(max(float(np.diag(moments).mean()), 1e-30))
    held = np.stack([padded[k * block : (k + 1) * block, k * block : (k + 1) * block] for k in range(blocks)])
    np.einsum("bkk->bk", held)[:] += np.float32(1e-6)
    return held


def _quadratic(off: Array, weights: Array) -> Array:
    """off^T M off of every block, [rows, blocks]."""
    turned = np.ascontiguousarray(off.transpose(1, 0, 2))
    error: Array = np.maximum(np.einsum("brk,brk->rb", turned @ weights, turned), 0)
    return error
