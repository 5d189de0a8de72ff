"""GPTQ: round one column after the other, and let the columns that are still float take up the error of those that are not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np

from graphopt.core.contract import Array

_PANEL = 128  # columns that are rounded before the rest of the matrix hears of it
_DAMPING = 0.01  # of the mean of the diagonal


class ColumnGrid(Protocol):
    """What the numbers of a weight may become."""

    def columns(self, order: Array) -> Callable[[int, Array], tuple[Array, Array]]:
        """(j, column order[j] of all rows) -> its nearest codes, and what they stand for."""
        ...


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What GPTQ wants to know of the inputs of a layer, made once for all weights that read them.

    Attributes:
        order: the columns by falling second moment.
        root: upper triangular [in, in] in that order, root^T root = (moments + damping)^-1.
    """

    order: Array
    root: Array

    @classmethod
    def of(cls, moments: Array) -> Inputs:
        """`moments` [in, in]: sum or mean of x x^T over the samples."""
        order = np.argsort(-np.diag(moments), kind="stable")
        return cls(order, _inverse_root(moments[np.ix_(order, order)]))


def gptq(rows: Array, inputs: Inputs, grid: ColumnGrid) -> Array:
    """Codes int16 [rows, in] that keep rows @ x near what it was, for inputs x with these second moments.

    Columns are taken in the order of falling moments, with the scales of the original weight (Frantar et al. 2022, "GPTQ: Accurate
    Post-Training Quantization for Generative Pre-trained Transformers", with static groups).

    Args:
        rows: [rows, in].
        inputs: of the samples.
        grid: of `rows`.
    """
    width = rows.shape[1]
    order, inverse = inputs.order, inputs.root
    nearest = grid.columns(order)
    left = np.ascontiguousarray(rows[:, order].T, dtype=np.float32)  # [in, rows]: a column of the weight lies together
    codes = np.empty(left.shape, np.int16)
    for start in range(0, width, _PANEL):
        end = min(start + _PANEL, width)
        errors = np.empty((end - start, left.shape[1]), np.float32)
        for j in range(start, end):
            codes[j], decoded = nearest(j, left[j])
            errors[j - start] = (left[j] - decoded) / inverse[j, j]
            left[j + 1 : end] -= np.outer(inverse[j, j + 1 : end], errors[j - start])
        left[end:] -= inverse[start:end, end:].T @ errors
    restored = np.empty_like(codes)
    restored[order] = codes
    return np.ascontiguousarray(restored.T)


def _inverse_root(moments: Array) -> Array:
    """The upper U with U^T U = (moments + damping)^-1; inputs that the samples never use count as independent."""
    damped = moments.astype(np.float64)
    diagonal = np.einsum("kk->k", damped)  # a view
    diagonal[diagonal <= 0] = 1
    diagonal += _DAMPING * diagonal.mean()
    lower = np.linalg.inv(np.linalg.cholesky(damped))
    upper: Array = np.linalg.cholesky(lower.T @ lower).T
    return np.ascontiguousarray(upper, dtype=np.float32)
