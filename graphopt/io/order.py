"""Topological order. Runtimes load a file whose nodes stand in any order, and a model can be copied only where they stand in order."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.core.errors import LoadError
from graphopt.graph.questions import all_nodes, graphs

MOVED = "graphopt.moved"  # graph.meta: the nodes of the file were not in order


def check_sources(model: ir.Model) -> None:
    """Raises LoadError where something is read that nothing makes, feeds or stores."""
    for node in all_nodes(model):
        for value in node.inputs:
            if value is not None and not _has_source(value):
                where = f"node `{node.name or ', '.join(str(v.name) for v in node.outputs)}` ({node.op_type})"
                raise LoadError(f"invalid graph: {where} reads `{value.name}`, which nothing makes; export the model again")
    for value in (value for graph in graphs(model) for value in graph.outputs):
        if not _has_source(value):
            raise LoadError(f"invalid graph: nothing makes the output `{value.name}`; export the model again")


def _has_source(value: ir.Value) -> bool:
    return value.producer() is not None or value.is_graph_input() or value.is_initializer()


def put_in_order(model: ir.Model) -> None:
    """Sort the nodes of every graph that is not in order, in place; which is noted.

    Raises:
        LoadError: they form a cycle, or read what nothing makes.
    """
    check_sources(model)
    roots: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for root in roots:
        if not _in_order(root):
            sort(root)
            model.graph.meta[MOVED] = True


def sort(graph: ir.Graph | ir.Function) -> None:
    """Raises LoadError for a cycle."""
    try:
        graph.sort()
    except ValueError:
        raise LoadError("invalid graph: its nodes form a cycle; export the model again") from None


def _in_order(graph: ir.Graph | ir.Function) -> bool:
    """Every node stands behind those that it, and what it holds, reads from."""
    seen: set[ir.Node] = set()
    for node in ir.traversal.RecursiveGraphIterator(graph):
        if any(v is not None and (made := v.producer()) is not None and made not in seen for v in node.inputs):
            return False
        seen.add(node)
    return True
