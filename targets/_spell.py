"""How the CPU provider of ONNX Runtime is best told the float pieces; each spelling is an ordinary rewrite pass.

Measured (docs/benchmarks.md): the provider fuses Add + LayerNormalization at load into one kernel that is three to four times slower than
the two kernels of Sum + LayerNormalization, which it leaves alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import onnx_ir as ir

from graphopt.core.contract import Context
from graphopt.graph.questions import is_constant, producer, used_once
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.match import Match
from graphopt.rewrite.rules import RewritePass


@dataclasses.dataclass(frozen=True)
class ResidualMatch(Match):
    terms: tuple[ir.Value, ...]

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"terms": [t.name for t in self.terms]}


@dataclasses.dataclass(frozen=True)
class SpellResidual(RewritePass[ResidualMatch]):
    """Add -> LayerNormalization (or RMSNormalization) becomes Sum -> LayerNormalization; a constant bias inside the residual joins the same Sum."""

    anchors: ClassVar[frozenset[str]] = frozenset({"LayerNormalization", "RMSNormalization"})

    def match(self, node: ir.Node, ctx: Context) -> ResidualMatch | None:
        add = producer(node.inputs[0], "Add")
        if add is None:
            return None
        a, b = add.inputs
        assert a is not None
        assert b is not None
        for branch, other in ((a, b), (b, a)):
            inner = producer(branch, "Add")
            if inner is not None and used_once(branch) and any(is_constant(v) for v in inner.inputs):
                terms = tuple(v for v in (*inner.inputs, other) if v is not None)
                return ResidualMatch((inner, add), (add.outputs[0],), terms)
        return ResidualMatch((add,), (add.outputs[0],), (a, b))

    def build(self, op: Builder, m: ResidualMatch) -> Sequence[ir.Value]:
        return [op.Sum(*m.terms)]
