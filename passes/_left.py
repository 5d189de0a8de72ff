"""Products whose stored operand stands on the left, turned round: W x = (x^T W^T)^T, as everything that reads weights wants them on the right.

A Gemm too: alpha * A' B' + C with a stored A is (alpha * B'^T A'^T + C^T)^T. A column that it adds is then a bias; what else it adds is added behind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.compress.select import passed_over
from graphopt.compress.weights import not_finite, numbers
from graphopt.core.contract import Array, Context
from graphopt.graph.questions import attr, constant, is_constant, rank, used_once
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.match import Match
from graphopt.rewrite.rules import RewritePass


@dataclasses.dataclass(frozen=True)
class LeftMatch(Match):
    """W [out, in] @ x [..., in, columns]; a Gemm reads both of them as its attributes say, and may add `third`."""

    weight: ir.Value
    x: ir.Value
    third: ir.Value | None


@dataclasses.dataclass(frozen=True)
class TurnLeftWeights(RewritePass[LeftMatch]):
    """Exact. Only for a float32 matrix that nothing else reads; `include` and `exclude` as for quantize."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    anchors: ClassVar[frozenset[str]] = frozenset({"MatMul", "Gemm"})

    def match(self, node: ir.Node, ctx: Context) -> LeftMatch | None:
        weight, x, third = (*node.inputs, None)[:3]
        if weight is None or x is None or not is_constant(weight) or is_constant(x) or rank(weight) != 2 or (rank(x) or 0) < 2:
            return None
        if not used_once(weight) or weight.dtype != ir.DataType.FLOAT or x.dtype != ir.DataType.FLOAT or min(numbers(weight).shape) < 2:
            return None
        fit = passed_over(node, self.include, self.exclude) is None and not_finite(weight) is None
        return LeftMatch((node,), (node.outputs[0],), weight, x, third) if fit else None

    def build(self, op: Builder, m: LeftMatch) -> Sequence[ir.Value]:
        size = rank(m.x) or 2
        swap = [*range(size - 2), size - 1, size - 2]
        node = m.nodes[0]
        array = numbers(m.weight) if attr(node, "transA", 0) else numbers(m.weight).T
        turned = op.const(np.ascontiguousarray(array), f"{m.weight.name}_turned")
        x = m.x if attr(node, "transB", 0) else op.Transpose(m.x, perm=swap)
        if node.op_type == "MatMul":
            return [op.Transpose(op.MatMul(x, turned), perm=swap)]
        beta, column = attr(node, "beta", 1.0), _column(m.third, turned)
        bias = [] if column is None else [op.const(column, f"{m.third.name if m.third else ''}_turned")]
        product = op.Transpose(op.Gemm(x, turned, *bias, alpha=attr(node, "alpha", 1.0), beta=beta if bias else None), perm=swap)
        if m.third is None or bias:
            return [product]
        added = m.third if beta == 1.0 else op.Mul(m.third, op.const(np.array(beta, np.float32), "beta"))
        return [op.Add(product, added)]


def _column(third: ir.Value | None, turned: ir.Value) -> Array | None:
    """A constant [out, 1] as the bias [out] of the turned product."""
    array = constant(third)
    if array is None or turned.shape is None or array.shape != (turned.shape[1], 1):
        return None
    return np.ascontiguousarray(array[:, 0])
