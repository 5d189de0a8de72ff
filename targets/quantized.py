"""Integer inference on the CPU provider of ONNX Runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from graphopt.core import Artifact, Pass
from graphopt.errors import PipelineError

from ._decompose import portable
from ._limits import save_within
from ._ort import LEVELS, CpuProvider, level_text


@dataclasses.dataclass(frozen=True)
class Quantized(CpuProvider):
    """Integer arithmetic for every quantized multiply, and a report of which stored weights really compute in integers.

    Args:
        vendor: False writes MatMulInteger, Cast and Mul, which any runtime knows and ONNX Runtime fuses when it loads the model.
        vnni: the CPU adds products of 8-bit numbers in 32 bits (AVX-VNNI, AVX512-VNNI, ARM dot product), so that all 8 bits are safe to use.
    """

    vnni: bool = True

    def __post_init__(self) -> None:
        if not self.vnni:
            error = PipelineError("quantized: vnni=false needs weights of 7 bits, which quantize does not make in this version; leave it out")
            error.bad_key = "vnni"  # type: ignore[attr-defined]
            raise error

    def pipeline(self, level: int) -> str:
        return level_text(self.name, level, LEVELS)

    def lowerings(self) -> Sequence[Pass]:
        return [*super().lowerings(), *portable(self.opset, self.vendor)]

    def save(self, model: ir.Model, path: Path) -> Artifact:
        return save_within(model, path, self.opset, vendor=self.vendor)
