"""The kernels of ONNX Runtime's CUDA provider, for machines without one.

From docs/OperatorKernels.md of ONNX Runtime at commit 001d12d2 (2026, main after 1.24; it lists ONNX opset 24 and 25), without operators that
inference of Transformers never meets (sequences, RNNs, beam search, training). Where the provider is installed its own registry is read
instead. A line is an operator, then ranges of the version of its schema with the types of its first tensors: f float, h float16, b bfloat16,
d double, i int32 and int64, s 8- and 16-bit and unsigned integers, l bool. An open range such as `14+` serves schemas of exactly version 14.
"""

from __future__ import annotations

import functools

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

STANDARD = """
Abs 6-12 fhdis 13+ fhbdis
Add 7-12 fhdi 13-13 fhbdi 14+ fhbdis
And 7+ l
ArgMax 1-11 fhd 12-12 fhd 13+ fhd
ArgMin 1-11 fhd 12-12 fhd 13+ fhd
Attention 23-23 fhb 24+ fhb
AveragePool 7-9 fhd 10-10 fhd 11-18 fhd 19-21 fhd 22+ fhbd
BatchNormalization 7-8 fhd 9-13 fhd 14-14 fhd 15+ fhd
Cast 6-8 fhdisl 9-12 fhdisl 13-18 fhbdisl 19-20 fhbdisl 21-22 fhbdisl 23+ fhbdisl
Ceil 6-12 fhd 13+ fhd
Clip 6-10 f 11-11 f 12-12 fhdis 13+ fhdis
Compress 9-10 fhbdisl 11+ fhbdisl
Concat 4-10 fhbdisl 11-12 fhbdisl 13+ fhbdisl
ConstantOfShape 9+ fhbdisl
Conv 1-10 fhd 11-21 fhd 22+ fhbd
ConvTranspose 1-10 fhd 11+ fhd
Cos 7+ fhd
CumSum 11-13 fdi 14+ fhdi
DepthToSpace 1-10 fhd 11-12 fhd 13+ fhd
DequantizeLinear 10-12 s 13-18 s 19-20 s 21+ s
Div 7-12 fhdi 13-13 fhbdi 14+ fhbdis
Dropout 7-9 fhd 10-11 fhd 12-12 fhd 13+ fhbd
Einsum 12+ fhd
Elu 6+ fhd
Equal 7-10 il 11-12 fhdil 13+ fhdil
Erf 9-12 fhd 13+ fhbd
Exp 6-12 fhd 13+ fhbd
Expand 8-12 fhbdisl 13+ fhbdisl
EyeLike 9+ fdi
Flatten 1-8 fhbdisl 9-10 fhbdisl 11-12 fhbdisl 13+ fhbdisl
Floor 6-12 fhd 13+ fhd
Gather 1-10 fhbdisl 11-12 fhbdisl 13+ fhbdisl
GatherElements 11-12 fhbdisl 13+ fhbdisl
GatherND 11-11 fhdil 12-12 fhdil 13+ fhbdil
Gelu 20+ fhbd
Gemm 7-8 fhd 9-10 fhd 11-12 fhd 13+ fhbd
GlobalAveragePool 1+ fhd
GlobalMaxPool 1+ fhd
Greater 7-8 fhd 9-12 fhdi 13+ fhdi
GreaterOrEqual 12-15 fhdi 16+ fhdi
HardSigmoid 6-21 fhd 22+ fhbd
HardSwish 14-21 fhd 22+ fhbd
Identity 1-12 fhbdisl 13-13 fhbdisl 14-18 fhbdisl 19+ fhbdisl
If 1-10 l 11-12 l 13-18 l 19+ l
InstanceNormalization 6+ fhd
IsInf 10-19 fd 20+ fhbd
IsNaN 9-12 fhd 13-19 fhbd 20+ fhbd
LayerNormalization 17+ fhbd
LeakyRelu 6-15 fhd 16+ fhd
Less 7-8 fhd 9-12 fhdi 13+ fhdi
LessOrEqual 12-15 fhdi 16+ fhdi
Log 6-12 fhd 13+ fhd
LogSoftmax 1-10 fhd 11-12 fhd 13+ fhd
Loop 1-10 i 11-12 i 13-18 i 19+ i
MatMul 1-8 fhd 9-12 fhd 13+ fhbd
MatMulInteger 10+ s
Max 6-11 fhbd 12-12 fhbdi 13+ fhbdi
MaxPool 1-7 fhd 8-9 fhd 10-10 fhd 11-11 fhd 12+ fhds
Min 6-11 fhbd 12-12 fhbdi 13+ fhbdi
Mod 10-12 fhdi 13+ fhbdi
Mul 7-12 fhdi 13-13 fhbdi 14+ fhbdis
Neg 6-12 fhdi 13+ fhbdi
NonZero 9-12 fhil 13+ fhil
Not 1+ l
OneHot 11+ i
Or 7+ l
PRelu 7-8 fhd 9-15 fhd 16+ fhd
Pad 2-10 fhd 11-12 fhd 13-17 fhdl 18+ fhdl
Pow 7-11 fhd 12-12 fhdi 13-14 fhbdi 15+ fhbdi
QuantizeLinear 10-12 f 13-18 f 19-20 fh 21+ fh
RMSNormalization 23+ fhbd
RandomNormal 1+ fhd
RandomUniform 1+ fhd
Range 11+ fdi
Reciprocal 6-12 fhd 13+ fhd
ReduceL1 1-17 fhdi 18+ fhdi
ReduceL2 1-17 fhdi 18+ fhdi
ReduceLogSum 1-17 fhd 18+ fhd
ReduceLogSumExp 1-17 fhd 18+ fhd
ReduceMax 1-17 fhdi 18+ fhdi
ReduceMean 1-17 fhdi 18+ fhdi
ReduceMin 1-17 fhdi 18+ fhdi
ReduceProd 1-17 fhdi 18+ fhdi
ReduceSum 1-12 fhdi 13+ fhbdi
ReduceSumSquare 1-17 fhd 18+ fhd
Relu 6-12 fhd 13-13 fhbd 14+ fhbd
Reshape 1-4 fhbdisl 5-12 fhbdisl 13-13 fhbdisl 14-18 fhbdisl 19-20 fhbdisl 21-22 fhbdisl 23+ fhbdisl
Resize 10-10 fhdi 11-12 fhdi 13-17 fhdi 18-18 fhdi 19+ fhdi
RotaryEmbedding 23+ fhb
Round 11+ fhd
Scan 8-8 fhbdisl 9-10 fhbdisl 11-15 fhbdisl 16-18 fhbdisl 19+ fhbdisl
ScatterElements 11-12 fhbdisl 13-15 fhbdisl 16-17 fhbdisl 18+ fhbdisl
ScatterND 11-12 fhbdisl 13-15 fhbdisl 16-17 fhbdisl 18+ fhbdisl
Selu 6+ fhd
Shape 1-12 fhbdisl 13-14 fhbdisl 15-18 fhbdisl 19-20 fhbdisl 21-22 fhbdisl 23+ fhbdisl
Shrink 9+ fhdis
Sigmoid 6-12 fhd 13+ fhbd
Sign 13+ fhbdis
Sin 7+ fhd
Size 1-12 fhbdisl 13+ fhbdisl
Slice 1-9 fhbdisl 10-10 fhbdisl 11-12 fhbdisl 13+ fhbdisl
Softmax 1-10 fhd 11-12 fhd 13+ fhbd
Softplus 1+ fhd
Softsign 1+ fhd
SpaceToDepth 1-12 fhd 13+ fhd
Split 2-10 fhbdisl 11-12 fhbdisl 13-17 fhbdisl 18+ fhbdisl
Sqrt 6-12 fhd 13+ fhbd
Squeeze 1-10 fhbdisl 11-12 fhbdisl 13-20 fhbdisl 21-22 fhbdisl 23+ fhbdisl
Sub 7-12 fhdi 13-13 fhbdi 14+ fhbdis
Sum 6-7 fhbd 8-12 fhbd 13+ fhbd
Tanh 6-12 fhd 13+ fhbd
TensorScatter 24+ fhbdisl
ThresholdedRelu 10+ fhd
Tile 6-12 fhdi 13+ fhbdi
TopK 1-9 fhdi 10-10 fhdi 11+ fhdi
Transpose 1-12 fhbdisl 13-20 fhbdisl 21-22 fhbdisl 23+ fhbdisl
Trilu 14+ fhbdisl
Unsqueeze 1-10 fhbdisl 11-12 fhbdisl 13-20 fhbdisl 21-22 fhbdisl 23+ fhbdisl
Where 9-15 fhdis 16+ fhbdis
Xor 7+ l
"""

