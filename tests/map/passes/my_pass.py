"""my-pass: two changes of sign are none."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import onnx_ir as ir

from graphopt.analysis.my_facts import MyFacts
from graphopt.core import Context
from graphopt.graph import producer
from graphopt.rewrite import Builder, Match, RewritePass


@dataclasses.dataclass(frozen=True)
class MyPass(RewritePass[Match]):
    """A sign that changes twice, never changes."""

    anchors: ClassVar[frozenset[str]] = frozenset({"Neg"})

    def match(self, node: ir.Node, ctx: Context) -> Match | None:
        return Match(nodes=(node,), outputs=(node.outputs[0],)) if node in ctx.get(MyFacts()) else None

    def build(self, op: Builder, m: Match) -> Sequence[ir.Value]:
        first = producer(m.nodes[0].inputs[0], "Neg")
        assert first is not None
        assert first.inputs[0] is not None
        return [first.inputs[0]]
