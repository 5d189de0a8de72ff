"""fuse-activation beyond the text cases: every order of the factors, how far constants may be off, and the gates that stay."""

from __future__ import annotations

import itertools
import math

import numpy as np
import onnx_ir as ir
import pytest
from harness import build, check, compare  # type: ignore[import-not-found]

import graphopt
from graphopt.analysis.formulas.polynomial import Gate, gate_of
from graphopt.run.ort import session

INNER = {
    "none": "a = Div(x, sqrt2)\n e = Erf(a)",
    "tanh": "p = Pow(x, three)\n q = Mul(p, k)\n r = Add(x, q)\n a = Mul(r, s)\n e = Tanh(a)",
}
CONSTANTS = (
    "float sqrt2 = {1.4142135}, float three = {3}, float k = {0.044715}, float s = {0.79788456}, float one = {1}, float half = {0.5}, float two = {2}"
)
ORDERS = {
    "x(1+e)/2": "c = Mul(x, b)\n y = Mul(c, half)",
    "(x/2)(1+e)": "c = Mul(x, half)\n y = Mul(c, b)",
    "x((1+e)/2)": "c = Mul(b, half)\n y = Mul(x, c)",
    "(1+e)x / 2": "c = Mul(b, x)\n y = Div(c, two)",
    "(x / 2)(1+e)": "c = Div(x, two)\n y = Mul(b, c)",
}


@pytest.mark.parametrize(("inner", "order", "canonical"), itertools.product(INNER, ORDERS, (False, True)))
def test_a16_every_order_of_the_factors(inner: str, order: str, canonical: bool) -> None:
    text = f"(float[B,S,8] x) => (float[B,S,8] y) <{CONSTANTS}> {{ {INNER[inner]}\n b = Add(e, one)\n {ORDERS[order]} }}"
    outcome = check(build(text), "canonicalize, fuse-activation" if canonical else "fuse-activation")
    assert dict(outcome.ops) == {"Gelu": 1}
    (gelu,) = outcome.model.graph
    assert ("approximate" in gelu.attributes) == (inner == "tanh")


def test_a16_exact_gelu_for_the_tanh_one_would_fail() -> None:
    """The two differ by 4.7e-4; the tolerance tells them apart."""
    text = f"(float[B,S,8] x) => (float[B,S,8] y) <{CONSTANTS}> {{ {INNER['tanh']}\n b = Add(e, one)\n {ORDERS['x(1+e)/2']} }}"
    proto, wrong = build(text), graphopt.load(build("(float[B,S,8] x) => (float[B,S,8] y) { y = Gelu(x) }"))
    feed = {"x": np.linspace(-4, 4, 64, dtype=np.float32).reshape(2, 4, 8)}
    with pytest.raises(AssertionError, match="output `y`"):
        compare(proto, wrong, [feed])
    right = check(proto, "fuse-activation", feeds=[feed])
    found = session(right.model, optimize=False).run(feed)["y"]
    assert np.abs(session(proto, optimize=False).run(feed)["y"] - found).max() <= 1e-6


@pytest.mark.parametrize(("factor", "fused"), [(1 + 1e-5, True), (1 - 1e-5, True), (1 + 1e-4, False), (1 - 1e-4, False)])
def test_a14_how_far_an_exporter_may_round(factor: float, fused: bool) -> None:
    """At the limit the numbers still hold; beyond it there is a reason."""
    text = f"(float[B,8] x) => (float[B,8] y) <{CONSTANTS}> {{ {INNER['none']}\n b = Add(e, one)\n {ORDERS['x(1+e)/2']} }}"
    feed = {"x": np.linspace(-4, 4, 64, dtype=np.float32).reshape(8, 8)}
    outcome = check(build(text.replace("1.4142135", repr(math.sqrt(2) * factor))), "fuse-activation", feeds=[feed])
    assert outcome.ops["Gelu"] == fused
    assert fused or outcome.said("missed", "the argument of Erf is")


# ---- gates --------------------------------------------------------------------------------------------------------------------------------


def gates(model: ir.Model) -> tuple[Gate, ...]:
    return tuple(gate for node in model.graph if node.op_type == "Sigmoid" and (gate := gate_of(node)) is not None)


GATES = {
    "quick gelu": ("e = Mul(x, alpha)\n f = Sigmoid(e)\n y = Mul(x, f)", "1.702", 1.702),
    "another alpha": ("e = Mul(alpha, x)\n f = Sigmoid(e)\n y = Mul(f, x)", "1.5", 1.5),
    "silu": ("f = Sigmoid(x)\n y = Mul(x, f)", "1", 1.0),
    "alpha by division": ("e = Div(x, alpha)\n f = Sigmoid(e)\n y = Mul(x, f)", "4", 0.25),
}


@pytest.mark.parametrize("name", GATES)
def test_a17_a_gate_is_a_fact_with_its_own_alpha(name: str) -> None:
    body, alpha, expected = GATES[name]
    model = graphopt.load(build(f"(float[2,8] x) => (float[2,8] y) <float alpha = {{{alpha}}}> {{ {body} }}"))
    (gate,) = gates(model)
    assert gate.alpha == pytest.approx(expected)
    assert gate.x.name == "x"
    assert gate.output.name == "y"
    assert gate.nodes[-1].outputs[0] is gate.output
    assert len(gate.nodes) == len(model.graph)


@pytest.mark.parametrize(
    "body",
    [
        "e = Mul(x, v)\n f = Sigmoid(e)\n y = Mul(x, f)",  # alpha is an input
        "f = Sigmoid(x)\n y = Mul(v, f)",  # another value is gated (GLU)
        "f = Sigmoid(x)\n y = Add(x, f)",
        "e = Add(x, one)\n f = Sigmoid(e)\n y = Mul(x, f)",
        "f = Sigmoid(x)\n y = Mul(f, f)",
        "y = Sigmoid(x)",
    ],
)
def test_a17_what_is_no_gate(body: str) -> None:
    model = graphopt.load(build(f"(float[2,8] x, float[2,8] v) => (float[2,8] y) <float one = {{1}}> {{ {body} }}"))
    assert gates(model) == ()


def test_a_gate_whose_sigmoid_is_public_is_none() -> None:
    model = graphopt.load(build("(float[2,8] x) => (float[2,8] y, float[2,8] f) { f = Sigmoid(x)\n y = Mul(x, f) }"))
    assert gates(model) == ()
