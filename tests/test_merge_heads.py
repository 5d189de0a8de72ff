"""Heads that become one, and key heads that more queries share: exact where heads are alike in other coordinates, better than dropping elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from models import minilm, parse, run  # type: ignore[import-not-found]
from pruning import prune, shapes, units  # type: ignore[import-not-found]
from test_prune_head_dim import PLAIN, X, weights  # type: ignore[import-not-found]
from test_pruning import FUSE, feeds  # type: ignore[import-not-found]
from tiny import tiny  # type: ignore[import-not-found]

import graphopt
from graphopt.analysis.heads import Units
from graphopt.core.contract import Context
from graphopt.core.errors import PassError, PipelineError
from graphopt.core.pipeline import parse as steps
from graphopt.core.registry import passes
from graphopt.graph.questions import parameters

Array = np.ndarray[Any, Any]
MULTI = PLAIN.replace("kv_num_heads=2", "kv_num_heads=4").replace("y = MatMul(c, wo)", "o = MatMul(c, wo)  y = Add(o, bo)")
FULL = weights(2, wq=(32, 32), wk=(32, 32), wv=(32, 32), wo=(32, 32), bq=(32,), bk=(32,), bv=(32,), bo=(32,))
TURNED = f"""{PLAIN.split("{")[0]} {{
    q0 = MatMul(x, wq)  qb = Add(q0, bq)  k0 = MatMul(x, wk)  kb = Add(k0, bk)  v0 = MatMul(x, wv)  v = Add(v0, bv)
    q = RotaryEmbedding<num_heads=4>(qb, cos, sin, ids)  k = RotaryEmbedding<num_heads=4>(kb, cos, sin, ids)
    c = Attention<q_num_heads=4, kv_num_heads=4>(q, k, v)  o = MatMul(c, wo)  y = Add(o, bo) }}"""
ANGLES = np.arange(9)[:, None] * 0.7 ** np.arange(4)
ROTARY = {"cos": np.cos(ANGLES).astype(np.float32), "sin": np.sin(ANGLES).astype(np.float32), "ids": np.tile(np.arange(9), (4, 1))}


def head(h: int) -> slice:
    return slice(8 * h, 8 * h + 8)


def phases(seed: int) -> Array:
    """A matrix that multiplies the four pairs of a head, first half real, second imaginary, by complex numbers."""
    rng = np.random.default_rng(seed)
    z = np.exp(1j * rng.uniform(0, 6, 4)) * rng.uniform(0.5, 2, 4)
    return np.block([[np.diag(z.real), np.diag(z.imag)], [np.diag(-z.imag), np.diag(z.real)]])


def alike(same_value: bool, rotary: bool = False, **given: Array) -> dict[str, Array]:
    """Heads 1 and 3 compute the scores of heads 0 and 2 in other coordinates, and their values too if asked."""
    found = {n: a.astype(np.float64) for n, a in given.items()}
    rng = np.random.default_rng(7)
    for old, new in ((0, 1), (2, 3)):
        if rotary:
            turn = phases(new)
            back = np.linalg.inv(turn).T
        else:
            turn = rng.standard_normal((8, 8)) + 3 * np.eye(8)
            back = np.linalg.inv(turn).T
        mix = rng.standard_normal((8, 8)) + 3 * np.eye(8)
        for n, m in (("q", turn), ("k", back), *([("v", mix)] if same_value else [])):
            found[f"w{n}"][:, head(new)] = found[f"w{n}"][:, head(old)] @ m
            found[f"b{n}"][head(new)] = found[f"b{n}"][head(old)] @ m
    return {n: a.astype(np.float32) for n, a in found.items()}


def error(base: ir.Model, model: ir.Model, batch: dict[str, Array]) -> float:
    (wanted,), (found,) = run(base, batch).values(), run(model, batch).values()
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("by", ["maps", "projections"])
@pytest.mark.parametrize("rotary", [False, True])
def test_heads_that_are_alike_in_other_coordinates_merge_exactly(rotary: bool, by: str) -> None:
    text, extra = (TURNED, ROTARY) if rotary else (MULTI, {})
    model = graphopt.load(parse(text, **alike(True, rotary, **FULL), **extra))
    base = model.clone()
    _, remarks = prune(model, f"merge-heads{{ratio=0.5 by={by} refit=false}}", X)
    (told,) = [dict(r.facts) for r in remarks if "merged" in r.facts]
    assert told["merged"] == [[0, 1], [2, 3]]
    assert told["lost"] < 1e-5
    assert told["keys"] == "aligned"
    assert {n: shapes(model)[n] for n in ("wq", "bk", "wv", "wo")} == {"wq": (32, 16), "bk": (16,), "wv": (32, 16), "wo": (16, 32)}
    assert error(base, model, X[0]) < 1e-4


def test_merged_heads_in_primitive_operators() -> None:
    """The same in the spelling of an exporter, packed and apart, with the features of the merged head kept in place."""
    for name, route in (("bert", "18"), ("distilbert", "ts17"), ("gpt2", "18")):
        for fuse in ("canonicalize", FUSE):
            model = graphopt.load(tiny(name, "sdpa", route))
            prune(model, fuse)
            for unit in Context(model).get(Units()).attention:
                for o in unit.operands:
                    assert o.linear is not None
                    weight = o.linear.matrix().copy()
                    weight[:, o.columns[1]], weight[:, o.columns[3]] = weight[:, o.columns[2]], weight[:, o.columns[0]]
                    o.linear.weight.const_value = ir.tensor(
                        np.ascontiguousarray(weight.T if o.linear.transposed else weight), name=o.linear.weight.name
                    )
            base, before = model.clone(), parameters(model)
            _, remarks = prune(model, "merge-heads{heads=2 refit=false}", [feeds(model, 3, 12, seed) for seed in range(3)])
            assert [dict(r.facts)["merged"] for r in remarks if "merged" in r.facts] == [[[0, 3], [1, 2]]] * 2, (name, fuse)
            assert error(base, model, feeds(model, 2, 9)) < 2e-4, (name, fuse)
            assert parameters(model) < before


def test_merging_beats_dropping_the_same_heads() -> None:
    errors = {}
    base = graphopt.load(parse(MULTI, **alike(False, **FULL)))
    for text in ("merge-heads{ratio=0.5 refit=false}", "merge-heads{ratio=0.5}", "prune-heads{heads=0:1+0:3 refit=false}"):
        model = base.clone()
        prune(model, text, X[:15])
        errors[text] = error(base, model, X[15])
    merged, refitted, dropped = errors.values()
    assert merged < 0.9 * dropped, errors
    assert refitted < dropped, errors


def test_a_head_behind_a_norm_keeps_its_own_query_and_key() -> None:
    text = MULTI.replace("c = Attention", "qn = RMSNormalization(q, g)  kn = RMSNormalization(k, g)  c = Attention").replace(
        "(q, k, v)", "(qn, kn, v)"
    )
    model = graphopt.load(parse(text, **alike(True, **FULL), g=np.ones(32, np.float32)))
    _, remarks = prune(model, "merge-heads{heads=3 refit=false}", X)
    (told,) = [dict(r.facts) for r in remarks if "merged" in r.facts]
    assert told["keys"] == "of the head that stays"
    assert units(model)["h0"].count == 3
    model = graphopt.load(parse(text, **FULL, g=np.ones(32, np.float32)))
    records, remarks = prune(model, "merge-heads{heads=3 by=projections}", X)
    assert records[0].changes == 0
    assert any("use by=maps" in r.message for r in remarks)


@pytest.mark.parametrize("rotary", [False, True])
def test_key_heads_that_are_alike_in_other_coordinates_are_shared_exactly(rotary: bool) -> None:
    """Heads 0 and 3, 1 and 2 have the same keys and values but for a turn, and queries of their own."""
    given = {n: a.astype(np.float64) for n, a in FULL.items()}
    rng = np.random.default_rng(7)
    for old, new in ((0, 3), (1, 2)):
        for n in "kv":
            turn = phases(new) if rotary and n == "k" else rng.standard_normal((8, 8)) + 3 * np.eye(8)
            given[f"w{n}"][:, head(new)], given[f"b{n}"][head(new)] = given[f"w{n}"][:, head(old)] @ turn, given[f"b{n}"][head(old)] @ turn
    text, extra = (TURNED, ROTARY) if rotary else (MULTI, {})
    model = graphopt.load(parse(text, **{n: a.astype(np.float32) for n, a in given.items()}, **extra))
    base = model.clone()
    _, remarks = prune(model, "merge-heads{kv-heads=2 refit=false}", X)
    assert [dict(r.facts)["groups"] for r in remarks if "groups" in r.facts] == [[[0, 3], [1, 2]]]
    assert {n: shapes(model)[n] for n in ("wq", "wk", "wv", "bk", "wo")} == {
        "wq": (32, 32),
        "wk": (32, 16),
        "wv": (32, 16),
        "bk": (16,),
        "wo": (32, 32),
    }
    assert (units(model)["h0"].heads, units(model)["h0"].kv_heads) == (4, 2)
    assert error(base, model, X[0]) < 2e-4


@pytest.mark.parametrize(("name", "kv"), [("bert", 2), ("bert", 1), ("llama", 1)])
def test_key_heads_of_whole_models_are_pooled(name: str, kv: int) -> None:
    model = graphopt.load(tiny(name, "sdpa", "ts17" if name == "llama" else "18"))
    prune(model, FUSE)
    base, samples = model.clone(), [feeds(model, 4, 12, seed) for seed in range(6)]
    _, remarks = prune(model, f"merge-heads{{kv-heads={kv}}}", samples)
    assert [(h.heads, h.kv_heads) for n, h in units(model).items() if n.startswith("h")] == [(4, kv)] * 2
    assert any("refitted" in r.message for r in remarks)
    assert parameters(model) < parameters(base)
    batch = feeds(model, 2, 9, 50)
    assert error(base, model, batch) < 0.3
    assert next(iter(run(model, batch).values())).shape == next(iter(run(base, batch).values())).shape


def test_aligned_keys_are_nearer_than_their_mean() -> None:
    """The baseline of Ainslie et al.: neighbours are grouped, and the weights of their keys and values averaged."""
    base = graphopt.load(parse(MULTI, **FULL))
    model = base.clone()
    prune(model, "merge-heads{kv-heads=2 refit=false}", X[:15])
    mean = {n: a if n[1] not in "kv" else a.reshape(*a.shape[:-1], 2, 2, 8).mean(-2).reshape(*a.shape[:-1], 16) for n, a in FULL.items()}
    pooled = graphopt.load(parse(MULTI.replace("kv_num_heads=4", "kv_num_heads=2"), **mean))
    assert error(base, model, X[15]) < 0.8 * error(base, pooled, X[15])


CACHED = """<ir_version: 10, opset_import: ["": 23]> g (float[B,S,32] x, float[B,4,P,8] past_k, float[B,4,P,8] past_v)
    => (float[B,S,32] y, float[B,4,T,8] present_k, float[B,4,T,8] present_v) {
    q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
    a, present_k, present_v = Attention<q_num_heads=4, kv_num_heads=4, is_causal=1>(q, k, v, "", past_k, past_v)
    y = MatMul(a, wo) }"""


def test_caches_are_pooled_only_if_the_user_lets_them() -> None:
    model = graphopt.load(parse(CACHED, **{n: FULL[n] for n in ("wq", "wk", "wv", "wo")}))
    empty = {n: np.zeros((4, 4, 0, 8), np.float32) for n in ("past_k", "past_v")}
    samples = [{**f, **empty} for f in X]
    records, remarks = prune(model, "merge-heads{kv-heads=2}", samples)
    assert records[0].changes == 0
    assert any("name it in resize" in r.message for r in remarks)
    _, remarks = prune(model, "merge-heads{kv-heads=2 refit=false resize=past_k+past_v+present_k+present_v}", samples)
    assert any("feed back what the model gives" in r.message for r in remarks)
    assert [list(v.shape or ())[1] for v in [*model.graph.inputs[1:], *model.graph.outputs[1:]]] == [2] * 4
    few = {n: np.zeros((4, 2, 0, 8), np.float32) for n in ("past_k", "past_v")}
    x = X[0]["x"]
    whole = run(model, {"x": x, **few})
    first = run(model, {"x": x[:, :5], **few})
    rest = run(model, {"x": x[:, 5:], "past_k": first["present_k"], "past_v": first["present_v"]})
    np.testing.assert_allclose(np.concatenate([first["y"], rest["y"]], 1), whole["y"], atol=1e-5)


def test_what_cannot_be_merged_is_named() -> None:
    for name, route, fuse, text, word in (
        ("bert", "18", "canonicalize", "merge-heads{kv-heads=2}", "run fuse-attention first"),
        ("llama", "23", FUSE, "merge-heads{heads=2}", "share a key head"),
        ("bert", "18", FUSE, "merge-heads{kv-heads=3}", "no multiple of 3"),
        ("bert", "18", FUSE, "merge-heads{heads=4}", "4 are to stay"),
    ):
        model = graphopt.load(tiny(name, "sdpa", route))
        prune(model, fuse)
        records, remarks = prune(model, text, [feeds(model, 2, 12)])
        assert records[0].changes == 0, (name, text)
        assert any(word in r.message for r in remarks), (word, [r.message for r in remarks])


def test_options_are_checked() -> None:
    for options, word in (("ratio=0.5 heads=2", "without ratio"), ("ratio=1", "fraction"), ("by=names", "projections"), ("kv-heads=0", "1 or more")):
        with pytest.raises(PipelineError, match=word):
            steps(f"merge-heads{{{options}}}", passes())
    model = graphopt.load(parse(MULTI, **FULL))
    with pytest.raises(PassError, match="kv-heads"):
        prune(model, "merge-heads", X)
    for options in ("ratio=0.5", "kv-heads=2"):
        with pytest.raises(PassError, match="needs samples"):
            prune(model, f"merge-heads{{{options}}}")


@pytest.mark.slow
def test_minilm_keeps_its_outputs_better_by_merging_than_by_chance() -> None:
    whole = graphopt.load(minilm("sdpa_18"))
    prune(whole, FUSE)
    rng = np.random.default_rng(0)
    ids = [rng.integers(1000, 20000, (8, 32)) for _ in range(8)]
    samples = [{"input_ids": a, "attention_mask": np.ones_like(a)} for a in ids]
    errors = []
    for text in ("merge-heads{ratio=0.2 rows=1792}", "prune-heads{ratio=0.2 importance=random rows=1792}"):
        model = whole.clone()
        prune(model, text, samples[:7])
        errors.append(error(whole, model, samples[7]))
    assert errors[0] < errors[1], errors
