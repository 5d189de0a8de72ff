"""The CPU provider of ONNX Runtime."""

from __future__ import annotations

import dataclasses

from ._ort import CpuProvider


@dataclasses.dataclass(frozen=True)
class Cpu(CpuProvider):
    """ONNX Runtime on the CPU: float kernels by a measured table, quantized weights by the integer kernels.

    Args:
        opset: the artifact keeps to it, for runtimes that know no newer one: `cpu{opset=17}` writes Attention, RotaryEmbedding,
            RMSNormalization and Gelu as the operators that they are made of.
        vendor: False writes standard operators only.
    """
