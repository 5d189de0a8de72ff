"""The CUDA provider of ONNX Runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from graphopt.core.contract import Pass
from graphopt.core.errors import TargetError
from graphopt.driver.lowering.ort_target import KernelDef

from ._blocked import SpellBlockedMatmul
from ._cuda import SpellGroupQuery, SpellQuickGelu
from ._cuda_table import cuda_table
from ._kernels import SpellBiasGelu, SpellMultiHead, SpellSkipNorm
from ._ort import EXACT, HalfPrecision


@dataclasses.dataclass(frozen=True)
class Cuda(HalfPrecision):
    """ONNX Runtime on an NVIDIA GPU: fused kernels for norms, activations and attention, in float32 or 16 bits.

    Nothing is timed: the spellings are the fused kernels, by the table of the provider's documentation (or its registry where it is installed).

    Args:
        dtype: float16 or bfloat16 converts the model (pass `to-half`; inputs and outputs keep float32).
        vendor: False writes standard operators only.
    """

    provider: ClassVar[str] = "CUDAExecutionProvider"
    package: ClassVar[str] = "onnxruntime-gpu"
    levels: ClassVar[Sequence[str]] = ("", f"{EXACT}, merge-projections, canonicalize")

    def pipeline(self, level: int) -> str:
        if level == 2:
            raise TargetError("target cuda has no level 2: dynamic int8 would fall back to the CPU there; use dtype=float16, or target tensorrt")
        return super().pipeline(level)

    def spell(self) -> Sequence[Pass]:
        own = (SpellBlockedMatmul(half=True, rows=False), SpellGroupQuery(), SpellMultiHead(), SpellSkipNorm(), SpellBiasGelu(), SpellQuickGelu())
        return [*(own if self.vendor else ()), *super().spell()]

    def known(self) -> tuple[KernelDef, ...]:
        return cuda_table()
