"""to-half (cases B03, B04, B06, B10, F10): range, epsilon, masks, the public interface, and where float32 stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import Array, minilm, parse, run, text_feeds  # type: ignore[import-not-found]

import graphopt
from graphopt.core.contract import Context
from graphopt.core.errors import VerifyError
from graphopt.core.pipeline import PassManager
from graphopt.core.pipeline import parse as parse_pipeline
from graphopt.core.registry import passes
from graphopt.core.remarks import Remark
from graphopt.graph.interface import RETYPED, interface
from graphopt.graph.questions import constant
from graphopt.graph.verify import verify
from graphopt.run.ort import session
from graphopt.run.reference import session as reference

HEADER = '<ir_version: 10, opset_import: ["": 23]>\n'
LOWEST = float(np.finfo(np.float32).min)
FUSE = "canonicalize, fuse-norm, fuse-attention, "


def convert(source: onnx.ModelProto | Path, pipeline: str = "to-half") -> tuple[ir.Model, list[Remark]]:
    """The graph after the pipeline, in normal form; a second run changes nothing."""
    model = graphopt.load(source)
    public = interface(model)
    context = Context(model)
    PassManager(parse_pipeline(pipeline, passes())).run(model, context)
    verify(model, interface=public)
    (again,) = PassManager(parse_pipeline(pipeline.rpartition(", ")[2], passes())).run(model, Context(model))
    assert again.changes == 0
    return model, list(context.remarks)


def weights(model: ir.Model, kind: Any = np.float16) -> dict[str, Array]:
    found = {name: constant(v) for name, v in model.graph.initializers.items()}
    return {name: a for name, a in found.items() if a is not None and a.dtype == kind}


def warnings(remarks: list[Remark]) -> list[Remark]:
    return [r for r in remarks if r.kind == "warning"]


def numbers(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# ---- B03, B04: masks ----------------------------------------------------------------------------------------------------------------------

PLANES = """g (float[B,2,4,4] s, float[B,1,1,4] pad) => (float[B,2,4,4] p) <float low = {LOW}, float[1,1,4,4] causal>
{ a = Mul (causal, low)
  b = Mul (pad, low)
  m = Add (a, b)
  t = Add (s, m)
  p = Softmax <axis = -1> (t) }"""
CAUSAL = 1 - np.tri(4, dtype=np.float32)[None, None]
PAD = np.array([[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]], np.float32)[:, None, None]


@pytest.mark.parametrize("fill", ["-3.4028234663852886e38", "-3.4e38", "-1e9"])
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_b04_two_planes_of_the_lowest_number(fill: str, scale: float) -> None:
    """Causal and padding added up, one text padded everywhere: no NaN, and the probabilities of float32."""
    source = parse(HEADER + PLANES.replace("{LOW}", "{" + fill + "}"), causal=CAUSAL)
    feeds = {"s": numbers(1, 3, 2, 4, 4).astype(np.float16).astype(np.float32) * np.float32(scale), "pad": PAD}
    expected = run(source, feeds)["p"]
    model, _ = convert(source)
    assert not [name for name, a in weights(model).items() if not np.isfinite(a).all()]
    for engine in (reference(model), session(model, optimize=False), session(model)):
        found = engine.run(feeds)["p"]
        assert found.dtype == np.float32
        assert np.abs(found - expected).max() <= 2e-3


ATTENTION = """g (float[B,4,8] q, float[B,4,8] k, float[B,4,8] v, float[B,1,1,4] pad) => (float[B,4,8] y)
<float low = {-3.4028234663852886e38}, float[1,1,4,4] causal, int64[4] split = {0,0,2,4}, int64[3] join = {0,0,8}, float scale = {0.5}>
{ a = Mul (causal, low)
  b = Mul (pad, low)
  m = Add (a, b)
  q4 = Reshape (q, split)
  k4 = Reshape (k, split)
  v4 = Reshape (v, split)
  qt = Transpose <perm = [0,2,1,3]> (q4)
  kt = Transpose <perm = [0,2,3,1]> (k4)
  vt = Transpose <perm = [0,2,1,3]> (v4)
  s0 = MatMul (qt, kt)
  s = Mul (s0, scale)
  t = Add (s, m)
  p = Softmax <axis = -1> (t)
  o = MatMul (p, vt)
  ot = Transpose <perm = [0,2,1,3]> (o)
  y = Reshape (ot, join) }"""


def test_b04_the_mask_of_a_fused_attention() -> None:
    """In the fused node, no mask is -inf, and rows that may read a key have the numbers of float32; the others are finite."""
    source = parse(HEADER + ATTENTION, causal=CAUSAL)
    feeds = {name: numbers(seed, 3, 4, 8) * 4 for seed, name in enumerate("qkv")} | {"pad": PAD}
    model, _ = convert(source, FUSE + "to-half")
    (attention,) = [n for n in model.graph if n.op_type == "Attention"]
    assert {v.dtype for v in attention.inputs if v is not None} == {ir.DataType.FLOAT16}
    expected = run(source, feeds)["y"]
    for engine in (reference(model), session(model)):
        found = engine.run(feeds)["y"]
        assert np.isfinite(found).all()
        readable = np.ones((3, 4), np.bool_)
        readable[1, :2], readable[2] = False, False
        assert np.abs(found - expected)[readable].max() <= 2e-2 * np.abs(expected).max()


def test_b03_a_padded_key_never_wins() -> None:
    text = PLANES.replace("{LOW}", "{-3.4028234663852886e38}")
    scores = np.full((1, 2, 4, 4), -2e4, np.float32)
    scores[..., 0] = 2e4  # the padded key has the largest score
    feeds = {"s": scores, "pad": np.array([1, 0, 0, 0], np.float32).reshape(1, 1, 1, 4)}
    source = parse(HEADER + text, causal=np.zeros((1, 1, 4, 4), np.float32))
    model, _ = convert(source)
    for found in (run(source, feeds)["p"], run(model, feeds)["p"]):
        assert (found[..., 0] == 0).all()
        assert np.abs(found[..., 1:] - 1 / 3).max() < 1e-3


# ---- B06: epsilon, range ------------------------------------------------------------------------------------------------------------------

NORM = """g (float[B,8] x) => (float[B,8] y) <float[8] gamma, float[8] beta>
{ y = LayerNormalization <epsilon = 1e-12> (x, gamma, beta) }"""
WRITTEN = """g (float[B,8] x) => (float[B,8] y) <float[8] gamma, float[8] beta, float epsilon = {1e-12}, float two = {2}, int64[1] last = {-1}>
{ mean = ReduceMean (x, last)
  d = Sub (x, mean)
  square = Pow (d, two)
  variance = ReduceMean (square, last)
  e = Add (variance, epsilon)
  root = Sqrt (e)
  n = Div (d, root)
  g0 = Mul (n, gamma)
  y = Add (g0, beta) }"""


@pytest.mark.parametrize("text", [NORM, WRITTEN])
def test_b06_epsilon(text: str) -> None:
    """An all-equal row gives beta; a row of hundreds does not overflow in its square."""
    source = parse(HEADER + text, gamma=numbers(1, 8), beta=numbers(2, 8))
    x = np.stack([np.full(8, 3, np.float32), numbers(3, 8) * 400, numbers(4, 8)])
    model, _ = convert(source)
    for node in model.graph:
        if node.op_type == "LayerNormalization":
            assert node.attributes["epsilon"].value == np.float32(1e-12)
    expected = run(source, {"x": x})["y"]
    found = run(model, {"x": x})["y"]
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() <= 4e-3 * np.abs(expected).max()
    assert np.abs(found[0] - constant(graphopt.load(source).graph.initializers["beta"])).max() <= 2e-3


@pytest.mark.parametrize("operator", ["MatMul", "Add"])
def test_b06_stored_numbers(operator: str) -> None:
    special = np.array([1e-12, 3e-8, 2e4, 65504, 1e5, -np.inf, 0.1, -7], np.float32)
    source = parse(HEADER + f"g (float[B,8] x) => (y) {{ y = {operator} (x, w) }}", w=special)
    model, remarks = convert(source)
    (stored,) = [a for a in weights(model).values() if a.size == 8]
    assert list(stored[2:6]) == [20000, 65504, 65504, -np.inf]
    assert list(stored[:2]) == [0, np.float16(3e-8)]
    (warning,) = warnings(remarks)
    assert "`w`" in warning.message
    assert "100000" in warning.message


# ---- F10: the public side -----------------------------------------------------------------------------------------------------------------

PUBLIC = """g (int64[B,S] z_ids, bool[B,S] a_keep, float[B,S] m_mask, int32[B] count)
  => (float[B,S,4] z_hidden, int64[B,S] a_ids, float[B,S] m_out) <float[9,4] table, float[1] scale = {0.5}, int64[1] last = {-1}>
{ rows = Gather (table, z_ids)
  kept = Cast <to = 1> (a_keep)
  k3 = Unsqueeze (kept, last)
  many = Cast <to = 7> (count)
  c = Unsqueeze (many, last)
  a_ids = Add (z_ids, c)
  z_hidden = Mul (rows, k3)
  m_out = Mul (m_mask, scale) }"""


@pytest.mark.parametrize("keep", [True, False])
def test_f10_names_order_and_types(keep: bool) -> None:
    source = parse(HEADER + PUBLIC, table=numbers(1, 9, 4))
    model, _ = convert(source, f"to-half{{keep-io={str(keep).lower()}}}")
    kind = ir.DataType.FLOAT if keep else ir.DataType.FLOAT16
    integers = ir.DataType.INT64, ir.DataType.BOOL, ir.DataType.INT32
    assert [(v.name, v.dtype) for v in model.graph.inputs] == [
        ("z_ids", integers[0]), ("a_keep", integers[1]), ("m_mask", kind), ("count", integers[2]),
    ]  # fmt: skip
    assert [(v.name, v.dtype) for v in model.graph.outputs] == [("z_hidden", kind), ("a_ids", integers[0]), ("m_out", kind)]
    real = np.float32 if keep else np.float16
    feeds = {
        "z_ids": np.array([[1, 8, 0]]), "a_keep": np.array([[True, False, True]]), "m_mask": np.array([[1, 2, 3]], real),
        "count": np.array([2], np.int32),
    }  # fmt: skip
    expected = run(source, feeds | {"m_mask": feeds["m_mask"].astype(np.float32)})
    found = run(model, feeds)
    assert list(found) == list(expected)
    for name, array in found.items():
        assert array.dtype == (np.int64 if name == "a_ids" else real)
        assert np.abs(array.astype(np.float64) - expected[name]).max() <= 2e-3


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_the_interface_changes_through_optimize_where_the_user_asks_for_it(kind: str) -> None:
    """Judged, checked and timed with the data of the model as it came. (The CPU provider has no MatMul of bfloat16: the gate would refuse it.)"""
    source = parse(HEADER + "g (float[B,8] x) => (float[B,8] y) <float[8,8] w> { a = MatMul (x, w)\n y = Tanh (a) }", w=numbers(1, 8, 8))
    data = [{"x": numbers(k, 4, 8)} for k in range(2)]
    runs = {"samples": data, "max_loss": 0.01, "check_numerics": True, "promise": True} if kind == "float16" else {"gate": False}
    got = graphopt.optimize(source, f"to-half{{dtype={kind} keep-io=false}}", target="cpu{tune=off}", verify_each=True, **runs)  # type: ignore[arg-type]
    assert [v.dtype.name for v in (*got.model.graph.inputs, *got.model.graph.outputs)] == [kind.upper()] * 2
    if kind == "float16":
        assert 0 < got.report.loss.value < 0.01
        assert got.report.speed_up.value is not None
        assert got.session().run(data[0])["y"].dtype == np.float16


def test_nobody_may_change_a_type_without_a_word() -> None:
    model = graphopt.load(parse(HEADER + "g (float[B,8] x) => (float[B,8] y) { y = Tanh (x) }"))
    public = interface(model)
    PassManager(parse_pipeline("to-half{keep-io=false}", passes())).run(model, Context(model))
    verify(model, interface=public)
    model.graph.meta[RETYPED] = {"y": "float16"}
    with pytest.raises(VerifyError, match="input `x: float\\[B,8\\]` has become"):
        verify(model, interface=public)


def test_b10_chains_of_casts_keep_their_meaning() -> None:
    text = """g (float[4] x, double[4] d) => (float[4] a, bool[4] b, double[4] c)
{ i = Cast <to = 6> (x)
  a = Cast <to = 1> (i)
  b = Cast <to = 9> (i)
  f = Cast <to = 1> (d)
  c = Cast <to = 11> (f) }"""
    source = parse(HEADER + text)
    feeds = {"x": np.array([-1.7, -0.2, 0.3, 1.9], np.float32), "d": np.array([1, 2, 3, 4.5])}
    model, _ = convert(source)
    found = run(model, feeds)
    assert found["a"].tolist() == [-1, 0, 0, 1]
    assert found["b"].tolist() == [True, False, False, True]
    assert found["c"].tolist() == [1, 2, 3, 4.5]


# ---- what must stay, and the rest ---------------------------------------------------------------------------------------------------------


def test_angles_stay_float32() -> None:
    """Position 3000 times a frequency has no digit behind the point in float16."""
    text = """g (int64[S,1] position) => (float[S,4] y) <float[1,4] frequency>
{ p = Cast <to = 1> (position)
  angle = MatMul (p, frequency)
  c = Cos (angle)
  y = Mul (c, weight) }"""
    text = text.replace("frequency>", "frequency, float[4] weight>")
    source = parse(HEADER + text, frequency=np.array([[1, 0.1, 0.01, 0.001]], np.float32), weight=np.ones(4, np.float32))
    feeds = {"position": np.array([[3000], [4097]])}
    model, remarks = convert(source)
    assert np.abs(run(model, feeds)["y"] - run(source, feeds)["y"]).max() < 1e-3
    assert any("angles" in r.message for r in remarks)


def test_bfloat16_never_rounds_to_infinity() -> None:
    text = "g (float[B,4] x, bool[B,4] keep) => (float[B,4] y) <float low = {-3.4028234663852886e38}> { m = Where (keep, x, low)\n y = Softmax (m) }"
    model, remarks = convert(parse(HEADER + text), "to-half{dtype=bfloat16}")
    (low,) = weights(model, ml_dtypes.bfloat16).values()
    assert np.isfinite(low.astype(np.float32)).all()
    assert "low" in warnings(remarks)[0].message
    assert model.graph.outputs[0].dtype == ir.DataType.FLOAT


def test_integer_arithmetic_and_subgraphs_stay() -> None:
    text = """g (float[B,8] x, bool c) => (float[B,8] y) <float[8,8] w, float[8] b>
{ q, s, z = DynamicQuantizeLinear (x)
  x1 = DequantizeLinear (q, s, z)
  h = MatMul (x1, w)
  y = If (c) <then_branch = t () => (float[B,8] o1) { o1 = Add (h, b) }, else_branch = e () => (float[B,8] o2) { o2 = Neg (h) }> }"""
    source = parse(HEADER + text, w=numbers(1, 8, 8), b=numbers(2, 8))
    model, _ = convert(source)
    feeds = {"x": numbers(3, 2, 8), "c": np.array(True)}
    for flag in (True, False):
        feeds["c"] = np.array(flag)
        assert np.abs(run(model, feeds)["y"] - run(source, feeds)["y"]).max() <= 2e-2
    assert any(a.shape == (8, 8) for a in weights(model).values())


@pytest.mark.parametrize("route", ["sdpa_18", "sdpa_23", "eager_ts17"])
def test_minilm(route: str) -> None:
    """Half the bytes, and the same sentences: with fused attention, and as it was exported."""
    path = minilm(route)
    feeds = text_feeds(["input_ids", "attention_mask"], 3, 16)
    expected = run(path, feeds)["last_hidden_state"]
    for pipeline in ("to-half", FUSE + "to-half"):
        model, remarks = convert(path, pipeline)
        assert sum(a.nbytes for a in weights(model).values()) > 0.99 * path.stat().st_size / 2 - 1e6
        assert not warnings(remarks)
        found = session(model).run(feeds)["last_hidden_state"]
        kept = feeds["attention_mask"].astype(np.bool_)
        cosine = (found * expected).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(expected, axis=-1)
        assert cosine[kept].min() > 0.9999


def test_f08_a_second_run_through_files(tmp_path: Path) -> None:
    result = graphopt.optimize(minilm("eager_ts17"), FUSE + "to-half", promise=False)
    result.save(tmp_path / "once.onnx")
    again = graphopt.optimize(tmp_path / "once.onnx", "to-half", target="cuda{vendor=false}")
    assert [p["changes"] for p in again.report.as_dict()["passes"] if p["name"] == "to-half"] == [0]
