"""Kernels of ONNX Runtime that take several standard operators at once. None is the default: each must be measured to be faster here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import onnx_ir as ir

from graphopt.analysis.stream import Residual, residual_of
from graphopt.core.contract import Context
from graphopt.driver.lowering.decompose import AttentionMatch
from graphopt.driver.lowering.extract import whole
from graphopt.graph.attention_node import AttentionNode
from graphopt.graph.questions import attr, is_constant, producer, rank, same_dim, used_once
from graphopt.rewrite.attention import may_hide_rows
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.match import Match, Miss
from graphopt.rewrite.rules import RewritePass

from ._vendored import VENDOR

_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)  # of the fused norms and of attention, all operands in one


@dataclasses.dataclass(frozen=True)
class SkipMatch(Match):
    """`total`: the sum, where something else reads it too."""

    norm: ir.Node
    first: ir.Value
    second: ir.Value
    bias: ir.Value | None


@dataclasses.dataclass(frozen=True)
class SpellSkipNorm(RewritePass[SkipMatch]):
    """Add -> LayerNormalization or RMSNormalization becomes one kernel, with a constant bias, and the sum as an output where it is read."""

    anchors: ClassVar[frozenset[str]] = frozenset({"LayerNormalization", "RMSNormalization"})

    def match(self, node: ir.Node, ctx: Context) -> SkipMatch | Miss | None:
        residual = residual_of(node)
        if residual is None:
            return None
        bias = [t.value for t in residual.terms if t.bias]
        terms = [t for t in residual.terms if not t.bias]
        if len(terms) != 2 or len(bias) > 1 or not terms[0].same_shape or not terms[1].skippable:
            return Miss(node, "the residual is no sum of two values of one shape and a bias")
        if not _plain_norm(residual):
            return Miss(node, "the norm does not run over the last axis alone, or its statistics are read")
        if not all(_runs_along(v, residual.total) for v in node.inputs[1:] if v is not None):
            return Miss(node, "the kernel wants one number of scale and bias for each feature")
        if not _one_type((*(t.value for t in residual.terms), *node.inputs[1:])):
            return Miss(node, "the kernel wants all in one type of 32 or 16 bits")
        outputs = (residual.total, node.outputs[0]) if residual.shared else (node.outputs[0],)
        return SkipMatch((*residual.adds, node), outputs, node, terms[0].value, terms[1].value, bias[0] if bias else None)

    def build(self, op: Builder, m: SkipMatch) -> Sequence[ir.Value]:
        layer = m.norm.op_type == "LayerNormalization"
        beta = m.norm.inputs[2] if layer and len(m.norm.inputs) > 2 else None
        inputs = [m.first, m.second, m.norm.inputs[1], *((beta,) if layer else ()), m.bias]
        while inputs[-1] is None:
            inputs.pop()
        shared = len(m.outputs) > 1
        name = "SkipLayerNormalization" if layer else "SkipSimplifiedLayerNormalization"
        made: Any = op.node(name, inputs, _domain=VENDOR, _outputs=4 if shared else 1, epsilon=attr(m.norm, "epsilon", 1e-5))
        if not shared:
            return [made]
        made[1].name = made[2].name = ""  # mean and deviation
        return [made[3], made[0]]


def _plain_norm(r: Residual) -> bool:
    size = rank(r.total)
    axis = attr(r.norm, "axis", -1)
    read = any(v.uses() or v.is_graph_output() for v in r.norm.outputs[1:])
    return size == 3 and axis in (-1, 2) and not read


def _runs_along(value: ir.Value, total: ir.Value) -> bool:
    return total.shape is not None and value.shape is not None and len(value.shape) == 1 and same_dim(value.shape[0], total.shape[-1])


def _one_type(values: Iterable[ir.Value | None]) -> bool:
    types = {v.dtype for v in values if v is not None}
    return len(types) == 1 and types <= set(_TYPES)


@dataclasses.dataclass(frozen=True)
class BiasMatch(Match):
    x: ir.Value
    bias: ir.Value | None
    tanh: bool


@dataclasses.dataclass(frozen=True)
class SpellBiasGelu(RewritePass[BiasMatch]):
    """Add of a bias -> Gelu becomes one kernel; the tanh approximation becomes FastGelu, with or without a bias."""

    anchors: ClassVar[frozenset[str]] = frozenset({"Gelu"})

    def match(self, node: ir.Node, ctx: Context) -> BiasMatch | None:
        x, tanh = node.inputs[0], attr(node, "approximate", "none") == "tanh"
        add = producer(x, "Add")
        assert x is not None
        if add is not None and used_once(x):
            for value, bias in (add.inputs, add.inputs[::-1]):
                if value is not None and bias is not None and is_constant(bias) and rank(bias) == 1 and bias.shape == _last(value):
                    return BiasMatch((add, node), (node.outputs[0],), value, bias, tanh)
        return BiasMatch((node,), (node.outputs[0],), x, None, True) if tanh else None

    def build(self, op: Builder, m: BiasMatch) -> Sequence[ir.Value]:
        inputs = [m.x] if m.bias is None else [m.x, m.bias]
        return [op.node("FastGelu" if m.tanh else "BiasGelu", inputs, _domain=VENDOR)]


def _last(value: ir.Value) -> ir.Shape | None:
    return None if value.shape is None or len(value.shape) == 0 else ir.Shape(value.shape[-1:])


@dataclasses.dataclass(frozen=True)
class SpellMultiHead(RewritePass[AttentionMatch]):
    """Attention of packed heads [batch, rows, heads * dim] -> MultiHeadAttention."""

    anchors: ClassVar[frozenset[str]] = frozenset({"Attention"})

    def match(self, node: ir.Node, ctx: Context) -> AttentionMatch | Miss | None:
        a = AttentionNode.of(node)
        if a is None or not a.packed or a.heads != a.kv_heads:
            return Miss(node, "MultiHeadAttention reads packed heads, as many for keys as for queries")
        if a.cached or a.shown is not None:
            return Miss(node, "stays Attention: it has a cache, or its scores are read")
        if not _one_type(a.operands):
            return Miss(node, "stays Attention: the kernel wants queries, keys and values in one type of 32 or 16 bits")
        if not a.plain:
            return Miss(node, "stays Attention: it is causal or has a soft cap, or a window or a softmax type of its own")
        if a.mask is not None and (rank(a.mask) != 4 or a.mask.dtype != a.result.dtype or may_hide_rows(whole(a.mask))):
            return Miss(node, "stays Attention: its mask is not additive of four axes, or may hide a row")
        return AttentionMatch((node,), (a.result,), a)

    def build(self, op: Builder, m: AttentionMatch) -> Sequence[ir.Value]:
        a = m.attention
        inputs = (*a.operands, *(() if a.mask is None else (None, None, a.mask)))
        return [op.node("MultiHeadAttention", inputs, _domain=VENDOR, num_heads=a.heads, scale=attr(a.node, "scale"))]
