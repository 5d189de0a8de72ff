"""How pieces are told to ONNX Runtime's CUDA provider; what the CPU provider has as well is in `_kernels.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.polynomial import gate_of
from graphopt.core.contract import Context
from graphopt.graph.questions import attr, rank, static_dim
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
class SpellGroupQuery(RewritePass[Match]):
    """Causal Attention with shared key heads, in half precision -> GroupQueryAttention. Ainslie et al., GQA (2023)."""

    anchors: ClassVar[frozenset[str]] = frozenset({"Attention"})

    def match(self, node: ir.Node, ctx: Context) -> Match | Miss | None:
        heads, kv_heads = attr(node, "q_num_heads"), attr(node, "kv_num_heads")
        q, k = node.inputs[0], node.inputs[1]
        if heads == kv_heads:
            return None
        if rank(q) != 3 or q is None or k is None:
            return Miss(node, "GroupQueryAttention reads packed heads")
        if q.dtype not in _HALF:
            return Miss(node, f"GroupQueryAttention has no kernel for {q.dtype and q.dtype.name.lower()}", "use dtype=float16 or dtype=bfloat16")
        if not attr(node, "is_causal", 0) or any(v is not None for v in node.inputs[3:]):
            return Miss(node, "GroupQueryAttention is causal and takes no mask of its own; this one has a mask, a cache, or is not causal")
        if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]) or attr(node, "softmax_precision"):
            return Miss(node, "stays Attention: its scores or keys are read, or its softmax has a type of its own")
        size = static_dim(q, -1)
        if size is None or not heads or size // heads % 8:
            return Miss(node, "GroupQueryAttention wants heads of a multiple of 8 features")
        if not _same_rows(q, k):
            return Miss(node, "stays Attention: keys and queries are not shown to have the same length")
        return Match((node,), (node.outputs[0],))

    def build(self, op: Builder, m: Match) -> Sequence[ir.Value]:
        (node,) = m.nodes
        q = node.inputs[0]
        one = op.const(np.array(1, np.int64), "one")
        length = op.shared(("length", q), lambda: op.Squeeze(op.Shape(q, start=1, end=2)))
        total = op.Cast(length, to=ir.DataType.INT32)
        last = op.Expand(op.Cast(op.Sub(length, one), to=ir.DataType.INT32), op.Shape(q, start=0, end=1))
        options = {"num_heads": attr(node, "q_num_heads"), "kv_num_heads": attr(node, "kv_num_heads"), "scale": attr(node, "scale")}
        made = op.node(
            "GroupQueryAttention", (*node.inputs[:3], None, None, last, total), _domain=VENDOR, _outputs=3,
            softcap=attr(node, "softcap") or None, **options,
        )  # fmt: skip
        return [made[0]]


def _same_rows(q: ir.Value, k: ir.Value) -> bool:
    return q.shape is not None and k.shape is not None and q.shape[1] == k.shape[1] and str(q.shape[1]) != "None"
