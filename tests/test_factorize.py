"""factorize: two narrow matrices in place of one, smaller always, and as close on the samples as the rank allows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from models import minilm, minilm_folder, parse, run, text_feeds  # type: ignore[import-not-found]

import graphopt
from graphopt.core.contract import Context
from graphopt.core.errors import PassError, PipelineError
from graphopt.core.machine import Machine
from graphopt.core.pipeline import PassManager
from graphopt.core.pipeline import parse as pipeline
from graphopt.core.registry import passes
from graphopt.graph.interface import interface
from graphopt.graph.questions import all_nodes, nbytes, parameters
from graphopt.graph.size import flops
from graphopt.graph.verify import verify
from graphopt.run.samples import Samples

ROOT = Path(__file__).resolve().parent.parent
Array = np.ndarray[Any, Any]
HEAD = '<ir_version: 10, opset_import: ["": 23]>'
ONE = HEAD + "g (float[B,S,{0}] x) => (float[B,S,{1}] y) <float[{0},{1}] w> {{ y = MatMul(x, w) }}"


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def one(w: Array) -> Any:
    return parse(ONE.format(*w.shape), w=w)


def low(rows: int, columns: int, rank: int) -> Array:
    return normal(rows, rank, seed=1) @ normal(rank, columns, seed=2) / np.float32(rank**0.5)


def cut(source: Any, text: str, samples: Any = None, target: Any = None) -> tuple[Any, Any]:
    """The model behind one pipeline, checked: normal form, interface, and never more numbers than before."""
    model = graphopt.load(source)
    public, before = interface(model), parameters(model)
    ctx = Context(model, samples=None if samples is None else Samples(samples), target=target)
    records = PassManager(pipeline(text, passes())).run(model, ctx)
    verify(model, interface=public)
    assert parameters(model) <= before or "quantize" in text
    for remark in ctx.remarks:
        if "rank" in remark.facts:
            assert remark.facts["after"] < remark.facts["before"]
    return model, records[-1]


def ranks(record: Any) -> list[int]:
    return [r.facts["rank"] for r in record.remarks if "rank" in r.facts]


def said(record: Any, text: str) -> bool:
    return any(text in str(r) for r in record.remarks)


def ops(model: ir.Model) -> list[str]:
    return [n.op_type for n in all_nodes(model)]


def error(base: Array, other: Array) -> float:
    return float(np.linalg.norm(base - other) / np.linalg.norm(base))


def uneven(count: int = 4, width: int = 48) -> list[dict[str, Array]]:
    """Inputs whose directions have very different sizes, so that what is large in the weight is not what is large in the output."""
    mix = np.linalg.qr(normal(width, width, seed=5))[0] * np.geomspace(30, 0.01, width).astype(np.float32)
    return [{"x": normal(3, 7 + k, width, seed=10 + k) @ mix.T} for k in range(count)]


# ---- H12: never larger -------------------------------------------------------------------------------------------------------------------


def test_h12_a_rank_that_saves_nothing_is_declined() -> None:
    model, record = cut(one(normal(64, 64)), "factorize{rank=48 method=svd}")
    assert record.changes == 0
    assert said(record, "rank 48 would hold 6,144 numbers instead of 4,096; the largest rank that saves any is 31")
    assert ops(model) == ["MatMul"]


@pytest.mark.parametrize(("text", "rank"), [("rank=48", 48), ("ratio=0.5", 304), ("rank=614", 614)])
def test_h12_a_wide_weight(text: str, rank: int) -> None:
    """Break-even of [768,3072] is 614.4."""
    model, record = cut(one(normal(768, 3072)), f"factorize{{{text} method=svd}}")
    assert ranks(record) == [rank]
    assert parameters(model) == rank * (768 + 3072) < 768 * 3072


def test_h12_energy_finds_the_exact_rank() -> None:
    w = low(64, 64, 5) + 1e-6 * normal(64, 64, seed=3)
    source = one(w)
    model, record = cut(source, "factorize{energy=0.9999 method=svd}")
    assert ranks(record) == [5]
    x = {"x": normal(2, 9, 64, seed=4)}
    assert np.abs(run(source, x)["y"] - run(model, x)["y"]).max() < 1e-4
    assert cut(one(normal(64, 64)), "factorize{energy=0.99 method=svd}")[1].changes == 0, "a random matrix has no low rank"


# ---- the optimum -------------------------------------------------------------------------------------------------------------------------


def test_whitened_is_the_optimum_on_the_samples_and_tells_its_error() -> None:
    samples, w = uneven(), normal(48, 40)
    found = {}
    x = np.concatenate([s["x"].reshape(-1, 48) for s in samples]).astype(np.float64)
    for method in ("svd", "asvd", "whitened"):
        model, record = cut(one(w), f"factorize{{rank=8 method={method}}}", samples)
        found[method] = error(x @ w, np.concatenate([run(model, s)["y"].reshape(-1, 40) for s in samples]))
        told = next(r.facts for r in record.remarks if r.kind == "applied")
        assert told["of"] == "outputs on samples"
        assert told["error"] == pytest.approx(found[method], rel=2e-3), method
    values = np.linalg.svd(x @ w, compute_uv=False)
    best = float(np.sqrt((values[8:] ** 2).sum() / (values**2).sum()))
    assert found["whitened"] == pytest.approx(best, rel=2e-2), "the best approximation of the outputs by any matrix of rank 8"
    assert found["whitened"] < 0.7 * found["asvd"] < 0.9 * found["svd"]


def test_without_samples_the_error_is_that_of_the_weight() -> None:
    w = normal(48, 40)
    _, record = cut(one(w), "factorize{rank=8 method=svd}")
    values = np.linalg.svd(w, compute_uv=False)
    told = next(r.facts for r in record.remarks if r.kind == "applied")
    assert told["of"] == "weight"
    assert told["error"] == pytest.approx(float(np.sqrt((values[8:] ** 2).sum() / (values**2).sum())), rel=1e-4)


def test_energy_is_kept_and_rounded_up() -> None:
    samples, w = uneven(), normal(48, 40)
    _, exact = cut(one(w), "factorize{energy=0.98 multiple=1}", samples)
    _, rounded = cut(one(w), "factorize{energy=0.98 multiple=4}", samples)
    (rank,), (wide,) = ranks(exact), ranks(rounded)
    assert (rank, wide) == (rank, rank + -rank % 4)
    assert next(r.facts["error"] for r in exact.remarks if r.kind == "applied") <= np.sqrt(0.02)


# ---- spellings ---------------------------------------------------------------------------------------------------------------------------

SPELLINGS = {
    "Gemm transB": ("(float[B,24] x) => (float[B,16] y) <float[16,24] w, float[16] b> { y = Gemm<transB=1, alpha=0.5, beta=2.0>(x, w, b) }", 1),
    "Gemm transA": ("(float[24,B] x) => (float[B,16] y) <float[24,16] w, float[16] b> { y = Gemm<transA=1>(x, w, b) }", 1),
    "Gemm addend": ("(float[B,24] x, float[B,16] c) => (float[B,16] y) <float[24,16] w> { y = Gemm<beta=0.5>(x, w, c) }", 1),
    "Gemm alone": ("(float[B,24] x) => (float[B,16] y) <float[24,16] w> { y = Gemm(x, w) }", 1),
    "bias": ("(float[B,S,24] x) => (float[B,S,16] y) <float[24,16] w, float[16] b> { m = MatMul(x, w)  y = Add(m, b) }", 1),
    "Transpose": ("(float[B,S,24] x) => (float[B,S,16] y) <float[16,24] w> { t = Transpose<perm=[1,0]>(w)  y = MatMul(x, t) }", 1),
    "batched": ("(float[3,S,24] x) => (float[3,S,16] y) <float[3,24,16] w> { y = MatMul(x, w) }", 1),
    "batched broadcast": ("(float[B,1,S,24] x) => (float[B,3,S,16] y) <float[3,24,16] w> { y = MatMul(x, w) }", 1),
    "E01 dynamic": ("(float[B,S,24] x) => (float[N,16] y) <float[24,16] w, int64[2] s = {-1,16}> { m = MatMul(x, w)  y = Reshape(m, s) }", 1),
    "output and reader": ("(float[B,S,24] x) => (float[B,S,16] m, float[B,S,16] y) <float[24,16] w> { m = MatMul(x, w)  y = Relu(m) }", 1),
    "double": ("(double[B,24] x) => (double[B,16] y) <double[24,16] w> { y = MatMul(x, w) }", 1),
    "float16 cast": ("(float[B,24] x) => (float[B,16] y) <float16[24,16] w> { c = Cast<to=1>(w)  y = MatMul(x, c) }", 1),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_computes_the_cut_weight(name: str) -> None:
    """The weight has rank 3, so that factors of rank 3 compute what the weight did, at two sizes; a bias that is added twice would show."""
    text, changes = SPELLINGS[name]
    weights = {}
    for key, shape, kind in (("w", (24, 16), "float"), ("b", (16,), "float")):
        if f"{kind}[16] {key}" in text or key == "w":
            weights[key] = normal(*shape, seed=8)
    weights["w"] = low(24, 16, 3).astype(np.float16 if "float16" in text else np.float64 if "double" in text else np.float32)
    if "[16,24] w" in text:
        weights["w"] = np.ascontiguousarray(weights["w"].T)
    if "[3,24,16] w" in text:
        weights["w"] = np.stack([low(24, 16, 3), 2 * low(24, 16, 2), normal(24, 1) @ normal(1, 16)])
    source = parse(f"{HEAD} g {text}", **weights)
    model, record = cut(source, "factorize{rank=3 method=svd}")
    assert record.changes == changes
    for rows, length in ((2, 5), (4, 1)):
        sizes = {"B": rows, "S": length}
        feeds = {v.name: normal(*(d if isinstance(d, int) else sizes[str(d)] for d in v.shape)).astype(v.dtype.numpy()) for v in model.graph.inputs}
        base, other = run(source, feeds), run(model, feeds)
        for key in base:
            tolerance = 3e-3 if "float16" in text else 1e-5
            assert np.abs(base[key] - other[key]).max() <= tolerance * (1 + np.abs(base[key]).max()), key


def test_a_shared_weight_is_cut_once() -> None:
    text = HEAD + "g (float[B,24] x, float[B,24] z) => (float[B,16] y) <float[24,16] w> { a = MatMul(x, w)  b = MatMul(z, w)  y = Add(a, b) }"
    model, record = cut(parse(text, w=low(24, 16, 3)), "factorize{rank=3}", [{"x": normal(4, 24), "z": normal(4, 24, seed=1)}])
    assert record.changes == 2
    assert parameters(model) == 3 * 40
    assert len(model.graph.initializers) == 2


def test_a_weight_inside_a_loop() -> None:
    text = (
        HEAD
        + """g (float[B,8] x, int64 n) => (float[B,8] y) <float[8,8] w, bool t = {1}> {
      y = Loop(n, t, x) <body = b (int64 i, bool c, float[B,8] s) => (bool d, float[B,8] r) { d = Identity(c)  m = MatMul(s, w)  r = Tanh(m) }>
    }"""
    )
    source = parse(text, w=low(8, 8, 2))
    feeds = {"x": normal(3, 8), "n": np.array(3)}
    model, record = cut(source, "factorize{rank=2 method=svd}")
    assert record.changes == 1
    assert np.abs(run(source, feeds)["y"] - run(model, feeds)["y"]).max() < 1e-5
    _, record = cut(source, "factorize{rank=2}", [feeds])
    assert record.changes == 0
    assert said(record, "inside a subgraph, where samples do not show it; method=svd needs no samples")


# ---- what stays whole --------------------------------------------------------------------------------------------------------------------

TIED = (
    HEAD
    + """g (int64[B,S] ids) => (float[B,S,64] y) <float[64,12] table, float[12,12] w, int64[2] s> {
  e = Gather(table, ids)  h = MatMul(e, w)  t = Transpose<perm=[1,0]>(table)  y = MatMul(h, t) }"""
)


def test_h09_a_tied_table_stays() -> None:
    source = parse(TIED, table=low(64, 12, 2), w=low(12, 12, 2))
    model, record = cut(source, "factorize{rank=2 method=svd embeddings=true}")
    assert record.changes == 1
    assert said(record, "its weight is tied to the table of")
    assert said(record, "its table is tied:")
    assert sorted(v.const_value.size for v in model.graph.initializers.values() if v.const_value.size > 4) == [24, 24, 64 * 12]


def test_h09_tied_by_content() -> None:
    text = TIED.replace("t = Transpose<perm=[1,0]>(table)  y = MatMul(h, t)", "y = MatMul(h, back)").replace(
        "float[12,12] w", "float[12,12] w, float[12,64] back"
    )
    table = low(64, 12, 2)
    _, record = cut(parse(text, table=table, w=low(12, 12, 2), back=np.ascontiguousarray(table.T)), "factorize{rank=2 method=svd embeddings=true}")
    assert record.changes == 1
    assert said(record, "its weight is tied to the table of")
    assert said(record, "multiplies with its transpose")


@pytest.mark.parametrize(("text", "reason"), [
    ("(float[B,8] x) => (float[B,8] y, float[8,8] z) <float[8,8] w> { y = MatMul(x, w)  z = Neg(w) }", "reads its weight too"),
    ("(float[B,8] x, float[8,8] w) => (float[B,8] y) <float[8,8] w = {W}> { y = MatMul(x, w) }", "a caller may override its weight"),
    ("(float[8,B] x) => (float[8,B] y) <float[8,8] w> { y = MatMul(w, x) }", "its stored operand stands on the left"),
    ("(float[B,8] x, float[8,B] z) => (float[B,B] y) { y = MatMul(x, z) }", "both operands are computed at run time"),
    ("(float[B,8] x) => (float[B,1] y) <float[8,1] w> { y = MatMul(x, w) }", "[8,1] has no smaller rank"),
])  # fmt: skip
def test_what_stays_whole_has_a_reason(text: str, reason: str) -> None:
    w = normal(8, 1 if "[8,1]" in text else 8)
    weights = {"w": w} if "w>" in text or "w =" in text else {}
    if reason.startswith("a caller"):
        text = text.replace(" <float[8,8] w = {W}>", "")
    _, record = cut(parse(f"{HEAD} g {text}", **weights), "factorize{rank=1 method=svd}")
    assert record.changes == 0
    assert said(record, reason), [str(r) for r in record.remarks]


def test_quantized_weights_stay_and_factors_are_quantized() -> None:
    source = one(low(64, 64, 8))
    _, record = cut(source, "quantize, factorize{rank=8 method=svd}")
    assert said(record, "quantized already; put factorize before quantize")
    model, record = cut(source, "factorize{rank=8 method=svd}, quantize")
    assert record.changes == 2
    assert ops(model).count("DequantizeLinear") == 4
    x = {"x": normal(2, 5, 64, seed=4)}
    assert error(run(source, x)["y"], run(model, x)["y"]) < 0.03


def test_factors_suit_an_8_bit_grid() -> None:
    """The singular values fall by a factor of 1,000; all columns between the factors are of like size nevertheless."""
    left, _ = np.linalg.qr(normal(96, 32))
    right, _ = np.linalg.qr(normal(96, 32, seed=1))
    source, samples = one(((left * np.geomspace(30, 0.03, 32)) @ right.T).astype(np.float32)), [{"x": normal(4, 64, 96, seed=k)} for k in range(2)]
    whole, _ = cut(source, "quantize")
    model, record = cut(source, "factorize{rank=32}, quantize", samples)
    assert record.changes == 2
    base = run(source, samples[0])["y"]
    assert error(base, run(model, samples[0])["y"]) < 2 * error(base, run(whole, samples[0])["y"])
    norms = np.linalg.norm(np.asarray(cut(source, "factorize{rank=32}", samples)[0].graph.initializers["w_left"].const_value), axis=0)
    assert norms.max() < 4 * norms.min(), "without the rotation 30 times"


def test_include_and_exclude() -> None:
    text = HEAD + "g (float[B,16] x) => (float[B,16] y) <float[16,16] v, float[16,16] w> { [first] a = MatMul(x, v)  [second] y = MatMul(a, w) }"
    source = parse(text, v=low(16, 16, 2), w=low(16, 16, 2))
    _, record = cut(source, "factorize{rank=2 method=svd include=first}")
    assert (record.changes, said(record, "not among include=first")) == (1, True)
    _, record = cut(source, "factorize{rank=2 method=svd exclude=s*}")
    assert (record.changes, said(record, "excluded by exclude=s*")) == (1, True)
    with pytest.raises(PassError, match="fits the name of no MatMul"):
        cut(source, "factorize{rank=2 method=svd include=third}")


# ---- joint, tables, budget, sequential -----------------------------------------------------------------------------------------------------

QKV = (
    HEAD
    + """g (float[B,S,32] x) => (float[B,S,32] q, float[B,S,8] k, float[B,S,8] v)
