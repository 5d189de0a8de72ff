"""Second moments of activations on samples: the Hessian of a layer's squared output error, for GPTQ and pruning by reconstruction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from graphopt.calibration.enough import too_few
from graphopt.calibration.observe import Reducer, observe
from graphopt.calibration.padding import Paddings
from graphopt.core.contract import Array, Context
from graphopt.graph.questions import static_dim
from graphopt.run.observe import Limited

T = TypeVar("T")
BYTES = 512 * 2**20  # of sums that are held at a time; more means another run over the samples


def input_moments(
    ctx: Context, values: Sequence[ir.Value], *, rows: int | None = None, limit: int = BYTES, ranks: bool = False
) -> Iterator[tuple[ir.Value, Array | str]]:
    """For each value [..., K] the mean of x x^T over its rows, float32 [K, K], or why they are too few (`too_few`).

    As many values are observed in one run over the samples as fit `limit`.

    Rows of padding are left out. Nothing is cached, as the sums are as large as the weights.

    Args:
        values: of the main graph (`observable`), float, with a known last axis.
        rows: stop after the batch in which so many rows (tokens) were seen.
        limit: bytes of sums that are held at a time; one value at least.
        ranks: ranks or errors will be read off them.

    Raises:
        SampleError: there was no sample.
    """
    ctx.get(Paddings()).about(str(v.name) for v in values)  # of all groups, in one trial
    for group in within(values, lambda value: 4 * _width(value) ** 2, limit):
        yield from _observed(ctx, group, rows, ranks)


def within(things: Sequence[T], size: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Neighbours in groups whose sizes stay within `limit` together; one thing at least."""
    group, total = list[T](), 0
    for thing in things:
        if group and total + size(thing) > limit:
            yield group
            group, total = [], 0
        group.append(thing)
        total += size(thing)
    if group:
        yield group


class _Moment:
    """The mean of x x^T."""

    def __init__(self, width: int) -> None:
        self.total, self.count = np.zeros((width, width), np.float32), 0

    def __call__(self, rows: Array) -> None:
        self.total += rows.T @ rows
        self.count += len(rows)


def _observed(ctx: Context, group: Sequence[ir.Value], rows: int | None, ranks: bool) -> Iterator[tuple[ir.Value, Array | str]]:
    sums, samples = {value: _Moment(_width(value)) for value in group}, ctx.require_samples()
    taken = samples if rows is None else Limited(samples, rows)
    observe(ctx.model, taken, ctx.get(Paddings()), [Reducer((value,), moment) for value, moment in sums.items()])
    for value, moment in sums.items():
        yield value, too_few(moment.count, _width(value), ranks=ranks) or moment.total / np.float32(moment.count)


def _width(value: ir.Value) -> int:
    width = static_dim(value, -1)
    assert width is not None, f"`{value.name}` has no known last axis"
    return width
