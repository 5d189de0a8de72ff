"""merge-projections: projections that read the same input become one matrix multiply and a Split."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.linear import Linear, Linears
from graphopt.core.contract import Context
from graphopt.graph.attention_node import AttentionNode, before_rotary
from graphopt.graph.questions import constant, producer
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.match import Match, Miss
from graphopt.rewrite.rules import RewritePass

_UNARY = ("Gelu", "Relu", "Sigmoid", "Tanh", "Elu", "Softplus", "HardSwish", "HardSigmoid", "Mish", "LeakyRelu", "Identity")


@dataclasses.dataclass(frozen=True)
class ProjectionsMatch(Match):
    linears: tuple[Linear, ...]

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"merged": [x.node.name for x in self.linears], "widths": [x.out_features for x in self.linears]}


@dataclasses.dataclass(frozen=True)
class MergeProjections(RewritePass[ProjectionsMatch]):
    """Merge query, key and value projections of one attention, and gate and up projections of one gated FFN, where they read one input.

    One wide product reads (and, when quantized at run time, quantizes) its input once. Exact: the columns are computed as before.
    """

    anchors: ClassVar[frozenset[str]] = frozenset({"Attention", "Mul"})

    def match(self, node: ir.Node, ctx: Context) -> ProjectionsMatch | Miss | None:
        made_by = {x.output: x for x in ctx.get(Linears())}
        a = AttentionNode.of(node)
        values = [_gate(v, made_by) for v in node.inputs] if a is None else [before_rotary(v) for v in a.operands]
        found = [made_by[v] for v in values if v in made_by]
        if len(found) < 2 or len({x.output for x in found}) < len(found):
            return None
        groups = [[x for x in found if x.x is first.x] for first in found]
        group = max(groups, key=len)
        if len(group) < 2:
            return None
        reason = next((r for x in group if (r := _unfit(x)) is not None), None)
        if reason is not None:
            return Miss(node, f"projections not merged: {reason}")
        nodes = tuple(n for x in group for n in (x.node, x.bias_node) if n is not None)
        return ProjectionsMatch(nodes, tuple(x.output for x in group), tuple(group))

    def build(self, op: Builder, m: ProjectionsMatch) -> Sequence[ir.Value]:
        weights = [x.weight for x in m.linears]
        weight = op.shared(("weights", *weights), lambda: op.const(_concat(weights), f"{weights[0].name}_merged"))
        out = op.MatMul(m.linears[0].x, weight)
        if any(x.bias is not None for x in m.linears):
            key = ("biases", *((x.bias, x.out_features) for x in m.linears))
            out = op.Add(out, op.shared(key, lambda: op.const(_biases(m.linears), f"{weights[0].name}_bias_merged")))
        widths = np.array([x.out_features for x in m.linears], np.int64)
        return op.node("Split", (out, op.const(widths, "widths")), axis=-1, _outputs=len(widths))  # type: ignore[no-any-return]


def _gate(value: ir.Value | None, made_by: Mapping[ir.Value, Linear], depth: int = 4) -> ir.Value | None:
    """The projection that one side of a gating product is an elementwise function of."""
    if value is None or value in made_by or depth == 0:
        return value
    node = producer(value, *_UNARY)
    if node is not None:
        return _gate(node.inputs[0], made_by, depth - 1)
    node = producer(value, "Mul")  # SiLU: x * Sigmoid(x)
    sides = {_gate(v, made_by, depth - 1) for v in node.inputs} if node is not None else set()
    return sides.pop() if len(sides) == 1 else None


def _unfit(x: Linear) -> str | None:
    if x.node.op_type != "MatMul" or x.path or x.batch:
        return f"`{x.node.name}` is not a plain MatMul with a float weight of shape [in, out]"
    if x.bias is not None and (x.bias.shape is None or x.bias.const_value is None or x.bias.const_value.size not in (1, x.out_features)):
        return f"the bias of `{x.node.name}` is not one number for each output"
    return None


def _concat(weights: Sequence[ir.Value]) -> np.ndarray[Any, Any]:
    return np.concatenate([np.asarray(constant(w)) for w in weights], axis=-1)


def _biases(linears: Sequence[Linear]) -> np.ndarray[Any, Any]:
    dtype = next(x.bias.const_value.dtype.numpy() for x in linears if x.bias is not None and x.bias.const_value is not None)
    return np.concatenate([np.zeros(x.out_features, dtype) if x.bias is None else _spread(x) for x in linears])


def _spread(x: Linear) -> np.ndarray[Any, Any]:
    return np.broadcast_to(np.asarray(constant(x.bias)).reshape(-1), (x.out_features,))
