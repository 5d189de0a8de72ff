"""Second moments of activations on samples: the Hessian of a layer's squared output error, for GPTQ and pruning by reconstruction."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analysis.padding import Padding
from graphopt.core import Array
from graphopt.errors import SampleError
from graphopt.graph import static_dim
from graphopt.run import Feeds
from graphopt.run.observe import Reducer, exposed, observe

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


@dataclasses.dataclass(frozen=True)
class Paired:
    """Means over the rows of x [rows, K] in one model and of z, the same value in another: x^T x, x^T z and z^T z, each float64 [K, K].

    `drift` [K, H]: x^T (t - s), where s [rows, H] is a second value of the one and t that of the other model.
    """

    own: Array
    cross: Array
    other: Array
    drift: Array | None = None


def paired_moments(model: ir.Model, other: ir.Model, samples: Iterable[Feeds], value: str, second: str | None = None) -> Paired:
    """How a value [.., K] of `model` and the one of this name in `other` go together; one run of both over the samples, without padding.

    Args:
        value, second: names of values in the main graphs of both; `second` has the same rows.

    Raises:
        SampleError: there was no sample.
    """
    from graphopt.run import ort

    given = {str(v.name) for v in model.graph.inputs}
    names = [n for n in dict.fromkeys((value, second)) if n is not None]
    shown = [n for n in names if n not in given]
    sessions = [ort.session(exposed(m, shown)) for m in (model, other)] if shown else []
    sums: list[Array] = []
    count, padding = 0, Padding(other, [value])
    for feed in padding.watch(samples):
        runs = [session.run(feed) for session in sessions] or [{}, {}]
        (x, *s), (z, *t) = ([padding.now.rows(value, feed[n] if n in given else run[n]) for n in names] for run in runs)
        pairs = [(x, x), (x, z), (z, z), *((x, b - a) for a, b in zip(s, t, strict=True))]
        parts = [(a.T @ b).astype(np.float64) for a, b in pairs]
        sums = [total + part for total, part in zip(sums, parts, strict=True)] if sums else parts
        count += len(x)
    if not sums:
        raise SampleError("calibration gave 0 samples: the source is empty, or a generator that was used before")
    return Paired(*(total / max(count, 1) for total in sums))


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
