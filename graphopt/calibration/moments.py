"""Second moments of activations on samples: the Hessian of a layer's squared output error, for GPTQ and pruning by reconstruction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.calibration.padding import Padding
from graphopt.core.contract import Array
from graphopt.graph.questions import static_dim
from graphopt.run import Feeds
from graphopt.run.observe import Reducer, observe

BYTES = 512 * 2**20  # of sums that are held at a time; more means another run over the samples


def input_moments(model: ir.Model, samples: Iterable[Feeds], values: Sequence[ir.Value], *, limit: int = BYTES) -> Iterator[tuple[ir.Value, Array]]:
    """For each value [..., K] the mean of x x^T over its rows, float32 [K, K]; as many values in one run over the samples as fit `limit`.

    Rows of padding are left out.

    Args:
        samples: iterated once for each group of values.
        values: of the main graph (`observable`), float, with a known last axis; a value that had no row gives zeros.
        limit: bytes of sums that are held at a time; one value at least.

    Raises:
        SampleError: there was no sample.
    """
    group: list[ir.Value] = []
    size, padding = 0, Padding(model, [str(v.name) for v in values])
    for value in values:
        need = 4 * _width(value) ** 2
        if group and size + need > limit:
            yield from _observed(model, samples, group, padding)
            group, size = [], 0
        group.append(value)
        size += need
    if group:
        yield from _observed(model, samples, group, padding)


def _observed(model: ir.Model, samples: Iterable[Feeds], group: Sequence[ir.Value], padding: Padding) -> Iterator[tuple[ir.Value, Array]]:
    sums = [np.zeros((_width(v), _width(v)), np.float32) for v in group]
    counts = [0] * len(group)

    def reducer(k: int) -> Reducer:
        def add(array: Array) -> None:
            rows = padding.now.rows(str(group[k].name), array)
            sums[k] += rows.T @ rows
            counts[k] += len(rows)

        return add

    observe(model, padding.watch(samples), {value: reducer(k) for k, value in enumerate(group)})
    for k, value in enumerate(group):
        yield value, sums[k] / np.float32(max(counts[k], 1))


def _width(value: ir.Value) -> int:
    width = static_dim(value, -1)
    assert width is not None, f"`{value.name}` has no known last axis"
    return width