OWN = """
Attention 1+ fhb
BiasGelu 1+ fhbd
BiasSoftmax 1+ fhd
EmbedLayerNormalization 1+ i
FastGelu 1+ fhbd
FusedMatMul 1+ fhbd
GatherBlockQuantized 1+ s
Gelu 1+ fhbd
GroupQueryAttention 1+ hb
LongformerAttention 1+ fh
MatMulBnb4 1+ fhb
MatMulNBits 1+ fhb
MoE 1+ fhb
MultiHeadAttention 1+ fhb
PackedAttention 1+ fh
PackedMultiHeadAttention 1+ fh
QAttention 1+ s
QMoE 1+ hb
QuickGelu 1+ fhbd
RelativePositionBias 1+ fh
RotaryEmbedding 1+ fhb
SkipLayerNormalization 1+ fhb
SkipSimplifiedLayerNormalization 1+ fhb
"""


@functools.cache
def cuda_table() -> tuple[KernelDef, ...]:
    return (*_read(STANDARD, ""), *_read(OWN, VENDOR))


def _read(table: str, domain: str) -> list[KernelDef]:
    found = []
    for line in table.strip().splitlines():
        op_type, *parts = line.split()
        for versions, letters in zip(parts[::2], parts[1::2], strict=True):
            first, _, last = versions.rstrip("+").partition("-")
            types = frozenset(name for letter in letters for name in _LETTERS[letter])
            found.append(KernelDef(domain, op_type, int(first), int(last) if last else None, (types,)))
    return found
