"""Weights that somebody else stored as integers and decodes by Cast and Mul, in the standard form: DequantizeLinear."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.core.contract import Context
from graphopt.graph.questions import attr, constant, is_constant, producer
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.match import Match
from graphopt.rewrite.rules import RewritePass

_CODES = (ir.DataType.INT8, ir.DataType.UINT8)


@dataclasses.dataclass(frozen=True)
class DecodeMatch(Match):
    codes: ir.Value
    scale: np.ndarray[Any, Any]
    axis: int | None


@dataclasses.dataclass(frozen=True)
class DecodeWeights(RewritePass[DecodeMatch]):
    """Cast(codes) * scale -> DequantizeLinear(codes, scale, axis); exact: both round the same product once."""

    anchors: ClassVar[frozenset[str]] = frozenset({"Mul"})

    def match(self, node: ir.Node, ctx: Context) -> DecodeMatch | None:
        for side, other in (node.inputs, node.inputs[::-1]):
            cast = producer(side, "Cast")
            scale = constant(other) if cast is not None else None
            if cast is None or scale is None or attr(cast, "to") != ir.DataType.FLOAT or scale.dtype != np.float32:
                continue
            codes = cast.inputs[0]
            if codes is None or not is_constant(codes) or codes.dtype not in _CODES or codes.shape is None or len(codes.shape) < scale.ndim:
                continue
            axes = [k for k, size in enumerate(scale.shape, start=len(codes.shape) - scale.ndim) if size != 1]
            if len(axes) > 1 or any(scale.size != codes.shape[k] for k in axes):
                continue
            flat = scale.reshape(-1) if axes else scale.reshape(())
            return DecodeMatch((cast, node), (node.outputs[0],), codes, flat, axes[0] if axes else None)
        return None

    def build(self, op: Builder, m: DecodeMatch) -> Sequence[ir.Value]:
        return [op.DequantizeLinear(m.codes, op.const(m.scale, f"{m.codes.name}_scale"), axis=m.axis)]
