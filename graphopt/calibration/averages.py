"""Averages over the columns of heads: second moments, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from graphopt.calibration.enough import too_few
from graphopt.calibration.observe import Reducer, observe
from graphopt.calibration.padding import Layout, Paddings
from graphopt.core.contract import Array, Context
from graphopt.run.observe import Limited

Handle = tuple[ir.Value, str]
Total = Callable[[Array], Array]  # rows [rows, ..] -> the sum over them

_LEAST = 1e-6  # of the largest eigenvalue: what is smaller counts as this much, so that it can be divided by


class Averages:
    """Means over the samples that several blocks ask for, gathered in one run."""

    def __init__(self) -> None:
        self._asked: dict[Handle, _Mean] = {}

    def ask(self, value: ir.Value, key: str, total: Total, by: Layout | None = None) -> Handle:
        """The mean over the rows of `value`; the handle reads it afterwards.

        Args:
            total: rows -> the sum over them.
            by: how rows are read off the value, see `Reducer`.
        """
        self._asked.setdefault((value, key), _Mean(total, by))
        return value, key

    def run(self, ctx: Context, rows: int) -> None:
        """Raises SampleError if there was no sample."""
        if self._asked:
            reducers = [Reducer((value,), mean, mean.by) for (value, _), mean in self._asked.items()]
            observe(ctx.model, Limited(ctx.require_samples(), rows), ctx.get(Paddings()), reducers)

    def too_few(self, *handles: Handle) -> str | None:
        """Why nothing is fitted to these, after `run`; see `enough.too_few`."""
        means = [self._asked[handle] for handle in handles]
        return next((why for mean in means if (why := too_few(mean.count, (1, *mean.sum.shape)[-1])) is not None), None)

    def __getitem__(self, handle: Handle) -> Array:
        mean = self._asked[handle]
        return mean.sum / max(mean.count, 1)


class _Mean:
    def __init__(self, total: Total, by: Layout | None) -> None:
        self.total, self.by, self.count = total, by, 0
        self.sum = np.zeros(())

    def __call__(self, rows: Array) -> None:
        self.sum = self.sum + self.total(rows)
        self.count += len(rows)


def moments(columns: Array, means: bool = False) -> Total:
    """The sum of x x^T, float64 [blocks, n, n], for each row of `columns` [blocks, n] of the last axis; with `means` of x and a one behind it."""

    def total(array: Array) -> Array:
        rows = array[:, columns].transpose(1, 0, 2)
        if means:
            rows = np.concatenate([rows, np.ones((*rows.shape[:2], 1), rows.dtype)], 2)
        return np.asarray((rows.transpose(0, 2, 1) @ rows).astype(np.float64))

    return total


def squares(rows: Array) -> Array:
    """The sum of x^2, float64 [heads, dim], of what `HeadOperand.by_head` gives."""
    return np.asarray(np.square(rows, dtype=np.float64).sum(0))


def centered(moment: Array) -> Array:
    """The covariance from what `moments` with `means` gives for one block. A softmax does not see what all keys have in common."""
    mean = moment[:-1, -1]
    return np.asarray(moment[:-1, :-1] - np.outer(mean, mean))


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
