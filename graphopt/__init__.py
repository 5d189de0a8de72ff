"""graphopt: a compiler for trained Transformer models. Public names only; each is imported when it is first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.api import optimize
    from graphopt.comparison import Comparison, compare
    from graphopt.core import Analysis, Artifact, Budget, Context, Pass, Target
    from graphopt.errors import GraphoptError, PassError
    from graphopt.frontend import load
    from graphopt.pipeline import PassManager
    from graphopt.result import Result
    from graphopt.rewrite import Builder, Match, Miss, RewritePass
    from graphopt.samples import Samples

_HOME = {
    "compare": "comparison", "Comparison": "comparison",
    "optimize": "api", "Result": "result", "load": "frontend", "PassManager": "pipeline", "Samples": "samples",
    "Pass": "core", "Context": "core", "Target": "core", "Analysis": "core", "Artifact": "core", "Budget": "core",
    "RewritePass": "rewrite", "Match": "rewrite", "Miss": "rewrite", "Builder": "rewrite",
    "GraphoptError": "errors", "PassError": "errors",
}  # fmt: skip

__all__ = [
    "Analysis", "Artifact", "Budget", "Builder", "Comparison", "Context", "GraphoptError", "Match", "Miss", "Pass", "PassError", "PassManager",
    "Result", "RewritePass", "Samples", "Target", "compare", "load", "optimize",
]  # fmt: skip
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'graphopt' has no attribute {name!r}")
    return getattr(importlib.import_module(f"graphopt.{_HOME[name]}"), name)
