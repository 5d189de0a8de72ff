"""What nothing reads is removed."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from graphopt.graph.opset.node_form import WORKING, schema
from graphopt.graph.questions import bodies, graphs, is_read, subgraphs


def remove_dead(model: ir.Model) -> int:
    """Remove nodes and initializers that no graph output depends on, and optional inputs and outputs at the end that are not there or not read.

    Inputs of the model stay, also overridable ones, and so do nodes without outputs. Returns how many nodes went or got shorter.
    """
    changes = _sweep(model.graph)
    for graph in graphs(model):
        for name, value in list(graph.initializers.items()):
            if not (is_read(value) or value.is_graph_input()):
                del graph.initializers[name]
    return changes


def _sweep(graph: ir.Graph) -> int:
    changes = 0
    for node in reversed(graph):
        if node.outputs and not any(map(is_read, node.outputs)):
            detach(node)
            graph.remove(node)
            changes += 1
            continue
        changes += _trim(node) + sum(map(_sweep, bodies(node)))
    return changes


def detach(node: ir.Node) -> None:
    """Make a node that is going away, and everything in its bodies, read nothing, so that what they read can be seen to be unused."""
    for index in range(len(node.inputs)):
        node.replace_input_with(index, None)
    for _, body in subgraphs(node):
        body.outputs.clear()
        for inner in body:
            detach(inner)


def _trim(node: ir.Node) -> int:
    """1 if the node got shorter, else 0."""
    before = len(node.inputs), len(node.outputs)
    inputs, outputs = before
    while inputs and node.inputs[inputs - 1] is None:
        inputs -= 1
    node.resize_inputs(inputs)
    found = schema(node.op_type, WORKING) if node.domain == "" and outputs > 1 else None
    if found is not None and node.op_type != "BatchNormalization":  # its arity selects training or inference
        while outputs > 1 and not is_read(node.outputs[outputs - 1]) and _optional(found, outputs - 1):
            outputs -= 1
        node.resize_outputs(outputs)
    return int((inputs, outputs) != before)


def _optional(found: onnx.defs.OpSchema, index: int) -> bool:
    return index < len(found.outputs) and found.outputs[index].option == onnx.defs.OpSchema.FormalParameterOption.Optional
