"""The one observation of samples: a graph runs over them once, and every statistic that was asked for gets the rows that are no padding."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir

from graphopt.calibration.padding import Kept, Layout, Padding, Paddings
from graphopt.core.contract import Analysis, Array, Context
from graphopt.run import Feeds
from graphopt.run.observe import shown

Facts = TypeVar("Facts")


@dataclasses.dataclass(frozen=True)
class Reducer:
    """What is made of some values of the main graph, batch after batch.

    Attributes:
        values: those of one batch have the same rows; which of them count is asked of the first.
        add: called once a batch, with an array [rows, ..] for each of `values`.
        by: how rows are read off an array; by default it is [.., K], and the rows are float32 [rows, K].
        hidden: `add` is given the rows of padding as well, behind those that count: what sets a scale at run time sees them, too.
    """

    values: tuple[ir.Value, ...]
    add: Callable[..., None]
    by: Layout | None = None
    hidden: bool = False

    def take(self, kept: Kept, arrays: Sequence[Array]) -> None:
        """One batch."""
        counts = kept.counts(str(self.values[0].name), arrays[0].shape, self.by)
        rows = [_flat(x) if self.by is None else self.by(x) for x in arrays]
        shown = rows if counts is None else [x[counts] for x in rows]
        self.add(*shown, *((x[:0] if counts is None else x[~counts] for x in rows) if self.hidden else ()))


def observe(model: ir.Model, samples: Iterable[Feeds], padding: Padding, reducers: Iterable[Reducer], *, optimize: bool = True) -> int:
    """Hand every batch to the reducers, without padding; they share one run over the samples.

    Args:
        padding: of `model`.
        optimize: False switches the runtime's own optimizations off.

    Returns:
        the number of samples.

    Raises:
        SampleError, GraphoptError, TargetError: as `shown`.
    """
    reducers, count = list(reducers), 0
    padding.about(str(r.values[0].name) for r in reducers)
    for feed, arrays in shown(model, [v for r in reducers for v in r.values], samples, optimize=optimize):
        kept = padding.kept(feed)
        for reducer in reducers:
            reducer.take(kept, [arrays[v] for v in reducer.values])
        count += 1
    return count


class Observed(Analysis[Facts]):
    """Facts about values on the samples of the Context. `together` computes several in one run."""

    @abstractmethod
    def watch(self, model: ir.Model, ctx: Context) -> tuple[Sequence[Reducer], Callable[[], Facts]]:
        """What reduces the samples, and how the facts are read afterwards."""

    def compute(self, model: ir.Model, ctx: Context) -> Facts:
        facts: Facts = _facts(model, ctx, [self])[0]
        return facts


def together(ctx: Context, *analyses: Observed[Any]) -> None:
    """Have `ctx` know these, out of one run over the samples.

    Raises:
        SampleError: there are no samples.
    """
    new = [a for a in analyses if not ctx.knows(a)]
    for analysis, facts in zip(new, _facts(ctx.model, ctx, new), strict=True):
        ctx.put(analysis, facts)


def _facts(model: ir.Model, ctx: Context, analyses: Sequence[Observed[Any]]) -> list[Any]:
    watched = [a.watch(model, ctx) for a in analyses]
    reducers = [r for wanted, _ in watched for r in wanted]
    if reducers:
        observe(model, ctx.require_samples(), ctx.get(Paddings()), reducers)
    return [facts() for _, facts in watched]


def _flat(array: Array) -> Array:
    return array.reshape(-1, array.shape[-1]).astype(np.float32, copy=False)
