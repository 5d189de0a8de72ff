"""Where the magnitude of activation channels can move into weights, and how much of it should."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analysis.linear import Linear
from graphopt.calibration.activations import ActivationStats
from graphopt.core.contract import Array
from graphopt.graph.questions import consumers, is_constant, producer, static_dim, used_once

GRID = tuple(k / 8 for k in range(1, 8))
_NORMS = ("LayerNormalization", "RMSNormalization")
_GAIN = 0.98  # a smaller improvement of the error is within what the sampled rows tell
_MULTIPLY_GAIN = 0.9  # and this is what a multiplication at run time must be worth
_NO_SOURCE = "no norm with stored scale, or gate behind a stored weight, makes its input"


@dataclasses.dataclass(frozen=True)
class ChannelGroup:
    """`x` is divided channel by channel where `source` makes it (a norm, or the Linear before a gate), and all its readers multiply back.

    Without a source others read x, too, or its channels cannot be scaled where it is made: a multiplication in front of `readers` divides it,
    unless they are `stiff`.

    Attributes:
        reason: why there is no source.
        stiff: the readers cannot take a factor for each channel.
    """

    x: ir.Value
    source: ir.Node | Linear | None
    readers: tuple[Linear, ...]
    reason: str = ""
    stiff: bool = False


def groups(linears: Sequence[Linear]) -> list[ChannelGroup]:
    """One for each input, also where nothing can be divided."""
    by_input: dict[ir.Value, list[Linear]] = {}
    for linear in linears:
        by_input.setdefault(linear.x, []).append(linear)
    by_output = {linear.output: linear for linear in linears}
    found: list[ChannelGroup] = []
    for x, readers in by_input.items():
        stiff = _why_not(readers)
        alone = not x.is_graph_output() and {r.node for r in readers} == set(consumers(x))
        source = _source(x, by_output) if alone and stiff is None else None
        why = _NO_SOURCE if alone else f"`{x.name}` is read by more than multiplies with stored weights"
        found.append(ChannelGroup(x, source, tuple(readers), stiff or ("" if source is not None else why), stiff is not None))
    return found


def scales(group: ChannelGroup, seen: ActivationStats, strength: float | None, rows: bool) -> tuple[Array, float, float, float]:
    """The power of two for each channel, the strength, and the relative output error before and after.

    `strength` None: searched over GRID against the error of the quantized output on the sampled rows. One scale for all rows is made at run time,
    where rows of padding set it, too.
    """
    weights = [w.matrix().astype(np.float32) for w in group.readers]
    bases = [seen.rows @ w for w in weights]
    high, low = (seen.high, seen.low) if rows else (seen.top, seen.bottom)
    magnitude = np.maximum(high, -low)
    largest = np.max([np.abs(w).max(1) for w in weights], axis=0)
    plain = np.ones(len(magnitude), np.float32)
    before = _error(seen, weights, bases, plain, rows)
    gain = _GAIN if group.source is not None else _MULTIPLY_GAIN
    best = (plain, 0.0, before * gain if strength is None or group.source is None else np.inf)
    for a in GRID if strength is None else (strength,):
        s = _powers(magnitude, largest, a)
        after = _error(seen, weights, bases, s, rows)
        if after < best[2]:
            best = (s, a, after)
    return best[0], best[1], before, best[2]


def _powers(magnitude: Array, largest: Array, a: float) -> Array:
    """max|x|^a / max|w|^(1-a) around 1, as powers of two, by which floats multiply without rounding."""
    alive = (magnitude > 0) & (largest > 0)
    exponent = np.zeros(len(magnitude))
    exponent[alive] = a * np.log2(magnitude[alive]) - (1 - a) * np.log2(largest[alive])
    if alive.any():
        exponent[alive] -= np.median(exponent[alive])
    powers: Array = np.exp2(np.clip(np.rint(exponent), -16, 16)).astype(np.float32)
    return powers


def _error(seen: ActivationStats, weights: Sequence[Array], bases: Sequence[Array], s: Array, rows: bool) -> float:
    """Root mean square over rows and multiplies of ||y - quantized y|| / ||y||: weights int8 per channel, activations 8 bit."""
    x = seen.rows / s
    if rows:
        step = np.maximum(2 * np.abs(x).max(1, keepdims=True) / 255, np.finfo(np.float32).tiny)
    else:
        width = max(float((seen.top / s).max()), 0) - min(float((seen.bottom / s).min()), 0)
        step = np.maximum(np.float32(width / 255), np.finfo(np.float32).tiny)
    coarse = (np.rint(x / step) * step).astype(np.float32)
    total = 0.0
    for weight, base in zip(weights, bases, strict=True):
        moved = weight * s[:, None]
        grid = np.maximum(np.abs(moved).max(0) / 127, np.finfo(np.float32).tiny)
        off = coarse @ (np.rint(moved / grid) * grid).astype(np.float32) - base
        norms = np.square(base).sum(1)
        kept = norms > 0
        total += float((np.square(off).sum(1)[kept] / norms[kept]).mean()) if kept.any() else 0.0
    return float(np.sqrt(total / len(weights)))


def _why_not(readers: Sequence[Linear]) -> str | None:
    """Why the readers of one value cannot take a factor for each channel."""
    for reader in readers:
        if reader.batch or reader.trans_x or reader.quantized or reader.x.dtype != ir.DataType.FLOAT or reader.weight.dtype != ir.DataType.FLOAT:
            return f"`{reader.weight.name}` is not one float32 matrix"
        if sum(use.node is reader.node for use in reader.x.uses()) != 1 or not _owned(reader):
            return f"something else reads `{reader.weight.name}` too"
    return None


def _owned(linear: Linear) -> bool:
    """The weight, and all between it and its multiply, has no other reader."""
    return used_once(linear.weight) and all(used_once(node.outputs[0]) for node in linear.path)


def _source(x: ir.Value, by_output: dict[ir.Value, Linear]) -> ir.Node | Linear | None:
    norm = producer(x, *_NORMS)
    if norm is not None:
        return norm if _foldable(norm, x) else None
    gate = producer(x, "Mul")
    for value in () if gate is None else gate.inputs:
        up = None if value is None else by_output.get(value)
        if up is not None and used_once(up.output) and _scales_columns(up, x):
            return up
    return None


def _foldable(norm: ir.Node, x: ir.Value) -> bool:
    """Scale and bias of the last axis are stored, one number for each channel."""
    width = static_dim(x, -1)
    parts = [v for v in norm.inputs[1:] if v is not None]
    return bool(parts) and all(is_constant(v) and v.dtype == ir.DataType.FLOAT and v.shape is not None and v.shape == [width] for v in parts)


def _scales_columns(up: Linear, x: ir.Value) -> bool:
    """Dividing the columns of `up` divides the channels of x, and nothing else."""
    if up.batch or up.quantized or up.addend is not None or up.weight.dtype != ir.DataType.FLOAT or not _owned(up):
        return False
    wide = up.bias is None or (up.bias.const_value is not None and up.bias.const_value.size == up.out_features)
    return wide and static_dim(x, -1) == up.out_features and static_dim(up.output, -1) == up.out_features
