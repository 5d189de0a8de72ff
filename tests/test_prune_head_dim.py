"""Narrower heads: features that go are those of a masked reference, turned heads are the best of their rank, and the scale stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from models import parse, run  # type: ignore[import-not-found]
from pruning import prune, same, shapes, units  # type: ignore[import-not-found]
from test_pruning import FUSE, feeds  # type: ignore[import-not-found]
from tiny import tiny  # type: ignore[import-not-found]

import graphopt
from graphopt.analysis.heads import Units
from graphopt.core.contract import Context
from graphopt.core.errors import PassError, PipelineError
from graphopt.core.pipeline import parse as steps
from graphopt.core.registry import passes
from graphopt.core.remarks import Remark
from graphopt.graph.questions import parameters
from graphopt.run.observe import exposed

Array = np.ndarray[Any, Any]
MODELS = [
    ("bert", "sdpa", "18"),
    ("distilbert", "sdpa", "ts17"),
    ("gpt2", "sdpa", "18"),
    ("llama", "sdpa", "23"),
    ("llama", "sdpa", "ts17"),
    ("qwen3", "eager", "18"),
]
HEAD = '<ir_version: 10, opset_import: ["": 23]>'
PLAIN = f"""{HEAD} g (float[B,S,32] x) => (float[B,S,32] y) {{
    q0 = MatMul(x, wq)  q = Add(q0, bq)  k0 = MatMul(x, wk)  k = Add(k0, bk)  v0 = MatMul(x, wv)  v = Add(v0, bv)
    c = Attention<q_num_heads=4, kv_num_heads=2>(q, k, v)  y = MatMul(c, wo) }}"""


def weights(seed: int = 0, **sizes: tuple[int, ...]) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {name: (rng.standard_normal(size) / np.sqrt(size[0] if len(size) > 1 else 4)).astype(np.float32) for name, size in sizes.items()}


GROUPED = weights(wq=(32, 32), wk=(32, 16), wv=(32, 16), wo=(32, 32), bq=(32,), bk=(16,), bv=(16,))
X = [{"x": np.random.default_rng(k).standard_normal((4, 9, 32)).astype(np.float32)} for k in range(16)]


def zeroed(model: ir.Model, removed: list[tuple[int, str, list[int]]]) -> ir.Model:
    """A copy in which these features, (layer, part, features), are multiplied by zero where query and key, and value, enter their products."""
    copy = model.clone()
    blocks = {unit.index: unit.operands for unit in Context(copy).get(Units()).attention}
    for k, (layer, part, gone) in enumerate(removed):
        operands = blocks[layer]
        operand = operands[0 if part == "query and key" else 2]
        shape = [1] * len(operand.value.shape or ())
        keep = (~operand.mask(gone)).astype(np.float32)
        shape[operand.dim_axis] = len(keep)
        mask = ir.Value(name=f"mask{k}", type=operand.value.type, shape=ir.Shape(shape), const_value=ir.tensor(keep.reshape(shape), name=f"mask{k}"))
        copy.graph.register_initializer(mask)
        readers = [(use.node, use.idx) for use in operand.value.uses()]
        product = ir.node("Mul", [operand.value, mask], name=f"masked{k}")
        product.outputs[0].name, product.outputs[0].type, product.outputs[0].shape = f"masked{k}_out", operand.value.type, operand.value.shape
        copy.graph.insert_after(operand.value.producer(), product)  # type: ignore[arg-type]
        for node, place in readers:
            node.replace_input_with(place, product.outputs[0])
    return copy


def applied(remarks: list[Remark]) -> list[dict[str, Any]]:
    return [dict(r.facts) for r in remarks if r.kind == "applied" and "part" in r.facts]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("name", "attention", "route"), MODELS)
def test_selected_features_are_those_of_a_masked_reference(name: str, attention: str, route: str, fused: bool) -> None:
    model = graphopt.load(tiny(name, attention, route))
    prune(model, FUSE if fused else "canonicalize")
    base, before = model.clone(), parameters(model)
    _, remarks = prune(model, "prune-head-dim{dim=4 method=select refit=false}", [feeds(model, 3, 12, seed) for seed in range(2)])
    told = applied(remarks)
    parts = ["value"] if name == "qwen3" else ["query and key", "value"]
    assert [f["part"] for f in told] == parts * 2
    assert all(f["after"] == 4 and f["how"] == "selected" for f in told)
    wanted = zeroed(base, [(f["layer"], f["part"], f["removed"]) for f in told])
    same(wanted, model, [feeds(model, 2, 12), feeds(model, 1, 7)])
    assert parameters(model) < before
    if name == "llama":  # pairs that turn together, the first with the fifth
        assert all({(d + 4) % 8 for d in f["removed"]} == set(f["removed"]) for f in told if f["part"] == "query and key")
    if name == "qwen3":
        assert any("a norm in front of the product" in r.message for r in remarks)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("name", "attention", "route"), MODELS)
def test_turned_heads_of_full_rank_compute_the_same(name: str, attention: str, route: str, fused: bool) -> None:
    """With projections of rank 6, heads of 6 features hold all; whole features would lose some."""
    model = graphopt.load(tiny(name, attention, route))
    prune(model, FUSE if fused else "canonicalize")
    for unit in Context(model).get(Units()).attention:
        q, _, v = unit.operands
        for operand in (q, v):
            if operand.linear is None or operand.rotary is not None:
                continue
            weight, bias = operand.linear.matrix().astype(np.float64), operand.linear.bias
            for columns in operand.columns:
                u, s, vt = np.linalg.svd(weight[:, columns])
                weight[:, columns] = u[:, :6] * s[:6] @ vt[:6]
                if bias is not None and bias.const_value is not None:  # inside the span too
                    b = bias.const_value.numpy().copy()
                    b.reshape(-1)[columns] = np.linspace(-1, 1, 6) @ vt[:6]
                    bias.const_value = ir.tensor(b, name=bias.name)
            laid = weight.T if operand.linear.transposed else weight
            operand.linear.weight.const_value = ir.tensor(np.ascontiguousarray(laid, np.float32), name=operand.linear.weight.name)
        assert unit.head_dim == 8
    base = model.clone()
    parts = "values" if name in ("llama", "qwen3") else "both"
    _, remarks = prune(model, f"prune-head-dim{{dim=6 parts={parts} refit=false}}", [feeds(model, 4, 12, seed) for seed in range(4)])
    told = applied(remarks)
    assert [f["how"] for f in told] == ["turned"] * (2 if parts == "values" else 4)
    assert max(f["lost"] for f in told) < 1e-5
    assert {u.value_dim for n, u in units(model).items() if n.startswith("h")} == {6}
    for batch in (feeds(model, 2, 12), feeds(model, 1, 7)):
        found, wanted = run(model, batch)["out"], run(base, batch)["out"]
        np.testing.assert_allclose(found, wanted, atol=2e-4 * np.abs(wanted).max())


def test_turned_keys_are_the_best_of_their_rank() -> None:
    """Against numpy: the scores of every rank-3 head lie at least as far, in the mean square over independent rows."""
    model = graphopt.load(parse(PLAIN, **GROUPED))
    prune(model, "prune-head-dim{dim=3 parts=keys refit=false}", X)
    x = np.concatenate([f["x"].reshape(-1, 32) for f in X]).astype(np.float64)
    stored = {n: v.const_value.numpy().astype(np.float64) for n, v in model.graph.initializers.items() if v.const_value is not None}
    assert {n: shapes(model)[n] for n in ("wq", "wk", "wv")} == {"wq": (32, 12), "wk": (32, 6), "wv": (32, 16)}
    q, k = x @ GROUPED["wq"] + GROUPED["bq"], x @ GROUPED["wk"] + GROUPED["bk"]
    k -= k.mean(0)  # a softmax does not see what all keys have in common
    narrow_q, narrow_k = x @ stored["wq"] + stored["bq"], x @ stored["wk"] + stored["bk"]
    narrow_k -= narrow_k.mean(0)
    for group in range(2):
        queries = np.concatenate([q[:, 8 * h : 8 * h + 8] for h in (2 * group, 2 * group + 1)])
        narrow = np.concatenate([narrow_q[:, 3 * h : 3 * h + 3] for h in (2 * group, 2 * group + 1)])
        scores = queries @ k[:, 8 * group : 8 * group + 8].T
        best = np.square(np.linalg.svd(scores, compute_uv=False)[3:]).sum()
        error = np.square(narrow @ narrow_k[:, 3 * group : 3 * group + 3].T - scores).sum()
        np.testing.assert_allclose(error, best, rtol=1e-3)
    (attention,) = [n for n in model.graph if n.op_type == "Attention"]
    assert attention.attributes["scale"].as_float() == pytest.approx(8**-0.5)


def test_turned_values_are_the_best_of_their_rank() -> None:
    """Against numpy: what each head adds is cut to rank 3 with the least square error."""
    single = weights(3, wq=(32, 32), wk=(32, 32), wv=(32, 32), wo=(32, 32), bq=(32,), bk=(32,), bv=(32,))
    model = graphopt.load(parse(PLAIN.replace("kv_num_heads=2", "kv_num_heads=4"), **single))
    whole = np.concatenate([run(exposed(model, ["c"]), f)["c"].reshape(-1, 32) for f in X]).astype(np.float64)
    prune(model, "prune-head-dim{dim=3 parts=values refit=false}", X)
    narrow = np.concatenate([run(exposed(model, ["c"]), f)["c"].reshape(-1, 12) for f in X]).astype(np.float64)
    wo = model.graph.initializers["wo"].const_value.numpy().astype(np.float64)  # type: ignore[union-attr]
    for h in range(4):
        added = whole[:, 8 * h : 8 * h + 8] @ single["wo"][8 * h : 8 * h + 8]
        best = np.square(np.linalg.svd(added, compute_uv=False)[3:]).sum()
        np.testing.assert_allclose(np.square(narrow[:, 3 * h : 3 * h + 3] @ wo[3 * h : 3 * h + 3] - added).sum(), best, rtol=1e-3)


def test_an_output_that_would_change_its_size_stays_unless_the_user_lets_it() -> None:
    text = PLAIN.replace("=> (float[B,S,32] y)", "=> (float[B,S,32] y, float[B,S,32] c)")
    model = graphopt.load(parse(text, **GROUPED))
    records, remarks = prune(model, "prune-head-dim{dim=3 parts=values refit=false}", X)
    assert records[0].changes == 0
    assert any("`c` is an output of the model" in r.message for r in remarks)
    prune(model, "prune-head-dim{dim=3 parts=values refit=false resize=c}", X)
    assert run(model, X[0])["c"].shape == (4, 9, 12)


def test_turned_and_refitted_heads_are_nearer_than_selected_ones() -> None:
    mix = weights(5, mix=(6, 32))["mix"] * 2.5  # features of real models depend on each other
    batches = [{"x": f["x"][..., :6] @ mix + 0.2 * f["x"]} for f in X]
    errors = {}
    for options in ("method=auto", "method=auto refit=false", "method=select refit=false"):
        model = graphopt.load(parse(PLAIN, **GROUPED))
        wanted = run(model, batches[15])["y"]
        prune(model, f"prune-head-dim{{dim=4 {options}}}", batches[:15])
        errors[options] = float(np.linalg.norm(run(model, batches[15])["y"] - wanted) / np.linalg.norm(wanted))
    refitted, turned, selected = errors.values()
    assert refitted < turned < 0.7 * selected, errors


def test_a_norm_over_all_heads_keeps_queries_and_keys_whole() -> None:
    text = PLAIN.replace("c = Attention", "qn = RMSNormalization(q, gq)  kn = RMSNormalization(k, gk)  c = Attention").replace(
        "(q, k, v)", "(qn, kn, v)"
    )
    gains = {"gq": np.linspace(0.5, 2, 32).astype(np.float32), "gk": np.linspace(1, 2, 16).astype(np.float32)}
    model = graphopt.load(parse(text, **GROUPED, **gains))
    _, remarks = prune(model, "prune-head-dim{ratio=0.5 multiple=1 refit=false}", X)
    assert [f["part"] for f in applied(remarks)] == ["value"]
    assert any("query and key not narrowed: a norm" in r.message for r in remarks)
    assert {n: shapes(model)[n] for n in ("wq", "wk", "wv", "wo")} == {"wq": (32, 32), "wk": (32, 16), "wv": (32, 8), "wo": (16, 32)}


def test_what_stays_is_rounded_and_options_are_checked() -> None:
    model = graphopt.load(parse(PLAIN, **GROUPED))
    records, remarks = prune(model, "prune-head-dim{ratio=0.5}", X)  # 4 of 8, rounded up to 8
    assert records[0].changes == 0
    assert any("8 would stay" in r.message for r in remarks)
    for options, word in (("dim=4 ratio=0.5", "without dim"), ("ratio=2", "fraction"), ("parts=heads", "values"), ("dim=0", "1 or more")):
        with pytest.raises(PipelineError, match=word):
            steps(f"prune-head-dim{{{options}}}", passes())
    with pytest.raises(PassError, match="or ratio"):
        prune(model, "prune-head-dim", X)
    with pytest.raises(PassError, match="needs samples"):
        prune(model, "prune-head-dim{dim=4}")
    (step,) = steps("prune-head-dim{ratio=0.5}", passes())
    assert step.weaker() == steps("prune-head-dim{ratio=0.25}", passes())[0]
