"""Weights that are quantized while activations stay float, as MatMulNBits and GatherBlockQuantized: codes and scales in one packed layout.

Both operators read uint8 [rows, blocks, block * bits / 8] with scales [rows, blocks] and zero points packed along the blocks; the lookup wants
the codes as [rows, in * bits / 8], which a Reshape gives without a copy. So a table that a multiply reads too is stored once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.linear import Embedding, IntegerGrid, Linear, StoredOperands
from graphopt.core.contract import Array, Context
from graphopt.graph.questions import attr, constant, producer
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.match import Match, Miss
from graphopt.rewrite.rules import RewritePass

from ._packed import Known, known
from ._vendored import VENDOR

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_BITS = {ir.DataType.INT4: 4, ir.DataType.UINT4: 4, ir.DataType.INT8: 8, ir.DataType.UINT8: 8}
_BLOCKS = (16, 32, 64, 128, 256)  # that the runtime's kernels have
_WHOLE_ROWS = (64, 32, 16)  # in which a row of one scale is cut, its scale repeated


@dataclasses.dataclass(frozen=True)
class Source:
    """Codes with their grid, as rows along the input features; `axis`: that of the input features. `known`: what is packed of them already."""

    codes: ir.Value
    grid: IntegerGrid
    axis: int
    block: int
    known: Known

    @property
    def bits(self) -> int:
        assert self.codes.dtype is not None
        return _BITS[self.codes.dtype]

    @property
    def signed(self) -> bool:
        return self.codes.dtype in (ir.DataType.INT4, ir.DataType.INT8)


@dataclasses.dataclass(frozen=True)
class BlockedMatch(Match):
    """`tied`: a product reads the codes as well, so that they are stored once, in its layout."""

    operand: Linear | Embedding
    source: Source
    tied: bool = False

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"weight": self.source.codes.name, "bits": self.source.bits, "block": self.source.block}


@dataclasses.dataclass(frozen=True)
class SpellBlockedTable(RewritePass[BlockedMatch]):
    """Gather(DequantizeLinear(table)) of blocks, or of a table that a float multiply reads too -> GatherBlockQuantized."""

    anchors: ClassVar[frozenset[str]] = frozenset({"Gather"})

    def match(self, node: ir.Node, ctx: Context) -> BlockedMatch | Miss | None:
        operands = ctx.get(StoredOperands())
        e = operands.get(node)
        if not isinstance(e, Embedding) or e.grid is None:
            return None
        tied = any(isinstance(x, Linear) and x.weight is e.table and weight_only(x) for x in operands.values())
        if not e.grid.block and not tied:
            return None
        source = _source(e.table, e.grid, 1, ir.DataType.FLOAT, ctx)
        if isinstance(source, str) or e.width % source.block:
            return Miss(node, f"the table is decoded as a whole: {source if isinstance(source, str) else 'its last block is short'}")
        return BlockedMatch((node,), (node.outputs[0],), e, source, tied)

    def build(self, op: Builder, m: BlockedMatch) -> Sequence[ir.Value]:
        e, source = m.operand, m.source
        assert isinstance(e, Embedding)
        scale, zero = _grid(op, source)
        if m.tied:
            rows = op.Reshape(source.known.once(op, "blocks", lambda: _codes(source)), op.const(np.array([e.rows, -1], np.int64), "rows"))
        else:
            rows = source.known.once(op, "rows", lambda: _codes(source).reshape(e.rows, -1))
        options = {"bits": m.source.bits, "block_size": m.source.block, "gather_axis": 0, "quantize_axis": 1}
        return [op.node("GatherBlockQuantized", (rows, e.ids, scale, zero), _domain=VENDOR, **options)]


@dataclasses.dataclass(frozen=True)
class SpellBlockedMatmul(RewritePass[BlockedMatch]):
    """MatMul or Gemm of float activations and a quantized weight -> MatMulNBits.

    Args:
        half: also activations of 16 bits, with scales of their type, which the CPU provider does not take.
        rows: also a weight with one scale for each row, and one whose last block is short; False: whole blocks only.
    """

    half: bool = False
    rows: bool = True
    accuracy_level: ClassVar[int | None] = None  # of the operator: it multiplies floats
    anchors: ClassVar[frozenset[str]] = frozenset({"MatMul", "Gemm"})

    def match(self, node: ir.Node, ctx: Context) -> BlockedMatch | Miss | None:
        linear = ctx.get(StoredOperands()).get(node)
        if not isinstance(linear, Linear):
            decode = producer(node.inputs[1], "DequantizeLinear")
            blocks = decode is not None and attr(decode, "block_size", 0)
            return Miss(node, "stays DequantizeLinear: its weight is not stored") if blocks else None
        if linear.grid is None or not weight_only(linear):
            return None
        dtype = linear.x.dtype
        if linear.batch or linear.trans_x or dtype not in ((ir.DataType.FLOAT, *_HALF) if self.half else (ir.DataType.FLOAT,)):
            return Miss(node, f"`{linear.weight.name}` is decoded as a whole: a batch of matrices, transposed or half-precision activations")
        if not self.rows and (not linear.grid.block or linear.in_features % linear.grid.block):
            return Miss(node, f"`{linear.weight.name}` is decoded as a whole: its scales are not of whole blocks")
        source = _source(linear.weight, linear.grid, 1 if linear.transposed else 0, dtype, ctx)
        if isinstance(source, str):
            return Miss(node, f"`{linear.weight.name}` is decoded as a whole: {source}")
        return BlockedMatch((node,), (node.outputs[0],), linear, source)

    def build(self, op: Builder, m: BlockedMatch) -> Sequence[ir.Value]:
        linear = m.operand
        assert isinstance(linear, Linear)
        packed, scale, zero = _packed(op, m.source)
        options = {"K": linear.in_features, "N": linear.out_features, "bits": m.source.bits, "block_size": m.source.block}
        out = op.node("MatMulNBits", (linear.x, packed, scale, zero), _domain=VENDOR, accuracy_level=self.accuracy_level, **options)
        return [with_rest(op, linear, out)]


@dataclasses.dataclass(frozen=True)
class SpellInt8Blocks(SpellBlockedMatmul):
    """Likewise, and the runtime rounds each block of the activations to 8 bits and multiplies integers: that is not exact."""

    exact: ClassVar[bool] = False
    accuracy_level: ClassVar[int | None] = 4

    def weaker(self) -> SpellBlockedMatmul:  # type: ignore[override]
        return SpellBlockedMatmul(self.half, self.rows)


def weight_only(linear: Linear) -> bool:
    """The weight is quantized, the activation is not."""
    return linear.quantized and producer(linear.x, "DequantizeLinear") is None


def with_rest(op: Builder, linear: Linear, product: ir.Value) -> ir.Value:
    """alpha * product + beta * C, where a Gemm has them."""
    out: Any = product
    kind = (linear.x.dtype or ir.DataType.FLOAT).numpy()
    if linear.alpha != 1.0:
        out = op.Mul(out, op.const(np.array(linear.alpha, kind), "alpha"))
    added = linear.addend if linear.bias is None or linear.bias_node is not None else linear.bias
    if added is not None:
        out = op.Add(out, added if linear.beta == 1.0 else _scaled(op, added, np.array(linear.beta, kind)))
    return out  # type: ignore[no-any-return]


def _scaled(op: Builder, added: ir.Value, beta: Array) -> ir.Value:
    array = constant(added)
    value: ir.Value = op.Mul(added, op.const(beta, "beta")) if array is None else op.const(array * beta, f"{added.name}_beta")
    return value


def _source(codes: ir.Value, grid: IntegerGrid, axis: int, dtype: ir.DataType | None, ctx: Context) -> Source | str:
    """What can be packed, or why it cannot; `axis` runs along the input features."""
    assert codes.const_value is not None
    width = int(codes.const_value.shape.numpy()[axis])
    if codes.dtype not in _BITS:
        return f"it is stored as {codes.dtype}"
    if grid.scale.dtype != dtype:
        return f"its scales are {grid.scale.dtype}"
    wanted = (axis,) if grid.block else (None, 1 - axis)
    if grid.axis not in wanted:
        return "its scales do not run along the input features"
    if grid.block and grid.block not in _BLOCKS:
        return f"the runtime has no kernel for blocks of {grid.block}"
    block = grid.block or next((b for b in _WHOLE_ROWS if width % b == 0), _WHOLE_ROWS[-1])
    return Source(codes, grid, axis, block, known(ctx, codes, grid.scale, block))


def _packed(op: Builder, source: Source) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """Codes, scales and zero points as the operators want them; made once."""
    return source.known.once(op, "blocks", lambda: _codes(source)), *_grid(op, source)


def _grid(op: Builder, source: Source) -> tuple[ir.Value, ir.Value | None]:
    # without zero points the operators take the middle for zero, and DequantizeLinear takes zero
    zero = source.known.once(op, "block_zeros", lambda: _zeros(source)) if source.grid.zero_point is not None or not source.signed else None
    return source.known.once(op, "block_scales", lambda: _by_block(source, source.grid.scale)), zero


def _codes(source: Source) -> Array:
    array = constant(source.codes)
    assert array is not None
    rows = _unsigned(np.moveaxis(array, source.axis, -1), source)
    blocks = -(-rows.shape[1] // source.block)
    rows = np.pad(rows, ((0, 0), (0, blocks * source.block - rows.shape[1])))
    return _nibbles(rows, source.bits).reshape(len(rows), blocks, -1)


def _zeros(source: Source) -> Array:
    point = source.grid.zero_point
    points = np.zeros(_by_block(source, source.grid.scale).shape, np.uint8) if point is None else _by_block(source, point)
    return _nibbles(_unsigned(points, source), source.bits)


def _by_block(source: Source, value: ir.Value) -> Array:
    """Scales or zero points as [rows, blocks]."""
    array, tensor = constant(value), source.codes.const_value
    assert array is not None
    assert tensor is not None
    if source.grid.block:
        return np.ascontiguousarray(np.moveaxis(array, source.axis, -1))
    shape = tensor.shape.numpy()
    count, width = shape[1 - source.axis], shape[source.axis]
    return np.ascontiguousarray(np.broadcast_to(array.reshape(-1, 1), (count, -(-width // source.block))))


def _unsigned(array: Array, source: Source) -> Array:
    """uint8 around 2^(bits-1) where the codes are signed: the zero point that the operators assume."""
    return (array.astype(np.int16) + ((1 << source.bits - 1) if source.signed else 0)).astype(np.uint8)


def _nibbles(array: Array, bits: int) -> Array:
    """Two 4-bit numbers in a byte along the last axis, the first one low."""
    if bits == 8:
        return np.ascontiguousarray(array)
    array = np.pad(array, ((0, 0), (0, array.shape[-1] % 2)))
    pairs: Array = array[:, ::2] | array[:, 1::2] << 4
    return pairs
