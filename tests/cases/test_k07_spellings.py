"""Kind 7: spellings of other exporters are read as what they are: Keras' Einsum, tf2onnx's norm, scales and shifts behind a Conv."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from harness import build, check  # type: ignore[import-not-found]
from hypothesis import given, settings
from hypothesis import strategies as st

import graphopt
from graphopt.core.contract import Context
from graphopt.core.pipeline import PassManager, parse
from graphopt.core.registry import passes, targets
from graphopt.core.remarks import Remarks
from graphopt.run.ort import session

EXACT = "canonicalize, simplify-masks, fuse-norm, fuse-activation, fuse-rotary, fuse-attention, canonicalize"

# ---- K7.1: Einsum --------------------------------------------------------------------------------------------------------------------------

KERAS = """(float[B,S,32] x, float[B,S] mask) => (float[B,S,32] y)
<float[32,4,8] wq, float[32,4,8] wk, float[32,4,8] wv, float[4,8,32] wo, float[4,8] bq, float[4,8] bk, float[4,8] bv, float[32] bo,
 float[32,64] w1, float[64,32] w2, float scale = {0.35355339}, float one = {1}, float low = {-10000.0}, int64[2] axes = {1,2}> {
  q0 = Einsum<equation = "abc,cde->abde">(x, wq)
  q1 = Add(q0, bq)
  k0 = Einsum<equation = "abc,cde->abde">(x, wk)
  k1 = Add(k0, bk)
  v0 = Einsum<equation = "abc,cde->abde">(x, wv)
  v1 = Add(v0, bv)
  q2 = Mul(q1, scale)
  s0 = Einsum<equation = "aecd,abcd->acbe">(k1, q2)
  hidden = Sub(one, mask)
  m0 = Mul(hidden, low)
  m1 = Unsqueeze(m0, axes)
  s1 = Add(s0, m1)
  p = Softmax<axis = -1>(s1)
  c = Einsum<equation = "acbe,aecd->abcd">(p, v1)
  o0 = Einsum<equation = "abcd,cde->abe">(c, wo)
  o1 = Add(o0, bo)
  r = Add(x, o1)
  f0 = Einsum<equation = "bsd,df->bsf">(r, w1)
  f1 = Relu(f0)
  f2 = Einsum<equation = "bsd,df->bsf">(f1, w2)
  y = Add(r, f2)
}"""
SHAPES: dict[str, tuple[int, ...]] = dict.fromkeys(("wq", "wk", "wv"), (32, 4, 8)) | {"wo": (4, 8, 32), "w1": (32, 64), "w2": (64, 32)}


def keras() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    return build(KERAS, {name: (rng.standard_normal(shape) * 0.15).astype(np.float32) for name, shape in SHAPES.items()})


def test_k71_one_attention_and_no_einsum_is_left() -> None:
    outcome = check(keras(), EXACT)
    assert outcome.ops["Attention"] == 1
    assert outcome.ops["Einsum"] == 0
    assert outcome.ops["MatMul"] == 6
    assert outcome.ops["Transpose"] == 0  # the stored weights were laid out once
    assert any(r.facts.get("heads") == 4 and r.facts.get("head_dim") == 8 for r in outcome.remarks)


def test_k71_quantize_reads_the_products() -> None:
    outcome = check(keras(), f"{EXACT}, quantize", loss=0.03)
    assert outcome.ops["MatMul"] == 6
    assert outcome.ops["DynamicQuantizeLinear"] >= 4
    stored = [v for v in outcome.model.graph.initializers.values() if v.const_value is not None and v.const_value.dtype.name == "INT8"]
    assert len([v for v in stored if len(v.const_value.shape) == 2]) == 6  # type: ignore[union-attr]


def test_k71_heads_and_neurons_can_go() -> None:
    outcome = check(
        keras(),
        f"{EXACT}, prune-heads{{ratio=0.5 importance=magnitude refit=false}}, prune-ffn{{ratio=0.5 importance=magnitude refit=false}}",
        loss=2.0,
    )
    widths = {tuple(map(int, v.shape)) for v in outcome.model.graph.initializers.values() if v.shape is not None and len(v.shape) == 2}
    assert {(32, 16), (16, 32), (32, 32)} <= widths


LABELS = "abcdE"


@st.composite
def equations(draw: st.DrawFn) -> tuple[str, list[list[str]], dict[str, bool], int]:
    """An equation, its operands (`.` is the ellipsis, one axis), which labels have a symbolic size, and which operand may be stored."""
    count = draw(st.sampled_from((1, 2, 2, 2, 2)))
    unique = draw(st.integers(0, 7)) > 0
    terms = [draw(st.lists(st.sampled_from(LABELS), min_size=1, max_size=4, unique=unique)) for _ in range(count)]
    spread = draw(st.integers(0, 2)) == 0
    for term in terms if spread else ():
        term.insert(draw(st.integers(0, len(term))), ".")
    result = draw(st.lists(st.sampled_from(sorted({i for t in terms for i in t if i != "."})), unique=True))
    if spread:
        result.insert(draw(st.integers(0, len(result))), ".")
    left = ",".join("".join(t) for t in terms)
    equation = left + ("" if draw(st.integers(0, 5)) == 0 else "->" + "".join(result))
    return equation.replace(".", "..."), terms, {i: draw(st.booleans()) for i in LABELS + "."}, draw(st.integers(0, 3))


def einsum_model(equation: str, terms: list[list[str]], symbolic: dict[str, bool], stored: int) -> tuple[onnx.ModelProto, dict[str, Any]]:
    sizes = {label: 2 + k for k, label in enumerate(LABELS + ".")}
    rng = np.random.default_rng(0)
    inputs, weights = [], {}
    for k, term in enumerate(terms):
        name, dims = f"x{k}", [f"N{i}" if symbolic[i] and i != "." else "M" if i == "." and symbolic[i] else sizes[i] for i in term]
        if k == stored and len(terms) == 2 and all(isinstance(d, int) for d in dims):
            weights[name] = rng.standard_normal([sizes[i] for i in term]).astype(np.float32)
        else:
            inputs.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, dims))
    node = onnx.helper.make_node("Einsum", [f"x{k}" for k in range(len(terms))], ["y"], equation=equation)
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    stored_weights = [onnx.numpy_helper.from_array(a, n) for n, a in weights.items()]
    graph = onnx.helper.make_graph([node], "g", inputs, [output], stored_weights)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10), weights


@settings(max_examples=60, deadline=None)
@given(equations())
def test_k71_any_equation_gives_the_numbers_of_numpy(case: tuple[str, list[list[str]], dict[str, bool], int]) -> None:
    equation, terms, symbolic, stored = case
    proto, weights = einsum_model(equation, terms, symbolic, stored)
    remarks = Remarks()
    model = graphopt.load(proto, remarks=remarks)
    PassManager(parse("canonicalize", passes())).run(model, Context(model, remarks=remarks))
    if any(node.op_type == "Einsum" for node in model.graph):
        assert any("stays, and no pass reads it" in r.message for r in remarks), equation
        return
    engine, rng = session(model, optimize=False), np.random.default_rng(1)
    for more in (0, 1):
        sizes = {label: 2 + k + more * symbolic[label] for k, label in enumerate(LABELS + ".")}
        feeds = {f"x{k}": rng.standard_normal([sizes[i] for i in term]).astype(np.float32) for k, term in enumerate(terms)} | weights
        expected = np.einsum(equation, *(feeds[f"x{k}"].astype(np.float64) for k in range(len(terms))))
        found = engine.run({k: v for k, v in feeds.items() if k not in weights})["y"]
        assert found.shape == expected.shape, equation
        np.testing.assert_allclose(found, expected, atol=1e-4, err_msg=equation)


@pytest.mark.parametrize("equation", ["bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd", "bnqd,bnkd->bnqk", "bijd,bkd->bijk", "...id,...jd->...ij"])
def test_k71_products_of_two_activations_are_one_matmul(equation: str) -> None:
    fixed = {"h": 2, "n": 2, "d": 4}
    terms = equation.replace("...", "b").replace("->", ",").split(",")
    left, right, out = (",".join(str(fixed.get(i, i.upper())) for i in term) for term in terms)
    text = f'(float[{left}] x, float[{right}] u) => (float[{out}] y) {{ y = Einsum<equation = "{equation}">(x, u) }}'
    counts = Counter(check(build(text), "canonicalize").ops)
    assert counts["MatMul"] == 1
    assert counts["Einsum"] == 0
    assert counts["Reshape"] == 0


# ---- K7.2: norms ---------------------------------------------------------------------------------------------------------------------------

DIFFERENCE = """(float[B,S,64] x) => (float[B,S,64] y) <int64[1] axes = {-1}, float zero = {0}, float eps = {1e-6}> {
  m = ReduceMean(x, axes)
  p = Mul(x, x)
  e = ReduceMean(p, axes)
  q = Mul(m, m)
  v0 = Sub(e, q)
  v = Max(v0, zero)
  a = Add(v, eps)
  s = Sqrt(a)
  r = Reciprocal(s)
  d = Sub(x, m)
  y = Mul(d, r)
}"""


@pytest.mark.parametrize("offset", [0.0, 3.0, 30.0, 300.0])
def test_k72_the_operator_is_at_least_as_exact_as_a_difference_of_squares(offset: float) -> None:
    proto = build(DIFFERENCE)
    model = check(proto, "canonicalize, fuse-norm").model
    assert [n.op_type for n in model.graph] == ["LayerNormalization"]
    x = (np.random.default_rng(0).standard_normal((3, 5, 64)) + offset).astype(np.float32)
    wide = x.astype(np.float64)
    true = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
    spelled, fused = (np.abs(session(m, optimize=False).run({"x": x})["y"] - true).max() for m in (proto, model))
    assert fused <= 2 * spelled + 1e-6


# ---- K7.3: scales and shifts behind a product ------------------------------------------------------------------------------------------------


def test_k73_every_target_folds_them_at_level_1() -> None:
    for target in targets().values():
        assert "fold-affine" in target().pipeline(1)


# ---- K7.4: what Attention has no words for -----------------------------------------------------------------------------------------------

UNREAD = {
    "openai-gpt": (
        "h = Mul(s, b)  one_less = Sub(one, b)  c = Mul(one_less, low)  u = Add(h, c)  p = Softmax<axis = -1>(u)",
        "sets hidden scores to c",
    ),
    "gpt-oss": (
        "n = Shape<start = 0, end = 3>(s)  size = Concat<axis = 0>(n, one64)  e = Expand(sink, size)  u = Concat<axis = -1>(s, e)\n"
        "  w = Softmax<axis = -1>(u)  p = Slice(w, first, last, axis)",
        "a sink say, has no place in Attention",
    ),
}


@pytest.mark.parametrize("name", UNREAD)
def test_k74_the_remark_says_what_attention_cannot(name: str) -> None:
    """Exact only where a row sees a key, or in no case: both stay as they are."""
    body, reason = UNREAD[name]
    text = f"""(float[B,4,S,8] q, float[B,4,S,8] k, float[B,4,S,8] v, bool[B,1,S,S] m) => (float[B,4,S,8] y)
    <float one = {{1}}, float low = {{-10000.0}}, float[1,4,1,1] sink, int64[1] one64 = {{1}}, int64[1] first = {{0}}, int64[1] last = {{-1}},
     int64[1] axis = {{-1}}> {{
      b = Cast<to = 1>(m)  kt = Transpose<perm = [0,1,3,2]>(k)  s = MatMul(q, kt)
      {body}
      y = MatMul(p, v) }}"""
    outcome = check(build(text), EXACT)
    assert outcome.ops["Attention"] == 0
    assert outcome.said("missed", reason)


def test_k71_quantize_names_an_einsum_that_it_leaves() -> None:
    text = '(float[B,S,8] x) => (float[B,S,4] y) <float[8,4] w> { a = MatMul(x, v)  y = Einsum<equation = "bsd,df->bsf">(a, w) }'
    outcome = check(build(text.replace("<float[8,4] w>", "<float[8,4] w, float[8,8] v>")), "quantize", loss=0.05)
    assert outcome.said("missed", "it is an Einsum; canonicalize makes a product of it")


GROUPED = """(float[B,T,32] x, float[T,T] mask) => (float[B,T,32] y)
<float[32,8,4] wq, float[32,2,4] wk, float[32,2,4] wv, float[8,4,32] wo, float scale = {0.5}, int64[5] groups = {0,0,2,4,4}, int64[4] heads = {0,0,8,4}> {
  q = Einsum<equation = "BTD,DNH->BTNH">(x, wq)
  k = Einsum<equation = "BSD,DKH->BSKH">(x, wk)
  v = Einsum<equation = "BSD,DKH->BSKH">(x, wv)
  qs = Mul(q, scale)
  q5 = Reshape(qs, groups)
  s = Einsum<equation = "BTKGH,BSKH->BKGTS">(q5, k)
  m = Add(s, mask)
  p = Softmax<axis = -1>(m)
  e = Einsum<equation = "BKGTS,BSKH->BTKGH">(p, v)
  a = Reshape(e, heads)
  o = Einsum<equation = "BTNH,NHD->BTD">(a, wo)
  y = Add(x, o)
}"""


def test_k71_grouped_queries_in_five_axes() -> None:
    """The product repeats each key head; no node does."""
    outcome = check(build(GROUPED), EXACT)
    assert (outcome.ops["Attention"], outcome.ops["Einsum"], outcome.ops["Transpose"]) == (1, 0, 0)
    assert any(r.facts.get("heads") == 8 and r.facts.get("kv_heads") == 2 for r in outcome.remarks)
    pruned = check(build(GROUPED), f"{EXACT}, prune-heads{{ratio=0.5 importance=magnitude refit=false}}", loss=2.0)
    assert any("removed" in r.facts for r in pruned.remarks)
    unfused = check(build(GROUPED), "canonicalize, prune-heads{ratio=0.5 importance=magnitude refit=false}", again=False)
    assert unfused.said("missed", "not pruned")  # and its numbers are those of the input
