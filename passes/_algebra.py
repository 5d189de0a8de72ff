"""Canonical spelling of elementwise arithmetic: no neutral elements, constants on the right, products instead of quotients.

A rule looks at one node and returns what stands for its outputs, None, or the reason why a node that it knows stays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt.core.contract import Array
from graphopt.graph.questions import constant, consumers, is_constant, producer, rank, same_shape, scalar, used_once
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.match import Miss

_ROUNDINGS = frozenset({"QuantizeLinear", "DynamicQuantizeLinear", "Round", "Floor", "Ceil"})
_ELEMENTWISE = frozenset(
    {"Mul", "Add", "Sub", "Div", "Neg", "Relu", "Clip", "Min", "Max", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity"}
)
_NEAR = 32  # nodes behind one that are looked at
Rewritten = ir.Value | Sequence[ir.Value | None] | Miss | None  # a Miss: it stays, for this reason
_LARGEST = 1 << 16  # elements of a constant that are read to see whether they are all 0 or 1
_EXACT = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)  # types whose rounding shows: only exact changes there
_WIDE = (ir.DataType.FLOAT, ir.DataType.DOUBLE)


def neutral_element(node: ir.Node, op: Builder) -> Rewritten:
    """x + 0, x - 0, x * 1, x / 1 -> x, where the constant does not broadcast x."""
    neutral = 0 if node.op_type in ("Add", "Sub") else 1
    sides = (0, 1) if node.op_type in ("Add", "Mul") else (0,)
    for side in sides:
        x, c = node.inputs[side], node.inputs[1 - side]
        if x is not None and _all(c, neutral) and _keeps_shape(x, c, node.outputs[0]):
            return stand_in(node, x, op)
    return None


def logic(node: ir.Node, op: Builder) -> Rewritten:
    """And with true, Or with false, Not of Not, Where with a constant condition."""
    x, y = node.inputs[0], node.inputs[-1]
    if node.op_type == "Not":
        inner = producer(x, "Not")
        return None if inner is None or inner.inputs[0] is None else stand_in(node, inner.inputs[0], op)
    if node.op_type == "Where":
        return _decided_where(node, op)
    neutral = node.op_type == "And"
    for kept, other in ((x, y), (y, x)):
        if kept is not None and _all(other, neutral) and _keeps_shape(kept, other, node.outputs[0]):
            return stand_in(node, kept, op)
    return None


def _decided_where(node: ir.Node, op: Builder) -> Rewritten:
    condition, *branches = node.inputs
    for verdict, kept in zip((True, False), branches, strict=True):
        if kept is not None and _all(condition, verdict) and same_shape(kept, node.outputs[0]):
            return stand_in(node, kept, op)
    return None


def constant_on_the_right(node: ir.Node, op: Builder) -> Rewritten:
    """c + x -> x + c, c * x -> x * c."""
    a, b = node.inputs
    return [op.node(node.op_type, (b, a))] if is_constant(a) and not is_constant(b) else None


def subtraction(node: ir.Node, op: Builder) -> Rewritten:
    """x - c -> x + (-c) for a scalar constant."""
    x, c = node.inputs
    array = _scalar_array(c)
    if array is None or c is None or is_constant(x) or np.issubdtype(array.dtype, np.unsignedinteger):
        return None
    return [op.Add(x, op.const(np.negative(array), c.name or "negated"))]


def division(node: ir.Node, op: Builder) -> Rewritten:
    """x / c -> x * (1/c) for a scalar constant c; 1 / x -> Reciprocal(x). Half types, and in front of a rounding, only where 1/c is exact."""
    x, c = node.inputs
    if x is None or c is None or c.dtype is None or c.dtype not in (*_WIDE, *_EXACT):
        return None
    if scalar(x) == 1 and not is_constant(c) and rank(c) is not None and (rank(x) or 0) <= (rank(c) or 0):
        return [op.Reciprocal(c)]
    array = _scalar_array(c)
    if array is None or is_constant(x):
        return None
    inverse = 0.0 if array.item() == 0 else 1 / float(array.item())
    rounded = _rounded(inverse, array, exact=c.dtype in _EXACT or in_front_of_rounding(node))
    return None if rounded is None else [op.Mul(x, op.const(rounded, f"{c.name}_reciprocal"))]


def power(node: ir.Node, op: Builder) -> Rewritten:
    """x ** c for c in 1, 2, 1/2, -1, -1/2 -> x, x * x, Sqrt, Reciprocal, Reciprocal of Sqrt."""
    x, c = node.inputs
    exponent = scalar(c)
    if x is None or exponent is None or not _keeps_shape(x, c, node.outputs[0]):
        return None
    if exponent == 1:
        return stand_in(node, x, op)
    if exponent == 2:
        return [op.Mul(x, x)]
    if x.dtype is None or not x.dtype.is_floating_point():
        return None
    spelled = {0.5: lambda: op.Sqrt(x), -1: lambda: op.Reciprocal(x), -0.5: lambda: op.Reciprocal(op.Sqrt(x))}.get(exponent)
    return None if spelled is None else spelled()


def chained_scales(node: ir.Node, op: Builder) -> Rewritten:
    """(x * c1) * c2 -> x * (c1 * c2) for scalar constants, where nothing else reads x * c1."""
    inner = producer(node.inputs[0], "Mul")
    outer = _scalar_array(node.inputs[1])
    if inner is None or outer is None or not used_once(inner.outputs[0]) or is_constant(inner.inputs[0]):
        return None
    first, dtype = _scalar_array(inner.inputs[1]), node.outputs[0].dtype
    if first is None or dtype not in (*_WIDE, *_EXACT):
        return None
    wider = first if first.ndim >= outer.ndim else outer
    product = _rounded(float(first.item()) * float(outer.item()), wider, exact=dtype in _EXACT or in_front_of_rounding(node))
    return None if product is None else [op.Mul(inner.inputs[0], op.const(product, node.inputs[1].name or "scale"))]  # type: ignore[union-attr]


def in_front_of_rounding(node: ir.Node) -> bool:
    """Whether the result is rounded behind nothing but elementwise arithmetic and layout: there a last digit decides between two codes."""
    todo, seen = [node], set[ir.Node]()
    while todo and len(seen) < _NEAR:
        for reader in (r for v in todo.pop().outputs for r in consumers(v) if r not in seen):
            if reader.domain == "" and (reader.op_type in _ROUNDINGS or (reader.op_type == "Cast" and _to_integer(reader))):
                return True
            seen.add(reader)
            todo += [reader] if reader.domain == "" and reader.op_type in _ELEMENTWISE else []
    return False


def _to_integer(cast: ir.Node) -> bool:
    kind = cast.outputs[0].dtype
    return kind is not None and not kind.is_floating_point() and kind != ir.DataType.BOOL


def stand_in(node: ir.Node, x: ir.Value, op: Builder) -> Rewritten:
    """`x` in place of the only used output of `node`. Where that output is public and x cannot take its name, an Identity is left."""
    out = node.outputs[0]
    source = x.producer()
    if out.is_graph_output() and (source is None or source.graph is not node.graph or x.is_graph_output()):
        return None if node.op_type == "Identity" else op.Identity(x)
    return x


def _scalar_array(value: ir.Value | None) -> Array | None:
    """A constant of one element, with its rank and type."""
    if value is None or not is_constant(value) or value.const_value is None or value.const_value.size != 1:
        return None
    return constant(value)


def _all(value: ir.Value | None, number: float | bool) -> bool:
    if value is None or not is_constant(value) or value.const_value is None or not 0 < value.const_value.size <= _LARGEST:
        return False
    array = constant(value)
    return array is not None and array.dtype.kind not in "OUS" and bool((array == number).all())


def _keeps_shape(x: ir.Value, c: ir.Value | None, out: ir.Value) -> bool:
    """True if broadcasting x with the constant c leaves the shape of x."""
    if c is None or c.const_value is None:
        return False
    ranks = rank(x), len(c.const_value.shape)
    if c.const_value.size == 1 and (ranks[1] == 0 or (ranks[0] is not None and ranks[1] <= ranks[0])):
        return True
    return same_shape(x, out)


def _rounded(number: float, like: Array, exact: bool) -> Array | None:
    """`number` in the shape and type of `like`; None where it is 0, leaves the normal range, or is not exact though it must be."""
    array: Array = np.full(like.shape, number, dtype=like.dtype)
    if exact:
        return array if number != 0 and array.item() == number else None
    tiny, largest = float(np.finfo(like.dtype).tiny), float(np.finfo(like.dtype).max)
    return array if math.isfinite(number) and tiny <= abs(number) <= largest else None
