"""x * sigmoid(alpha * x): SiLU (alpha = 1) and QuickGELU (alpha = 1.702). ONNX has no operator for them that runtimes of today run, so they
stay Sigmoid and Mul; these facts let a target spell them."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from graphopt.analysis.polynomial import polynomial, roots
from graphopt.core import Analysis, Context
from graphopt.graph import all_nodes, consumers, enclosed, producer


@dataclasses.dataclass(frozen=True)
class Gate:
    """`output` = x * sigmoid(alpha * x). `nodes`: what computes it and nothing else, the last one makes `output`."""

    x: ir.Value
    alpha: float
    output: ir.Value
    nodes: tuple[ir.Node, ...]


@dataclasses.dataclass(frozen=True)
class Gates(Analysis[tuple[Gate, ...]]):
    """Every gate whose alpha is a constant number, in graph order."""

    def compute(self, model: ir.Model, ctx: Context) -> tuple[Gate, ...]:
        found = (_gate(node) for node in all_nodes(model) if node.op_type == "Sigmoid" and node.domain == "")
        return tuple(gate for gate in found if gate is not None)


def _gate(node: ir.Node) -> Gate | None:
    gated = node.outputs[0]
    readers = consumers(gated)
    if len(readers) != 1 or gated.is_graph_output() or readers[0].graph is not node.graph or producer(readers[0].outputs[0], "Mul") is None:
        return None
    product, argument = readers[0], node.inputs[0]
    x = product.inputs[1] if product.inputs[0] is gated else product.inputs[0]
    if argument is None or x is None or x is gated or x not in roots(argument):
        return None
    read = polynomial(argument, x)
    if read is None or {k for k, c in read[0].items() if c} != {1}:
        return None
    return Gate(x, read[0][1], product.outputs[0], enclosed((node, product), read[1]))
