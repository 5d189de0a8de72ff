"""The CPU provider of ONNX Runtime."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from graphopt.core import Artifact, Pass, Session, Target
from graphopt.errors import TargetError
from graphopt.graph import all_nodes

from ._spell import SpellResidual

EXACT = "canonicalize, fuse-norm, fuse-activation, fuse-attention, merge-projections, canonicalize"
_LEVELS = {0: "", 1: EXACT, 2: f"{EXACT}, quantize{{mode=dynamic}}"}


@dataclasses.dataclass(frozen=True)
class Cpu(Target):
    """ONNX Runtime on the CPU: float kernels by a measured table, quantized weights by the integer kernels."""

    threads: int = 1
    opset: int | None = None
    vendor: bool = True

    def pipeline(self, level: int) -> str:
        return level_text(self.name, level)

    def lowerings(self) -> Sequence[Pass]:
        from ._integer import integer_lowerings

        return [SpellResidual(), *integer_lowerings(vendor=self.vendor)]

    def supports(self, node: ir.Node) -> bool:
        return (node.domain or "", node.op_type) in kernels("CPUExecutionProvider")

    def save(self, model: ir.Model, path: Path) -> Artifact:
        from graphopt.save import save

        return save(model, path)

    def session(self, model: ir.Model) -> Session:
        from graphopt.run.ort import session

        return session(model, threads=self.threads)


def level_text(name: str, level: int) -> str:
    """The pipeline of an optimization level.

    Raises:
        TargetError: a level that this version does not have.
    """
    if level not in _LEVELS:
        raise TargetError(f"target {name} has the levels 0, 1 and 2, found {level}; sample-driven compression (level 3) is not in this version")
    return _LEVELS[level]


@functools.cache
def kernels(provider: str) -> frozenset[tuple[str, str]]:
    """(domain, operator) of every kernel that the installed runtime has for a provider."""
    import onnxruntime.capi.onnxruntime_pybind11_state as state

    return frozenset(("" if k.domain == "ai.onnx" else k.domain, k.op_name) for k in state.get_all_opkernel_def() if k.provider == provider)


def unsupported(target: Target, model: ir.Model) -> list[ir.Node]:
    """The nodes that the target has no kernel for."""
    return [n for n in all_nodes(model) if not target.supports(n)]
