"""New nodes in front of a node that stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.graph.questions import Names, initializer
from graphopt.graph.shapes import infer_nodes


class _Recipe:
    """New nodes in front of one node."""

    def __init__(self, model: ir.Model, before: ir.Node, names: Names) -> None:
        self.model, self.before, self.names = model, before, names
        self.nodes: list[ir.Node] = []

    def op(self, op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        node = ir.node(op_type, inputs, attributes)
        node.name = self.names.fresh(f"{self.before.name}/{op_type}")
        node.outputs[0].name = self.names.fresh(f"{node.name}_output_0")
        self.nodes.append(node)
        return node.outputs[0]

    def const(self, array: np.ndarray[Any, Any]) -> ir.Value:
        value = initializer(array, self.names.fresh("repair"))
        self.model.graph.register_initializer(value)
        return value

    def not_below(self, mask: ir.Value, lowest: float) -> ir.Value:
        """Finite numbers are raised to `lowest`; -inf stays."""
        least = self.const(np.array(np.finfo(np.float32).min, np.float32))
        raised = self.op("Max", mask, self.const(np.array(lowest, np.float32)))
        return self.op("Where", self.op("Less", mask, least), mask, raised)

    def for_every_row(self, mask: ir.Value, query: ir.Value) -> ir.Value:
        axis = len(query.shape or ()) - 2
        rows = self.op("Shape", query, start=axis, end=axis + 1)
        return self.op("Expand", mask, self.op("Concat", rows, self.const(np.array([1], np.int64)), axis=0))

    def insert(self) -> None:
        graph = self.before.graph
        assert graph is not None
        graph.insert_before(self.before, self.nodes)
        infer_nodes(self.model, self.nodes)
