"""Passes with a planted fault, as a plugin of the user, and a graph that they break."""

from __future__ import annotations

CHAIN = "(float[b,4] x) => (float[b,4] y) { " + " ".join(f"[n{k}] v{k} = Sigmoid ({'x' if k == 0 else f'v{k - 1}'})" for k in range(8))
CHAIN += " [n8] y = Tanh (v7) }"

PLUGIN = '''
import dataclasses
from collections.abc import Sequence
import numpy as np
import onnx_ir as ir
from graphopt.core.contract import Context, Pass
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.match import Match
from graphopt.rewrite.rules import RewritePass


class Spelled(RewritePass[Match]):
    anchors = frozenset({"Sigmoid"})

    def match(self, node, ctx):
        return Match((node,), (node.outputs[0],))

    def build(self, op: Builder, m: Match) -> Sequence[ir.Value]:
        x = m.nodes[0].inputs[0]
        wrong = m.nodes[0].name == self.at
        return [self.bad(op, x) if wrong else op.Reciprocal(op.Add(op.Exp(op.Neg(x)), op.const(np.float32(1.0), "one")))]


@dataclasses.dataclass(frozen=True)
class WrongSigmoid(Spelled):
    """Another spelling, and at one node a wrong one."""

    at: str = "n5"

    def bad(self, op, x):
        return op.Reciprocal(op.Add(op.Exp(op.Neg(x)), op.const(np.float32(3.0), "one")))


@dataclasses.dataclass(frozen=True)
class UnloadableSigmoid(Spelled):
    """The same, and at one node an operator that no runtime has."""

    at: str = "n5"

    def bad(self, op, x):
        return op.Nope(x, _domain="planted")


@dataclasses.dataclass(frozen=True)
class Shifty(Pass):
    """Wrong in every second run of one process, and burns no fuel."""

    always: bool = True

    def run(self, model: ir.Model, ctx: Context) -> int:
        Shifty.runs += 1
        if not self.always and Shifty.runs % 2 == 0:
            return 0
        for node in model.graph:
            if node.op_type == "Tanh":
                node.op_type = "Sigmoid"
                return 1
        return 0


Shifty.runs = 0


@dataclasses.dataclass(frozen=True)
class Raises(Pass):
    """Raises at its third change."""

    def run(self, model: ir.Model, ctx: Context) -> int:
        changes = 0
        for node in model.graph:
            if node.op_type == "Sigmoid" and ctx.fuel.burn():
                changes += 1
                node.metadata_props["seen"] = "1"
                if changes == 3:
                    raise ValueError("three is too many")
        return changes


@dataclasses.dataclass(frozen=True)
class WrongNorm(RewritePass[Match]):
    """Writes every normalization anew, and one of them with another epsilon, or as an operator that no runtime has."""

    at: str = ""
    unloadable: bool = False
    anchors = frozenset({"LayerNormalization"})

    def match(self, node, ctx):
        return None if "planted" in node.metadata_props else Match((node,), (node.outputs[0],))

    def build(self, op: Builder, m: Match) -> Sequence[ir.Value]:
        node = m.nodes[0]
        epsilon = 0.1 if node.name == self.at else node.attributes["epsilon"].value
        if node.name == self.at and self.unloadable:
            y = op.Nope(*node.inputs, _domain="planted")
        else:
            y = op.LayerNormalization(*node.inputs, axis=-1, epsilon=epsilon)
        y.producer().metadata_props["planted"] = "1"
        return [y]
'''
