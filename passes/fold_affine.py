"""fold-affine: constant scales and shifts, and BatchNormalization, behind a product go into its stored weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphopt.core.contract import Array, Context
from graphopt.graph.questions import attr, constant, consumers, is_constant, is_read, rank, scalar, used_once
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.match import Match, Miss
from graphopt.rewrite.rules import RewritePass

_CONVOLUTIONS = ("Conv", "ConvTranspose")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_LINES = {"Add", "Sub", "Mul", "Div"}


@dataclasses.dataclass(frozen=True)
class FoldedProduct(Match):
    """The product `node` with the weight and the bias [channels] that do the work of the nodes behind it."""

    node: ir.Node
    weight: Array
    bias: Array

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"op": self.node.op_type, "folded": [n.op_type for n in self.nodes[1:]]}


@dataclasses.dataclass(frozen=True)
class _Line:
    """y = scale * x + shift, of one number for each channel, float64."""

    scale: Array
    shift: Array

    def then(self, other: _Line) -> _Line:
        return _Line(self.scale * other.scale, self.shift * other.scale + other.shift)


@dataclasses.dataclass(frozen=True)
class FoldAffine(RewritePass[FoldedProduct]):
    """Conv, ConvTranspose, MatMul or Gemm, then Add, Sub, Mul, Div by constants or BatchNormalization at inference -> the product with other weights.

    One number for all channels, or one for each, moves into the weight and the bias; the new weights are computed in float64 and rounded once. A
    product keeps its weight where something else reads it, or the result in between. Behind a MatMul or Gemm one bias, and a scale that is
    one number (attention scales its scores so), stay as they are. Jacob et al. 2018, section 3.2, for the algebra of batch normalization.
    """

    anchors: ClassVar[frozenset[str]] = frozenset({*_CONVOLUTIONS, "MatMul", "Gemm"})

    def match(self, node: ir.Node, ctx: Context) -> FoldedProduct | Miss | None:
        weight, first = node.inputs[1], node.outputs[0]
        channels = _channels(node)
        if weight is None or channels is None or weight.dtype not in _FLOATS or first.dtype != weight.dtype:
            return None
        steps, total, refused = _follow(node, channels)
        if not steps or not _worthwhile(node, steps, channels):
            return None if refused is None else Miss(node, refused)
        if len(weight.uses()) > 1 or weight.is_graph_output():
            return Miss(node, f"{steps[0].op_type} `{steps[0].name}` stays: something else reads the weight `{weight.name}`, too")
        bias = _bias(node, channels)
        if bias is None:
            return Miss(node, f"{steps[0].op_type} `{steps[0].name}` stays: what `{node.name}` adds is no constant for each channel")
        old = constant(weight)
        assert old is not None
        new = _scaled(node, old.astype(np.float64), total.scale)
        shift = bias * total.scale + total.shift
        rounded = new.astype(old.dtype)
        if not _kept(new, rounded) or not np.isfinite(shift.astype(old.dtype)).all():
            return Miss(node, f"{steps[0].op_type} `{steps[0].name}` stays: the new weights leave the range of {weight.dtype.name.lower()}")
        return FoldedProduct((node, *steps), (steps[-1].outputs[0],), node, rounded, shift.astype(old.dtype))

    def build(self, op: Builder, m: FoldedProduct) -> Sequence[ir.Value]:
        node, old = m.node, m.node.inputs[1]
        assert old is not None
        weight = op.const(m.weight, str(old.name))
        shifts = bool(m.bias.any())
        given = dict(node.attributes)
        if node.op_type == "MatMul":
            made = op.MatMul(node.inputs[0], weight)
            return [op.Add(made, op.const(m.bias, f"{old.name}_bias")) if shifts else made]
        if node.op_type == "Gemm":
            given["beta"] = ir.AttrFloat32("beta", 1.0)
        has = shifts or len(node.inputs) > 2
        made = op.node(node.op_type, (node.inputs[0], weight, op.const(m.bias, f"{old.name}_bias") if has else None))
        made.producer().attributes.update(given)
        return [made]


def _channels(node: ir.Node) -> int | None:
    """How many output channels the stored weight has; None if there is none."""
    weight = node.inputs[1]
    if weight is None or not is_constant(weight) or weight.const_value is None:
        return None
    shape = tuple(weight.const_value.shape.numpy())
    if node.op_type == "Conv":
        return int(shape[0])
    if node.op_type == "ConvTranspose":
        return int(shape[1] * attr(node, "group", 1))
    if len(shape) != 2:
        return None
    return int(shape[0] if attr(node, "transB", 0) else shape[1])


def _follow(node: ir.Node, channels: int) -> tuple[list[ir.Node], _Line, str | None]:
    """The nodes behind `node` that are lines for each channel, what they do together, and why a BatchNormalization ends them."""
    steps: list[ir.Node] = []
    total = _Line(np.ones(channels), np.zeros(channels))
    value = node.outputs[0]
    size = rank(value) or (rank(node.inputs[1]) if node.op_type in _CONVOLUTIONS else None)
    if size is None or size < 2:
        return steps, total, None
    axis = 1 if node.op_type in _CONVOLUTIONS else size - 1
    while True:
        readers = consumers(value)
        norm = next((n for n in readers if n.op_type == "BatchNormalization" and n.domain == "" and n.inputs[0] is value), None)
        if not used_once(value) or readers[0].graph is not node.graph:
            return steps, total, None if norm is None else f"BatchNormalization `{norm.name}` stays: something else reads `{value.name}`, too"
        line = _normalizing(readers[0], axis) if norm is not None else _line(readers[0], value, axis, size, channels)
        if not isinstance(line, _Line):
            return steps, total, line
        steps.append(readers[0])
        total = total.then(line)
        value = readers[0].outputs[0]


def _line(node: ir.Node, value: ir.Value, axis: int, size: int, channels: int) -> _Line | None:
    """An Add, Sub, Mul or Div with a constant that has one number, or one for each channel, and does not grow the result."""
    if node.domain != "" or node.op_type not in _LINES:
        return None
    first = node.inputs[0] is value
    number = _each(node.inputs[1 if first else 0], axis, size, channels)
    if number is None or (node.op_type == "Div" and (not first or not number.all())):
        return None
    ones, zeros = np.ones(channels), np.zeros(channels)
    match node.op_type:
        case "Add":
            return _Line(ones, number)
        case "Sub":
            return _Line(ones, -number) if first else _Line(-ones, number)
        case "Mul":
            return _Line(number, zeros)
    return _Line(1 / number, zeros)


def _each(value: ir.Value | None, axis: int, size: int, channels: int) -> Array | None:
    """[channels], float64."""
    if value is None or not is_constant(value) or value.const_value is None or value.dtype not in _FLOATS:
        return None
    shape = tuple(value.const_value.shape.numpy())
    if len(shape) > size:
        return None
    padded = (1,) * (size - len(shape)) + shape
    if padded[axis] not in (1, channels) or any(d != 1 for k, d in enumerate(padded) if k != axis):
        return None
    array = constant(value)
    return None if array is None else np.broadcast_to(array.astype(np.float64).reshape(-1), (channels,))


def _normalizing(node: ir.Node, axis: int) -> _Line | str:
    """What a BatchNormalization computes for each channel, or why it is not known beforehand."""
    told = f"BatchNormalization `{node.name}` stays"
    if attr(node, "training_mode", 0) or any(map(is_read, node.outputs[1:])):
        return f"{told}: it takes mean and variance from the batch (training_mode); export the model after model.eval()"
    if axis != 1:
        return f"{told}: its channels are not the output features of the product"
    arrays = [constant(v) for v in node.inputs[1:5]]
    if any(a is None for a in arrays):
        return f"{told}: its statistics are not constant"
    gamma, beta, mean, variance = (np.asarray(a, np.float64) for a in arrays)
    scale = gamma / np.sqrt(variance + attr(node, "epsilon", 1e-5))
    return _Line(scale, beta - mean * scale)


def _worthwhile(node: ir.Node, steps: Sequence[ir.Node], channels: int) -> bool:
    """Behind a MatMul or Gemm a bias alone is what is wanted, and one number for all may be the scale of an attention."""
    if node.op_type in _CONVOLUTIONS:
        return True
    scaling = [n for n in steps if n.op_type in ("Mul", "Div") and all(scalar(v) is None for v in n.inputs)]
    return any(n.op_type == "BatchNormalization" for n in steps) or (bool(scaling) and channels > 1)


def _bias(node: ir.Node, channels: int) -> Array | None:
    """[channels], float64: what the product itself adds."""
    given = node.inputs[2] if len(node.inputs) > 2 else None
    if given is None:
        return np.zeros(channels)
    found = _each(given, 0, 1, channels) if node.op_type in _CONVOLUTIONS else _each(given, 1, 2, channels)
    return None if found is None else found * (attr(node, "beta", 1.0) if node.op_type == "Gemm" else 1.0)


def _scaled(node: ir.Node, weight: Array, scale: Array) -> Array:
    """Each output channel times its number."""
    if node.op_type == "ConvTranspose":  # [in, out / group, ..], the groups along the first axis
        groups = attr(node, "group", 1)
        apart = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        return (apart * scale.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))).reshape(weight.shape)
    if node.op_type == "Conv" or attr(node, "transB", 0):
        return weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    return weight * scale


def _kept(exact: Array, rounded: Array) -> bool:
    """No number became infinite, or lost digits below the smallest normal one."""
    small = np.abs(exact) < float(ml_dtypes.finfo(rounded.dtype).tiny)  # type: ignore[no-untyped-call]
    return bool(np.isfinite(rounded).all()) and not bool((small & (exact != 0)).any())
