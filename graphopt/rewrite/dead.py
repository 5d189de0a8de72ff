"""What nothing reads is removed."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from graphopt.graph.opset.node_form import WORKING, schema
from graphopt.graph.questions import graphs


def bodies(attribute: ir.Attr) -> tuple[ir.Graph, ...]:
    """The subgraphs that an attribute holds."""
    if attribute.is_ref():
        return ()
    if attribute.type == ir.AttributeType.GRAPH:
        return (attribute.as_graph(),)
    return tuple(attribute.as_graphs()) if attribute.type == ir.AttributeType.GRAPHS else ()


def detach(node: ir.Node) -> None:
    """Make a node that is going away, and everything in its bodies, read nothing, so that what they read can be seen to be unused."""
    for index in range(len(node.inputs)):
        node.replace_input_with(index, None)
    for attribute in node.attributes.values():
        for body in bodies(attribute):
            body.outputs.clear()
            for inner in body:
                detach(inner)


def _sweep(graph: ir.Graph) -> None:
    for node in reversed(graph):
        if node.outputs and not any(_read(v) for v in node.outputs):
            detach(node)
            graph.remove(node)
            continue
        _trim(node)
        for attribute in node.attributes.values():
            for body in bodies(attribute):
                _sweep(body)


def _read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _trim(node: ir.Node) -> None:
    keep = len(node.inputs)
    while keep and node.inputs[keep - 1] is None:
        keep -= 1
    node.resize_inputs(keep)
    found = schema(node.op_type, WORKING) if node.domain == "" and len(node.outputs) > 1 else None
    if found is None or node.op_type == "BatchNormalization":  # its arity selects training or inference
        return
    keep = len(node.outputs)
    while keep > 1 and not _read(node.outputs[keep - 1]) and _optional(found, keep - 1):
        keep -= 1
    node.resize_outputs(keep)


def _optional(found: onnx.defs.OpSchema, index: int) -> bool:
    return index < len(found.outputs) and found.outputs[index].option == onnx.defs.OpSchema.FormalParameterOption.Optional


def remove_dead(model: ir.Model) -> int:
    """Remove nodes and initializers that nothing reads; inputs stay, also overridable ones. Returns how many nodes went."""
    removed = 0
    for graph in reversed(list(graphs(model))):
        for node in reversed(graph):
            if any(v.uses() or v.is_graph_output() for v in node.outputs):
                continue
            graph.remove(node, safe=True)
            removed += 1
    for graph in graphs(model):
        for name, value in list(graph.initializers.items()):
            if not value.uses() and not value.is_graph_input() and not value.is_graph_output():
                del graph.initializers[name]
    return removed
