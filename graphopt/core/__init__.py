"""The contract: passes change a graph, analyses tell facts about it, targets lower it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphopt.core.hand_on import hand_on

if TYPE_CHECKING:
    from graphopt.core.contract import (
        Analysis,
        Array,
        Artifact,
        Batches,
        Budget,
        Context,
        Metric,
        NamedMetric,
        Pass,
        Piece,
        Session,
        Spelling,
        Target,
    )
    from graphopt.core.errors import GraphoptError, LoadError, PassError, PipelineError, SampleError, SaveError, TargetError, VerifyError
    from graphopt.core.fuel import Fuel
    from graphopt.core.pipeline import PassManager, parse, render
    from graphopt.core.remarks import Remark, Remarks

__all__ = [
    "Analysis", "Array", "Artifact", "Batches", "Budget", "Context", "Fuel", "GraphoptError", "LoadError", "Metric", "NamedMetric", "Pass",
    "PassError", "PassManager", "Piece", "PipelineError", "Remark", "Remarks", "SampleError", "SaveError", "Session", "Spelling", "Target",
    "TargetError", "VerifyError", "parse", "render",
]  # fmt: skip
__getattr__ = hand_on(__name__, __all__, ("contract", "errors", "fuel", "pipeline", "remarks"))
