"""Codebooks for the rows of a weight: NF4, and k-means in one dimension."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from graphopt.analysis.codebook import NF4
from graphopt.core.contract import Array

_ROUNDS = 50  # of Lloyd's algorithm, which stops earlier where nothing moves
_BINS = 1 << 16  # in which the numbers of a whole weight are counted
_FINE, _MOST = 6, 512  # bins for each entry, and in all, between which clusters are found exactly
_CHUNK, _NEAR = 1 << 21, 1 << 18  # elements that are clustered at a time, and costs of runs of bins (which the cache should hold)


@dataclasses.dataclass(frozen=True)
class CodebookGrid:
    """Rows [rows, in] as table[codes] * scale.

    Attributes:
        table: float32, rising: [entries], or [rows, entries].
        scale: float32 [rows, blocks], or None for 1.
        block: neighbours that share a scale; 0: the whole row.
        kind: the name of the option.
    """

    table: Array
    scale: Array | None
    block: int
    kind: str

    @property
    def entries(self) -> int:
        return int(self.table.shape[-1])

    def round(self, rows: Array) -> Array:
        """The nearest codes, int16 [rows, in]."""
        scaled = rows if self.scale is None else rows / _spread(self.scale, self.block, rows.shape[1])
        if self.table.ndim == 1:
            nearest: Array = np.searchsorted(_middles(self.table), scaled).astype(np.int16)
            return nearest
        codes, middles = np.zeros(rows.shape, np.int16), _middles(self.table)
        for k in range(self.entries - 1):
            codes += scaled > middles[:, k : k + 1]
        return codes

    def decode(self, codes: Array) -> Array:
        values: Array = self.table[codes] if self.table.ndim == 1 else np.take_along_axis(self.table, codes.astype(np.int64), 1)
        return values if self.scale is None else values * _spread(self.scale, self.block, codes.shape[1])

    def columns(self, order: Array) -> Callable[[int, Array], tuple[Array, Array]]:
        """For GPTQ: (j, column order[j] of all rows) -> its codes, and what they stand for."""
        scale = None if self.scale is None else np.ascontiguousarray(_spread(self.scale, self.block, len(order))[:, order].T)
        middles, lines = _middles(self.table), np.arange(len(self.table))

        def nearest(j: int, column: Array) -> tuple[Array, Array]:
            scaled = column if scale is None else column / scale[j]
            if self.table.ndim == 1:
                codes = np.searchsorted(middles, scaled)
                values = self.table[codes]
            else:
                codes = (scaled[:, None] > middles).sum(1)
                values = self.table[lines, codes]
            return codes, values if scale is None else values * scale[j]

        return nearest


def nf4(rows: Array, block: int) -> CodebookGrid:
    """NF4 with the largest magnitude of each block as its scale. `block` must divide the row; 0: the whole row."""
    return CodebookGrid(NF4, _largest(rows, block), block, "nf4")


def kmeans(rows: Array, entries: int, block: int, importance: Array | None = None) -> CodebookGrid:
    """Lloyd's codebook of least squared error, each column weighted by `importance` [in] (SqueezeLLM, Kim et al. 2023, with mean squares of
    the inputs); one for each row, or, with a block or more than 16 entries, one for the weight, whose blocks (rows) are scaled to [-1, 1].
    """
    weight = np.ones(rows.shape[1]) if importance is None else np.maximum(importance / max(float(importance.mean()), 1e-30), 1e-6)
    if not block and entries <= 16:
        table = np.empty((len(rows), entries), np.float32)
        step = max(1, _CHUNK // rows.shape[1])
        for k in range(0, len(rows), step):
            order = np.argsort(rows[k : k + step], axis=1)
            table[k : k + step] = _cluster(np.take_along_axis(rows[k : k + step], order, 1).astype(np.float64), weight[order], entries)
        return CodebookGrid(table, None, 0, "kmeans")
    scale = _largest(rows, block)
    points, mass = _counted(rows, scale, block, weight)
    return CodebookGrid(_cluster(points, mass, entries)[0].astype(np.float32), scale, block, "kmeans")


def _largest(rows: Array, block: int) -> Array:
    parts = np.abs(rows).reshape(len(rows), -1, block or rows.shape[1]).max(2)
    return np.where(parts < np.finfo(np.float32).tiny, 1, parts).astype(np.float32)


def _spread(scale: Array, block: int, width: int) -> Array:
    return np.repeat(scale, block or width, axis=1)


def _middles(table: Array) -> Array:
    middles: Array = (table[..., 1:] + table[..., :-1]) / 2
    return middles


def _counted(rows: Array, scale: Array, block: int, weight: Array) -> tuple[Array, Array]:
    """The scaled numbers of all rows in bins: mean and mass of each, [1, bins]; the mass is what a step there costs of the energy of its row."""
    mass, total = np.zeros(_BINS), np.zeros(_BINS)
    step = max(1, _CHUNK // rows.shape[1])
    for k in range(0, len(rows), step):
        spread = _spread(scale[k : k + step], block, rows.shape[1])
        scaled = (rows[k : k + step] / spread).ravel()
        energy = np.maximum(np.square(rows[k : k + step], dtype=np.float64).sum(1, keepdims=True), 1e-300)
        cost = (np.square(spread, dtype=np.float64) / energy * weight).ravel()
        place = np.clip((scaled + 1) * (_BINS / 2), 0, _BINS - 1).astype(np.int64)
        mass += np.bincount(place, cost, _BINS)
        total += np.bincount(place, cost * scaled, _BINS)
    kept = mass > 0
    return (total[kept] / mass[kept])[None], mass[kept][None]


def _cluster(points: Array, mass: Array, entries: int) -> Array:
    """Centres of least squared error: the exact clusters of `_FINE` bins for each entry, then Lloyd's algorithm on the points themselves.

    Args:
        points: float64 [rows, n], rising.
        mass: [rows, n].

    Returns:
        float64 [rows, entries], rising.
    """
    bins = min(_FINE * entries, _MOST)
    sums = [np.concatenate([np.zeros((len(points), 1)), np.cumsum(mass * points**k, axis=1)], axis=1) for k in range(3)]
    spread = (points - points[:, :1]) / np.maximum(points[:, -1:] - points[:, :1], 1e-300)
    place = sums[0][:, 1:] / np.maximum(sums[0][:, -1:], 1e-300) + spread  # rising: half by mass, half by distance
    fine = np.concatenate(
        [_find(place, np.broadcast_to(np.arange(bins) * 2 / bins, (len(points), bins))), np.full((len(points), 1), points.shape[1])], 1
    )
    edges, step = np.empty((len(points), entries + 1), np.int64), max(1, _NEAR // bins**2)
    for k in range(0, len(points), step):
        now = slice(k, k + step)
        cuts = _best_cuts([np.take_along_axis(s[now], fine[now], 1) for s in sums], entries)
        edges[now] = np.take_along_axis(fine[now], cuts, 1)
    return _lloyd(points, sums, edges)


def _best_cuts(sums: Sequence[Array], entries: int) -> Array:
    """Where to cut bins into `entries` runs of least squared error, by dynamic programming: [rows, entries + 1], from 0 to the number of bins.

    Args:
        sums: mass, mass * x and mass * x^2 of all that lies before each edge of a bin, [rows, bins + 1].
    """
    held, first, second = (s[:, :, None] - s[:, None, :] for s in sums)  # [rows, j, i]: of the bins from i to j
    exact = second - first**2 / np.where(held > 0, held, 1)
    exact[:, *np.triu_indices(exact.shape[1], 1)] = np.inf
    cost = exact.astype(np.float32)
    least, came = cost[:, :, 0], list[Array]()
    for _ in range(entries - 1):
        every = cost + least[:, None, :]
        came.append(every.argmin(2))
        least = np.take_along_axis(every, came[-1][..., None], 2)[..., 0]
    cuts = [np.full((len(cost), 1), cost.shape[1] - 1)]
    for before in reversed(came):
        cuts.append(np.take_along_axis(before, cuts[-1], 1))
    return np.concatenate([np.zeros_like(cuts[0]), *reversed(cuts)], axis=1)


def _lloyd(points: Array, sums: Sequence[Array], edges: Array) -> Array:
    """Centres [rows, entries] after Lloyd's algorithm, from clusters of neighbours between `edges` [rows, entries + 1]."""
    for _ in range(_ROUNDS):
        held, total = (np.diff(np.take_along_axis(s, edges, 1), axis=1) for s in sums[:2])
        there = np.take_along_axis(points, np.minimum(edges[:, :-1], points.shape[1] - 1), 1)  # an empty cluster stands where it starts
        centres = np.where(held > 0, total / np.where(held > 0, held, 1), there)
        cuts = np.concatenate([edges[:, :1], _find(points, _middles(centres)), edges[:, -1:]], axis=1)
        if np.array_equal(cuts, edges):
            break
        edges = cuts
    return centres


def _find(rising: Array, values: Array) -> Array:
    """searchsorted in each row, int64 [rows, m]: the rows are laid behind each other."""
    low, count = rising[:, :1], rising.shape[1]
    span = np.maximum(rising[:, -1:] - low, 1e-300)
    shift = 2 * np.arange(len(rising))[:, None]
    flat = ((rising - low) / span + shift).ravel()
    wanted = np.clip((values - low) / span, -0.5, 1.5) + shift
    found: Array = np.clip(np.searchsorted(flat, wanted.ravel()).reshape(values.shape) - count * np.arange(len(rising))[:, None], 0, count)
    return found
