"""A quantized constant as the nodes that read it want it: codes and scales once in the model, each node once in every graph that reads them."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from graphopt.core import Array
from graphopt.rewrite import Builder


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
