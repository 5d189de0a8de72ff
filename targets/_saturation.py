"""CPUs without VNNI add two products of uint8 and int8 in 16 bits, and clip the sum (vpmaddubsw): which weights are safe there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.linear import Linear, StoredOperands
from graphopt.core.contract import Context
from graphopt.graph.questions import constant, producer
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.match import Match, Miss
from graphopt.rewrite.rules import RewritePass

from ._integer import why_float

_SIGNED, _UNSIGNED = 64, 127  # 2 * 255 * 64 < 2^15; uint8 weights are multiplied with seven bits by convention
EVERYWHERE = "any CPU"
WITH_VNNI = "CPUs that add 8-bit products in 32 bits: AVX-VNNI, AVX512-VNNI, AMX, ARM dot product"


def saturates(weight: ir.Value) -> bool:
    """Whether sums of two products with these codes may leave 16 bits."""
    codes = constant(weight)
    if codes is None or not codes.size:
        return False
    return int(np.abs(codes.astype(np.int16)).max()) > _most(weight)


def _most(weight: ir.Value) -> int:
    """The largest code that is safe."""
    return _UNSIGNED if weight.dtype == ir.DataType.UINT8 else _SIGNED


def exceeding(model: ir.Model, names: Iterable[str]) -> list[str]:
    """Those of the named weights that are safe with VNNI only."""
    known = model.graph.initializers
    return [name for name in names if name in known and saturates(known[name])]


@dataclasses.dataclass(frozen=True)
class RangeMatch(Match):
    linear: Linear
    x: ir.Value

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"weight": self.linear.weight.name, "most": _most(self.linear.weight)}


@dataclasses.dataclass(frozen=True)
class GuardRange(RewritePass[RangeMatch]):
    """An integer multiply whose weight is not safe without VNNI reads its float input again, and stays float (weight-only).

    Not exact: the activation is no longer rounded. `vnni=false` asks for it, so that neither time nor loss takes it back.
    """

    exact: ClassVar[bool] = False
    anchors: ClassVar[frozenset[str]] = frozenset({"MatMul", "Gemm"})

    @property
    def binding(self) -> bool:
        return True

    def run(self, model: ir.Model, ctx: Context) -> int:
        mark = len(ctx.remarks)
        changes = super().run(model, ctx)
        for remark in ctx.remarks.since(mark):
            if remark.kind == "applied":
                weight, most = remark.facts["weight"], remark.facts["most"]
                text = f"`{weight}` has codes beyond {most}, which clip without VNNI; it is multiplied as float (quantize it with reduce-range=true)"
                ctx.remarks.warning(remark.node, text, **remark.facts)
        return changes

    def match(self, node: ir.Node, ctx: Context) -> RangeMatch | Miss | None:
        linear = ctx.get(StoredOperands()).get(node)
        if not isinstance(linear, Linear) or linear.grid is None or why_float(linear) is not None or not saturates(linear.weight):
            return None
        decode = producer(linear.x, "DequantizeLinear")
        quantized = None if decode is None else producer(decode.inputs[0], "DynamicQuantizeLinear", "QuantizeLinear")
        if quantized is None or quantized.inputs[0] is None:
            return Miss(node, f"`{linear.weight.name}` may clip without VNNI, and its activation comes as codes; quantize it with reduce-range=true")
        return RangeMatch((node,), (node.outputs[0],), linear, quantized.inputs[0])

    def build(self, op: Builder, m: RangeMatch) -> Sequence[ir.Value]:
        node = m.nodes[0]
        kept = {name: a.value for name, a in node.attributes.items()}
        return [op.node(node.op_type, (m.x, *node.inputs[1:]), **kept)]
