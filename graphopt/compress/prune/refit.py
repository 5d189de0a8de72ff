"""Least squares after removal: output projections take over, as far as they can, what the removed units contributed.

Block after block on the samples, each on what the pruned model really feeds it: min ||x W' + b' - y||^2, where y is what the unpruned model adds
to the residual stream there, corrected by what the stream has lost already (Kwon et al. 2022; for layers in sequence Frantar and Alistarh 2023).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analysis.linear import Linear, Linears, bias_of
from graphopt.calibration.enough import too_few
from graphopt.calibration.pair import LeastSquares, Meeting, Pair
from graphopt.compress.weights import store, unfit
from graphopt.core.contract import Array, Context
from graphopt.core.errors import SampleError
from graphopt.graph.interface import RESIZED
from graphopt.graph.questions import Names
from graphopt.run import Feeds

_RIDGES = (1e-4, 1e-3, 1e-2, 0.1, 1.0)  # of the mean second moment, towards the old weights; chosen on what is held out
_HELD_OUT = 4  # one batch of so many; one row, where there are fewer batches


def fit_behind(model: ir.Model, teacher: ir.Model, names: Sequence[str], ctx: Context, rows: int) -> None:
    """Fit the multiplies of these names (they have them in both models), in graph order, and say so.

    Args:
        model: the pruned graph; its weights and biases are replaced.
        teacher: the graph before.
        rows: stop after the batch in which so many rows of activations were seen; they are held in memory, at the places where blocks begin.
    """
    ctx.invalidate()
    samples = ctx.require_samples()
    for feed in samples:
        _check_caches(model, feed)
    old = {x.node.name: x for x in Linears().compute(teacher, Context(teacher))}
    new = {x.node.name: x for x in Linears().compute(model, Context(model))}
    order = [str(n.name) for n in model.graph if n.name in set(names)]
    refused = {name: reason for name in order if (reason := _unfit(model, new.get(name), old.get(name)))}
    order = [name for name in order if name not in refused]
    if order:
        pair, fresh = Pair(model, teacher, samples, [old[name] for name in order], rows), Names(model)
        for name in order:
            fitted = _fit(model, fresh, new[name], old[name], pair.at(new[name], old[name]))
            if isinstance(fitted, str):
                refused[name] = fitted
                continue
            before, after = fitted
            ctx.remarks.applied(name, f"refitted: error {before:.4f} -> {after:.4f}", before=before, after=after)
    for name, reason in refused.items():
        ctx.remarks.missed(name, f"not refitted: {reason}")


def _check_caches(model: ir.Model, feed: Feeds) -> None:
    """Raises SampleError where samples fill a cache whose heads are others by now; an empty one fits in any size."""
    for name in model.graph.meta.get(RESIZED, ()):
        array = feed.get(name)
        value = next((v for v in model.graph.inputs if v.name == name), None)
        sizes = () if value is None or value.shape is None else tuple(value.shape)
        if isinstance(array, np.ndarray) and array.size and any(isinstance(d, int) and d != n for d, n in zip(sizes, array.shape, strict=True)):
            text = f"the samples feed `{name}` as {list(array.shape)}, and it has become {list(map(str, sizes))}"
            raise SampleError(f"{text}, to which nothing can be refitted; give samples with an empty `{name}`, or refit=false")


def _fit(model: ir.Model, names: Names, new: Linear, old: Linear, met: Meeting) -> tuple[float, float] | str:
    """The relative error of what the projection gives on the samples, before and after; or why it stays."""
    weight, bias = new.matrix().astype(np.float32), bias_of(new)
    start = (weight if bias is None else np.concatenate([weight, bias[None]])).astype(np.float64)
    fit, held = (LeastSquares(np.zeros((len(start), len(start))), np.zeros(start.shape)) for _ in range(2))
    seen = 0
    for number, (x, y) in enumerate(_rows(old, met, biased=bias is not None)):
        out = np.arange(number, number + len(x)) if len(met) < _HELD_OUT else np.full(len(x), number)
        out = out % _HELD_OUT == _HELD_OUT - 1
        fit.add(x[~out], y[~out])
        held.add(x[out], y[out])
        seen += len(x)
    few = too_few(seen, new.in_features)
    if few is not None:
        return few
    ridge = min(_RIDGES, key=lambda r: held.error(fit.solve(start, r)))
    whole = fit + held
    found = whole.solve(start, ridge)
    store(model, names, new, found if bias is None else found[:-1], None if bias is None else found[-1])
    return whole.error(start), whole.error(found)


def _rows(old: Linear, met: Meeting, *, biased: bool) -> Iterator[tuple[Array, Array]]:
    """For each batch what the pruned multiply is fed, a one behind it where it has a bias, and what should come out."""
    target, then = old.matrix().astype(np.float32), bias_of(old)
    for x, z, drift in met:
        y = z @ target
        if biased:
            x = np.concatenate([x, np.ones((len(x), 1), x.dtype)], 1)
        if then is not None:
            y = y + then.astype(np.float32)
        yield x, y if drift is None else y + drift


def _unfit(model: ir.Model, new: Linear | None, old: Linear | None) -> str | None:
    if new is None or old is None or new.node.graph is not model.graph:
        return "its output projection is no multiply of the main graph with a stored float weight"
    if new.path and not new.quantized:
        return "its weight stands behind a Transpose; canonicalize folds it"
    return unfit(new)
