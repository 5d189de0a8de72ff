"""Recent standard operators written as older ones, for runtimes that know only an older opset or lack the kernel.

What a runtime of 2022 loads is opset 17: no Attention, RotaryEmbedding or RMSNormalization (opset 23), and no Gelu (opset 20). The numbers
are those of ONNX Runtime's kernels, also in rows of attention that may read no key at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.core.contract import Context, Pass
from graphopt.driver.lowering.limits import KeepWithin
from graphopt.graph.attention_node import AttentionNode
from graphopt.graph.questions import attr, rank, static_dim
from graphopt.rewrite.attention import read_outputs, unfused, why_not_unfused
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.match import M, Match, Miss
from graphopt.rewrite.rules import RewritePass

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def portable(opset: int | None, without: str = "") -> list[Pass]:
    """The passes that keep a graph to `opset`, and warn of operators of the domain `without`; none where there is no limit.

    What they cannot write is refused when the model is saved.
    """
    limits = [KeepWithin(opset, without)] if opset is not None or without else []
    since: list[tuple[int, Pass]] = [
        (23, DecomposeAttention(opset)),
        (23, DecomposeRotary(opset)),
        (23, DecomposeRms(opset)),
        (21, DecomposeGroupNorm(opset)),
        (20, DecomposeGelu(opset)),
        (17, DecomposeLayerNorm(opset)),
    ]
    return [*(step for version, step in since if opset is not None and opset < version), *limits]


@dataclasses.dataclass(frozen=True)
class Decompose(RewritePass[M]):
    """An operator written as what it is made of.

    Args:
        opset: the artifact's limit, where that is the reason; None: the runtime has no kernel, or is faster so.
    """

    opset: int | None = None

    @property
    def binding(self) -> bool:
        return self.opset is not None


@dataclasses.dataclass(frozen=True)
class DecomposeRotary(Decompose[Match]):
    """RotaryEmbedding-23 -> slices, products and Concat."""

    anchors: ClassVar[frozenset[str]] = frozenset({"RotaryEmbedding"})

    def match(self, node: ir.Node, ctx: Context) -> Match | Miss | None:
        if rank(node.inputs[0]) not in (3, 4) or _head_dim(node) is None:
            return Miss(node, "stays RotaryEmbedding: the size of one head is unknown")
        return Match((node,), (node.outputs[0],))

    def build(self, op: Builder, m: Match) -> Sequence[ir.Value]:
        (node,) = m.nodes
        x, cos, sin = node.inputs[0], node.inputs[1], node.inputs[2]
        positions = node.inputs[3] if len(node.inputs) > 3 else None
        assert x is not None
        packed, dim = rank(x) == 3, _head_dim(node) or 0
        turned = attr(node, "rotary_embedding_dim", 0) or dim
        if positions is not None:
            cos, sin = (op.Gather(cache, positions, axis=0) for cache in (cos, sin))
        axis = 2 if packed else 1  # of the heads, which share their angles
        cos, sin = (op.Unsqueeze(cache, _ints(op, axis)) for cache in (cos, sin))
        value = op.Reshape(x, _ints(op, 0, 0, attr(node, "num_heads"), dim)) if packed else x
        out = _turn(op, value, cos, sin, turned, interleaved=bool(attr(node, "interleaved", 0)))
        if turned < dim:
            out = op.Concat(out, _slice(op, value, turned, dim), axis=-1)
        return [op.Reshape(out, _ints(op, 0, 0, attr(node, "num_heads") * dim)) if packed else out]


def _head_dim(node: ir.Node) -> int | None:
    size, heads = static_dim(node.inputs[0], -1), attr(node, "num_heads", 0)
    if rank(node.inputs[0]) == 4:
        return size
    return size // heads if size is not None and heads and size % heads == 0 else None


def _turn(op: Builder, x: ir.Value, cos: ir.Value, sin: ir.Value, dim: int, *, interleaved: bool) -> ir.Value:
    """The first `dim` features of x [.., features], turned pair by pair; cos and sin [.., dim / 2]."""
    if interleaved:
        a, b = _slice(op, x, 0, dim, 2), _slice(op, x, 1, dim, 2)
    else:
        a, b = _slice(op, x, 0, dim // 2), _slice(op, x, dim // 2, dim)
    real = op.Sub(op.Mul(a, cos), op.Mul(b, sin))
    imaginary = op.Add(op.Mul(a, sin), op.Mul(b, cos))
    if not interleaved:
        return op.Concat(real, imaginary, axis=-1)  # type: ignore[no-any-return]
    pairs = op.Concat(*(op.Unsqueeze(part, _ints(op, 4)) for part in (real, imaginary)), axis=-1)
    return op.Reshape(pairs, _ints(op, 0, 0, 0, dim))  # type: ignore[no-any-return]


def _slice(op: Builder, x: ir.Value, start: int, end: int, step: int = 1) -> ir.Value:
    value: ir.Value = op.Slice(x, _ints(op, start), _ints(op, end), _ints(op, -1), _ints(op, step))
    return value


def _ints(op: Builder, *values: int) -> ir.Value:
    return op.const(np.array(values, np.int64), "ints")


@dataclasses.dataclass(frozen=True)
class _DecomposeNorm(Decompose[Match]):
    """A norm over the last axes, computed in the type that the runtime computes it in."""

    def match(self, node: ir.Node, ctx: Context) -> Match | Miss | None:
        size = rank(node.inputs[0])
        if size is None:
            return Miss(node, f"stays {node.op_type}: the rank of `{node.inputs[0] and node.inputs[0].name}` is unknown")
        if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
            return Miss(node, f"stays {node.op_type}: its mean or deviation is read as well")
        return Match((node,), (node.outputs[0],))

    def _computed(self, node: ir.Node) -> ir.DataType:
        """The kernels take no notice of stash_type: float32 for what is narrower, else x's own type."""
        own = _own(node)
        return ir.DataType.FLOAT if own in _HALF else own

    def _wide(self, op: Builder, node: ir.Node) -> tuple[ir.Value, ir.Value]:
        """x in the type that is computed in, and the axes."""
        x = node.inputs[0]
        assert x is not None
        size, axis, to = rank(x) or 0, attr(node, "axis", -1), self._computed(node)
        axes = _ints(op, *range(axis % size - size, 0))
        return (x if to == _own(node) else op.Cast(x, to=to)), axes

    def _narrow(self, op: Builder, value: ir.Value, node: ir.Node, to: ir.DataType) -> ir.Value:
        """From the type that is computed in to `to`."""
        narrowed: ir.Value = value if to == self._computed(node) else op.Cast(value, to=to)
        return narrowed

    def _quotient(self, op: Builder, x: ir.Value, axes: ir.Value, node: ir.Node) -> ir.Value:
        """x / sqrt(mean(x^2) + epsilon), in the spelling that runtimes fuse again."""
        kind = self._computed(node).numpy()
        two, epsilon = (op.const(np.array(c, kind), name) for c, name in ((2, "two"), (attr(node, "epsilon", 1e-5), "epsilon")))
        root = op.Sqrt(op.Add(op.ReduceMean(op.Pow(x, two), axes, keepdims=1), epsilon))
        value: ir.Value = op.Div(x, root)
        return value


