"""threshold-attention{constant=..}: heads that depend on positions and the mask only are computed from these, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from models import assert_same, minilm, parse, run, text_feeds  # type: ignore[import-not-found]

import graphopt
from graphopt.core.contract import Context
from graphopt.core.errors import PassError, PipelineError
from graphopt.core.pipeline import PassManager
from graphopt.core.pipeline import parse as pipeline
from graphopt.core.registry import passes
from graphopt.graph.interface import interface
from graphopt.graph.verify import verify
from graphopt.run.samples import Samples

Array = np.ndarray[Any, Any]
ALL = ("self", "previous", "next", "first", "uniform")
STEP = 2 * np.pi / 40  # of the angle that stands for a position
TEXT = """<ir_version: 10, opset_import: ["": 23]>
g (float[B,S,8] x, int64[B,S] attention_mask) => (float[B,S,8] y)
<int64[4] apart = {0, 0, -1, 4}, int64[3] together = {0, 0, -1}, int64[2] axes = {1, 2}, int64[1] one = {1}, float low = {-1e30}, float zero = {0},
 int64 start = {0}, int64 step = {1}, int64[1] all = {0}, float[8,H] wq, float[8,H] wk, float[8,H] wv, float[H,8] wo> {
  q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
  qa = Reshape(q, apart)  ka = Reshape(k, apart)  va = Reshape(v, apart)
  qh = Transpose <perm = [0,2,1,3]> (qa)  kh = Transpose <perm = [0,2,3,1]> (ka)  vh = Transpose <perm = [0,2,1,3]> (va)
  s = MatMul(qh, kh)
  b = Cast <to = 9> (attention_mask)
  u = Unsqueeze(b, axes)
  CAUSAL
  m = Where(keep, zero, low)
  z = Add(s, m)
  p = Softmax <axis = -1> (z)
  o = MatMul(p, vh)
  t = Transpose <perm = [0,2,1,3]> (o)
  r = Reshape(t, together)
  y = MatMul(r, wo)
}"""
OPERATOR = """<ir_version: 10, opset_import: ["": 23]>
g (float[B,S,8] x, int64[B,S] attention_mask) => (float[B,S,8] y) <int64[2] axes = {1, 2}, float[8,H] wq, float[8,H] wk, float[8,H] wv, float[H,8] wo> {
  q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
  b = Cast <to = 9> (attention_mask)
  u = Unsqueeze(b, axes)
  r = Attention <q_num_heads = N, kv_num_heads = N, scale = 1.0, is_causal = CAUSAL> (q, k, v, u)
  y = MatMul(r, wo)
}"""
RANGES = """n = Shape <start = 1, end = 2> (attention_mask)  c = Squeeze(n, all)  key = Range(start, c, step)
  row = Unsqueeze(key, one)  le = LessOrEqual(key, row)  keep = And(u, le)"""


def weights(heads: Sequence[str], sharpness: float = 100.0) -> dict[str, Array]:
    """Query and key of each head, from the features (cos, sin of the position's angle, position, 1, four that mean nothing)."""
    rng = np.random.default_rng(3)
    query, key = [], []
    for name in heads:
        q, k = np.zeros((8, 4)), np.zeros((8, 4))
        if name in ("self", "previous", "next"):
            turn = STEP * {"self": 0.0, "previous": -0.9, "next": 0.9}[name]  # where the neighbour is hidden the row itself is nearest
            q[:2, :2] = sharpness * np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
            k[:2, :2] = sharpness * np.eye(2)
        elif name == "first":
            q[3, 0], k[2, 0] = sharpness, -1
        elif name == "content":
            q[4:], k[4:] = rng.standard_normal((2, 4, 4))
        query.append(q)
        key.append(k)
    shape = (8, 4 * len(heads))
    found = {"wq": np.hstack(query), "wk": np.hstack(key), "wv": rng.standard_normal(shape), "wo": rng.standard_normal(shape[::-1])}
    return {name: array.astype(np.float32) for name, array in found.items()}


def source(heads: Sequence[str], causal: bool = False, operator: bool = False, sharpness: float = 100.0) -> onnx.ModelProto:
    text = OPERATOR.replace("CAUSAL", str(int(causal))) if operator else TEXT.replace("CAUSAL", RANGES if causal else "keep = Identity(u)")
    stored = weights(heads, sharpness)
    text = text.replace("N", str(len(heads))).replace("[8,H]", f"[8,{4 * len(heads)}]").replace("[H,8]", f"[{4 * len(heads)},8]")
    for name, array in stored.items():
        text = text.replace(f"float[{','.join(map(str, array.shape))}] {name}", f"float {name} = {{0}}")
    return parse(text, **stored)


def feed(batch: int, length: int, seed: int = 0) -> dict[str, Array]:
    """Row 0 is full, row 1 padded on the left, row 2 has holes."""
    rng = np.random.default_rng(seed)
    place = np.arange(length)
    fixed = np.stack([np.cos(STEP * place), np.sin(STEP * place), place, np.ones(length)], -1)
    x = np.concatenate([np.broadcast_to(fixed, (batch, length, 4)), rng.standard_normal((batch, length, 4))], -1)
    mask = np.ones((batch, length), np.int64)
    mask[1:2, : length // 2], mask[2:3, 2], mask[2:3, length - 2] = 0, 0, 0
    return {"x": x.astype(np.float32), "attention_mask": mask}


def made(model: onnx.ModelProto | str, text: str, samples: Sequence[Any]) -> tuple[Any, list[Any]]:
    graph = graphopt.load(model)
    public = interface(graph)
    records = PassManager(pipeline(text, passes())).run(graph, Context(graph, samples=Samples(samples)))
    verify(graph, interface=public)
    return graph, list(records[-1].remarks)


def told(remarks: Sequence[Any]) -> list[dict[str, Any]]:
    """The heads of the only layer."""
    (found,) = [r.facts["heads"] for r in remarks if "heads" in r.facts]
    return list(found)


def same_where_it_is_read(a: Any, b: Any, sizes: tuple[int, int], tolerance: float = 1e-5) -> None:
    """Loading repairs the mask of the operator, which ONNX Runtime refuses without an axis for rows."""
    x = feed(*sizes, seed=9)
    kept = x["attention_mask"] != 0
    expected, found = ({"y": run(m, x)["y"][kept]} for m in (graphopt.load(a), b))
    assert_same(expected, found, tolerance)


SAMPLES = [feed(3, 9, 1), feed(1, 6, 2), feed(3, 11, 3)]
SPELLINGS = [("spelled", ""), ("fused", "fuse-attention, "), ("operator", "")]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("spelling", "first"), SPELLINGS)
def test_heads_of_every_form_need_neither_queries_nor_keys(spelling: str, first: str, causal: bool) -> None:
    model = source(ALL, causal, spelling == "operator")
    found, remarks = made(model, f"{first}threshold-attention{{threshold=1e-6 constant=0.001}}", SAMPLES)
    forms = ["self" if causal and form == "next" else form for form in ALL]  # a causal row does not see the next: it reads itself
    assert [h["form"] for h in told(remarks)] == forms
    assert all(h["replaced"] and h["deviation"] < 1e-3 for h in told(remarks))
    assert any("query and key are gone" in str(r) for r in remarks), [str(r) for r in remarks]
    assert {"wq", "wk"}.isdisjoint(found.graph.initializers)
    assert not {"Softmax", "Attention"} & {n.op_type for n in found.graph}
    for sizes in ((1, 5), (3, 9), (3, 12)):
        same_where_it_is_read(model, found, sizes, 1e-4)


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize(("spelling", "first"), SPELLINGS)
def test_heads_of_one_form(spelling: str, first: str, form: str) -> None:
    """One form for all heads has no axis for them, and without a mask none for the batch."""
    model = source((form, form), False, spelling == "operator")
    found, remarks = made(model, f"{first}threshold-attention{{threshold=1e-6 constant=0.001}}", SAMPLES)
    assert [h["form"] for h in told(remarks)] == [form, form]
    for sizes in ((1, 5), (3, 9)):
        same_where_it_is_read(model, found, sizes, 1e-4)


@pytest.mark.parametrize(("spelling", "first"), SPELLINGS)
def test_some_heads(spelling: str, first: str) -> None:
    model = source(("content", "previous", "first", "content"), False, spelling == "operator")
    text = f"{first}threshold-attention{{threshold=1e-6 constant=0.001}}"
    found, remarks = made(model, text, SAMPLES)
    assert [h["form"] for h in told(remarks) if h["replaced"]] == ["previous", "first"]
    assert [h["head"] for h in told(remarks) if h["replaced"]] == [1, 2]
    assert any("the projections of query and key of these heads stay" in str(r) for r in remarks)
    assert {"wq", "wk"} <= set(found.graph.initializers)
    for sizes in ((1, 5), (3, 9)):
        same_where_it_is_read(model, found, sizes, 1e-4)
    again, _ = made(model, f"{text}, threshold-attention{{threshold=0.5}}", SAMPLES)
    assert [n.op_type for n in again.graph] == [n.op_type for n in found.graph], "it knows its own work"


def test_a_cut_makes_a_head_positional() -> None:
    """Around a peak the neighbours have a part of the weight; cut off, the row reads itself."""
    model = source(("self", "content"), sharpness=12.0)
    for text, replaced in (("threshold=1e-6", []), ("threshold=0.7 relative=true", [0])):
        found, remarks = made(model, f"threshold-attention{{{text} constant=0.01}}", SAMPLES)
        assert [h["head"] for h in told(remarks) if h["replaced"]] == replaced
    uncut, _ = made(model, "threshold-attention{threshold=0.7 relative=true}", SAMPLES)
    for sizes in ((1, 5), (3, 9)):
        same_where_it_is_read(uncut, found, sizes)


@pytest.mark.parametrize("gemm", [False, True])
def test_what_was_computed_together_is_taken_apart(gemm: bool) -> None:
    """One wide projection, as GPT-2 has it: only the columns of the values stay, and of what something else reads."""
    stored = weights(("first", "previous"))
    wide = np.hstack([stored["wq"], stored["wk"], stored["wv"], stored["wv"] + 1])
    bias = np.random.default_rng(8).standard_normal(32).astype(np.float32)
    bias[:16] = 0
    product = "w = MatMul(x, wide)  wb = Add(w, bias)"
    if gemm:
        product = "flat = Reshape(x, rows)  w = Gemm <transB = 1> (flat, wide, bias)  wb = Reshape(w, shape)"
    text = OPERATOR.replace("N", "2").replace("CAUSAL", "0").replace("k = MatMul(x, wk)  v = MatMul(x, wv)", "")
    text = text.replace("q = MatMul(x, wq)", f"{product}  q, k, v, other = Split <axis = -1> (wb, sizes)")
    text = text.replace("y = MatMul(r, wo)", "sum = Add(r, other)  y = MatMul(sum, wo)")
    text = text.replace("float[8,H] wq, float[8,H] wk, float[8,H] wv", "float wide = {0}, float bias = {0}, int64[4] sizes = {8, 8, 8, 8}")
    text = text.replace("float[H,8] wo", "float wo = {0}, int64[2] rows = {-1, 8}, int64[3] shape = {1, -1, 32}")
    text = text.replace("[B,", "[1,") if gemm else text
    model = parse(text, wide=wide.T.copy() if gemm else wide, bias=bias, wo=stored["wo"])
    found, remarks = made(model, "canonicalize, threshold-attention{threshold=1e-6 constant=0.001}", [feed(1, 9), feed(1, 6)])
    assert [h["form"] for h in told(remarks) if h["replaced"]] == ["first", "previous"]
    assert any("query and key are gone" in str(r) for r in remarks), [str(r) for r in remarks]
    (matrix,) = [v for v in found.graph.initializers.values() if "wide" in str(v.name)]
    assert np.array_equal(matrix.const_value.numpy(), wide[:, 16:])
    for sizes in ((1, 5), (1, 9)):
        same_where_it_is_read(model, found, sizes, 1e-4)


def test_heads_that_read_the_text_stay() -> None:
    model = source(("content", "content"))
    found, remarks = made(model, "threshold-attention{constant=0.01}", SAMPLES)
    assert not any(h["replaced"] for h in told(remarks))
    assert any(r.kind == "missed" and "no head is within 0.01 of a form; the nearest is head" in str(r) for r in remarks)
    plain, _ = made(model, "threshold-attention", SAMPLES)
    assert_same(run(plain, feed(3, 9)), run(found, feed(3, 9)))


def test_the_deviation_is_the_largest_of_all_weights() -> None:
    """One other row in one sample is enough."""
    model = source(("self",))
    odd = feed(2, 8, 5)
    odd["x"][0, 3, :2] = odd["x"][0, 6, :2]  # it looks like position 6
    (clean,), (other,) = (told(made(model, "threshold-attention{constant=0.4}", samples)[1]) for samples in (SAMPLES, [*SAMPLES, odd]))
    assert clean["deviation"] < 1e-3
    assert other["deviation"] == pytest.approx(0.5, abs=1e-3), "rows 3 and 6 share their weight"
    assert (clean["replaced"], other["replaced"]) == (True, False)


def crossing(heads: Sequence[str]) -> onnx.ModelProto:
    """Queries from `x` [B,S,8], keys and values from `from` [B,T,8]."""
    text = TEXT.replace("int64[B,S] attention_mask", "float[B,T,8] from, int64[B,T] attention_mask").replace("CAUSAL", "keep = Identity(u)")
    text = text.replace("MatMul(x, wk)", "MatMul(from, wk)").replace("MatMul(x, wv)", "MatMul(from, wv)")
    for name in ("wq", "wk", "wv", "wo"):
        text = text.replace(f"float[{'H,8' if name == 'wo' else '8,H'}] {name}", f"float {name} = {{0}}")
    return parse(text, **weights(heads))


def crossed(batch: int, rows: int, keys: int, behind: bool = False) -> dict[str, Array]:
    """`behind`: the rows are the last ones of the keys, as with a cache."""
    other = feed(batch, keys)
    return {"x": other["x"][:, keys - rows :] if behind else feed(batch, rows, 4)["x"], "from": other["x"], "attention_mask": other["attention_mask"]}


@pytest.mark.parametrize("first", ["", "fuse-attention, "])
def test_rows_and_keys_of_different_numbers(first: str) -> None:
    model = crossing(("first", "uniform"))
    found, remarks = made(model, f"{first}threshold-attention{{threshold=1e-6 constant=0.001}}", [crossed(3, 4, 7), crossed(2, 9, 6)])
    assert [h["form"] for h in told(remarks) if h["replaced"]] == ["first", "uniform"]
    assert {"wq", "wk"}.isdisjoint(found.graph.initializers)
    for sizes in ((1, 5, 3), (3, 3, 9)):
        assert_same(run(model, crossed(*sizes)), run(found, crossed(*sizes)), 1e-4)


@pytest.mark.parametrize("first", ["", "fuse-attention, "])
def test_rows_behind_a_cache_count_from_its_end(first: str) -> None:
    model = crossing(("self", "previous"))
    samples = [crossed(1, 3, 8, True), crossed(1, 1, 5, True), crossed(1, 6, 6, True)]
    found, remarks = made(model, f"{first}threshold-attention{{threshold=1e-6 constant=0.001}}", samples)
    assert [h["form"] for h in told(remarks) if h["replaced"]] == ["self", "previous"]
    for sizes in ((1, 2, 9), (1, 7, 7)):
        x = crossed(*sizes, True)
        assert_same(run(model, x), run(found, x), 1e-4)


def test_a_row_that_sees_nothing_reads_nothing() -> None:
    text = """<ir_version: 10, opset_import: ["": 23]> g (float[B,S,8] x, bool[B,1,S,S] mask) => (float[B,S,8] y) <float wq = {0}> {
      q = MatMul(x, wq)
      y = Attention <q_num_heads = 2, kv_num_heads = 2, scale = 1.0> (q, x, x, mask)
    }"""
    model = parse(text, wq=np.zeros((8, 8), np.float32))
    x = {"x": feed(2, 6)["x"], "mask": np.random.default_rng(0).random((2, 1, 6, 6)) < 0.5}
    x["mask"][0, 0, 2] = False
    found, remarks = made(model, "threshold-attention{threshold=1e-6 constant=0.001}", [x])
    assert [h["form"] for h in told(remarks) if h["replaced"]] == ["uniform", "uniform"]
    assert not run(found, x)["y"][0, 2].any()
    assert_same(run(model, x), run(found, x))


def test_wrong_options() -> None:
    graph = graphopt.load(source(("self",)))
    with pytest.raises(PassError, match="add --samples"):
        PassManager(pipeline("threshold-attention{constant=0.1}", passes())).run(graph, Context(graph))
    with pytest.raises(PipelineError, match="option `constant` expects a number between 0 and 1"):
        pipeline("threshold-attention{constant=2}", passes())
    (step,) = pipeline("threshold-attention{constant=0.1}", passes())
    milder: Any = step.weaker()
    assert milder.constant == 0.05


@pytest.mark.parametrize("first", ["canonicalize", "canonicalize, fuse-attention", "canonicalize, fuse-attention, merge-projections"])
def test_minilm_without_any_scores(first: str) -> None:
    """What is left when every head counts as positional: no projection of a query or key."""
    names = ["input_ids", "attention_mask"]
    model, remarks = made(str(minilm("sdpa_18")), f"{first}, threshold-attention{{constant=0.9999}}", [text_feeds(names, 2, 12)])
    assert [len(r.facts["heads"]) for r in remarks if "heads" in r.facts] == [12] * 6
    assert sum("query and key are gone" in str(r) for r in remarks) == 6, [str(r) for r in remarks]
    assert not {"Softmax", "Attention"} & {n.op_type for n in model.graph}
    widths = [n.inputs[1].shape[1] for n in model.graph if n.op_type == "MatMul" and n.inputs[1].is_initializer()]
    assert widths == [384, 384, 1536, 384] * 6
    for sizes in ((1, 7), (3, 20)):
        assert np.isfinite(run(model, text_feeds(names, *sizes))["last_hidden_state"]).all()


def test_samples_that_tell_no_form_from_another_decide_nothing() -> None:
    """For one position all forms are one."""
    one = {"x": np.zeros((3, 1, 8), np.float32), "attention_mask": np.ones((3, 1), np.int64)}
    found, remarks = made(source(ALL), "threshold-attention{threshold=1e-6 constant=0.001}", [one])
    assert not [r for r in remarks if "heads" in r.facts]
    assert [n.op_type for n in found.graph].count("Softmax") == 1
