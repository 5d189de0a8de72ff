"""The CUDA provider of ONNX Runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

from graphopt.core.contract import Pass
from graphopt.core.errors import TargetError
from graphopt.driver.lowering.decompose import DecomposeAttention, DecomposeGelu, DecomposeRms, DecomposeRotary
from graphopt.driver.lowering.ort_target import KernelDef

from ._blocked import SpellBlockedMatmul
from ._cuda import SpellGroupQuery, SpellQuickGelu
from ._cuda_table import cuda_table
from ._kernels import SpellBiasGelu, SpellMultiHead, SpellSkipNorm
from ._ort import EXACT, OwnOperators, level_text


@dataclasses.dataclass(frozen=True)
class Cuda(OwnOperators):
    """ONNX Runtime on an NVIDIA GPU: fused kernels for norms, activations and attention, in float32 or 16 bits.

    Nothing is timed: the spellings are the fused kernels, by the table of the provider's documentation (or its registry where it is installed).

    Args:
        dtype: float16 or bfloat16 converts the model (pass `to-half`; inputs and outputs keep float32).
        vendor: False writes standard operators only.
    """

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    provider: ClassVar[str] = "CUDAExecutionProvider"
    package: ClassVar[str] = "onnxruntime-gpu"

    def pipeline(self, level: int) -> str:
        if level == 2:
            raise TargetError("target cuda has no level 2: dynamic int8 would fall back to the CPU there; use dtype=float16, or target tensorrt")
        text = level_text(self.name, level, ("", f"{EXACT}, merge-projections, canonicalize"))
        return text if self.dtype == "float32" or not text else f"{text}, to-half{{dtype={self.dtype}}}"

    def spell(self) -> Sequence[Pass]:
        own: list[Pass] = (
            [SpellBlockedMatmul(half=True, rows=False), SpellGroupQuery(), SpellMultiHead(), SpellSkipNorm(), SpellBiasGelu(), SpellQuickGelu()]
            if self.vendor
            else []
        )
        has = {(k.domain, k.op_type) for k in self.kernels()}
        missing: list[tuple[str, Pass]] = [
            ("Attention", DecomposeAttention()),
            ("RotaryEmbedding", DecomposeRotary()),
            ("RMSNormalization", DecomposeRms()),
            ("Gelu", DecomposeGelu()),
        ]
        return [*own, *(step for op_type, step in missing if ("", op_type) not in has)]

    def known(self) -> tuple[KernelDef, ...]:
        return cuda_table()
