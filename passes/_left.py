"""Products whose stored operand stands on the left, turned round: W x = (x^T W^T)^T, as everything that reads weights wants them on the right."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.core import Context
from graphopt.graph import is_constant, rank, used_once
from graphopt.rewrite import Builder, Match, RewritePass

from ._eligible import not_finite, numbers, passed_over


@dataclasses.dataclass(frozen=True)
class LeftMatch(Match):
    """W [out, in] @ x [..., in, columns]."""

    weight: ir.Value
    x: ir.Value


@dataclasses.dataclass(frozen=True)
class TurnLeftWeights(RewritePass[LeftMatch]):
    """Exact. Only for a float32 matrix that nothing else reads; `include` and `exclude` as for quantize."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    anchors: ClassVar[frozenset[str]] = frozenset({"MatMul"})

    def match(self, node: ir.Node, ctx: Context) -> LeftMatch | None:
        weight, x = node.inputs
        if weight is None or x is None or not is_constant(weight) or is_constant(x) or rank(weight) != 2 or (rank(x) or 0) < 2:
            return None
        if not used_once(weight) or weight.dtype != ir.DataType.FLOAT or x.dtype != ir.DataType.FLOAT or min(numbers(weight).shape) < 2:
            return None
        fit = passed_over(node, self.include, self.exclude) is None and not_finite(weight) is None
        return LeftMatch((node,), (node.outputs[0],), weight, x) if fit else None

    def build(self, op: Builder, m: LeftMatch) -> Sequence[ir.Value]:
        size = rank(m.x) or 2
        swap = [*range(size - 2), size - 1, size - 2]
        turned = op.const(np.ascontiguousarray(numbers(m.weight).T), f"{m.weight.name}_turned")
        return [op.Transpose(op.MatMul(op.Transpose(m.x, perm=swap), turned), perm=swap)]
