"""Averages over the columns of heads: second moments, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import onnx_ir as ir

from graphopt.analysis.projections import HeadOperand
from graphopt.calibration.padding import Padding
from graphopt.core.contract import Array
from graphopt.run import Feeds
from graphopt.run.observe import limited, observe

_LEAST = 1e-6  # of the largest eigenvalue: what is smaller counts as this much, so that it can be divided by


class Averages:
    """Means over the samples that several blocks ask for, gathered in one run."""

    def __init__(self) -> None:
        self._asked: dict[ir.Value, list[tuple[str, Callable[[Array], tuple[Array, int]]]]] = {}
        self._sums: dict[tuple[ir.Value, str], Array] = {}
        self._counts: dict[tuple[ir.Value, str], int] = {}

    def ask(self, value: ir.Value, key: str, reduce: Callable[[Array], tuple[Array, int]]) -> tuple[ir.Value, str]:
        """`reduce`: a batch -> (sum, rows); the handle reads the mean afterwards."""
        asked = self._asked.setdefault(value, [])
        if key not in (k for k, _ in asked):
            asked.append((key, reduce))
        return value, key

    def run(self, model: ir.Model, samples: Iterable[Feeds], rows: int) -> None:
        """Raises SampleError if there was no sample."""

        padding = Padding(model, [str(v.name) for v in self._asked])

        def reducer(value: ir.Value) -> Callable[[Array], None]:
            def add(array: Array) -> None:
                if array.ndim == 3:
                    array = padding.now.rows(str(value.name), array)[None]
                for key, reduce in self._asked[value]:
                    total, count = reduce(array)
                    self._sums[value, key] = self._sums.get((value, key), np.zeros(())) + total
                    self._counts[value, key] = self._counts.get((value, key), 0) + count

            return add

        if self._asked:
            observe(model, padding.watch(limited(samples, rows)), {value: reducer(value) for value in self._asked})

    def __getitem__(self, handle: tuple[ir.Value, str]) -> Array:
        return self._sums[handle] / max(self._counts[handle], 1)


def moments(columns: Array, means: bool = False) -> Callable[[Array], tuple[Array, int]]:
    """E[x x^T], float64 [blocks, n, n], for each row of `columns` [blocks, n] of the last axis; with `means` of x and a one behind it."""

    def reduce(array: Array) -> tuple[Array, int]:
        rows = array.reshape(-1, array.shape[-1])[:, columns].transpose(1, 0, 2)
        if means:
            rows = np.concatenate([rows, np.ones((*rows.shape[:2], 1), rows.dtype)], 2)
        return (rows.transpose(0, 2, 1) @ rows).astype(np.float64), rows.shape[1]

    return reduce


def centered(moment: Array) -> Array:
    """The covariance from what `moments` with `means` gives for one block. A softmax does not see what all keys have in common."""
    mean = moment[:-1, -1]
    return np.asarray(moment[:-1, :-1] - np.outer(mean, mean))


def squares(operand: HeadOperand) -> Callable[[Array], tuple[Array, int]]:
    """E[x^2], float64 [heads, dim]."""

    def reduce(array: Array) -> tuple[Array, int]:
        rows = operand.by_head(array)
        return np.square(rows, dtype=np.float64).sum(0), len(rows)

    return reduce


def root(moment: Array) -> tuple[Array, Array]:
    """The symmetric square root of a moment matrix, and its inverse."""
    values, vectors = np.linalg.eigh(moment)
    values = np.sqrt(np.maximum(values, max(_LEAST * float(values[-1]), 1e-30)))
    return (vectors * values) @ vectors.conj().T, (vectors / values) @ vectors.conj().T


def leading(matrix: Array, rank: int) -> tuple[Array, float]:
    """The first eigenvectors [n, rank] of a positive matrix, and the fraction of its trace that the others hold."""
    values, vectors = np.linalg.eigh(matrix)
    kept = float(values[len(values) - rank :].sum())
    return vectors[:, ::-1][:, :rank], max(0.0, 1 - kept / max(float(values.sum()), 1e-300))
