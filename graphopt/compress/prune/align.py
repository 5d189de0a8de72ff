"""Heads that become one: the best common query, key and value of several heads, from second moments on the samples.

Notation: q, k, v are the features of all heads that are merged, one head after another [n]; a turn A [n, d] makes the features A^T q of one head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt.calibration.averages import leading, root
from graphopt.core.contract import Array
from graphopt.graph.questions import attr


@dataclasses.dataclass(frozen=True)
class Planes:
    """How the features of a head may be turned: `pairs` int64 [pairs, 2] (real, imaginary) only as complex numbers, `free` int64 [m] at will."""

    pairs: Array
    free: Array


def planes_of(rotary: ir.Node | None, dim: int) -> Planes:
    """A rotary embedding commutes with complex factors of its pairs, and with nothing else."""
    if rotary is None:
        return Planes(np.zeros((0, 2), np.int64), np.arange(dim))
    size = int(attr(rotary, "rotary_embedding_dim", 0)) or dim
    turned = np.arange(size)
    pairs = turned.reshape(-1, 2) if attr(rotary, "interleaved", 0) else turned.reshape(2, -1).T
    return Planes(pairs, np.arange(size, dim))


def scores(query: Array, key: Array, planes: Planes, dim: int) -> tuple[Array, Array]:
    """Turns A, B [n, dim] such that (A^T q) . (B^T k) is nearest to q . k in the mean square over independent q and k.

    k^T q = (K^-1/2 k)^T K^1/2 Q^1/2 (Q^-1/2 q): the leading singular vectors of K^1/2 Q^1/2.

    Args:
        query, key: Q = E[q q^T] and K, float64 [n, n], of n / dim heads.
    """
    heads = len(query) // dim
    offsets: Array = np.arange(heads) * dim
    turns = np.zeros((len(query), dim)), np.zeros((len(query), dim))
    free = (offsets[:, None] + planes.free).reshape(-1)
    if len(planes.free):
        for turn, found in zip(turns, _product(query[np.ix_(free, free)], key[np.ix_(free, free)], len(planes.free)), strict=True):
            turn[np.ix_(free, planes.free)] = found
    for real, imaginary in planes.pairs:
        a, b = offsets + real, offsets + imaginary
        for turn, (factor,) in zip(turns, (f.T for f in _product(_complex(query, a, b), _complex(key, a, b), 1)), strict=True):
            turn[a, real], turn[b, real] = factor.real, factor.imag
            turn[a, imaginary], turn[b, imaginary] = -factor.imag, factor.real
    return turns


def _complex(moment: Array, a: Array, b: Array) -> Array:
    """E[z z^H] of z = x_a + i x_b."""
    real = moment[np.ix_(a, a)] + moment[np.ix_(b, b)]
    return np.asarray(real + 1j * (moment[np.ix_(b, a)] - moment[np.ix_(a, b)]))


def _product(query: Array, key: Array, rank: int) -> tuple[Array, Array]:
    (half_q, inverse_q), (half_k, inverse_k) = root(query), root(key)
    u, s, vh = np.linalg.svd(half_k @ half_q)
    weight = np.sqrt(s[:rank])
    return inverse_q @ vh.conj().T[:, :rank] * weight, inverse_k @ u[:, :rank] * weight


def values(moment: Array, squares: Array, rank: int) -> tuple[Array, Array, float]:
    """A turn A [n, rank] and what undoes it, B [rank, n]: B^T A^T v is nearest to v where W reads it, `squares` = W W^T, `moment` = E[v v^T].

    Returns:
        A, B, and the fraction of E||v W||^2 that is lost.
    """
    half, inverse = root(moment)
    basis, lost = leading(half @ squares @ half, rank)
    return inverse @ basis, basis.T @ half, lost


def linked(distance: Array, energy: Array) -> list[tuple[float, int, int]]:
    """Average-linkage clustering of heads, cheapest first: (cost, kept, merged into it), by the least member of each cluster.

    Two clusters cost their mean distance times E_a E_b / (E_a + E_b), as Ward's criterion does for means of weighted points.

    Args:
        distance: [heads, heads]; energy: [heads], what each contributes.
    """
    clusters = {h: [h] for h in range(len(energy))}
    steps = []
    while len(clusters) > 1:
        cost, a, b = min((_linkage(distance, energy, clusters[a], clusters[b]), a, b) for a in clusters for b in clusters if a < b)
        clusters[a] += clusters.pop(b)
        steps.append((cost, a, b))
    return steps


def _linkage(distance: Array, energy: Array, a: Sequence[int], b: Sequence[int]) -> float:
    first, second = float(energy[a].sum()), float(energy[b].sum())
    return float(distance[np.ix_(a, b)].mean()) * first * second / max(first + second, 1e-300)


def balanced(cost: Array, groups: int) -> list[list[int]]:
    """Heads in `groups` of equal size with a small sum of `cost` [heads, heads] inside: greedy, then swaps while they help."""
    size, left, found = len(cost) // groups, list(range(len(cost))), []
    while left:
        group = [left.pop(0)]
        while len(group) < size:
            nearest = min(left, key=lambda h: float(cost[h, group].sum()))
            left.remove(nearest)
            group.append(nearest)
        found.append(group)
    while _swap(cost, found):
        pass
    return [sorted(group) for group in found]


def _swap(cost: Array, groups: list[list[int]]) -> bool:
    for i, a in enumerate(groups):
        for b in groups[i + 1 :]:
            for x in range(len(a)):
                for y in range(len(b)):
                    rest_a, rest_b = [h for h in a if h != a[x]], [h for h in b if h != b[y]]
                    now = cost[a[x], rest_a].sum() + cost[b[y], rest_b].sum()
                    if cost[b[y], rest_a].sum() + cost[a[x], rest_b].sum() < now - 1e-12:
                        a[x], b[y] = b[y], a[x]
                        return True
    return False
