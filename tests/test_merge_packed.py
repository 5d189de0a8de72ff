"""Key heads that more queries share, where query, key and value come from one packed projection: the same as with three of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from models import assert_same, parse, run  # type: ignore[import-not-found]
from pruning import prune, shapes, units  # type: ignore[import-not-found]
from test_pruning import FUSE, feeds  # type: ignore[import-not-found]
from tiny import tiny  # type: ignore[import-not-found]

import graphopt
from graphopt.analysis.heads import Units
from graphopt.core.contract import Context
from graphopt.core.remarks import Remark

Array = np.ndarray[Any, Any]
HEAD = '<ir_version: 10, opset_import: ["": 23]> g (float[B,S,32] x, bool[B,1,S,S] mask) => (float[B,S,32] y) {'
TAIL = "c = Attention<q_num_heads=4, kv_num_heads=4>(q, k, v, mask)  o = MatMul(c, wo)  y = Add(o, bo) }"
ANGLES = np.arange(9)[:, None] * 0.7 ** np.arange(4)
TURN = "q = RotaryEmbedding<num_heads=4>(q1, cos, sin, ids)  k = RotaryEmbedding<num_heads=4>(k1, cos, sin, ids)"
APART = f"{HEAD} q0 = MatMul(x, wq)  q = Add(q0, bq)  k0 = MatMul(x, wk)  k = Add(k0, bk)  v0 = MatMul(x, wv)  v = Add(v0, bv)  {TAIL}"
PACKED = {
    "split": f"{HEAD} p0 = MatMul(x, w)  p = Add(p0, b)  q, k, v = Split<axis=-1, num_outputs=3>(p)  {TAIL}",
    "sizes": f"{HEAD} p0 = MatMul(x, w)  p = Add(p0, b)  q, k, v = Split<axis=2>(p, widths)  {TAIL}",
    "slices": f"{HEAD} p0 = MatMul(x, w)  p = Add(p0, b)  q = Slice(p, n0, n32, n2)  k = Slice(p, n32, n64, n2)  v = Slice(p, n64, n96, n2)  {TAIL}",
    "gemm": f"""{HEAD} f = Reshape(x, rows)  p0 = Gemm<transB=1>(f, wt, b)  s = Shape<start=0, end=2>(x)  t = Concat<axis=0>(s, n96)
        p = Reshape(p0, t)  q, k, v = Split<axis=-1, num_outputs=3>(p)  {TAIL}""",
    "repeated mask": f"""{HEAD} p0 = MatMul(x, w)  p = Add(p0, b)  q, k, v = Split<axis=-1, num_outputs=3>(p)  m = Expand(mask, repeat)
        {TAIL.replace("v, mask", "v, m")}""",
    "apart by head": f"""{HEAD} p0 = MatMul(x, w)  p = Add(p0, b)  q0, k0, v0 = Split<axis=-1, num_outputs=3>(p)
        q1 = Reshape(q0, heads)  q = Transpose<perm=[0,2,1,3]>(q1)  k1 = Reshape(k0, heads)  k = Transpose<perm=[0,2,1,3]>(k1)
        v1 = Reshape(v0, heads)  v = Transpose<perm=[0,2,1,3]>(v1)  c4 = Attention(q, k, v, mask)
        ct = Transpose<perm=[0,2,1,3]>(c4)  c = Reshape(ct, flat)  o = MatMul(c, wo)  y = Add(o, bo) }}""",
}


def weights(seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    found = {f"w{n}": rng.standard_normal((32, 32)) / 5.6 for n in "qkvo"} | {f"b{n}": rng.standard_normal(32) / 2 for n in "qkvo"}
    return {name: array.astype(np.float32) for name, array in found.items()}


def packed(given: dict[str, Array]) -> dict[str, Array]:
    w, b = np.concatenate([given[f"w{n}"] for n in "qkv"], 1), np.concatenate([given[f"b{n}"] for n in "qkv"])
    numbers = {f"n{k}": np.array([k]) for k in (0, 2, 32, 64, 96)}
    numbers |= {"widths": np.array([32, 32, 32]), "rows": np.array([-1, 32]), "heads": np.array([0, 0, 4, 8]), "flat": np.array([0, 0, 32])}
    numbers["repeat"] = np.array([1, 4, 1, 1])
    return {"w": w, "wt": np.ascontiguousarray(w.T), "b": b, "wo": given["wo"], "bo": given["bo"], **numbers}


def batch(seed: int, rows: int, length: int) -> dict[str, Array]:
    """A causal mask with a hole in the first row, and left padding in the others; what is padding sees itself."""
    rng = np.random.default_rng(seed)
    seen = np.ones((rows, length), bool)
    seen[0, length // 2] = False
    seen[1:, : length // 3] = False
    mask = (np.tril(np.ones((length, length), bool)) & seen[:, None]) | np.eye(length, dtype=bool)
    return {"x": rng.standard_normal((rows, length, 32)).astype(np.float32), "mask": mask[:, None]}


BATCHES = [batch(100, 3, 9), batch(101, 2, 6)]


def grouped(given: dict[str, Array], feed: dict[str, Array], kv_heads: int) -> Array:
    """Attention of 4 query heads over `kv_heads` key heads, in numpy, float64."""

    def by_head(n: str, heads: int) -> Array:
        made = feed["x"] @ given[f"w{n}"].astype(np.float64) + given[f"b{n}"]
        return np.repeat(made.reshape(*made.shape[:2], heads, 8).transpose(0, 2, 1, 3), 4 // heads, 1)

    q, k, v = by_head("q", 4), by_head("k", kv_heads), by_head("v", kv_heads)
    scores = np.where(feed["mask"], q @ k.transpose(0, 1, 3, 2) / np.sqrt(8), -np.inf)
    maps = np.exp(scores - scores.max(-1, keepdims=True))
    result = (maps / maps.sum(-1, keepdims=True)) @ v
    made: Array = result.transpose(0, 2, 1, 3).reshape(*feed["x"].shape) @ given["wo"] + given["bo"]
    return made


def pool(text: str, stored: dict[str, Array], options: str) -> tuple[ir.Model, list[Remark]]:
    model = graphopt.load(parse(text, **{n: a for n, a in stored.items() if n in text}))
    _, remarks = prune(model, f"merge-heads{{{options}}}", [batch(k, 4, 9) for k in range(8)])
    return model, remarks


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("layout", PACKED)
def test_packed_equals_three_projections_and_numpy(layout: str, kv_heads: int) -> None:
    given, options = weights(), f"kv-heads={kv_heads} refit=false"
    apart, told = pool(APART, given, options)
    model, remarks = pool(PACKED[layout], packed(given), options)
    groups = [dict(r.facts)["groups"] for r in told if "groups" in r.facts]
    assert [dict(r.facts)["groups"] for r in remarks if "groups" in r.facts] == groups
    assert len(groups) == 1
    stored = {n: v.const_value.numpy() for n, v in model.graph.initializers.items() if v.const_value is not None}
    w = stored["wt"].T if layout == "gemm" else stored["w"]
    assert w.shape == (32, 32 + 2 * 8 * kv_heads)
    borders = [32, 32 + 8 * kv_heads]
    parts = {f"{a}{n}": part for a, whole in (("w", w), ("b", stored["b"])) for n, part in zip("qkv", np.split(whole, borders, -1), strict=True)}
    now = {**parts, "wo": stored["wo"], "bo": stored["bo"]}
    for feed in BATCHES:
        (found,) = run(model, feed).values()
        assert_same({"y": found}, run(apart, feed))
        assert_same({"y": found}, {"y": grouped(now, feed, kv_heads).astype(np.float32)})
        assert np.abs(found - grouped(given, feed, 4)).max() > 1e-2, "these heads are not alike, so pooling them shows"


@pytest.mark.parametrize("layout", PACKED)
def test_as_many_heads_as_there_are_changes_nothing(layout: str) -> None:
    given = weights()
    model, remarks = pool(PACKED[layout], packed(given), "kv-heads=4")
    assert any("no multiple of 4 above it" in r.message for r in remarks)
    for feed in BATCHES:
        assert_same(run(model, feed), {"y": grouped(given, feed, 4).astype(np.float32)})


@pytest.mark.parametrize("layout", PACKED)
def test_heads_that_are_alike_in_other_coordinates_are_shared_exactly(layout: str) -> None:
    """Heads 0 and 3, 1 and 2 have the same keys and values but for a turn, and queries of their own."""
    given = {n: a.astype(np.float64) for n, a in weights().items()}
    rng = np.random.default_rng(7)
    for old, new in ((slice(0, 8), slice(24, 32)), (slice(8, 16), slice(16, 24))):
        for n in "kv":
            turn = rng.standard_normal((8, 8)) + 3 * np.eye(8)
            given[f"w{n}"][:, new], given[f"b{n}"][new] = given[f"w{n}"][:, old] @ turn, given[f"b{n}"][old] @ turn
    model, remarks = pool(PACKED[layout], packed({n: a.astype(np.float32) for n, a in given.items()}), "kv-heads=2 refit=false")
    assert [dict(r.facts)["groups"] for r in remarks if "groups" in r.facts] == [[[0, 3], [1, 2]]]
    for feed in BATCHES:
        wanted = grouped(given, feed, 4)
        (found,) = run(model, feed).values()
        assert np.linalg.norm(found - wanted) < 2e-4 * np.linalg.norm(wanted)


def test_what_merge_projections_writes_is_pooled_behind_a_rotary_embedding() -> None:
    turned = APART.replace("q = Add", "q1 = Add").replace("k = Add", "k1 = Add").replace("c = Attention", f"{TURN}  c = Attention")
    stored = {**weights(), "cos": np.cos(ANGLES).astype(np.float32), "sin": np.sin(ANGLES).astype(np.float32), "ids": np.tile(np.arange(9), (4, 1))}
    samples, found = [batch(k, 4, 9) for k in range(8)], []
    for pipeline in ("merge-heads{kv-heads=2 refit=false}", "merge-projections, merge-heads{kv-heads=2 refit=false}"):
        model = graphopt.load(parse(turned, **stored))
        prune(model, pipeline, samples)
        assert (units(model)["h0"].heads, units(model)["h0"].kv_heads) == (4, 2)
        found.append(model)
    assert {s for s in shapes(found[1]).values() if len(s) == 2 and s[0] == 32} == {(32, 64), (32, 32)}
    assert_same(run(found[0], batch(50, 4, 9)), run(found[1], batch(50, 4, 9)))


@pytest.mark.parametrize("route", ["18", "23", "ts17"])
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_gpt2_is_pooled(route: str, kv_heads: int) -> None:
    model = graphopt.load(tiny("gpt2", "sdpa", route))
    prune(model, FUSE)
    for unit in Context(model).get(Units()).attention:  # all keys and values of a layer alike: pooling is exact
        for o in unit.operands[1:]:
            assert o.linear is not None
            weight = o.linear.matrix().copy()
            weight[:, o.columns[1:]] = weight[:, o.columns[:1]]
            o.linear.weight.const_value = ir.tensor(np.ascontiguousarray(weight.T if o.linear.transposed else weight), name=o.linear.weight.name)
    base = model.clone()
    records, _ = prune(model, f"merge-heads{{kv-heads={kv_heads} refit=false}}", [feeds(model, 4, 12, seed) for seed in range(4)])
    assert records[0].changes == 2
    assert [(h.heads, h.kv_heads) for n, h in units(model).items() if n.startswith("h")] == [(4, kv_heads)] * 2
    assert sum(shape == (32, 32 + 16 * kv_heads) for shape in shapes(model).values()) == 2
    for rows, length in ((2, 12), (3, 7)):
        feed = feeds(model, rows, length, 50)
        wanted, found = (next(iter(run(m, feed).values())) for m in (base, model))
        assert np.linalg.norm(found - wanted) < 2e-4 * np.linalg.norm(wanted)


def test_a_mask_that_differs_from_head_to_head_forbids_it() -> None:
    text = PACKED["split"].replace("c = Attention", "m = Or(mask, some)  c = Attention").replace("v, mask", "v, m")
    _, remarks = pool(text, {**packed(weights()), "some": np.arange(4).reshape(1, 4, 1, 1) == 2}, "kv-heads=2")
    assert any("differs from head to head" in r.message for r in remarks), [r.message for r in remarks]


def test_heads_between_the_three_are_refused_with_the_reason() -> None:
    """[heads, 3, head_dim] can lose a key only with its query."""
    text = f"""{HEAD} p0 = MatMul(x, w)  p = Reshape(p0, five)  q1, k1, v1 = Split<axis=3, num_outputs=3>(p)
        q = Reshape(q1, flat)  k = Reshape(k1, flat)  v = Reshape(v1, flat)  {TAIL}"""
    model, remarks = pool(text, {**packed(weights()), "five": np.array([0, 0, 4, 3, 8])}, "kv-heads=2")
    assert any("its query heads would go with their key heads" in r.message for r in remarks), [r.message for r in remarks]
    assert units(model)["h0"].kv_heads == 4


def test_out_of_fuel_one_layer_is_pooled_and_told() -> None:
    from graphopt.core.fuel import Fuel
    from graphopt.core.pipeline import PassManager
    from graphopt.core.pipeline import parse as steps
    from graphopt.core.registry import passes

    model = graphopt.load(tiny("gpt2", "sdpa", "18"))
    prune(model, FUSE)
    ctx = Context(model, samples=[feeds(model, 2, 12)], fuel=Fuel(1))
    (record,) = PassManager(steps("merge-heads{kv-heads=2}", passes())).run(model, ctx)
    assert record.changes == 1
    assert [h.kv_heads for n, h in units(model).items() if n.startswith("h")] == [2, 4]
    assert sorted(r.kind for r in record.remarks if "pooled" in r.message) == ["applied", "missed"]