<float[32,32] wq, float[32,8] wk, float[8,32] wv, float[8] bv> {
  q = MatMul(x, wq)  k = MatMul(x, wk)  t = Transpose<perm=[1,0]>(wv)  m = MatMul(x, t)  v = Add(m, bv) }"""
)


def test_joint_shares_the_first_factor() -> None:
    shared = normal(32, 6, seed=1)
    weights = {"wq": shared @ normal(6, 32), "wk": 100 * shared @ normal(6, 8), "wv": (shared @ normal(6, 8, seed=2)).T.copy(), "bv": normal(8)}
    source, samples = parse(QKV, **weights), [{"x": normal(2, 9, 32, seed=k)} for k in range(3)]
    model, record = cut(source, "factorize{rank=6 joint=true}", samples)
    assert record.changes == 1
    assert parameters(model) == 6 * (32 + 48) + 8
    assert ops(model).count("MatMul") == 4
    base, other = run(source, samples[0]), run(model, samples[0])
    assert all(error(base[n], other[n]) < 1e-4 for n in base), "also the outputs that are small beside the others"


def test_joint_is_as_good_as_its_rank_for_every_output() -> None:
    """The key is a hundred times larger; weighed by size, it does not take the whole rank."""
    weights = {"wq": normal(32, 32), "wk": 100 * normal(32, 8, seed=1), "wv": normal(8, 32, seed=2), "bv": normal(8)}
    source, samples = parse(QKV, **weights), [{"x": normal(2, 29, 32, seed=k)} for k in range(3)]
    model, _ = cut(source, "factorize{rank=16 joint=true}", samples)
    base, other = run(source, samples[0]), run(model, samples[0])
    assert max(error(base[n] - weights["bv"] * (n == "v"), other[n] - weights["bv"] * (n == "v")) if n != "q" else 0.0 for n in base) < 0.75


def test_a_table_becomes_two() -> None:
    text = HEAD + "g (int64[B,S] ids) => (float[B,S,24] y) <float[90,24] table> { y = Gather(table, ids) }"
    source = parse(text, table=low(90, 24, 4))
    model, record = cut(source, "factorize{energy=0.99999 method=svd embeddings=true}")
    assert ranks(record) == [4]
    assert ops(model) == ["Gather", "MatMul"]
    ids = {"ids": np.array([[3, 89, 0]])}
    assert error(run(source, ids)["y"], run(model, ids)["y"]) < 1e-4
    _, record = cut(source, "factorize{budget=0.1 method=svd embeddings=true}")
    assert said(record, "saves no operations; give energy, rank or ratio instead of budget")
    assert cut(source, "factorize{rank=4 method=svd}")[1].changes == 0, "only where it is asked for"


CHAIN = (
    HEAD
    + """g (float[B,S,48] x) => (float[B,S,48] y) <float[48,48] w1, float[48,48] w2, float[48,48] w3, float eps = {0.01}> {
  a = MatMul(x, w1)  b = Tanh(a)  c = MatMul(b, w2)  d = Tanh(c)  e = MatMul(d, w3)  s = Mul(e, eps)  y = Add(s, d) }"""
)


def chain(**other: Array) -> tuple[Any, list[dict[str, Array]]]:
    """w3 hardly matters for the output; w1 has a low rank, w2 has not."""
    weights = {"w1": low(48, 48, 6) / 4, "w2": normal(48, 48) / 7, "w3": normal(48, 48, seed=3) / 7} | other
    return parse(CHAIN, **weights), [{"x": normal(4, 16, 48, seed=20 + k)} for k in range(4)]


def test_a_budget_is_met_where_it_costs_least() -> None:
    source, samples = chain()
    before = graphopt.load(source)
    sizes = {"B": 4, "S": 16}
    for budget in (0.2, 0.4):
        model, record = cut(source, f"factorize{{budget={budget} multiple=1}}", samples)
        saved = 1 - flops(model, sizes).total / flops(before, sizes).total
        assert budget <= saved < budget + 0.03
    assert said(record, "`a`") or len(ranks(record)) >= 2
    even, _ = cut(source, "factorize{ratio=0.4 multiple=1}", samples)
    base = run(source, samples[0])["y"]
    assert error(base, run(model, samples[0])["y"]) < 0.3 * error(base, run(even, samples[0])["y"])


def test_sensitivity_finds_the_layer_that_does_not_matter() -> None:
    source, samples = chain()
    base = run(source, samples[0])["y"]
    found = {}
    for flag in ("true", "false"):
        model, _ = cut(source, f"factorize{{budget=0.5 multiple=1 sensitivity={flag}}}", samples)
        found[flag] = error(base, run(model, samples[0])["y"])
    assert found["true"] < 0.5 * found["false"]


def test_a_budget_out_of_reach_changes_nothing() -> None:
    source, samples = chain()
    _, record = cut(source, "factorize{budget=0.97}", samples)
    assert record.changes == 0
    assert said(record, "budget=0.97 is out of reach: the weights that can be cut take 100% of the operations, and 67% at rank 16")


def test_joint_with_a_budget_takes_what_loses_less() -> None:
    """Query and key have their directions in common, so one factor for both is enough; with nothing in common it is not."""
    shared = normal(32, 4, seed=1)
    text = (
        HEAD + "g (float[B,S,32] x) => (float[B,S,32] q, float[B,S,32] k) <float[32,32] wq, float[32,32] wk> { q = MatMul(x, wq)  k = MatMul(x, wk) }"
    )
    samples = [{"x": normal(2, 40, 32)}]
    _, record = cut(
        parse(text, wq=shared @ normal(4, 32), wk=shared @ normal(4, 32, seed=2)), "factorize{budget=0.78 joint=true multiple=1}", samples
    )
    assert [r.facts.get("joint") is not None for r in record.remarks if r.kind == "applied"] == [True]
    _, record = cut(parse(text, wq=low(32, 32, 4), wk=low(32, 32, 4)[:, ::-1].T.copy()), "factorize{budget=0.7 joint=true multiple=1}", samples)
    assert all("joint" not in r.facts for r in record.remarks if r.kind == "applied")


def test_sequential_makes_up_for_the_layers_before() -> None:
    source, samples = chain(w1=normal(48, 48) / 3, w2=low(48, 48, 12) / 3)
    found = {}
    for flag in ("false", "true"):
        model, record = cut(source, f"factorize{{rank=12 sequential={flag}}}", samples)
        assert len(ranks(record)) <= 3
        found[flag] = error(*(np.concatenate([run(m, s)["y"] for s in samples]) for m in (source, model)))
    assert found["true"] < 0.95 * found["false"]


def test_sequential_takes_back_what_the_stream_has_lost() -> None:
    """Two blocks on a residual stream. The second is of low rank, so that its factors have room to take back what the first one lost."""
    text = (
        HEAD
        + """g (float[B,S,32] x) => (float[B,S,32] y) <float[32,64] u1, float[64,32] d1, float[32,64] u2, float[64,32] d2> {
      a1 = MatMul(x, u1)  r1 = Relu(a1)  b1 = MatMul(r1, d1)  s1 = Add(x, b1)
      a2 = MatMul(s1, u2)  r2 = Relu(a2)  b2 = MatMul(r2, d2)  y = Add(s1, b2) }"""
    )
    weights = {"u1": normal(32, 64) / 6, "d1": normal(64, 32, seed=1) / 6, "u2": normal(32, 64, seed=2) / 6, "d2": low(64, 32, 2) / 30}
    source, samples = parse(text, **weights), [{"x": normal(8, 64, 32, seed=30 + k)} for k in range(3)]
    found = {}
    for flag in ("false", "true"):
        model, record = cut(source, f"factorize{{rank=16 sequential={flag}}}", samples)
        assert record.changes == 4
        found[flag] = error(*(np.concatenate([run(m, s)["y"] for s in samples]) for m in (source, model)))
    assert found["true"] < 0.9 * found["false"], found


# ---- time, errors, budgets of loss -----------------------------------------------------------------------------------------------------------


class _Clocked:
    """A session that is slow in proportion to the numbers that its model stores, or not at all."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def run(self, feeds: Any) -> dict[str, Array]:
        import time

        time.sleep(self.seconds)
        return {}


