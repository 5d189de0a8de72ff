"""Where a sign changes back."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from graphopt.core.contract import Analysis, Context
from graphopt.graph.questions import producer


@dataclasses.dataclass(frozen=True)
class MyFacts(Analysis[frozenset[ir.Node]]):
    """The nodes that take a change of sign back."""

    def compute(self, model: ir.Model, ctx: Context) -> frozenset[ir.Node]:
        return frozenset(node for node in model.graph if node.op_type == "Neg" and producer(node.inputs[0], "Neg") is not None)
