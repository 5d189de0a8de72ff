"""Bias correction: rounding moves the mean of what a product gives, and a constant can move it back.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction"; Banner et al. 2019, "Post Training 4-bit
Quantization of Convolutional Networks for Rapid-Deployment". The means are those of the samples in the float graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import onnx_ir as ir

from graphopt.analysis.linear import Linear, Linears, StoredOperands
from graphopt.calibration.activations import ActivationStats, LinearInputs
from graphopt.calibration.enough import too_few
from graphopt.calibration.ranges import grid
from graphopt.core.contract import Array, Context
from graphopt.graph.questions import constant, is_constant, producer, scalar, used_once
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.match import Match, Miss
from graphopt.rewrite.rules import RewritePass

_WORTH = 0.01  # of the relative squared error of the rows: what takes away less is not worth an addition


@dataclasses.dataclass(frozen=True)
class Before:
    """A multiply of the float graph; `source`: the name that its input had (values that are replaced lose theirs)."""

    linear: Linear
    seen: ActivationStats
    source: str


@dataclasses.dataclass(frozen=True)
class CorrectionMatch(Match):
    """`key`: the name in the float graph; `value`: the product (behind the scales of its rows); `bias`: what is to be added to it; `inside`: by
    the Gemm itself."""

    key: str
    value: ir.Value
    bias: Array
    inside: bool
    weight: str
    share: float

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"weight": self.weight, "bias_correction": round(self.share, 4)}


class CorrectBias(RewritePass[CorrectionMatch]):
    """Adds E[x W] - E[x_q W_q] to what each multiply gives whose weight became integers since `before`.

    x_q: the activation on its grid; one that is made at run time is taken to be that of all samples. Which rows there were, and their mean, is
    of the float graph: that the input of a layer has moved too is left to the corrections in front of it.
    """

    exact: ClassVar[bool] = False
    anchors: ClassVar[frozenset[str]] = frozenset({"MatMul", "Gemm"})

    def __init__(self, floats: Mapping[str, Before], refused: Mapping[str, str]) -> None:
        self.floats, self.refused = dict(floats), refused

    @classmethod
    def before(cls, ctx: Context) -> Self:
        """What is known of the float graph, by the name of the output of each multiply.

        Raises:
            SampleError: there are no samples.
        """
        found = [x for x in ctx.get(Linears(casts=True)) if not x.quantized and x.x.dtype == ir.DataType.FLOAT]
        seen = ctx.get(LinearInputs()) if found else {}
        reasons = {x.node.outputs[0].name or "": _unknown(x, seen.get(x.x)) for x in found}
        known = {name: Before(x, seen[x.x], x.x.name or "") for x in found if reasons[name := x.node.outputs[0].name or ""] is None}
        return cls(known, {name: reason for name, reason in reasons.items() if reason is not None})

    def match(self, node: ir.Node, ctx: Context) -> CorrectionMatch | Miss | None:
        linear = ctx.get(StoredOperands()).get(node)
        if not isinstance(linear, Linear) or linear.grid is None:
            return None
        value = self._result(node.outputs[0])
        if value is None:
            reason = self.refused.get(node.outputs[0].name or "")
            return None if reason is None else Miss(node, f"bias not corrected: {reason}")
        was = self.floats[str(value.name)]
        seen = was.seen
        behind = value.producer() is not node
        source, rounded = _rounding(linear, seen, rows=behind)
        if source.name != was.source and not behind:
            return Miss(node, "bias not corrected: the multiply reads another input than before")
        before, after = (w.matrix().astype(np.float32) for w in (was.linear, linear))
        off, share = _correction(before, after, seen, seen.rows if rounded is None else rounded)
        if share < _WORTH:
            return Miss(node, f"bias not corrected: it would take away {share:.1%} of the relative squared error of the rows")
        return self._placed(value, linear, off * linear.alpha, share)

    def build(self, op: Builder, m: CorrectionMatch) -> Sequence[ir.Value]:
        self.floats.pop(m.key, None)
        node, bias = m.nodes[0], op.const(m.bias, f"{m.weight}_corrected")
        if node.op_type == "Add" and m.value is not node.outputs[0]:
            return [op.Add(m.value, bias)]
        kept = {name: a.value for name, a in node.attributes.items()}
        if m.inside:
            return [op.Gemm(*node.inputs[:2], bias, **{**kept, "beta": 1.0})]
        return [op.Add(op.node(node.op_type, node.inputs, **kept), bias)]

    def _result(self, value: ir.Value) -> ir.Value | None:
        """What carries the name that the product had before: itself, or what stands behind the scales of its rows."""
        for behind in ("Mul", "Add"):  # the Add of a Gemm's third input
            if str(value.name) in self.floats:
                return value
            reader = next(iter(value.uses())).node if used_once(value) else None
            if reader is None or reader.op_type != behind:
                return None
            value = reader.outputs[0]
        return value if str(value.name) in self.floats else None

    def _placed(self, value: ir.Value, linear: Linear, off: Array, share: float) -> CorrectionMatch:
        """The addition that takes the correction up: that of a bias which is there, else a new one."""
        node = value.producer()
        assert node is not None
        key, name = str(value.name), linear.weight.name or "weight"
        if node.op_type == "Gemm" and linear.addend is None:
            total = off.astype(np.float32) if linear.bias is None else _sum(linear.bias, linear.beta, off)
            return CorrectionMatch((node,), (value,), key, value, total, True, name, share)
        reader = next(iter(value.uses())).node if used_once(value) else None
        for add in (node, reader):
            if add is None or add.domain != "" or add.op_type != "Add" or add.graph is not node.graph:
                continue
            for product, bias in (add.inputs, add.inputs[::-1]):
                if product is not None and bias is not None and (product is value or add is node) and _is_bias(bias, product, len(off)):
                    return CorrectionMatch((add,), (add.outputs[0],), key, product, _sum(bias, 1.0, off), False, name, share)
        return CorrectionMatch((node,), (value,), key, value, off.astype(np.float32), False, name, share)


def _correction(before: Array, after: Array, seen: ActivationStats, rounded: Array) -> tuple[Array, float]:
    """The mean error of x W, float64 [out], and what part of the rows' relative squared error it takes away (it may add to it).

    Relative to each row, since a mean that comes of a few rows with a large error would be added to all the others.
    """
    off = seen.mean @ (before - after).astype(np.float64) - (rounded - seen.rows).mean(0, dtype=np.float64) @ after
    exact = seen.rows @ before
    errors, norms = exact - rounded @ after, np.square(exact).sum(1)
    kept = norms > 0
    left, whole = ((np.square(e).sum(1)[kept] / norms[kept]).sum() for e in (errors - off.astype(np.float32), errors))
    return off, 1 - float(left / whole) if whole > 0 else 0.0


def _unknown(linear: Linear, seen: ActivationStats | None) -> str | None:
    """Why the samples do not tell what a product is off by on the average."""
    if linear.batch:
        return "a batch of matrices"
    return "no row of it was seen" if seen is None else too_few(seen.seen, linear.in_features)


def _rounding(linear: Linear, seen: ActivationStats, *, rows: bool) -> tuple[ir.Value, Array | None]:
    """What a multiply reads before it is rounded, and the sampled rows [n, in] as they are rounded; None where they stay float.

    `rows`: each is divided by its largest magnitude first. A grid that is made at run time is taken to be the one of all samples,
    padding too.
    """
    decode = producer(linear.x, "DequantizeLinear")
    code = None if decode is None else producer(decode.inputs[0], "QuantizeLinear", "DynamicQuantizeLinear")
    if code is None or code.inputs[0] is None:
        return linear.x, None
    size = np.maximum(np.abs(seen.rows).max(1, keepdims=True), np.finfo(np.float32).tiny) if rows else np.float32(1)
    scale, zero = (scalar(v) for v in code.inputs[1:3]) if code.op_type == "QuantizeLinear" else (None, None)
    if scale is None or zero is None:
        scale, zero = grid(float(seen.bottom.min()), float(seen.top.max()))
    step = np.float32(scale)
    rounded: Array = ((np.clip(np.rint(seen.rows / size / step) + zero, 0, 255) - zero) * step * size).astype(np.float32)
    return code.inputs[0], rounded


def _is_bias(other: ir.Value, value: ir.Value, width: int) -> bool:
    """A float constant that adds no axis to `value`, and is the same for every row."""
    if not is_constant(other) or other.const_value is None or other.dtype != ir.DataType.FLOAT:
        return False
    shape = tuple(other.const_value.shape.numpy())
    rank = 1 if value.shape is None else len(value.shape)
    return len(shape) <= rank and all(d == 1 for d in shape[:-1]) and (not shape or shape[-1] in (1, width))


def _sum(bias: ir.Value, beta: float, off: Array) -> Array:
    array = constant(bias)
    assert array is not None
    total: Array = (array.astype(np.float64) * beta + off).astype(np.float32)
    return total
