"""The kernels of ONNX Runtime's CUDA provider, for machines without one.

From docs/OperatorKernels.md of ONNX Runtime at commit 001d12d2 (2026, main after 1.24; it lists ONNX opset 24 and 25), without operators that
inference of Transformers never meets (sequences, RNNs, beam search, training). Where the provider is installed its own registry is read
instead. A word of letters says the types of the first tensors: f float, h float16, b bfloat16, d double, i int32 and int64, s 8- and 16-bit
and unsigned integers, l bool. Behind it stand the operators that take them, each with the versions of its schema, first and last.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from graphopt.driver.lowering.ort_target import KernelDef

from ._vendored import VENDOR

_LETTERS = {
    "f": ("float",),
    "h": ("float16",),
    "b": ("bfloat16",),
    "d": ("double",),
    "i": ("int32", "int64"),
    "s": ("int8", "uint8", "int16", "uint16", "uint32", "uint64"),
    "l": ("bool",),
}

_STANDARD = """
fhd ArgMax:1-13 ArgMin:1-13 AveragePool:7-21 BatchNormalization:7-15 Ceil:6-13 Conv:1-21 ConvTranspose:1-11 Cos:7 DepthToSpace:1-13 Dropout:7-12
Einsum:12 Elu:6 Erf:9-12 Exp:6-12 Floor:6-13 Gemm:7-12 GlobalAveragePool:1 GlobalMaxPool:1 Greater:7-8 HardSigmoid:6-21 HardSwish:14-21
InstanceNormalization:6 IsNaN:9-12 LeakyRelu:6-16 Less:7-8 Log:6-13 LogSoftmax:1-13 MatMul:1-12 MaxPool:1-11 PRelu:7-16 Pad:2-12 Pow:7-11
RandomNormal:1 RandomUniform:1 Reciprocal:6-13 ReduceLogSum:1-18 ReduceLogSumExp:1-18 ReduceSumSquare:1-18 Relu:6-12 Round:11 Selu:6 Sigmoid:6-12
Sin:7 Softmax:1-12 Softplus:1 Softsign:1 SpaceToDepth:1-13 Sqrt:6-12 Tanh:6-12 ThresholdedRelu:10
fhbd AveragePool:22 Conv:22 Dropout:13 Erf:13 Exp:13 Gelu:20 Gemm:13 HardSigmoid:22 HardSwish:22 IsInf:20 IsNaN:13-20 LayerNormalization:17
MatMul:13 Max:6-11 Min:6-11 RMSNormalization:23 Relu:13-14 Sigmoid:13 Softmax:13 Sqrt:13 Sum:6-13 Tanh:13
fhbdisl Cast:13-23 Compress:9-11 Concat:4-13 ConstantOfShape:9 Expand:8-13 Flatten:1-13 Gather:1-13 GatherElements:11-13 Identity:1-19 Reshape:1-23
Scan:8-19 ScatterElements:11-18 ScatterND:11-18 Shape:1-23 Size:1-13 Slice:1-13 Split:2-18 Squeeze:1-23 TensorScatter:24 Transpose:1-23 Trilu:14
Unsqueeze:1-23
fhdi Add:7-12 CumSum:14 Div:7-12 Greater:9-13 GreaterOrEqual:12-16 Less:9-13 LessOrEqual:12-16 Mod:10-12 Mul:7-12 Neg:6-12 Pow:12 ReduceL1:1-18
ReduceL2:1-18 ReduceMax:1-18 ReduceMean:1-18 ReduceMin:1-18 ReduceProd:1-18 ReduceSum:1-12 Resize:10-19 Sub:7-12 Tile:6-12 TopK:1-11
fhbdi Add:13 Div:13 Max:12-13 Min:12-13 Mod:13 Mul:13 Neg:13 Pow:13-15 ReduceSum:13 Sub:13 Tile:13
fhbdis Abs:13 Add:14 Div:14 Mul:14 Sign:13 Sub:14 Where:16
l And:7 If:1-19 Not:1 Or:7 Xor:7
fhdis Abs:6-12 Clip:12-13 Shrink:9 Where:9-15
fdi CumSum:11-13 EyeLike:9 Range:11
f Clip:6-11 QuantizeLinear:10-18
fhb Attention:23-24 RotaryEmbedding:23
fhdil Equal:11-13 GatherND:11-12
i Loop:1-19 OneHot:11
s DequantizeLinear:10-21 MatMulInteger:10
fd IsInf:10-19
fh QuantizeLinear:19-21
fhbdil GatherND:13
fhdisl Cast:6-12
fhdl Pad:13-18
fhds MaxPool:12
fhil NonZero:9-13
il Equal:7-10
"""

_OWN = """
fhb Attention:1 MatMulBnb4:1 MatMulNBits:1 MoE:1 MultiHeadAttention:1 RotaryEmbedding:1 SkipLayerNormalization:1 SkipSimplifiedLayerNormalization:1
fhbd BiasGelu:1 FastGelu:1 FusedMatMul:1 Gelu:1 QuickGelu:1
fh LongformerAttention:1 PackedAttention:1 PackedMultiHeadAttention:1 RelativePositionBias:1
hb GroupQueryAttention:1 QMoE:1
s GatherBlockQuantized:1 QAttention:1
fhd BiasSoftmax:1
i EmbedLayerNormalization:1
"""


@functools.cache
def cuda_table() -> tuple[KernelDef, ...]:
    return (*_read(_STANDARD, ""), *_read(_OWN, VENDOR))


def _read(table: str, domain: str) -> Iterator[KernelDef]:
    types = frozenset[str]()
    for word in table.split():
        op_type, _, versions = word.partition(":")
        if not versions:
            types = frozenset(name for letter in word for name in _LETTERS[letter])
            continue
        first, _, last = versions.partition("-")
        yield KernelDef(domain, op_type, int(first), int(last or first), (types,))
