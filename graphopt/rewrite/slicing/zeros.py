"""Where entries are zero because entries elsewhere are: what a removal starts at counts as zero, and a sum over its entries loses nothing then."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.graph.questions import consumers

_FIRST = ("Div", "Pow", "DequantizeLinear", "QuantizeLinear", "Gather", "Slice", "Split", "Reshape", "Squeeze", "Unsqueeze", "Expand")
_ALWAYS = (
    "Abs Asin Asinh Atan Atanh Attention Cast CastLike Ceil Celu Concat Dropout DynamicQuantizeLinear Einsum Elu Erf Flatten Floor Gelu HardSwish "
    "Identity LayerNormalization LeakyRelu LpNormalization MatMul Mish Mul Neg PRelu RMSNormalization ReduceL1 ReduceL2 ReduceMax ReduceMean "
    "ReduceMin ReduceSum ReduceSumSquare Relu RotaryEmbedding Round Selu Shrink Sign Sin Sinh Softsign Sqrt Swish Tan Tanh ThresholdedRelu Transpose"
)
_TOGETHER = frozenset({"Add", "Sub", "Sum", "Mean", "Max", "Min"})  # zero where all operands are
_BIAS = {"Gemm": 2, "Conv": 2}


def zeros(start: ir.Value) -> set[ir.Value]:
    """The values whose entries are zero where those of `start` that they belong to are: each other one may hold something else there.

    Norms count as such; that they are taken over fewer features is told apart.
    """
    found, todo = {start}, [start]
    while todo:
        for node in consumers(todo.pop()):
            fresh = [v for v in node.outputs if v not in found] if _keeps(node, found) else []
            found.update(fresh)
            todo += fresh
    return found


def _keeps(node: ir.Node, zero: set[ir.Value]) -> bool:
    if node.domain not in ("", "ai.onnx"):
        return False
    if node.op_type in _ALWAYS.split():
        return True
    if node.op_type in _FIRST:
        return node.inputs[0] in zero
    if node.op_type in _BIAS:
        return len(node.inputs) <= _BIAS[node.op_type] or node.inputs[_BIAS[node.op_type]] is None
    return node.op_type in _TOGETHER and all(v in zero for v in node.inputs)
