"""Which stored weights may be quantized, and why the others stay float; what the passes share that quantize."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.analysis.linear import Embedding, Linear, StoredOperands
from graphopt.compress.weights import not_finite
from graphopt.core.contract import Context
from graphopt.graph.questions import consumers, is_constant

LONGEST_SUM = 2**31 // (255 * 128)  # products of 8-bit numbers that a 32-bit sum is sure to hold
_WORTH = 4096  # bytes; a table that saves less is not worth the nodes that decode it


def quantized_before(ctx: Context) -> int:
    """How many stored operands are integers already."""
    return sum(x.quantized for x in ctx.get(StoredOperands(casts=True)).values())


def say_nothing_to_do(ctx: Context, before: int) -> None:
    """The remark of a pass that changed nothing; `before`: what `quantized_before` counted."""
    why = f"{before} weights are quantized already" if before else "no MatMul, Gemm or Gather reads a stored weight that fits"
    ctx.remarks.missed("", f"nothing to quantize: {why}")


def unfit_linear(linear: Linear, *, integer: bool = True) -> str | None:
    """`integer`: the products are added as 32-bit integers."""
    weight = linear.weight
    assert weight.const_value is not None
    if linear.x.dtype != ir.DataType.FLOAT:
        return f"its input is {linear.x.dtype}, not FLOAT"
    if is_constant(linear.x):
        return "both operands are stored; canonicalize folds them"
    if weight.const_value.size == 0:
        return f"the weight {list(weight.const_value.shape)} is empty"
    if integer and linear.in_features > LONGEST_SUM:
        return f"a sum over {linear.in_features} products of 8-bit numbers may leave 32 bits; the limit is {LONGEST_SUM}"
    return not_finite(weight)


def unfit_table(e: Embedding) -> str | None:
    if e.node.outputs[0].dtype != ir.DataType.FLOAT:
        return f"its rows are {e.node.outputs[0].dtype}, not FLOAT"
    saved = 4 * e.rows * e.width - e.rows * (e.width + 4)
    if saved < _WORTH:
        return f"the table [{e.rows},{e.width}] would shrink by {max(saved, 0)} bytes only"
    floats = [n.name for n in consumers(e.table) if n.op_type not in ("Gather", "MatMul", "Gemm", "Transpose", "Identity", "Cast")]
    if floats:
        return f"`{floats[0]}` reads the float table too, which would be stored twice"
    return not_finite(e.table)