class _Target:
    """Where the product of two is `factor` times as slow as one."""

    name, tune, shapes, processor = "test", "on", ("1x4",), None

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def machine(self) -> Machine:
        return Machine("none", "none", "none", 1, in_process=False)

    def runs_here(self) -> bool:
        return True

    def probe(self, model: ir.Model, feed: object = None) -> dict[str, Array]:
        return {}

    def session(self, model: ir.Model) -> _Clocked:
        return _Clocked(1e-3 * (self.factor if len(list(model.graph)) > 1 else 1.0))


@pytest.mark.parametrize(("factor", "changes"), [(3.0, 0), (0.3, 1)])
def test_what_is_not_faster_on_the_target_stays_whole(factor: float, changes: int) -> None:
    _, record = cut(one(low(64, 64, 4)), "factorize{rank=4 method=svd}", target=_Target(factor))
    assert record.changes == changes
    assert said(record, "as fast on test, at [4] rows") == (changes == 0)


@pytest.mark.parametrize(("text", "message"), [
    ("rank=4 energy=0.9", "to stand alone"), ("energy=1.5", "between 0 and 1, found 1.5"), ("rank=0", "1 or more, found 0"),
    ("sequential=true method=svd", "a method that reads samples"), ("method=pca", "one of whitened, asvd, svd"),
])  # fmt: skip
def test_errors(text: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        pipeline(f"factorize{{{text}}}", passes())


def test_samples_are_asked_for() -> None:
    with pytest.raises(PassError, match="add --samples"):
        cut(one(normal(8, 8)), "factorize{rank=2}")


@pytest.mark.parametrize("text", ["", "{energy=0.6}", "{rank=2}", "{ratio=0.9}", "{budget=0.5}"])
def test_weaker_settings_come_to_an_end(text: str) -> None:
    step: Any = pipeline(f"factorize{text}", passes())[0]
    for count in range(60):  # noqa: B007
        milder = step.weaker()
        if milder is None:
            break
        assert (milder.energy or 0) >= (step.energy or 0)
        assert (milder.rank or 0) >= (step.rank or 0)
        assert (milder.ratio or 0) <= (step.ratio or 0)
        assert (milder.budget or 0) <= (step.budget or 0)
        step = milder
    assert count < 50


def test_it_is_weakened_to_the_budget_of_loss() -> None:
    source, samples = chain(w2=low(48, 48, 16) / 4)
    result = graphopt.optimize(source, "factorize{ratio=0.6 multiple=1}", samples=samples, max_loss=0.05, target="cpu{tune=off}", promise=False)
    assert 0 < result.report.loss.value <= 0.05
    assert parameters(result.model) < parameters(graphopt.load(source))


@pytest.mark.slow
def test_minilm() -> None:
    """A real encoder: whitened keeps it usable at 30 % fewer operations, and quantize works on the factors."""
    path = minilm("sdpa_23")
    samples = [text_feeds(["input_ids", "attention_mask"], 1, 64 + k) for k in range(8)]
    model, record = cut(path, "canonicalize, factorize{ratio=0.3}", samples)
    assert record.changes == 36
    assert nbytes(model) < 0.9 * nbytes(graphopt.load(path))
    feed = text_feeds(["input_ids", "attention_mask"], 1, 40)
    base = run(str(path), feed)["last_hidden_state"]
    assert error(base, run(model, feed)["last_hidden_state"]) < 0.75
    _, record = cut(path, "canonicalize, factorize{ratio=0.3}, quantize", samples)
    assert record.changes == 36 * 2 + 2


@pytest.mark.slow
def test_the_page(tmp_path: Path) -> None:
    """docs/factorizing.md: its pipelines parse, and its example runs on a real model."""
    text = (ROOT / "docs" / "factorizing.md").read_text(encoding="utf-8")
    found = re.findall(r"`((?:factorize|drop-layers|threshold-attention)\{[^`]*\})`", text)
    assert len(found) >= 9
    for one in found:
        assert pipeline(one, passes())
    shutil.copy(minilm("sdpa_18"), tmp_path / "minilm.onnx")
    shutil.copy(minilm_folder() / "tokenizer.json", tmp_path / "tokenizer.json")
    (example,) = re.findall(r"```sh\n(.*?)```", text, flags=re.S)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(["bash", "-eu", "-c", example], cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "minilm-thin.onnx").stat().st_size < 22.5e6
