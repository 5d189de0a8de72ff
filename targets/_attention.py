"""Standard Attention written as MatMul and Softmax, with the numbers of ONNX Runtime's kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import onnx_ir as ir

from graphopt.core.contract import Context
from graphopt.rewrite.attention import Sizes, sizes_of, unfused
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.match import Match, Miss
from graphopt.rewrite.rules import RewritePass


@dataclasses.dataclass(frozen=True)
class AttentionMatch(Match):
    sizes: Sizes


@dataclasses.dataclass(frozen=True)
class DecomposeAttention(RewritePass[AttentionMatch]):
    """Attention-23 -> MatMul, mask, Softmax, MatMul: `graphopt.rewrite.attention`.

    Args:
        opset: the artifact's limit, where that is the reason; None: the runtime is faster so, or has no kernel.
    """

    opset: int | None = None
    anchors: ClassVar[frozenset[str]] = frozenset({"Attention"})

    @property
    def binding(self) -> bool:
        return self.opset is not None

    def match(self, node: ir.Node, ctx: Context) -> AttentionMatch | Miss:
        sizes = sizes_of(node)
        if isinstance(sizes, str):
            return Miss(node, f"stays Attention: {sizes}")
        return AttentionMatch((node,), tuple(node.outputs[i] for i in sizes.made), sizes)

    def build(self, op: Builder, m: AttentionMatch) -> Sequence[ir.Value]:
        return unfused(op, m.nodes[0], m.sizes)
