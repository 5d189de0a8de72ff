"""graphopt: a compiler for trained Transformer models. Public names only; each is imported when it is first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.core.contract import Analysis, Artifact, Budget, Context, Pass, Target
    from graphopt.core.errors import GraphoptError, PassError
    from graphopt.core.pipeline import PassManager
    from graphopt.driver.optimize import optimize
    from graphopt.driver.result import Result
    from graphopt.io.load import load
    from graphopt.report.comparison import Comparison, compare
    from graphopt.rewrite.builder import Builder
    from graphopt.rewrite.match import Match, Miss
    from graphopt.rewrite.rules import RewritePass
    from graphopt.run.samples import Samples

__all__ = [
    "Analysis", "Artifact", "Budget", "Builder", "Comparison", "Context", "GraphoptError", "Match", "Miss", "Pass", "PassError", "PassManager",
    "Result", "RewritePass", "Samples", "Target", "compare", "load", "optimize",
]  # fmt: skip
__version__ = "0.1.0"


_HOME = {
    "compare": "report.comparison", "Comparison": "report.comparison",
    "optimize": "driver.optimize", "Result": "driver.result", "load": "io.load", "PassManager": "core.pipeline", "Samples": "run.samples",
    "Pass": "core.contract", "Context": "core.contract", "Target": "core.contract", "Analysis": "core.contract", "Artifact": "core.contract",
    "Budget": "core.contract", "GraphoptError": "core.errors", "PassError": "core.errors",
    "RewritePass": "rewrite.rules", "Match": "rewrite.match", "Miss": "rewrite.match", "Builder": "rewrite.builder",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'graphopt' has no attribute {name!r}")
    return getattr(importlib.import_module(f"graphopt.{_HOME[name]}"), name)
