"""How a coded constant stands in the graph: DequantizeLinear of blocks, or Gather of a codebook; stored once, whoever reads it."""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphopt.compress.quantize.codebooks import CodebookGrid
from graphopt.compress.quantize.grids import Steps
from graphopt.core.contract import Array
from graphopt.rewrite.builder import Builder

_TYPES: Mapping[tuple[int, bool], Any] = {(4, True): ml_dtypes.int4, (4, False): ml_dtypes.uint4, (8, True): np.int8, (8, False): np.uint8}


@dataclasses.dataclass(frozen=True)
class Form(ABC):
    """A constant as codes, in its own shape.

    Attributes:
        axis: along which its scales lie, or the entries of its tables; None: there is one scale.
        block: neighbours along `axis` that share a scale; 0: none do.
        facts: what the report says about it.
    """

    codes: Array
    axis: int | None
    block: int
    facts: Mapping[str, Any]

    @abstractmethod
    def stored(self) -> Mapping[str, Array]:
        """All constants, by the ends of their names; the codes first."""

    @abstractmethod
    def nodes(self, op: Builder, parts: Sequence[ir.Value]) -> ir.Value:
        """What decodes `parts`, which `stored` names."""

    @property
    def nbytes(self) -> int:
        return sum(map(_stored_bytes, self.stored().values()))

    def decoded(self, op: Builder, source: ir.Value, graph: object, *, transposed: bool = False) -> ir.Value:
        """What stands for `source` in `graph`, made once; `transposed`: with its last two axes exchanged behind it."""
        name, key = source.name or "weight", (source, self.axis)
        parts = [op.shared((end, *key), functools.partial(op.const, array, f"{name}_{end}")) for end, array in self.stored().items()]
        value = op.shared(("decoded", *key, graph), lambda: self.nodes(op, parts))
        if not transposed:
            return value
        rank = self.codes.ndim
        order = [*range(rank - 2), rank - 1, rank - 2]
        return op.shared(("transposed", *key, graph), lambda: op.Transpose(value, perm=order))


@dataclasses.dataclass(frozen=True)
class Blocked(Form):
    """(codes - zero_point) * scale; one scale for `block` neighbours along `axis`. `block` 0: `axis` is the channel axis, `scale` a vector."""

    scale: Array
    zero_point: Array | None

    def stored(self) -> Mapping[str, Array]:
        zero = {} if self.zero_point is None else {"zero_point": self.zero_point}
        return {np.dtype(self.codes.dtype).name: self.codes, "scale": self.scale, **zero}

    def nodes(self, op: Builder, parts: Sequence[ir.Value]) -> ir.Value:
        return op.DequantizeLinear(*parts, axis=self.axis, block_size=self.block or None)


@dataclasses.dataclass(frozen=True)
class Tabled(Form):
    """table[codes] * scale; `axis` is that of the input features.

    Attributes:
        table: [entries], or one for each row: the shape of the codes with the entries along `axis`.
        scale: None; with a `block`, the shape of the codes with `axis` split into blocks and 1; else with 1 along `axis`.
    """

    axis: int
    table: Array
    scale: Array | None

    def stored(self) -> Mapping[str, Array]:
        scale = {} if self.scale is None else {"scale": self.scale}
        return {np.dtype(self.codes.dtype).name: self.codes, "codebook": self.table, **scale}

    def nodes(self, op: Builder, parts: Sequence[ir.Value]) -> ir.Value:
        (codes, table, *scales), shape = parts, self.codes.shape
        index = op.Cast(codes, to=ir.DataType.INT32)
        value: ir.Value = op.Gather(table, index, axis=0) if self.table.ndim == 1 else op.GatherElements(table, index, axis=self.axis)
        if self.scale is None:
            return value
        split = (*shape[: self.axis], self.scale.shape[self.axis], self.block, *shape[self.axis + 1 :])
        if self.block:
            value = op.Reshape(value, op.const(np.array(split, np.int64), "blocks"))
        value = op.Mul(value, *scales)
        return op.Reshape(value, op.const(np.array(shape, np.int64), "shape")) if self.block else value


def blocked(shape: tuple[int, ...], axis: int, rows: Array, grid: Steps, codes: Array) -> Blocked:
    """Codes [rows, in] on a grid of blocks, in the `shape` of the constant, whose input features lie along `axis`."""
    moved, kind = (*shape[:axis], *shape[axis + 1 :]), _TYPES[grid.bits, grid.low < 0]

    def back(array: Array, dtype: Any) -> Array:
        if grid.whole:
            return np.ascontiguousarray(array[:, 0].astype(dtype))
        return np.ascontiguousarray(np.moveaxis(array.reshape(*moved, -1), -1, axis).astype(dtype))

    stored = np.ascontiguousarray(np.moveaxis(codes.reshape(*moved, -1), -1, axis)).astype(kind)
    zero = None if grid.low < 0 else back(grid.zero, kind)
    where, block = (1 - axis, 0) if grid.whole else (axis, grid.block)
    return Blocked(stored, where, block, {"axis": where, "block": block, **_worst(rows, grid.decode(codes))}, back(grid.scale, np.float32), zero)


def tabled(shape: tuple[int, ...], axis: int, rows: Array, grid: CodebookGrid, codes: Array) -> Tabled:
    """Codes [rows, in] of a codebook, likewise."""
    moved = (*shape[:axis], *shape[axis + 1 :])

    def back(array: Array) -> Array:
        return np.ascontiguousarray(np.moveaxis(array.reshape(*moved, -1), -1, axis))

    stored = back(codes).astype(ml_dtypes.uint4 if grid.entries <= 16 else np.uint8)
    table = grid.table if grid.table.ndim == 1 else back(grid.table)
    scale = None if grid.scale is None else back(grid.scale)
    if scale is not None and grid.block:
        scale = np.expand_dims(scale, axis + 1)
    facts = {"axis": axis, "block": grid.block, "codes": grid.kind, "entries": grid.entries, "tables": grid.table.size // grid.entries}
    return Tabled(stored, axis, grid.block, {**facts, **_worst(rows, grid.decode(codes))}, table, scale)


def _worst(rows: Array, decoded: Array) -> dict[str, float]:
    """The largest ||row - decoded|| / ||row||, for the report."""
    off = np.square(decoded - rows).sum(1) / np.maximum(np.square(rows, dtype=np.float64).sum(1), 1e-300)
    return {"worst_error": round(float(np.sqrt(off.max())), 6)}


def _stored_bytes(array: Array) -> int:
    bits = 4 if array.dtype in (ml_dtypes.int4, ml_dtypes.uint4) else 8 * array.dtype.itemsize
    return -(-array.size * bits // 8)