@dataclasses.dataclass(frozen=True)
class DecomposeRms(_DecomposeNorm):
    """RMSNormalization-23 -> Pow, ReduceMean, Add, Sqrt, Div, Mul."""

    anchors: ClassVar[frozenset[str]] = frozenset({"RMSNormalization"})

    def build(self, op: Builder, m: Match) -> Sequence[ir.Value]:
        (node,) = m.nodes
        x, axes = self._wide(op, node)
        out, scale = self._quotient(op, x, axes, node), node.inputs[1]
        assert scale is not None
        return [op.Mul(self._narrow(op, out, node, scale.dtype or _own(node)), scale)]


@dataclasses.dataclass(frozen=True)
class DecomposeLayerNorm(_DecomposeNorm):
    """LayerNormalization-17 -> ReduceMean, Sub, Pow, ReduceMean, Add, Sqrt, Div, Mul, Add."""

    anchors: ClassVar[frozenset[str]] = frozenset({"LayerNormalization"})

    def build(self, op: Builder, m: Match) -> Sequence[ir.Value]:
        (node,) = m.nodes
        x, axes = self._wide(op, node)
        out = self._narrow(op, self._quotient(op, op.Sub(x, op.ReduceMean(x, axes, keepdims=1)), axes, node), node, _own(node))
        out = op.Mul(out, node.inputs[1])
        beta = node.inputs[2] if len(node.inputs) > 2 else None
        return [out if beta is None else op.Add(out, beta)]


