"""The TensorRT provider of ONNX Runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import onnx_ir as ir

from graphopt.graph.questions import attr, constant

from ._ort import HalfPrecision

# The operator matrix of onnx-tensorrt (docs/operators.md), 8.4 and what 8.6 and 10 added.
_MATRIX = """
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast Ceil Celu Clip Concat Constant
ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten
Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample
GroupNormalization GRU HardSigmoid HardSwish Identity If InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log
LogSoftmax Loop LRN LSTM LpNormalization LpPool MatMul Max MaxPool Mean MeanVarianceNormalization Min Mish Mod Mul Neg NonMaxSuppression
NonZero Not OneHot Or Pad Pow PRelu QuantizeLinear RandomUniform RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum
ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence RNN RoiAlign Round
Scan ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze
Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Upsample Where Xor
"""
_PARSED = frozenset(_MATRIX.split())


@dataclasses.dataclass(frozen=True)
class Tensorrt(HalfPrecision):
    """TensorRT through ONNX Runtime: it builds an engine of the graph and fuses by itself; int8 goes in as QDQ and stays QDQ.

    Args:
        dtype: float16 or bfloat16 converts the model (pass `to-half`); the engine may use that type then.
    """

    provider: ClassVar[str] = "TensorrtExecutionProvider"
    package: ClassVar[str] = "onnxruntime-gpu, and TensorRT"
    has_kernels: ClassVar[bool] = False

    def refusal(self, node: ir.Node, opset: int | None = None) -> str | None:
        if node.domain not in ("", "ai.onnx") or node.op_type not in _PARSED:
            return f"TensorRT has no parser for {node.domain + '::' if node.domain else ''}{node.op_type}"
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            return _not_symmetric(node)
        return None

    def providers(self) -> Sequence[str | tuple[str, Mapping[str, str]]]:
        return (self.provider, "CUDAExecutionProvider")


def _not_symmetric(node: ir.Node) -> str | None:
    """TensorRT quantizes symmetrically, in int8: every zero point is 0."""
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if zero is None:
        return f"TensorRT takes {node.op_type} of int8 only" if attr(node, "output_dtype", 3) not in (0, 3) else None
    codes = constant(zero)
    if codes is None or bool(codes.astype(int).any()):
        return f"TensorRT takes {node.op_type} with the zero point 0 only"
    assert zero.const_value is not None
    return None if zero.const_value.dtype in (ir.DataType.INT8, ir.DataType.INT4) else f"TensorRT takes {node.op_type} of int8 only"
