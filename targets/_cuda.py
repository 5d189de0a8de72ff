"""How pieces are told to ONNX Runtime's CUDA provider; what the CPU provider has as well is in `_kernels.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.formulas.polynomial import gate_of
from graphopt.core.contract import Context
from graphopt.driver.lowering.decompose import AttentionMatch
from graphopt.graph.attention_node import AttentionNode
from graphopt.graph.questions import attr
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.match import Match, Miss
from graphopt.rewrite.rules import RewritePass

from ._vendored import VENDOR

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclasses.dataclass(frozen=True)
class QuickMatch(Match):
    x: ir.Value
    slope: float


@dataclasses.dataclass(frozen=True)
class SpellQuickGelu(RewritePass[QuickMatch]):
    """x * sigmoid(slope * x) -> QuickGelu; SiLU is slope 1. Hendrycks and Gimpel, GELUs (2016)."""

    anchors: ClassVar[frozenset[str]] = frozenset({"Sigmoid"})

    def match(self, node: ir.Node, ctx: Context) -> QuickMatch | None:
        gate = gate_of(node)
        return None if gate is None else QuickMatch(gate.nodes, (gate.output,), gate.x, gate.alpha)

    def build(self, op: Builder, m: QuickMatch) -> Sequence[ir.Value]:
        return [op.node("QuickGelu", (m.x,), _domain=VENDOR, alpha=m.slope)]


@dataclasses.dataclass(frozen=True)
class SpellGroupQuery(RewritePass[AttentionMatch]):
    """Causal Attention with shared key heads, in half precision -> GroupQueryAttention. Ainslie et al., GQA (2023)."""

    anchors: ClassVar[frozenset[str]] = frozenset({"Attention"})

    def match(self, node: ir.Node, ctx: Context) -> AttentionMatch | Miss | None:
        a = AttentionNode.of(node)
        if a is not None and a.heads == a.kv_heads:
            return None
        if a is None or not a.packed:
            return Miss(node, "GroupQueryAttention reads packed heads")
        if a.q.dtype not in _HALF:
            return Miss(node, f"GroupQueryAttention has no kernel for {a.q.dtype and a.q.dtype.name.lower()}", "use dtype=float16 or dtype=bfloat16")
        if not a.causal or a.mask is not None or a.cached:
            return Miss(node, "GroupQueryAttention is causal and takes no mask of its own; this one has a mask, a cache, or is not causal")
        if a.shown is not None or a.precision or a.window != (-1, -1):
            return Miss(node, "stays Attention: its scores are read, or it has a window, or its softmax a type of its own")
        if not a.head_dim or a.head_dim % 8:
            return Miss(node, "GroupQueryAttention wants heads of a multiple of 8 features")
        if not _same_rows(a.q, a.k):
            return Miss(node, "stays Attention: keys and queries are not shown to have the same length")
        return AttentionMatch((node,), (node.outputs[0],), a)

    def build(self, op: Builder, m: AttentionMatch) -> Sequence[ir.Value]:
        a = m.attention
        one = op.const(np.array(1, np.int64), "one")
        length = op.shared(("length", a.q), lambda: op.Squeeze(op.Shape(a.q, start=1, end=2)))
        total = op.Cast(length, to=ir.DataType.INT32)
        last = op.Expand(op.Cast(op.Sub(length, one), to=ir.DataType.INT32), op.Shape(a.q, start=0, end=1))
        made = op.node(
            "GroupQueryAttention", (*a.operands, None, None, last, total), _domain=VENDOR, _outputs=3,
            softcap=a.softcap or None, num_heads=a.heads, kv_num_heads=a.kv_heads, scale=attr(a.node, "scale"),
        )  # fmt: skip
        return [made[0]]


def _same_rows(q: ir.Value, k: ir.Value) -> bool:
    return q.shape is not None and k.shape is not None and q.shape[1] == k.shape[1] and str(q.shape[1]) != "None"
