"""The reference evaluator of the onnx package."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from graphopt.core import Artifact, Pass, Session, Target
from graphopt.io.save import save
from graphopt.run import reference


@dataclasses.dataclass(frozen=True)
class MyTarget(Target):
    """Slow, and exact."""

    def pipeline(self, level: int) -> str:
        return ("", "my-pass")[min(level, 1)]

    def lowerings(self) -> Sequence[Pass]:
        return []

    def supports(self, node: ir.Node) -> bool:
        return node.domain in ("", "ai.onnx")

    def save(self, model: ir.Model, path: Path) -> Artifact:
        return save(model, path)

    def session(self, model: ir.Model) -> Session:
        return reference.session(model)
