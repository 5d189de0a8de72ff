"""Least squares after removal: output projections take over, as far as they can, what the removed units contributed.

Block after block on the samples, each on what the pruned model really feeds it: min ||x W' + b' - y||^2, where y is what the unpruned model adds
to the residual stream there, corrected by what the stream has lost already (Kwon et al. 2022; for layers in sequence Frantar and Alistarh 2023).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analysis.linear import Linear, Linears
from graphopt.analysis.padding import Kept, Padding
from graphopt.core import Array, Context
from graphopt.graph import Names, consumers, initializer, is_constant, same_shape, used_once
from graphopt.run import Feeds
from graphopt.run.observe import limited
from graphopt.run.segments import Segments, State

_RIDGES = (1e-4, 1e-3, 1e-2, 0.1, 1.0)  # of the mean second moment, towards the old weights; chosen on what is held out
_HELD_OUT = 4  # one batch of so many; one row, where there are fewer batches


@dataclasses.dataclass(frozen=True)
class Fitted:
    """`before`, `after`: the relative error of what one projection gives, on the samples."""

    node: str
    before: float
    after: float


def refit(
    model: ir.Model, teacher: ir.Model, names: Sequence[str], samples: Iterable[Feeds], rows: int
) -> tuple[list[Fitted], list[tuple[str, str]]]:
    """Fit the multiplies of these names (they have them in both models), in graph order.

    Args:
        model: the pruned graph; its weights and biases are replaced.
        teacher: the graph before.
        rows: stop after the batch in which so many rows of activations were seen; they are held in memory, at the places where blocks begin.

    Returns:
        what was fitted, and (node, reason) for what was not.
    """
    old = {x.node.name: x for x in Linears().compute(teacher, Context(teacher))}
    new = {x.node.name: x for x in Linears().compute(model, Context(model))}
    order = [str(n.name) for n in model.graph if n.name in set(names)]
    refused = [(name, reason) for name in order if (reason := _unfit(model, new.get(name), old.get(name)))]
    order = [name for name in order if name not in dict(refused)]
    if not order:
        return [], refused
    pupil = _Progress(model, [new[name] for name in order])
    master = _Progress(teacher, [old[name] for name in order])
    pupil.begin(samples, rows)
    master.begin(pupil.feeds, rows)
    padding, fresh = Padding(teacher, [str(old[name].x.name) for name in order]), Names(model)
    kept = [padding.kept(feed) for feed in pupil.feeds]
    return [_fit(model, fresh, new[n], old[n], pupil.until(new[n]), master.until(old[n]), kept) for n in order], refused


def fit_behind(model: ir.Model, teacher: ir.Model, names: Sequence[str], ctx: Context, rows: int) -> None:
    """Refit these output projections, and say so."""
    ctx.invalidate()
    fitted, refused = refit(model, teacher, names, ctx.require_samples(), rows)
    for fit in fitted:
        ctx.remarks.applied(fit.node, f"refitted: error {fit.before:.4f} -> {fit.after:.4f}", before=fit.before, after=fit.after)
    for name, reason in refused:
        ctx.remarks.missed(name, f"not refitted: {reason}")


class _Progress:
    """A model on its way through the samples, all batches at one place; what is in front of it may no longer change."""

    def __init__(self, model: ir.Model, linears: Sequence[Linear]) -> None:
        self.segments = Segments(model, [str(x.node.outputs[0].name) for x in linears])
        self.here, self.states, self.feeds = 0, list[State](), list[Feeds]()

    def begin(self, samples: Iterable[Feeds], rows: int) -> None:
        for feed in limited(samples, rows):
            self.feeds.append(feed)
            self.states.append(self.segments.begin(feed))

    def until(self, linear: Linear) -> list[State]:
        """The values in front of a multiply, for every batch."""
        piece = self.segments.piece_of(str(linear.node.outputs[0].name))
        while self.here < piece:
            self.states = [self.segments.step(self.here, state) for state in self.states]
            self.here += 1
        return self.states


class _Sums:
    """What a least-squares fit of x [rows, in] @ W to y [rows, out] needs of the rows."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.moments, self.cross, self.squares = np.zeros((inputs, inputs)), np.zeros((inputs, outputs)), 0.0

    def add(self, x: Array, y: Array) -> None:
        self.moments += x.T @ x
        self.cross += x.T @ y
        self.squares += float(np.square(y, dtype=np.float64).sum())

    def __add__(self, other: _Sums) -> _Sums:
        total = _Sums(*self.cross.shape)
        total.moments, total.cross = self.moments + other.moments, self.cross + other.cross
        total.squares = self.squares + other.squares
        return total

    def solve(self, start: Array, ridge: float) -> Array:
        """The best W, drawn to `start` by a part of the mean second moment."""
        damp = ridge * max(float(np.trace(self.moments)) / len(self.moments), 1e-30)  # without any row the start is the answer
        found: Array = np.linalg.solve(self.moments + damp * np.eye(len(self.moments)), self.cross + damp * start)
        return found

    def error(self, w: Array) -> float:
        """|x W - y| / |y|"""
        rest = self.squares - 2 * float((w * self.cross).sum()) + float(((self.moments @ w) * w).sum())
        return float(np.sqrt(max(rest, 0.0) / max(self.squares, 1e-30)))


