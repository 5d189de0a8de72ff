"""How a coded constant stands in the graph: DequantizeLinear of blocks, or Gather of a codebook; stored once, whoever reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphopt.compress.quantize.codebooks import Lookup
from graphopt.compress.quantize.grids import Steps
from graphopt.core.contract import Array
from graphopt.rewrite.builder import Builder

_TYPES: Mapping[tuple[int, bool], Any] = {(4, True): ml_dtypes.int4, (4, False): ml_dtypes.uint4, (8, True): np.int8, (8, False): np.uint8}


class Form(Protocol):
    """A constant as codes, in its own shape. `error`: ||w - decoded|| / ||w|| of the worst output feature or row."""

    @property
    def codes(self) -> Array: ...
    @property
    def error(self) -> float: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def facts(self) -> Mapping[str, Any]: ...
    def decoded(self, op: Builder, source: ir.Value, axis: int, graph: object) -> ir.Value:
        """The decoded constant in `graph`, made once for `source` with the input features along `axis`."""
        ...


@dataclasses.dataclass(frozen=True)
class Blocked:
    """(codes - zero_point) * scale; one scale for `block` neighbours along `axis`. `block` 0: `axis` is the channel axis, `scale` a vector."""

    codes: Array
    scale: Array
    zero_point: Array | None
    axis: int
    block: int
    error: float

    @property
    def nbytes(self) -> int:
        zeros = 0 if self.zero_point is None else _stored_bytes(self.zero_point)
        return _stored_bytes(self.codes) + self.scale.nbytes + zeros

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"axis": self.axis, "block": self.block}

    def decoded(self, op: Builder, source: ir.Value, axis: int, graph: object) -> ir.Value:
        return decoded(op, source, self, graph)


@dataclasses.dataclass(frozen=True)
class Tabled:
    """table[codes] * scale.

    Attributes:
        table: [entries], or one for each row: the shape of the codes with the entries along `axis`.
        scale: None; with a `block`, the shape of the codes with `axis` split into blocks and 1; else with 1 along `axis`.
        axis: of the input features.
    """

    codes: Array
    table: Array
    scale: Array | None
    axis: int
    block: int
    error: float
    kind: str

    @property
    def nbytes(self) -> int:
        return _stored_bytes(self.codes) + self.table.nbytes + (0 if self.scale is None else self.scale.nbytes)

    @property
    def facts(self) -> Mapping[str, Any]:
        entries = self.table.shape[0 if self.table.ndim == 1 else self.axis]
        return {"axis": self.axis, "block": self.block, "codes": self.kind, "entries": entries, "tables": self.table.size // entries}

    def decoded(self, op: Builder, source: ir.Value, axis: int, graph: object) -> ir.Value:
        value: ir.Value = op.shared(("decoded", source, axis, graph), lambda: self._nodes(op, source))
        return value

    def _nodes(self, op: Builder, source: ir.Value) -> Any:
        name, key, shape = source.name or "weight", (source, self.axis), self.codes.shape
        codes = op.shared(("codes", *key), lambda: op.const(self.codes, f"{name}_{np.dtype(self.codes.dtype).name}"))
        table = op.shared(("table", *key), lambda: op.const(self.table, f"{name}_codebook"))
        index = op.Cast(codes, to=ir.DataType.INT32)
        value: ir.Value = op.Gather(table, index, axis=0) if self.table.ndim == 1 else op.GatherElements(table, index, axis=self.axis)
        scale = self.scale
        if scale is None:
            return value
        stored = op.shared(("scale", *key), lambda: op.const(scale, f"{name}_scale"))
        parts = (*shape[: self.axis], scale.shape[self.axis], self.block, *shape[self.axis + 1 :])
        if self.block:
            value = op.Reshape(value, op.const(np.array(parts, np.int64), "blocks"))
        value = op.Mul(value, stored)
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
    return Blocked(stored, back(grid.scale, np.float32), zero, where, block, worst_error(rows, grid.decode(codes)))


def tabled(shape: tuple[int, ...], axis: int, rows: Array, grid: Lookup, codes: Array) -> Tabled:
    """Codes [rows, in] of a codebook, likewise."""
    moved = (*shape[:axis], *shape[axis + 1 :])

    def back(array: Array) -> Array:
        return np.ascontiguousarray(np.moveaxis(array.reshape(*moved, -1), -1, axis))

    stored = back(codes).astype(ml_dtypes.uint4 if grid.entries <= 16 else np.uint8)
    table = grid.table if grid.table.ndim == 1 else back(grid.table)
    scale = None if grid.scale is None else back(grid.scale)
    if scale is not None and grid.block:
        scale = np.expand_dims(scale, axis + 1)
    return Tabled(stored, table, scale, axis, grid.block, worst_error(rows, grid.decode(codes)), grid.kind)


def worst_error(rows: Array, decoded: Array) -> float:
    """The largest ||row - decoded|| / ||row||."""
    off = np.square(decoded - rows).sum(1) / np.maximum(np.square(rows, dtype=np.float64).sum(1), 1e-300)
    return float(np.sqrt(off.max()))


def _stored_bytes(array: Array) -> int:
    bits = 4 if array.dtype in (ml_dtypes.int4, ml_dtypes.uint4) else 8 * array.dtype.itemsize
    return -(-array.size * bits // 8)


class Codes(Protocol):
    """(codes - zero_point) * scale, in the shape of the constant; `block` > 0: one scale for so many neighbours along `axis`."""

    @property
    def codes(self) -> Array: ...
    @property
    def scale(self) -> Array: ...
    @property
    def zero_point(self) -> Array | None: ...
    @property
    def axis(self) -> int | None: ...
    @property
    def block(self) -> int: ...


def decoded(op: Builder, source: ir.Value, coded: Codes, graph: Any, *, transposed: bool = False) -> ir.Value:
    """The DequantizeLinear of `source` in `graph`; `transposed`: with its last two axes exchanged behind it."""
    name, key = source.name or "weight", (source, coded.axis)

    def stored(part: str, array: Array, suffix: str) -> ir.Value:
        return op.shared((part, *key), lambda: op.const(array, f"{name}_{suffix}"))

    parts = [stored("codes", coded.codes, np.dtype(coded.codes.dtype).name), stored("scale", coded.scale, "scale")]
    if coded.zero_point is not None:
        parts.append(stored("zero", coded.zero_point, "zero_point"))
    block = coded.block or None
    value: ir.Value = op.shared(("decoded", *key, graph), lambda: op.DequantizeLinear(*parts, axis=coded.axis, block_size=block))
    if not transposed:
        return value
    rank = coded.codes.ndim
    order = [*range(rank - 2), rank - 1, rank - 2]
    return op.shared(("transposed", *key, graph), lambda: op.Transpose(value, perm=order))
