"""f(f(x)) is x where f is its own inverse."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import onnx_ir as ir

from graphopt import Builder, Context, Match, Miss, RewritePass
from graphopt.graph import producer

SELF_INVERSE = ("Neg", "Not", "BitwiseNot")


@dataclasses.dataclass(frozen=True)
class Twice(Match):
    """`inner` is the value that was negated twice."""

    inner: ir.Value


@dataclasses.dataclass(frozen=True)
class RemoveInvolutions(RewritePass[Twice]):
    """Neg(Neg(x)), Not(Not(x)) and BitwiseNot(BitwiseNot(x)) become x."""

    ops: tuple[str, ...] = SELF_INVERSE
    anchors: ClassVar[frozenset[str]] = frozenset(SELF_INVERSE)

    def match(self, node: ir.Node, ctx: Context) -> Twice | Miss | None:
        first = producer(node.inputs[0], node.op_type)
        if first is None or first.inputs[0] is None:
            return None
        if node.op_type not in self.ops:
            return Miss(node, f"{node.op_type} is not among ops={'+'.join(self.ops)}", "add it to the option")
        return Twice(nodes=(node,), outputs=(node.outputs[0],), inner=first.inputs[0])

    def build(self, op: Builder, m: Twice) -> Sequence[ir.Value]:
        return [m.inner]
