"""New nodes and constants: the one place that puts them into a graph, with names of their own and the names of what they stand for.

A pass asks `ctx.fuel` once for each change that it counts, before it makes it; the rewrite engine does so for its passes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx_ir as ir

from graphopt.core.contract import Array
from graphopt.graph.questions import ORIGINS, Names, initializer, origins
from graphopt.graph.shapes import infer_nodes
from graphopt.rewrite.builder import Builder


class Inserter:
    """Puts what a `Builder` recorded beside nodes that stay: a scale in front of a multiply, a Cast behind a value.

    `op = inserter.builder()`, then `y = op.Mul(x, op.const(array, "scale"))`, then `inserter.before(node, op)`, and `node` may read y.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model, self.names = model, Names(model)
        self.memo: dict[Any, list[ir.Value]] = {}

    def builder(self, graph: ir.Graph | ir.Function | None = None) -> Builder:
        """For new nodes that will stand in `graph`; by default the main graph."""
        home = self.model.graph if graph is None else graph
        return Builder(self.names, self.memo, home if isinstance(home, ir.Graph) else None)

    def constant(self, array: Array, name: str) -> ir.Value:
        """A new initializer of the main graph, under that name or one like it."""
        return add_constant(self.model, self.names, array, name)

    def before(self, node: ir.Node, op: Builder, stand_for: Iterable[ir.Node] = ()) -> None:
        """Put the recorded nodes in front of `node`; they stand for it, or for `stand_for`."""
        assert node.graph is not None
        self.adopt(op, node.name or node.op_type, stand_for or (node,))
        node.graph.insert_before(node, op.nodes)
        infer_nodes(self.model, op.nodes)

    def behind(self, value: ir.Value, op: Builder, graph: ir.Graph | ir.Function, stand_for: Iterable[ir.Node]) -> None:
        """Put the recorded nodes right behind `value`, or at the front of `graph` where it is made in another one or not at all."""
        maker = value.producer()
        self.adopt(op, value.name or "value", stand_for)
        if maker is not None and maker.graph is graph:
            graph.insert_after(maker, op.nodes)
        else:
            graph.insert_before(graph[0], op.nodes)
        infer_nodes(self.model, op.nodes)

    def adopt(self, op: Builder, base: str, stand_for: Iterable[ir.Node]) -> None:
        """Names that begin with `base`, and provenance; initializers go to the main graph. Where the nodes stand is the caller's to do."""
        names = frozenset[str]().union(*map(origins, stand_for))
        for node in op.nodes:
            self.model.opset_imports.setdefault(node.domain, 1)
            node.name = self.names.fresh(f"{base}/{node.op_type}")
            node.meta[ORIGINS] = names
            for k, value in enumerate(node.outputs):
                if value.name == "":  # an optional output that is not there
                    continue
                value.name = self.names.fresh(f"{node.name}_output_{k}")
        for value in op.initializers:
            self.model.graph.register_initializer(value)
        for key, value in op.made.items():
            self.memo.setdefault(key, []).append(value)


def add_constant(model: ir.Model, names: Names, array: Array, name: str) -> ir.Value:
    """A new initializer of the main graph, under that name or one like it."""
    value = initializer(array, names.fresh(name))
    model.graph.register_initializer(value)
    return value
