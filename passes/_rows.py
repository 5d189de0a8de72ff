"""One activation scale for each row of a tensor, in standard operators: a token that is much larger than the others ruins its own row only.

DynamicQuantizeLinear has one scale for the whole tensor. Rows that are divided by their largest magnitude all reach to 1 or -1, so that one
scale fits them all; what was divided out is multiplied back behind the multiply, as x @ W is linear in each row of x.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.analysis.activations import LinearInputs
from graphopt.core import Context
from graphopt.graph import attr
from graphopt.rewrite import Builder

_TINY = float(np.finfo(np.float32).tiny)  # a row of zeros is divided by it and stays zero
_UNEVEN = 1.5  # rows=auto: rounding error of one scale for all, in that of one scale for each row


def wants_rows(node: ir.Node, rows: str, ctx: Context) -> bool:
    """Whether each row of the activation of a MatMul or Gemm gets a scale of its own; `auto` asks the samples.

    Raises:
        SampleError: `auto` without samples.
    """
    x = node.inputs[0]
    if rows == "false" or attr(node, "transA", 0) or x is None or x.shape is None or len(x.shape) < 2:
        return False
    if rows == "true":
        return True
    seen = ctx.get(LinearInputs()).get(x)
    return seen is not None and seen.unevenness > _UNEVEN


def row_scale(op: Builder, x: ir.Value, graph: object) -> ir.Value:
    """max |x| over the last axis, [..., 1], made once for all readers in a graph."""

    def build() -> ir.Value:
        largest = op.ReduceMax(op.Abs(x), op.const(np.array([-1], np.int64), "axes"), keepdims=1)
        value: ir.Value = op.Max(largest, op.const(np.array(_TINY, np.float32), "tiny"))
        return value

    return op.shared(("row scale", x, graph), build)


def even_rows(op: Builder, x: ir.Value, graph: object) -> ir.Value:
    """x with every row divided by its largest magnitude."""
    return op.shared(("even rows", x, graph), lambda: op.Div(x, row_scale(op, x, graph)))
