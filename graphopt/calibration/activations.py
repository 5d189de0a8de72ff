"""What flows into the multiplies with stored weights, observed on samples: ranges, and a bounded sample of rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analysis.linear import Linears
from graphopt.calibration.observe import Observed, Reducer
from graphopt.core.contract import Array, Context
from graphopt.run.observe import observable


@dataclasses.dataclass
class ActivationStats:
    """One tensor [..., features] over all samples, streamed: memory does not grow with their number.

    Attributes:
        high, low: the largest and smallest number of each feature, float64 [features]; 0 always counts.
        top, bottom: the same of all rows, padding too: what a scale that is made at run time covers.
        total: the sum over all rows, float64 [features].
        rows: float32 [n, features], n <= `limit`, spread evenly over every batch and over the batches.
        seen: the rows that there were.
        whole, each: sums over the rows of (step of the rounding / norm of the row) squared, for one 8-bit grid for the batch (padding
            too) and for a symmetric one for each row.
    """

    limit: int
    high: Array = dataclasses.field(default_factory=lambda: np.zeros(0))
    low: Array = dataclasses.field(default_factory=lambda: np.zeros(0))
    top: Array = dataclasses.field(default_factory=lambda: np.zeros(0))
    bottom: Array = dataclasses.field(default_factory=lambda: np.zeros(0))
    total: Array = dataclasses.field(default_factory=lambda: np.zeros(0))
    rows: Array = dataclasses.field(default_factory=lambda: np.zeros((0, 0), np.float32))
    seen: int = 0
    whole: float = 0.0
    each: float = 0.0

    def __call__(self, rows: Array, hidden: Array) -> None:
        """One batch: the rows that count, and those of padding."""
        rows, hidden = (x[np.isfinite(x).all(1)] for x in (rows, hidden))
        if not rows.size:
            return
        if not self.seen:
            self.high, self.low, self.top, self.bottom, self.total = (np.zeros(rows.shape[1]) for _ in range(5))
            self.rows = np.zeros((0, rows.shape[1]), np.float32)
        high, low = rows.max(0), rows.min(0)
        self.high, self.low = np.maximum(self.high, high), np.minimum(self.low, low)
        top, bottom = hidden.max(0, initial=-np.inf), hidden.min(0, initial=np.inf)
        top, bottom = np.maximum(top, high), np.minimum(bottom, low)
        self.top, self.bottom = np.maximum(self.top, top), np.minimum(self.bottom, bottom)
        self.total += rows.sum(0, dtype=np.float64)
        norms = np.square(rows.astype(np.float64)).sum(1)
        step = (max(float(top.max()), 0) - min(float(bottom.min()), 0)) / 255
        steps = 2 * np.abs(rows).max(1).astype(np.float64) / 255
        kept = norms > 0
        self.whole += float((step**2 / norms[kept]).sum())
        self.each += float((steps[kept] ** 2 / norms[kept]).sum())
        self._keep(rows)

    @property
    def mean(self) -> Array:
        """Of each feature over all rows, float64 [features]."""
        return self.total / max(self.seen, 1)

    @property
    def unevenness(self) -> float:
        """How many times larger the rounding error (root mean square, relative to each row) is with one grid for all than with one for each row."""
        return float(np.sqrt(self.whole / self.each)) if self.each else 1.0

    def _keep(self, rows: Array) -> None:
        """Each batch gets the share of the sample that its rows are of all rows so far."""
        self.seen += len(rows)
        share = max(1, round(self.limit * len(rows) / self.seen))
        stay = min(len(self.rows), self.limit - min(share, len(rows)))
        self.rows = np.concatenate([evenly(self.rows, stay), evenly(rows, share).astype(np.float32)])


@dataclasses.dataclass(frozen=True)
class LinearInputs(Observed[Mapping[ir.Value, ActivationStats]]):
    """The activation of every Linear of the main graph, by value.

    Needs samples; it runs the graph once over all of them.

    Args:
        limit: rows kept of each.
    """

    limit: int = 256

    def watch(self, model: ir.Model, ctx: Context) -> tuple[Sequence[Reducer], Callable[[], Mapping[ir.Value, ActivationStats]]]:
        ctx.require_samples()
        found = {x.x: ActivationStats(self.limit) for x in ctx.get(Linears(casts=True)) if observable(model, x.x) and not x.trans_x}
        reducers = [Reducer((value,), seen, hidden=True) for value, seen in found.items()]
        return reducers, lambda: {value: seen for value, seen in found.items() if seen.seen}


def evenly(rows: Array, count: int) -> Array:
    """`count` of the rows at most, evenly."""
    if len(rows) <= count:
        return rows
    picked: Array = rows[np.linspace(0, len(rows) - 1, count).astype(int)]
    return picked