def _fit(model: ir.Model, names: Names, new: Linear, old: Linear, pupil: Sequence[State], master: Sequence[State], kept: Sequence[Kept]) -> Fitted:
    weight, bias = new.matrix().astype(np.float32), bias_of(new)
    start = (weight if bias is None else np.concatenate([weight, bias[None]])).astype(np.float64)
    fit, held = _Sums(*start.shape), _Sums(*start.shape)
    for number, (x, y) in enumerate(_rows(new, old, pupil, master, kept)):
        out = np.arange(number, number + len(x)) if len(pupil) < _HELD_OUT else np.full(len(x), number)
        out = out % _HELD_OUT == _HELD_OUT - 1
        fit.add(x[~out], y[~out])
        held.add(x[out], y[out])
    ridge = min(_RIDGES, key=lambda r: held.error(fit.solve(start, r)))
    whole = fit + held
    found = whole.solve(start, ridge)
    store(model, names, new, found if bias is None else found[:-1], None if bias is None else found[-1])
    return Fitted(str(new.node.name), whole.error(start), whole.error(found))


def _rows(new: Linear, old: Linear, pupil: Sequence[State], master: Sequence[State], kept: Sequence[Kept]) -> Iterator[tuple[Array, Array]]:
    """For each batch what the pruned multiply is fed, a one behind it where it has a bias, and what should come out; without padding."""
    target, then, biased = old.matrix().astype(np.float32), bias_of(old), bias_of(new) is not None
    stream = _stream(new), _stream(old)
    if None in stream or any(str(stream[0]) not in s for s in pupil) or any(str(stream[1]) not in s for s in master):
        stream = (None, None)
    for ours, theirs, batch in zip(pupil, master, kept, strict=True):
        fed = theirs[str(old.x.name)]
        lead = batch.lead(str(old.x.name), fed.shape)
        counts = slice(None) if lead is None else lead.reshape(-1)
        x = ours[str(new.x.name)].reshape(-1, new.in_features)[counts]
        y = fed.reshape(-1, len(target))[counts] @ target
        if biased:
            x = np.concatenate([x, np.ones((len(x), 1), x.dtype)], 1)
        if then is not None:
            y = y + then.astype(np.float32)
        if stream[0] is not None:
            y = y + (theirs[str(stream[1])] - ours[str(stream[0])]).reshape(-1, y.shape[-1])[counts]
        yield x, y


def bias_of(linear: Linear) -> Array | None:
    """[out], float64; a copy."""
    if linear.bias is None or linear.bias.const_value is None:
        return None
    return np.broadcast_to(linear.bias.const_value.numpy().reshape(-1), (linear.out_features,)).astype(np.float64)


def _stream(linear: Linear) -> str | None:
    """The other summand of the residual Add behind a projection, by name."""
    readers = consumers(linear.output)
    if len(readers) != 1 or readers[0].op_type != "Add" or readers[0].domain:
        return None
    other = next((v for v in readers[0].inputs if v is not None and v is not linear.output), None)
    return None if other is None or is_constant(other) or not same_shape(other, linear.output) else str(other.name)


def _unfit(model: ir.Model, new: Linear | None, old: Linear | None) -> str | None:
    if new is None or old is None or new.node.graph is not model.graph:
        return "its output projection is no multiply of the main graph with a stored float weight"
    if new.path and not new.quantized:
        return "its weight stands behind a Transpose; canonicalize folds it"
    return unfit(new)


def unfit(linear: Linear | None) -> str | None:
    """Why the columns or rows of a projection cannot be rewritten."""
    if linear is None:
        return "there is no projection"
    if linear.quantized or linear.weight.dtype != ir.DataType.FLOAT or linear.x.dtype != ir.DataType.FLOAT:
        return f"`{linear.node.name}` has no float32 weight; do this before quantizing"
    if linear.batch or linear.trans_x or linear.alpha != 1 or linear.beta != 1 or linear.addend is not None:
        return f"`{linear.node.name}` is not x @ W + b"
    if linear.bias is not None and linear.bias.const_value is not None and linear.bias.const_value.size != linear.out_features:
        return f"the bias of `{linear.node.name}` is one number for all outputs"
    if not used_once(linear.weight) or not all(used_once(n.outputs[0]) for n in linear.path):
        return f"the weight of `{linear.node.name}` is shared"
    return None


def store(model: ir.Model, names: Names, linear: Linear, weight: Array, bias: Array | None) -> None:
    """New contents for the weight; for the bias too, which is forked where others read it."""
    laid = weight.T if linear.transposed else weight
    linear.weight.const_value = ir.tensor(np.ascontiguousarray(laid, np.float32), name=linear.weight.name)
    old = linear.bias
    if bias is None or old is None or old.const_value is None:
        return
    array = np.ascontiguousarray(bias, np.float32).reshape(tuple(old.const_value.shape.numpy()))
    if used_once(old):
        old.const_value = ir.tensor(array, name=old.name)
        return
    new = initializer(array, names.fresh(f"{old.name}_refit"))
    model.graph.register_initializer(new)
    reader = linear.bias_node or linear.node
    reader.replace_input_with(next(k for k, v in enumerate(reader.inputs) if v is old), new)
