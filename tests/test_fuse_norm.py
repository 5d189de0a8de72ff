"""fuse-norm beyond the text cases: composed spellings, blocks of a model, and the residual facts that targets read."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from harness import build, check  # type: ignore[import-not-found]

import graphopt
from graphopt.analysis.stream import Residual, Residuals
from graphopt.core.contract import Context

SQUARES = ("p = Pow(d, two)", "p = Mul(d, d)")
ROOTS = {
    "div": ("s = Sqrt(a)", "n = Div(d, s)"),
    "reciprocal": ("s = Sqrt(a)\n r = Reciprocal(s)", "n = Mul(d, r)"),
    "one over": ("s = Sqrt(a)\n r = Div(one, s)", "n = Mul(r, d)"),
    "power": ("s = Pow(a, minus)", "n = Mul(s, d)"),
}
CONSTANTS = "int64[1] axes = {-1}, float two = {2}, float one = {1}, float minus = {-0.5}, float[1] eps = {1e-5}, float[1,8] gamma, float[8] beta"


def spelled(norm: str, square: str, root: tuple[str, str], flipped: bool) -> str:
    center = "m = ReduceMean(x, axes)\n d = Sub(x, m)" if norm == "layer" else "d = Neg(x)"
    scale = "g = Mul(gamma, n)" if flipped else "g = Mul(n, gamma)"
    shift = ("y = Add(beta, g)" if flipped else "y = Add(g, beta)") if norm == "layer" else "y = Identity(g)"
    add = "a = Add(eps, v)" if flipped else "a = Add(v, eps)"
    body = "\n ".join((center, square, "v = ReduceMean(p, axes)", add, *root, scale, shift))
    return f"(float[B,S,8] x) => (float[B,S,8] y) <{CONSTANTS}> {{\n {body}\n}}"


@pytest.mark.parametrize(("square", "root", "flipped"), itertools.product(SQUARES, ROOTS, (False, True)))
def test_a11_every_composition_of_the_parts(square: str, root: str, flipped: bool) -> None:
    for norm, op_type in (("layer", "LayerNormalization"), ("rms", "RMSNormalization")):
        outcome = check(build(spelled(norm, square, ROOTS[root], flipped)), "canonicalize, fuse-norm")
        kept = {"LayerNormalization": 1} if norm == "layer" else {"RMSNormalization": 1, "Neg": 1}
        assert dict(outcome.ops) == kept
        fused = next(n for n in outcome.model.graph if n.op_type == op_type)
        assert fused.attributes["epsilon"].value == pytest.approx(1e-5, rel=1e-6)
        assert list(fused.inputs[1].shape) == [8]


def test_a05_the_remark_names_the_node() -> None:
    text = spelled("layer", SQUARES[0], ROOTS["div"], False).replace("ReduceMean(", "ReduceMean<keepdims = 0>(").replace("[B,S,8]", "[8,8]")
    proto = build(text)
    for node in proto.graph.node:
        if node.op_type == "ReduceMean":
            node.name = f"mean_of_{node.input[0]}"
    outcome = check(proto, "fuse-norm", broken=True)
    (remark,) = [r for r in outcome.remarks if r.kind == "missed"]
    assert remark.node == "mean_of_p"


def test_b06_an_all_equal_row_gives_beta() -> None:
    text = spelled("layer", SQUARES[1], ROOTS["div"], False).replace("1e-5", "1e-12")
    proto = build(text)
    rows = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
    rows[0, 1] = 3
    outcome = check(proto, "canonicalize, fuse-norm", feeds=[{"x": rows}])
    assert outcome.ops["LayerNormalization"] == 1


# ---- residual facts -----------------------------------------------------------------------------------------------------------------------


def residuals(body: str, inputs: str, declared: str = "", outputs: str = 'float["b",3,8] y') -> tuple[Residual, ...]:
    text = f"({inputs}) => ({outputs}) <float[8] gamma, float[8] bias, float[8,8] w{declared}> {{ {body} }}"
    model = graphopt.load(build(text.replace('"', "")))
    return Context(model).get(Residuals())


NORM = "y = LayerNormalization(s, gamma)"


@pytest.mark.parametrize(
    ("shape", "same", "skippable"),
    [
        ("[1,3,8]", False, True),
        ("[3,8]", False, True),
        ("[1,1,8]", False, False),
        ("[b,1,8]", False, False),
        ("[b,3,8]", True, True),
        ("[8]", False, False),
    ],
)
def test_a19_which_partner_may_be_a_residual_input(shape: str, same: bool, skippable: bool) -> None:
    (fact,) = residuals(f"s = Add(p, a)\n {NORM}", f"float[b,3,8] a, float{shape} p")
    by_name = {t.value.name: t for t in fact.terms}
    assert list(by_name) == ["p", "a"]
    assert (by_name["a"].same_shape, by_name["a"].skippable) == (True, True)
    assert (by_name["p"].same_shape, by_name["p"].skippable) == (same, skippable)


def test_a_bias_inside_the_residual_is_a_term_of_its_own() -> None:
    body = f"m = MatMul(a, w)\n h = Add(m, bias)\n s = Add(h, p)\n {NORM}"
    (fact,) = residuals(body, "float[b,3,8] a, float[b,3,8] p")
    assert [t.value.name for t in fact.terms] == ["m", "bias", "p"]
    assert [t.bias for t in fact.terms] == [False, True, False]
    assert [n.op_type for n in fact.adds] == ["Add", "Add"]
    assert fact.adds[-1].outputs[0] is fact.total
    assert not fact.shared


def test_a_sum_that_is_read_elsewhere_is_shared_and_not_opened_further_up() -> None:
    body = f"r = Add(a, p)\n m = MatMul(r, w)\n s = Add(m, r)\n {NORM}\n z = Relu(s)"
    (fact,) = residuals(body, "float[b,3,8] a, float[b,3,8] p", outputs="float[b,3,8] y, float[b,3,8] z")
    assert [t.value.name for t in fact.terms] == ["m", "r"]
    assert fact.shared


def test_a_norm_of_something_else_has_no_residual() -> None:
    assert residuals("s = Relu(a)\n " + NORM, "float[b,3,8] a") == ()


def test_a12_a_public_sum_is_shared() -> None:
    (fact,) = residuals(f"s = Add(a, p)\n {NORM}", "float[b,3,8] a, float[b,3,8] p", outputs="float[b,3,8] y, float[b,3,8] s")
    assert fact.shared
