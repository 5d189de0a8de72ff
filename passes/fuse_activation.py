"""fuse-activation: the GELU family, in whatever order its factors are written, becomes the standard Gelu."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import onnx_ir as ir

from graphopt.analysis.formulas.polynomial import Polynomial, close, polynomial, roots
from graphopt.core.contract import Context
from graphopt.graph.questions import consumers, enclosed, producer, scalar
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.match import Match, Miss
from graphopt.rewrite.rules import RewritePass

_SINCE = 20  # the opset that has Gelu
_SQRT_2_PI = math.sqrt(2 / math.pi)
_INNER: Mapping[str, Polynomial] = {"Erf": {1: math.sqrt(0.5)}, "Tanh": {1: _SQRT_2_PI, 3: 0.044715 * _SQRT_2_PI}}
_ROUNDING = 2e-5  # relative; how exporters round sqrt(2) and 0.044715. It moves a GELU by less than 6e-6
_ROUNDING_HALF = 1e-3  # the same in 16-bit types
_EXACT = 1e-6  # relative; 1/2 and 1 are exact in every type
_STEPS = 6  # nodes after the Erf or Tanh


@dataclasses.dataclass(frozen=True)
class GeluMatch(Match):
    x: ir.Value
    approximate: str

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"approximate": self.approximate}


@dataclasses.dataclass(frozen=True)
class FuseActivation(RewritePass[GeluMatch]):
    """x/2 * (1 + erf(x / sqrt 2)) -> Gelu; x/2 * (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) -> Gelu, approximate="tanh".

    Hendrycks and Gimpel, Gaussian Error Linear Units (2016). x * sigmoid(a x) is another function and stays (see analysis/polynomial.py).
    """

    anchors: ClassVar[frozenset[str]] = frozenset(_INNER)

    def match(self, node: ir.Node, ctx: Context) -> GeluMatch | Miss | None:
        found = _inner(node)
        if isinstance(found, Miss) or found is None:
            return found
        x, inner = found
        walk = _Walk(node, x)
        while not walk.complete:
            complaint = walk.step()
            if complaint is not None:
                return Miss(node, complaint) if walk.factors else None
        if ctx.model.opset_imports.get("", 1) < _SINCE:
            return Miss(node, f"Gelu needs opset {_SINCE}, the graph has {ctx.model.opset_imports.get('', 1)}")
        nodes = enclosed((node, *walk.path), inner | walk.side)
        return GeluMatch(nodes, (walk.value,), x, "none" if node.op_type == "Erf" else "tanh")

    def build(self, op: Builder, m: GeluMatch) -> Sequence[ir.Value]:
        return [op.Gelu(m.x, approximate="tanh" if m.approximate == "tanh" else None)]


def _inner(node: ir.Node) -> tuple[ir.Value, frozenset[ir.Node]] | Miss | None:
    """The x of which the argument of Erf or Tanh is the right polynomial, and the nodes between."""
    argument, wanted = node.inputs[0], _INNER[node.op_type]
    if argument is None:
        return None
    tolerance = _ROUNDING if argument.dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE) else _ROUNDING_HALF
    near: Polynomial | None = None
    for root in roots(argument):
        read = polynomial(argument, root)
        if read is None:
            continue
        if close(read[0], wanted, tolerance):
            return root, read[1]
        if {k for k, c in read[0].items() if c} == set(wanted) and root is not argument:
            near = near or read[0]
    if near is None:
        return None
    terms = " + ".join(f"{near[k]:.6g} x^{k}" for k in sorted(wanted))
    return Miss(node, f"the argument of {node.op_type} is {terms}, GELU has " + " + ".join(f"{wanted[k]:.6g} x^{k}" for k in sorted(wanted)))


class _Walk:
    """Follows e = Erf(..) or Tanh(..) down the graph; `value` is always x^factors * (constant + slope * e)."""

    def __init__(self, node: ir.Node, x: ir.Value) -> None:
        self.value, self.x, self.graph = node.outputs[0], x, node.graph
        self.constant, self.slope, self.factors = 0.0, 1.0, 0
        self.path: list[ir.Node] = []
        self.side: frozenset[ir.Node] = frozenset()
        self.shifted = False

    @property
    def complete(self) -> bool:
        half = (math.isclose(v, 0.5, rel_tol=_EXACT) for v in (self.constant, self.slope))
        return self.factors == 1 and all(half)

    def step(self) -> str | None:
        """Take the next node in; a text says why that is not possible."""
        readers = consumers(self.value)
        if self.factors and not math.isclose(self.constant, self.slope, rel_tol=_EXACT):
            return f"the product is x * ({self.constant:.6g} + {self.slope:.6g} e), GELU has x * (0.5 + 0.5 e)"
        if len(readers) != 1 or len(self.path) >= _STEPS:
            return self._ends()
        node = readers[0]
        if node.graph is not self.graph or producer(node.outputs[0], "Add", "Mul", "Div") is None or node.inputs[0] is node.inputs[1]:
            return self._ends()
        side = node.inputs[1] if node.inputs[0] is self.value else node.inputs[0]
        if node.op_type == "Div" and node.inputs[0] is not self.value:
            return self._ends()
        complaint = self._scalar(node, scalar(side)) if scalar(side) is not None else self._factor(node, side)
        if complaint is None:
            self.path.append(node)
            self.value = node.outputs[0]
        return complaint

    def _ends(self) -> str:
        return f"the product stops at x * ({self.constant:.6g} + {self.slope:.6g} e), GELU has x * (0.5 + 0.5 e)"

    def _scalar(self, node: ir.Node, number: float | None) -> str | None:
        assert number is not None
        if node.op_type == "Add":
            if self.factors:
                return self._ends()
            self.constant += number
            return None
        if node.op_type == "Div" and number == 0:
            return self._ends()
        factor = number if node.op_type == "Mul" else 1 / number
        self.constant, self.slope = self.constant * factor, self.slope * factor
        return None

    def _factor(self, node: ir.Node, side: ir.Value | None) -> str | None:
        """x itself, or x times a number, joins the product."""
        if node.op_type != "Mul" or self.factors:
            return self._ends()
        read = polynomial(side, self.x)
        if read is None or {k for k, c in read[0].items() if c} != {1}:
            if self.constant == 0:
                return "not a GELU"
            self.factors = 1
            return f"the last product is with `{'' if side is None else side.name}`, GELU has x itself, `{self.x.name}`"
        self.factors = 1
        self.constant, self.slope = self.constant * read[0][1], self.slope * read[0][1]
        self.side |= read[1]
        return None
