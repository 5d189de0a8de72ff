"""What the targets of ONNX Runtime share: the domain of its operators, the texts of the levels, and all of its CPU provider."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import onnx_ir as ir

from graphopt.core.contract import Alternative, Pass
from graphopt.core.errors import TargetError
from graphopt.core.machine import Machine, processor
from graphopt.driver.lowering.choose import ChooseSpellings
from graphopt.driver.lowering.decompose import DecomposeAttention, DecomposeGelu, DecomposeRms, DecomposeRotary
from graphopt.driver.lowering.ort_target import OrtTarget, registered
from graphopt.rewrite.choices import table_passes

from ._integer import integer_report
from ._refused import SpellHalfNorm, SpellHalfTransposed, SpellSigned
from ._table import cpu_table
from ._vendored import VENDOR

EXACT = "canonicalize, fold-affine, simplify-masks, fuse-norm, fuse-activation, fuse-rotary, fuse-attention, canonicalize"


@dataclasses.dataclass(frozen=True)
class OwnOperators(OrtTarget):
    """A provider that may have the runtime's own operators.

    `levels`: the texts of its levels of optimization. What recent standard operators it refuses is written as what they are made of.
    """

    own_domain: ClassVar[str] = VENDOR
    levels: ClassVar[Sequence[str]] = ("", EXACT)

    def pipeline(self, level: int) -> str:
        """The pipeline of an optimization level.

        Raises:
            TargetError: a level that this version does not have.
        """
        if not 0 <= level < len(self.levels):
            has = ", ".join(map(str, range(len(self.levels))))
            instead = "; this version compresses further by a pipeline, such as `prune{flops=0.3}, quantize`" if level == 3 else ""
            raise TargetError(f"target {self.name} has the levels {has}, found {level}{instead}")
        return self.levels[level]

    def spell(self) -> Sequence[Pass]:
        steps = (DecomposeAttention(), DecomposeRotary(), DecomposeRms(), DecomposeGelu())
        return [step for step in steps if not all(self.supports(ir.Node("", name, [])) for name in step.anchors)]


@dataclasses.dataclass(frozen=True)
class HalfPrecision(OwnOperators):
    """A provider for which the option `dtype` converts the model."""

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"

    def pipeline(self, level: int) -> str:
        text = super().pipeline(level)
        return text if self.dtype == "float32" or not text else f"{text}, to-half{{dtype={self.dtype}}}"


@dataclasses.dataclass(frozen=True)
class CpuProvider(OwnOperators):
    """`tune`: `on` times the spellings of the table that were not timed before,
    `cache` takes what is in the tuning cache only, `off` takes the defaults of the table. `processor`: the name of another processor, whose
    timings were imported by `graphopt tune import`; nothing is timed then. `int8_blocks`: a weight-only multiply may round its activations to
    8 bits where that is measured to be faster (accuracy_level=4 of MatMulNBits); it costs some accuracy, so it is off.
    """

    tune: Literal["on", "cache", "off"] = "on"
    processor: str | None = None
    int8_blocks: bool = False
    provider: ClassVar[str] = "CPUExecutionProvider"
    package: ClassVar[str] = "onnxruntime"
    levels: ClassVar[Sequence[str]] = ("", EXACT, f"{EXACT}, quantize{{mode=dynamic}}")

    def spellings(self) -> Sequence[Alternative]:
        return cpu_table(vendor=self.vendor, int8_blocks=self.int8_blocks)

    def spell(self) -> Sequence[Pass]:
        return [ChooseSpellings(), *table_passes(self.spellings())]

    def lowerings(self) -> Sequence[Pass]:
        return [*super().lowerings(), SpellSigned(), SpellHalfTransposed(), SpellHalfNorm()]

    def providers(self) -> Sequence[str | tuple[str, Mapping[str, str]]]:
        return ()

    def machine(self) -> Machine | None:
        if not self.runs_here():
            return None
        import onnxruntime

        runtime = f"onnxruntime {onnxruntime.__version__} ({onnxruntime.get_build_info()})"
        return Machine(self.processor or processor(), runtime, self.provider, self.threads, in_process=True)

    def supports(self, node: ir.Node) -> bool:
        """By the runtime's own list; where it has none to show, what the standard has."""
        listed, domain = registered(self.provider), "" if node.domain == "ai.onnx" else node.domain
        return any((k.domain, k.op_type) == (domain, node.op_type) for k in listed) if listed else not domain

    def report(self, model: ir.Model) -> dict[str, Any]:
        """`integer`: weights that are multiplied as integers; `float`: [{name, reason}] of the other stored integers; `tables`: of rows."""
        return integer_report(model, lambda: self.finish(model)[0])
