"""Integer inference on the CPU provider of ONNX Runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from graphopt.core.contract import Pass

from ._ort import CpuProvider
from ._saturation import EVERYWHERE, WITH_VNNI, GuardRange, exceeding


@dataclasses.dataclass(frozen=True)
class Quantized(CpuProvider):
    """Integer arithmetic for every quantized multiply, and a report of which stored weights really compute in integers.

    Args:
        vendor: False writes MatMulInteger, Cast and Mul, which any runtime knows and ONNX Runtime fuses when it loads the model.
        vnni: the CPU adds products of 8-bit numbers in 32 bits (AVX-VNNI, AVX512-VNNI, ARM dot product), so that all 8 bits are safe to use.
            False: level 2 keeps the codes of weights in [-64, 64], and what has larger ones is multiplied as float, with a warning.
    """

    vnni: bool = True

    def pipeline(self, level: int) -> str:
        text = super().pipeline(level)
        return text if self.vnni else text.replace("mode=dynamic", "mode=dynamic reduce-range=true")

    def lowerings(self) -> Sequence[Pass]:
        guard = [] if self.vnni else [GuardRange()]
        return [*guard, *super().lowerings()]

    def report(self, model: ir.Model) -> dict[str, Any]:
        """Also `safe_on`: the CPUs on which no sum of the integer multiplies can clip."""
        found = super().report(model)
        if not found["integer"]:
            return found
        return {**found, "safe_on": WITH_VNNI if exceeding(model, found["integer"]) else EVERYWHERE}
