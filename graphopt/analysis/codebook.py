"""A stored weight that is looked up in a codebook: how the standard operators spell it, and what it holds."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from graphopt.core.contract import Array
from graphopt.graph.questions import attr, constant, is_constant, producer

# The quantiles of a normal distribution, with a zero of its own, in [-1, 1] (Dettmers et al. 2023, "QLoRA", appendix E).
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
     0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
     1.0], np.float32)  # fmt: skip
_CODES = (ir.DataType.UINT4, ir.DataType.UINT8)
_INDICES = (ir.DataType.INT32, ir.DataType.INT64)


@dataclasses.dataclass(frozen=True)
class Codebook:
    """table[codes] * scale, in the shape of the codes.

    Spelled Gather(table, Cast(codes)), or GatherElements where there are many tables; then Mul, for blocks between two Reshapes.

    Attributes:
        codes: the stored constant, UINT4 or UINT8.
        path: the nodes from the codes to the decoded weight.
        table: [entries], one for all; or the shape of the codes with the entries of a table along `axis`.
        axis: where each line of the codes along this axis has a table of its own; None: one for all.
        scale: broadcasts to the codes, or (`block`) to the codes with `block_axis` split into blocks and their elements; None: 1.
        block: so many neighbours along `block_axis` share a scale; 0: they are not split.
    """

    codes: ir.Value
    path: tuple[ir.Node, ...]
    table: ir.Value
    axis: int | None
    scale: ir.Value | None = None
    block: int = 0
    block_axis: int = 0

    def decode(self) -> Array:
        """The contents, float, in the shape of the codes."""
        codes, table = constant(self.codes), constant(self.table)
        assert codes is not None
        assert table is not None
        index = codes.astype(np.int64)
        values: Array = table[index] if self.axis is None else np.take_along_axis(table, index, self.axis)
        if self.scale is None:
            return values
        scale = constant(self.scale)
        assert scale is not None
        if self.block:
            scale = np.repeat(scale.squeeze(self.block_axis + 1), self.block, axis=self.block_axis)
        return values * scale


def read_codebook(value: ir.Value | None) -> Codebook | None:
    """The codebook weight that `value` is, or None."""
    return _with_blocks(value) or _with_scale(value) or _looked_up(value)


def _looked_up(value: ir.Value | None) -> Codebook | None:
    gather = producer(value, "Gather", "GatherElements")
    cast = None if gather is None else producer(gather.inputs[1], "Cast")
    if gather is None or cast is None or attr(cast, "to") not in _INDICES:
        return None
    codes, table = cast.inputs[0], gather.inputs[0]
    if codes is None or table is None or not is_constant(codes) or not is_constant(table) or codes.dtype not in _CODES:
        return None
    shape, entries = _shape(codes), _shape(table)
    if gather.op_type == "Gather":
        fits = len(entries) == 1 and attr(gather, "axis", 0) == 0
        return Codebook(codes, (cast, gather), table, None) if fits else None
    if len(shape) != len(entries) or not shape:
        return None
    axis = attr(gather, "axis", 0) % len(shape)
    fits = all(a == b for k, (a, b) in enumerate(zip(shape, entries, strict=True)) if k != axis)
    return Codebook(codes, (cast, gather), table, axis) if fits else None


def _with_scale(value: ir.Value | None) -> Codebook | None:
    multiplied = _product(value)
    if multiplied is None:
        return None
    node, inner, scale = multiplied
    found = _looked_up(inner)
    if found is None or len(_shape(scale)) != len(_shape(found.codes)):
        return None
    if any(a not in (1, b) for a, b in zip(_shape(scale), _shape(found.codes), strict=True)):
        return None
    return dataclasses.replace(found, path=(*found.path, node), scale=scale)


def _with_blocks(value: ir.Value | None) -> Codebook | None:
    """Reshape [.., blocks, block, ..], Mul [.., blocks, 1, ..], Reshape back. The scale is stored as [.., blocks, 1, ..]."""
    back = producer(value, "Reshape")
    multiplied = None if back is None else _product(back.inputs[0])
    split = None if multiplied is None else producer(multiplied[1], "Reshape")
    found = None if split is None else _looked_up(split.inputs[0])
    if back is None or multiplied is None or split is None or found is None:
        return None
    node, _, scale = multiplied
    shape, parts, whole = _shape(found.codes), constant(split.inputs[1]), constant(back.inputs[1])
    if parts is None or whole is None or tuple(whole) != shape:
        return None
    for axis in range(len(shape)):
        expected = (*shape[:axis], *parts[axis : axis + 2], *shape[axis + 1 :])
        spread = (*expected[: axis + 1], 1, *expected[axis + 2 :])
        if tuple(parts) == expected and _shape(scale) == spread and expected[axis] * expected[axis + 1] == shape[axis]:
            path = (*found.path, split, node, back)
            return dataclasses.replace(found, path=path, scale=scale, block=int(expected[axis + 1]), block_axis=axis)
    return None


def _product(value: ir.Value | None) -> tuple[ir.Node, ir.Value, ir.Value] | None:
    """(the Mul, its computed operand, its stored one)."""
    node = producer(value, "Mul")
    for a, b in () if node is None else ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
        if node is not None and a is not None and b is not None and is_constant(b) and not is_constant(a):
            return node, a, b
    return None


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.const_value is not None
    return tuple(int(d) for d in value.const_value.shape.numpy())