@dataclasses.dataclass(frozen=True)
class DecomposeGroupNorm(_DecomposeNorm):
    """GroupNormalization-21 -> a norm over [batch, groups, the rest]. Wu and He, Group Normalization (2018)."""

    anchors: ClassVar[frozenset[str]] = frozenset({"GroupNormalization"})

    def _computed(self, node: ir.Node) -> ir.DataType:
        """It has no kernel: its definition is run, which casts to stash_type."""
        return ir.DataType(attr(node, "stash_type", 1))

    def build(self, op: Builder, m: Match) -> Sequence[ir.Value]:
        (node,) = m.nodes
        whole, _ = self._wide(op, node)
        x, last = op.Reshape(whole, _ints(op, 0, attr(node, "num_groups"), -1)), _ints(op, -1)
        out = self._quotient(op, op.Sub(x, op.ReduceMean(x, last, keepdims=1)), last, node)
        out = self._narrow(op, op.Reshape(out, op.Shape(whole)), node, _own(node))
        beside = _ints(op, *range(1, (rank(node.inputs[0]) or 0) - 1))  # scale and bias are per channel
        return [op.Add(op.Mul(out, op.Unsqueeze(node.inputs[1], beside)), op.Unsqueeze(node.inputs[2], beside))]


def _own(node: ir.Node) -> ir.DataType:
    """Asked of the operand: the values that a Builder made have no dtype yet."""
    x = node.inputs[0]
    return ir.DataType.FLOAT if x is None or x.dtype is None else x.dtype


@dataclasses.dataclass(frozen=True)
class DecomposeGelu(Decompose[Match]):
    """Gelu-20 -> the five nodes with Erf (or those with Tanh) that runtimes fuse again. Hendrycks and Gimpel, GELUs (2016)."""

    anchors: ClassVar[frozenset[str]] = frozenset({"Gelu"})

    def match(self, node: ir.Node, ctx: Context) -> Match | Miss | None:
        return Match((node,), (node.outputs[0],))

    def build(self, op: Builder, m: Match) -> Sequence[ir.Value]:
        (node,) = m.nodes
        x = node.inputs[0]
        assert x is not None
        kind = _own(node).numpy()

        def number(value: float, name: str) -> ir.Value:
            return op.const(np.array(value, kind), name)

        if attr(node, "approximate", "none") == "tanh":
            cubic = op.Add(x, op.Mul(number(0.044715, "cubic"), op.Pow(x, number(3, "three"))))
            inner: Any = op.Tanh(op.Mul(number(np.sqrt(2 / np.pi), "slope"), cubic))
        else:
            inner = op.Erf(op.Div(x, number(np.sqrt(2), "root")))
        return [op.Mul(op.Mul(x, op.Add(inner, number(1, "one"))), number(0.5, "half"))]


@dataclasses.dataclass(frozen=True)
class AttentionMatch(Match):
    attention: AttentionNode


@dataclasses.dataclass(frozen=True)
class DecomposeAttention(Decompose[AttentionMatch]):
    """Attention-23 -> MatMul, mask, Softmax, MatMul: `graphopt.rewrite.attention`.

    With the numbers of ONNX Runtime's kernel.
    """

    anchors: ClassVar[frozenset[str]] = frozenset({"Attention"})

    def match(self, node: ir.Node, ctx: Context) -> AttentionMatch | Miss:
        a = AttentionNode.of(node)
        reason = "it breaks the specification of the operator" if a is None else why_not_unfused(a)
        if a is None or reason is not None:
            return Miss(node, f"stays Attention: {reason}")
        return AttentionMatch((node,), tuple(node.outputs[i] for i in read_outputs(a)), a)

    def build(self, op: Builder, m: AttentionMatch) -> Sequence[ir.Value]:
        return unfused(op, m.attention)
