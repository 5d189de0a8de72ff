"""What the targets share that run on the CPU provider of ONNX Runtime."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt.core import Artifact, Pass, Session, Target
from graphopt.errors import TargetError

from ._integer import integer_lowerings, integer_report
from ._spell import SpellResidual

FUSE = "canonicalize, simplify-masks, fuse-norm, fuse-activation, fuse-rotary, fuse-attention"
EXACT = f"{FUSE}, merge-projections, canonicalize"
# Integer projections stay apart: they share one quantized activation, and three narrow multiplies are quicker than a wide one and a Split.
LEVELS = ("", EXACT, f"{FUSE}, canonicalize, quantize{{mode=dynamic}}")


@dataclasses.dataclass(frozen=True)
class CpuProvider(Target):
    """`threads`: intra-op threads of a session; `opset`: of the artifact; `vendor`: whether operators of the runtime may be used."""

    threads: int = 1
    opset: int | None = None
    vendor: bool = True

    def lowerings(self) -> Sequence[Pass]:
        """Integer multiplies come first: they take the bias, which would else join the residual sum."""
        return [*integer_lowerings(vendor=self.vendor), SpellResidual()]

    def supports(self, node: ir.Node) -> bool:
        return (node.domain or "", node.op_type) in kernels("CPUExecutionProvider")

    def save(self, model: ir.Model, path: Path) -> Artifact:
        from graphopt.save import save

        return save(model, path, opset=self.opset)

    def session(self, model: ir.Model) -> Session:
        from graphopt.run.ort import session

        return session(model, threads=self.threads)

    def report(self, model: ir.Model) -> dict[str, Any]:
        """`integer`: weights that are multiplied as integers; `float`: [{name, reason}] of the other stored integers; `tables`: of rows."""
        return integer_report(model)


def level_text(target: str, level: int, levels: Sequence[str]) -> str:
    """The pipeline of an optimization level.

    Raises:
        TargetError: a level that this version does not have.
    """
    if not 0 <= level < len(levels):
        has = ", ".join(map(str, range(len(levels))))
        raise TargetError(f"target {target} has the levels {has}, found {level}; sample-driven compression (level 3) is not in this version")
    return levels[level]


@functools.cache
def kernels(provider: str) -> frozenset[tuple[str, str]]:
    """(domain, operator) of every kernel that the installed runtime has for a provider."""
    import onnxruntime.capi.onnxruntime_pybind11_state as state

    return frozenset(("" if k.domain == "ai.onnx" else k.domain, k.op_name) for k in state.get_all_opkernel_def() if k.provider == provider)
