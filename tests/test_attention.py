"""Recognition of attention by meaning: many spellings are found, impostors are refused with the reason, and the numbers hold."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

import graphopt
from graphopt.analysis.attention import AttentionFacts, Attentions
from graphopt.core.contract import Context
from graphopt.core.pipeline import PassManager, parse
from graphopt.core.registry import passes
from graphopt.graph.layout import Tracer
from graphopt.graph.shapes import infer_shapes
from graphopt.run.ort import session

HEAD = '< ir_version: 10, opset_import: ["" : 20] >\n'
PROJECTIONS = "  q = MatMul (x, wq)\n  k = MatMul (x, wk)\n  v = MatMul (x, wv)\n"
WEIGHTS = "float[32,32] wq, float[32,32] wk, float[32,32] wv"
PLAIN = f"""g (float[B,S,32] x, float[B,1,1,S] m) => (float[B,S,32] y)
<{WEIGHTS}, int64[4] s4 = {{0,0,4,8}}, int64[3] s3 = {{0,0,32}}, float c = {{2.8284271}}>
{{
{PROJECTIONS}  q4 = Reshape (q, s4)
  k4 = Reshape (k, s4)
  v4 = Reshape (v, s4)
  qt = Transpose <perm = [0,2,1,3]> (q4)
  kt = Transpose <perm = [0,2,3,1]> (k4)
  vt = Transpose <perm = [0,2,1,3]> (v4)
  s = MatMul (qt, kt)
  sc = Div (s, c)
  sm = Add (sc, m)
  p = Softmax <axis = -1> (sm)
  o = MatMul (p, vt)
  ot = Transpose <perm = [0,2,1,3]> (o)
  y = Reshape (ot, s3)
}}"""
PACKED = """g (float[B,S,32] x) => (float[B,S,32] y)
<float[32,96] w, int64[5] s5 = {0,0,3,4,8}, int64[3] s3 = {0,0,32}, int64 i0 = {0}, int64 i1 = {1}, int64 i2 = {2}, float c = {2.8284271}>
{
  qkv = MatMul (x, w)
  r = Reshape (qkv, s5)
  t = Transpose <perm = [2,0,3,1,4]> (r)
  q = Gather <axis = 0> (t, i0)
  k = Gather <axis = 0> (t, i1)
  v = Gather <axis = 0> (t, i2)
  kt = Transpose <perm = [0,1,3,2]> (k)
  s = MatMul (q, kt)
  sc = Div (s, c)
  p = Softmax <axis = -1> (sc)
  o = MatMul (p, v)
  ot = Transpose <perm = [0,2,1,3]> (o)
  y = Reshape (ot, s3)
}"""
PACKED_SPLIT = """g (float[B,S,32] x) => (float[B,S,32] y)
<float[32,96] w, int64[4] s4 = {0,0,4,8}, int64[3] s3 = {0,0,32}, float c = {2.8284271}>
{
  qkv = MatMul (x, w)
  q0, k0, v0 = Split <axis = -1, num_outputs = 3> (qkv)
  q1 = Reshape (q0, s4)
  k1 = Reshape (k0, s4)
  v1 = Reshape (v0, s4)
  q = Transpose <perm = [0,2,1,3]> (q1)
  kt = Transpose <perm = [0,2,3,1]> (k1)
  v = Transpose <perm = [0,2,1,3]> (v1)
  s = MatMul (q, kt)
  sc = Div (s, c)
  p = Softmax <axis = -1> (sc)
  o = MatMul (p, v)
  ot = Transpose <perm = [0,2,1,3]> (o)
  y = Reshape (ot, s3)
}"""
PACKED_BY_HEAD = """g (float[B,S,32] x) => (float[B,S,32] y)
<float[32,96] w, int64[4] s4 = {0,0,4,24}, int64[3] s3 = {0,0,32}, int64[1] i0 = {0}, int64[1] i8 = {8}, int64[1] i16 = {16}, int64[1] i24 = {24},
 int64[1] a3 = {3}, float c = {2.8284271}>
{
  qkv = MatMul (x, w)
  r = Reshape (qkv, s4)
  t = Transpose <perm = [0,2,1,3]> (r)
  q = Slice (t, i0, i8, a3)
  k = Slice (t, i8, i16, a3)
  v = Slice (t, i16, i24, a3)
  kt = Transpose <perm = [0,1,3,2]> (k)
  s = MatMul (q, kt)
  sc = Div (s, c)
  p = Softmax <axis = -1> (sc)
  o = MatMul (p, v)
  ot = Transpose <perm = [0,2,1,3]> (o)
  y = Reshape (ot, s3)
}"""
BATCHED_3D = f"""g (float[2,S,32] x) => (float[2,S,32] y)
<{WEIGHTS}, int64[4] s4 = {{2,-1,4,8}}, int64[3] sb = {{8,-1,8}}, int64[4] so = {{2,4,-1,8}}, int64[3] s3 = {{2,-1,32}}, float c = {{0.35355339}}>
{{
{PROJECTIONS}  q4 = Reshape (q, s4)
  k4 = Reshape (k, s4)
  v4 = Reshape (v, s4)
  qt = Transpose <perm = [0,2,1,3]> (q4)
  kt = Transpose <perm = [0,2,1,3]> (k4)
  vt = Transpose <perm = [0,2,1,3]> (v4)
  q3 = Reshape (qt, sb)
  k3 = Reshape (kt, sb)
  v3 = Reshape (vt, sb)
  k3t = Transpose <perm = [0,2,1]> (k3)
  s = MatMul (q3, k3t)
  sc = Mul (s, c)
  p = Softmax <axis = -1> (sc)
  o = MatMul (p, v3)
  o4 = Reshape (o, so)
  ot = Transpose <perm = [0,2,1,3]> (o4)
  y = Reshape (ot, s3)
}}"""
SPELLINGS = {
    "plain": PLAIN,
    "two_step_transpose": PLAIN.replace(
        "kt = Transpose <perm = [0,2,3,1]> (k4)", "kh = Transpose <perm = [0,2,1,3]> (k4)\n  kt = Transpose <perm = [0,1,3,2]> (kh)"
    ),
    "scale_on_both": PLAIN.replace("s = MatMul (qt, kt)", "qs = Div (qt, r)\n  ks = Div (kt, r)\n  s = MatMul (qs, ks)")
    .replace("  sc = Div (s, c)\n", "")
    .replace("sm = Add (sc, m)", "sm = Add (s, m)")
    .replace("float c = {2.8284271}", "float r = {1.6817928}"),
    "scale_before_heads": PLAIN.replace("q4 = Reshape (q, s4)", "q0 = Div (q, c)\n  q4 = Reshape (q0, s4)")
    .replace("  sc = Div (s, c)\n", "")
    .replace("sm = Add (sc, m)", "sm = Add (s, m)"),
    "mask_before_scale": PLAIN.replace("sc = Div (s, c)\n  sm = Add (sc, m)", "sc = Add (s, m)\n  sm = Div (sc, c)"),
    "mask_first_operand": PLAIN.replace("sm = Add (sc, m)", "sm = Add (m, sc)"),
    "no_mask": PLAIN.replace(", float[B,1,1,S] m", "")
    .replace("  sm = Add (sc, m)\n", "")
    .replace("Softmax <axis = -1> (sm)", "Softmax <axis = -1> (sc)"),
    "flat_result": PLAIN.replace("(float[B,S,32] y)", "(float[N,32] y)").replace("int64[3] s3 = {0,0,32}", "int64[2] s3 = {-1,32}"),
    "packed_by_gather": PACKED,
    "packed_by_split": PACKED_SPLIT,
    "packed_by_head": PACKED_BY_HEAD,
    "batched_3d": BATCHED_3D,
}
TWICE_SWAPPED = "float[2,4,32]"  # batch 2, sequence 4 = heads 4: every size agrees
IMPOSTORS = {
    "scores are a difference": (
        PLAIN.replace("s = MatMul (qt, kt)", "ks = Transpose <perm = [0,1,3,2]> (kt)\n  s = Sub (qt, ks)").replace("[B,1,1,S] m", "[B,1,1,8] m")
        .replace("o = MatMul (p, vt)", "pt = Transpose <perm = [0,1,3,2]> (p)\n  o4 = MatMul (pt, vt)\n  o = Transpose <perm = [0,1,3,2]> (o4)")
        .replace("y = Reshape (ot, s3)", "yy = Reshape (ot, s3)\n  y = Identity (yy)"),
        "unexpected Transpose",
    ),
    "value rows are heads": (
        PLAIN.replace("float[B,S,32]", TWICE_SWAPPED).replace("float[B,1,1,S]", "float[2,1,1,4]")
        .replace("vt = Transpose <perm = [0,2,1,3]> (v4)", "vt = Identity (v4)"),
        "rows of the value are cut from its feature axis",
    ),
    "softmax over queries by a transpose": (
        PLAIN.replace("Softmax <axis = -1> (sm)", "Softmax <axis = -1> (st)").replace("  p = ", "  st = Transpose <perm = [0,1,3,2]> (sm)\n  pt = ")
        .replace("o = MatMul (p, vt)", "p = Transpose <perm = [0,1,3,2]> (pt)\n  o = MatMul (p, vt)"),
        "unexpected Transpose",
    ),
    "softmax over queries": (PLAIN.replace("Softmax <axis = -1>", "Softmax <axis = 2>"), "normalizes axis 2"),
    "scores of a weight": (
        PLAIN.replace("s = MatMul (qt, kt)", "s = MatMul (qt, wk8)").replace(WEIGHTS, WEIGHTS + ", float[8,8] wk8").replace("[B,1,1,S] m", "[B,1,1,8] m")
        .replace("o = MatMul (p, vt)", "o = MatMul (p, wv8)").replace(WEIGHTS, WEIGHTS + ", float[8,8] wv8"),
        "constant weight",
    ),
    "scale is a tensor": (
        PLAIN.replace("float[B,1,1,S] m)", "float[B,1,1,S] m, float[B,1,1,1] c)").replace(", float c = {2.8284271}", ""), "not a constant number",
    ),
}  # fmt: skip


def build(text: str) -> ir.Model:
    """A model of ONNX text; weights that are declared without data get seeded random data."""
    model = ir.from_onnx_text(HEAD + text)
    rng = np.random.default_rng(0)
    for value in model.graph.initializers.values():
        if value.const_value is None:
            value.const_value = ir.tensor(rng.standard_normal([int(d) for d in value.shape or ()], dtype=np.float32) / 4, name=value.name)
    known = {*model.graph.inputs, *model.graph.initializers.values(), *(v for n in model.graph for v in n.outputs)}
    for value in {v for n in model.graph for v in n.inputs if v is not None and v not in known}:
        assert value.shape is not None
        value.const_value = ir.tensor(rng.standard_normal(value.shape.numpy(), dtype=np.float32) / 4, name=value.name)
        model.graph.register_initializer(value)
    return graphopt.load(model)


def feeds(model: ir.Model, batch: int, length: int) -> dict[str, np.ndarray]:
    rng, sizes = np.random.default_rng(1), {"B": batch, "S": length}
    out = {}
    for value in model.graph.inputs:
        if value.dtype != ir.DataType.FLOAT:
            continue
        shape = [d if isinstance(d, int) else sizes[str(d)] for d in value.shape or ()]
        out[str(value.name)] = rng.standard_normal(shape, dtype=np.float32)
        if value.name == "m":
            out["m"] = np.where(rng.random(shape) < 0.3, np.float32(-3.4028235e38), np.float32(0))
    return out


def run(model: ir.Model, given: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(ReferenceEvaluator(ir.to_proto(model)).run(None, given)[0])


def fuse(model: ir.Model, text: str = "fuse-attention") -> Context:
    ctx = Context(model)
    PassManager(parse(text, passes())).run(model, ctx)
    return ctx


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_becomes_one_attention(name: str) -> None:
    model = build(SPELLINGS[name])
    sizes = [(2, 5), (2, 4)] if name == "batched_3d" else [(2, 5), (3, 4)]
    given = [feeds(model, *s) for s in sizes]
    before = [run(model, g) for g in given]
    fuse(model)
    ops = [n.op_type for n in model.graph]
    assert ops.count("Attention") == 1
    assert "Softmax" not in ops
    for expected, g in zip(before, given, strict=True):
        np.testing.assert_allclose(run(model, g), expected, rtol=0, atol=2e-6)
    assert fuse(model).remarks is not None
    assert [n.op_type for n in model.graph] == ops, "a second run changes nothing"


def test_the_numeric_check_would_see_a_wrong_head_count() -> None:
    model = build(PLAIN)
    given = feeds(model, 2, 5)
    before = run(model, given)
    fuse(model)
    node = next(n for n in model.graph if n.op_type == "Attention")
    node.attributes["q_num_heads"] = ir.AttrInt64("q_num_heads", 2)
    node.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", 2)
    assert np.abs(run(model, given) - before).max() > 1e-3


@pytest.mark.parametrize("name", IMPOSTORS)
def test_impostors_are_refused_with_the_reason(name: str) -> None:
    text, reason = IMPOSTORS[name]
    model = build(text)
    ops = [n.op_type for n in model.graph]
    ctx = fuse(model)
    assert [n.op_type for n in model.graph] == ops
    missed = [r for r in ctx.remarks if r.kind == "missed"]
    assert len(missed) == 1
    assert reason in missed[0].message


@pytest.mark.parametrize(("name", "scale"), [("plain", 8**-0.5), ("scale_on_both", 8**-0.5), ("packed_by_gather", 8**-0.5)])
def test_facts(name: str, scale: float) -> None:
    model = build(SPELLINGS[name])
    (facts,) = Context(model).get(Attentions()).values()
    assert isinstance(facts, AttentionFacts)
    assert (facts.heads, facts.kv_heads, facts.head_dim, facts.value_dim) == (4, 4, 8, 8)
    factor = facts.scale * facts.q.view.steps[0].scale * facts.k.view.steps[0].scale
    assert factor == pytest.approx(scale, rel=1e-6)


def test_grouped_query_attention_keeps_its_key_heads() -> None:
    text = (
        PLAIN.replace("float[32,32] wk, float[32,32] wv", "float[32,16] wk, float[32,16] wv")
        .replace("int64[4] s4 = {0,0,4,8}", "int64[4] s4 = {0,0,4,8}, int64[4] s2 = {0,0,2,8}, int64[5] s6 = {0,0,0,2,0}, int64[1] a3 = {3}, int64[4] sk = {0,0,4,8}, "
                 "int64[5] e = {1,1,1,2,1}")
        .replace("k4 = Reshape (k, s4)", "k2 = Reshape (k, s2)\n  k5 = Unsqueeze (k2, a3)\n  k6 = Expand (k5, e)\n  k4 = Reshape (k6, sk)")
        .replace("v4 = Reshape (v, s4)", "v2 = Reshape (v, s2)\n  v5 = Unsqueeze (v2, a3)\n  v6 = Expand (v5, e)\n  v4 = Reshape (v6, sk)")
    )  # fmt: skip
    model = build(text)
    given = feeds(model, 2, 5)
    before = run(model, given)
    fuse(model)
    (node,) = [n for n in model.graph if n.op_type == "Attention"]
    assert node.attributes["q_num_heads"].as_int() == 4
    assert node.attributes["kv_num_heads"].as_int() == 2
    assert "Expand" not in [n.op_type for n in model.graph if any(v is node.inputs[1] for v in n.outputs)]
    np.testing.assert_allclose(run(model, given), before, rtol=0, atol=2e-6)


CAPPED = PLAIN.replace("sm = Add (sc, m)", "a = Div (sc, two)\n  b = Tanh (a)\n  d = Mul (b, two)\n  sm = Add (d, m)").replace(
    "float c =", "float two = {2}, float c ="
)
MASK_THEN_CAP = (
    PLAIN.replace("Softmax <axis = -1> (sm)", "Softmax <axis = -1> (d)")
    .replace("  p = ", "  a = Div (sm, two)\n  b = Tanh (a)\n  d = Mul (b, two)\n  p = ")
    .replace("float c =", "float two = {2}, float c =")
)


def test_a29_a_soft_cap_keeps_its_place() -> None:
    for text, fused in ((CAPPED, 1), (MASK_THEN_CAP, 0)):
        model = build(text)
        given = [{k: v * 3 if k == "x" else v for k, v in feeds(model, *s).items()} for s in ((2, 5), (3, 4))]
        before = [run(model, g) for g in given]
        ctx = fuse(model)
        assert [n.op_type for n in model.graph].count("Attention") == fused
        assert fused or "before the soft cap" in next(r.message for r in ctx.remarks if r.kind == "missed")
        for expected, g in zip(before, given, strict=True):
            np.testing.assert_allclose(run(model, g), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(run(build(CAPPED), given[0]) - run(build(MASK_THEN_CAP), given[0])).max() > 1e-3


def test_probabilities_that_are_an_output_keep_their_name() -> None:
    model = build(PLAIN.replace("=> (float[B,S,32] y)", "=> (float[B,S,32] y, float[B,4,S,S] p)"))
    given = feeds(model, 2, 5)
    before = ReferenceEvaluator(ir.to_proto(model)).run(None, given)
    fuse(model)
    assert [n.op_type for n in model.graph].count("Attention") == 1
    assert [v.name for v in model.graph.outputs] == ["y", "p"]
    for expected, found in zip(before, session(model, optimize=False).run(given).values(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_a_mask_for_each_head_of_a_batched_product() -> None:
    text = BATCHED_3D.replace("(float[2,S,32] x)", "(float[2,S,32] x, float[8,S,S] m)").replace(
        "p = Softmax <axis = -1> (sc)", "sm = Add (sc, m)\n  p = Softmax <axis = -1> (sm)"
    )
    model = build(text)
    given = [feeds(model, 2, s) for s in (5, 3)]
    before = [run(model, g) for g in given]
    fuse(model)
    assert [n.op_type for n in model.graph].count("Attention") == 1
    for expected, g in zip(before, given, strict=True):
        np.testing.assert_allclose(session(model, optimize=False).run(g)["y"], expected, rtol=0, atol=2e-6)


def test_a_window_mask_over_scores_of_five_axes() -> None:
    """Swin: [batch * windows, heads, rows, keys] is seen as [batch, windows, heads, rows, keys] for the mask, and back."""
    text = (
        PLAIN.replace(", float[B,1,1,S] m", ", float[1,3,1,S,S] m").replace("float c =", "int64[5] five = {-1,3,4,5,5}, int64[4] four = {-1,4,5,5}, float c =")
        .replace("sm = Add (sc, m)", "s5 = Reshape (sc, five)\n  m5 = Add (s5, m)\n  sm = Reshape (m5, four)")
        .replace("float[B,S,32]", "float[B,5,32]").replace("[1,3,1,S,S]", "[1,3,1,5,5]")
    )  # fmt: skip
    model = build(text)
    given = [feeds(model, b, 5) for b in (3, 6)]
    before = [run(model, g) for g in given]
    fuse(model)
    assert [n.op_type for n in model.graph].count("Attention") == 1
    for expected, g in zip(before, given, strict=True):
        np.testing.assert_allclose(session(model, optimize=False).run(g)["y"], expected, rtol=0, atol=2e-6)


HIDDEN = {
    "two fills in a row": (
        ", bool[B,1,1,S] m, bool[1,1,S,S] cc", "h = Where (m, sc, low)\n  sm = Where (cc, h, low)", ", float low = {-3.4028235e38}",
    ),
    "a bias under a fill of -1e9": (
        ", bool[B,1,1,S] m, float[1,4,S,S] b", "h = Add (sc, b)\n  sm = Where (m, h, low)", ", float low = {-1e9}",
    ),
    "a mask whose rows have a symbol of their own": (", float[B,1,R,S] m", "sm = Add (sc, m)", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", HIDDEN)
def test_rows_that_are_masked_everywhere_average(name: str) -> None:
    inputs, body, constants = HIDDEN[name]
    model = build(
        PLAIN.replace(", float[B,1,1,S] m", inputs)
        .replace("sm = Add (sc, m)", body)
        .replace("float c = {2.8284271}", "float c = {2.8284271}" + constants)
    )
    rng = np.random.default_rng(0)
    for batch, length in ((2, 5), (3, 4)):
        given = {"x": rng.standard_normal((batch, length, 32), dtype=np.float32) * 20}
        for value in model.graph.inputs[1:]:
            assert value.shape is not None
            shape = [{"B": batch, "S": length, "R": 1}.get(str(d), d) for d in value.shape]
            given[str(value.name)] = rng.random(shape) < 0.5 if value.dtype == ir.DataType.BOOL else rng.standard_normal(shape).astype(np.float32)
        if "two" in name:
            given["m"][0], given["cc"][..., 0, :] = False, False
        elif "bias" in name:
            given["m"][0] = False
        before = session(model, optimize=False).run(given)["y"]
        fused = model.clone()
        fuse(fused)
        assert [n.op_type for n in fused.graph].count("Attention") == 1
        np.testing.assert_allclose(session(fused, optimize=False).run(given)["y"], before, rtol=1e-5, atol=1e-5)


REFUSED = {
    "a mask of head groups is no window mask": (
        PLAIN.replace(", float[B,1,1,S] m", ", float[1,2,1,5,5] m").replace("[B,S,32]", "[B,5,32]")
        .replace("float c =", "int64[5] five = {-1,2,2,5,5}, int64[4] four = {-1,4,5,5}, float c =")
        .replace("sm = Add (sc, m)", "s5 = Reshape (sc, five)\n  m5 = Add (s5, m)\n  sm = Reshape (m5, four)"),
        "is not the heads",
    ),
    "a negative scale": (PLAIN.replace("float c = {2.8284271}", "float c = {-2.8284271}"), "the scores are scaled by"),
    "a negative cap": (CAPPED.replace("d = Mul (b, two)", "d = Mul (b, minus)").replace("float two", "float minus = {-2}, float two"), "no soft cap"),
    "two fills that differ": (
        PLAIN.replace(", float[B,1,1,S] m", ", bool[B,1,1,S] m, bool[1,1,S,S] kk").replace("sm = Add (sc, m)", "h = Where (m, sc, low)\n  sm = Where (kk, h, lower)")
        .replace("float c =", "float low = {-1e10}, float lower = {-1e30}, float c ="),
        "different numbers",
    ),
    "scores added to themselves": (PLAIN.replace("sm = Add (sc, m)", "sm = Add (sc, sc)").replace(", float[B,1,1,S] m", ""), "which it replaces"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_attention_has_no_words_for_is_refused(name: str) -> None:
    text, reason = REFUSED[name]
    model = build(text)
    ops = [n.op_type for n in model.graph]
    ctx = fuse(model)
    assert [n.op_type for n in model.graph] == ops
    assert any(reason in r.message for r in ctx.remarks if r.kind == "missed"), [r.message for r in ctx.remarks]


def test_a_match_does_not_reach_into_a_subgraph() -> None:
    """Scores outside, Softmax inside a branch: they are left apart, and the branch still runs."""
    inner = "p = Softmax <axis = -1> (sm)\n      o = MatMul (p, vt)"
    text = PLAIN.replace("(float[B,S,32] x, ", "(bool go, float[B,S,32] x, ").replace("  p = Softmax <axis = -1> (sm)\n  o = MatMul (p, vt)", (
        f"  o = If (go) <then_branch = t () => (float[B,4,S,8] o) {{\n      {inner}\n  }}, else_branch = e () => (float[B,4,S,8] z) {{ z = Identity (vt) }}>"
    ))  # fmt: skip
    model = build(text)
    for go in (True, False):
        given = {k: v for k, v in feeds(model, 2, 5).items() if k != "go"} | {"go": np.array(go)}
        before = session(model, optimize=False).run(given)["y"]
        other = model.clone()
        fuse(other, "canonicalize, fuse-attention, merge-projections")
        np.testing.assert_allclose(session(other, optimize=False).run(given)["y"], before, rtol=0, atol=2e-6)


LAYOUTS = st.lists(st.sampled_from(["identity", "transpose_back_and_forth", "reshape_flat", "unsqueeze", "split_heads"]), max_size=4)


@settings(max_examples=25, deadline=None)
@given(q=LAYOUTS, k=LAYOUTS, v=LAYOUTS)
def test_layout_stacks_around_the_operands_are_seen_through(q: list[str], k: list[str], v: list[str]) -> None:
    text = PLAIN
    for name, stack in (("q4", q), ("k4", k), ("v4", v)):
        lines, current = [], name
        for i, kind in enumerate(stack):
            new = f"{name}_{i}"
            lines += {
                "identity": [f"  {new} = Identity ({current})"],
                "transpose_back_and_forth": [
                    f"  {new}a = Transpose <perm = [2,0,3,1]> ({current})", f"  {new} = Transpose <perm = [1,3,0,2]> ({new}a)",
                ],
                "reshape_flat": [f"  {new}a = Reshape ({current}, f3)", f"  {new} = Reshape ({new}a, s4)"],
                "unsqueeze": [f"  {new}a = Unsqueeze ({current}, a1)", f"  {new} = Squeeze ({new}a, a1)"],
                "split_heads": [f"  {new}a = Reshape ({current}, f5)", f"  {new} = Reshape ({new}a, s4)"],
            }[kind]  # fmt: skip
            current = new
        first = "q4 = Reshape (q, s4)" if name == "q4" else f"{name} = Reshape ({name[0]}, s4)"
        text = text.replace(first, "\n".join([first, *lines]))
        text = _retarget(text, f"{name[0]}t", current)
    text = text.replace("int64[4] s4", "int64[3] f3 = {0,0,32}, int64[5] f5 = {0,0,2,2,8}, int64[1] a1 = {1}, int64[4] s4")
    model = build(text)
    given = feeds(model, 2, 3)
    before = run(model, given)
    fuse(model)
    assert [n.op_type for n in model.graph].count("Attention") == 1
    np.testing.assert_allclose(run(model, given), before, rtol=0, atol=2e-6)


def _retarget(text: str, output: str, source: str) -> str:
    """Let the Transpose that makes `output` read `source`."""
    line = next(x for x in text.splitlines() if x.strip().startswith(f"{output} = "))
    return text.replace(line, line[: line.rindex("(")] + f"({source})")


@pytest.mark.parametrize("fed", ["axes", "steps"])
def test_a_slice_of_which_not_all_is_known_is_not_seen_through(fed: str) -> None:
    stored = "int64[1] axes = {1}, int64[1] steps = {1}".replace(f"int64[1] {fed} = {{1}}", f"int64[1] other_{fed} = {{1}}")
    text = f"""<ir_version: 10, opset_import: ["": 23]> g (float[8,6] x, int64[1] {fed}) => (float[a,b] y)
    <int64[1] from = {{0}}, int64[1] to = {{4}}, {stored}> {{ y = Slice(x, from, to, axes, steps) }}"""
    model = ir.from_onnx_text(text)
    infer_shapes(model)
    y = model.graph.outputs[0]
    view = Tracer().view(y)
    assert view is None or view.root is y
