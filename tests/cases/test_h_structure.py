"""Given cases of part (h), pruning and factorizing; what is removed equals a masked reference, in every spelling of a block."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import parse, run  # type: ignore[import-not-found]
from pruning import masked, prune, same, shapes, units  # type: ignore[import-not-found]

import graphopt
from graphopt.core.errors import PassError, TargetError

Array = np.ndarray[Any, Any]
HEAD = '<ir_version: 10, opset_import: ["": 21]>'
BATCHES = [{"x": np.random.default_rng(k).standard_normal((b, s, 32)).astype(np.float32)} for k, (b, s) in enumerate(((2, 6), (3, 1), (1, 9)))]
FUSE = "canonicalize, fuse-norm, fuse-activation, simplify-masks, fuse-rotary, fuse-attention"
SPELLINGS = ["", "canonicalize", FUSE]


def weights(**shapes: tuple[int, ...]) -> dict[str, Array]:
    rng = np.random.default_rng(1)
    return {name: (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32) for name, shape in shapes.items()}


SQUARE = weights(wq=(32, 32), wk=(32, 32), wv=(32, 32), wo=(32, 32), bq=(32,), bk=(32,), bv=(32,), bo=(32,))
NUMBERS = {"scale": np.array(8**-0.5, np.float32)}


def core(x: str, out: str, split: str = "apart", joined: str = "together", tag: str = "") -> str:
    """Attention with separate projections; `split` and `joined` name the targets of its Reshapes."""
    return f"""
        q1{tag} = MatMul({x}, wq)  q2{tag} = Add(q1{tag}, bq)  q3{tag} = Reshape(q2{tag}, {split})  q{tag} = Transpose<perm=[0,2,1,3]>(q3{tag})
        k1{tag} = MatMul({x}, wk)  k2{tag} = Add(k1{tag}, bk)  k3{tag} = Reshape(k2{tag}, {split})  k{tag} = Transpose<perm=[0,2,3,1]>(k3{tag})
        v1{tag} = MatMul({x}, wv)  v2{tag} = Add(v1{tag}, bv)  v3{tag} = Reshape(v2{tag}, {split})  v{tag} = Transpose<perm=[0,2,1,3]>(v3{tag})
        s1{tag} = MatMul(q{tag}, k{tag})  s2{tag} = Mul(s1{tag}, scale)  p{tag} = Softmax<axis=-1>(s2{tag})  c1{tag} = MatMul(p{tag}, v{tag})
        c2{tag} = Transpose<perm=[0,2,1,3]>(c1{tag})  c{tag} = Reshape(c2{tag}, {joined})  o1{tag} = MatMul(c{tag}, wo)  {out} = Add(o1{tag}, bo)
    """


def integers(**values: list[int]) -> dict[str, Array]:
    return {name: np.array(value, np.int64) for name, value in values.items()}


def load(source: onnx.ModelProto, spelling: str) -> ir.Model:
    model = graphopt.load(source)
    if spelling:
        prune(model, spelling)
    return model


# ---- H06: sizes in constants, shared constants, and sizes that are computed ---------------------------------------------------------------


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(("apart", "together"), [([0, 0, 4, 8], [0, 0, 32]), ([0, -1, 4, 8], [0, -1, 32])])
def test_h06_shared_reshape_constants_are_forked(apart: list[int], together: list[int], spelling: str) -> None:
    text = f"{HEAD} g (float[B,S,32] x) => (float[B,S,32] y) {{ {core('x', 'h')} {core('h', 'y', tag='_2')} }}"
    model = load(parse(text, **SQUARE, **NUMBERS, **integers(apart=apart, together=together)), spelling)
    wanted = masked(model, {units(model)["h0"]: [2]})
    _, remarks = prune(model, "prune-heads{heads=0:2 refit=false}")
    same(wanted, model, BATCHES)
    assert [(h.heads, h.kv_heads) for h in (units(model)["h0"], units(model)["h1"])] == [(3, 3), (4, 4)]
    forked = [r.message for r in remarks if r.kind == "warning"]
    assert any("`wq` is shared" in m and "bytes more" in m for m in forked), forked


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_h06_sizes_computed_from_shapes(spelling: str) -> None:
    text = f"""{HEAD} g (float[B,S,32] x) => (float[B,S,32] y) {{
        shape = Shape(x)  b = Gather<axis=0>(shape, zero)  s = Gather<axis=0>(shape, one)  apart = Concat<axis=0>(b, s, four, eight)
        heads = Mul(four, eight)  together = Concat<axis=0>(b, s, heads)  {core("x", "y")} }}"""
    model = load(parse(text, **SQUARE, **NUMBERS, **integers(zero=[0], one=[1], four=[4], eight=[8])), spelling)
    wanted = masked(model, {units(model)["h0"]: [1, 3]})
    prune(model, "prune-heads{heads=0:1+0:3 refit=false}")
    same(wanted, model, BATCHES)
    assert shapes(model)["wo"] == (16, 32)


def test_h06_a_baked_batch_stays() -> None:
    text = f"{HEAD} g (float[2,S,32] x) => (float[2,S,32] y) {{ {core('x', 'y')} }}"
    model = graphopt.load(parse(text, **SQUARE, **NUMBERS, **integers(apart=[2, -1, 4, 8], together=[2, -1, 32])))
    wanted = masked(model, {units(model)["h0"]: [0]})
    prune(model, "prune-heads{heads=0:0 refit=false}")
    same(wanted, model, [BATCHES[0], {"x": BATCHES[0]["x"][:, :3]}])


# ---- H04: one projection for query, key and value -----------------------------------------------------------------------------------------

PACKED = weights(w=(32, 96), b=(96,), wo=(32, 32), bo=(32,))
AFTER = """ s1 = MatMul(q, kt)  s2 = Mul(s1, scale)  p = Softmax<axis=-1>(s2)  c1 = MatMul(p, v)  c2 = Transpose<perm=[0,2,1,3]>(c1)
            c = Reshape(c2, together)  o = MatMul(c, wo)  y = Add(o, bo) """
FUSED = {
    "timm": """ r = Reshape(f, apart)  t = Transpose<perm=[2,0,3,1,4]>(r)  q = Gather<axis=0>(t, i0)  k = Gather<axis=0>(t, i1)
                v = Gather<axis=0>(t, i2)  kt = Transpose<perm=[0,1,3,2]>(k) """,
    "split": """ q0, k0, v0 = Split<axis=-1>(f, thirds)  q1 = Reshape(q0, each)  k1 = Reshape(k0, each)  v1 = Reshape(v0, each)
                q = Transpose<perm=[0,2,1,3]>(q1)  kt = Transpose<perm=[0,2,3,1]>(k1)  v = Transpose<perm=[0,2,1,3]>(v1) """,
    "interleaved": """ r = Reshape(f, mixed)  q0, k0, v0 = Split<axis=3>(r, ones)  q1 = Squeeze(q0, three)  k1 = Squeeze(k0, three)
                v1 = Squeeze(v0, three)  q = Transpose<perm=[0,2,1,3]>(q1)  kt = Transpose<perm=[0,2,3,1]>(k1)  v = Transpose<perm=[0,2,1,3]>(v1) """,
}  # fmt: skip
SIZES = integers(apart=[0, 0, 3, 4, 8], each=[0, 0, 4, 8], mixed=[0, 0, 4, 3, 8], thirds=[32] * 3, ones=[1] * 3, three=[3], together=[0, 0, 32])
PLACES = {name: np.array(k, np.int64) for k, name in enumerate(("i0", "i1", "i2"))}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("layout", FUSED)
def test_h04_packed_projections(layout: str, spelling: str) -> None:
    text = f"{HEAD} g (float[B,S,32] x) => (float[B,S,32] y) {{ m = MatMul(x, w)  f = Add(m, b) {FUSED[layout]} {AFTER} }}"
    model = load(parse(text, **PACKED, **NUMBERS, **SIZES, **PLACES), spelling)
    wanted = masked(model, {units(model)["h0"]: [2]})
    prune(model, "prune-heads{heads=0:2 refit=false}")
    same(wanted, model, BATCHES)
    gone = [*range(48, 72)] if layout == "interleaved" else [32 * k + i for k in range(3) for i in range(16, 24)]
    for name, axis in (("w", 1), ("b", 0)):
        stored = model.graph.initializers[name].const_value
        assert stored is not None
        np.testing.assert_array_equal(stored.numpy(), np.delete(PACKED[name], gone, axis=axis))
    stored = model.graph.initializers["wo"].const_value
    assert stored is not None
    np.testing.assert_array_equal(stored.numpy(), np.delete(PACKED["wo"], range(16, 24), axis=0))


# ---- H01, H10: groups stay whole, heads never ragged ---------------------------------------------------------------------------------------

GROUPED = weights(wq=(32, 32), wk=(32, 16), wv=(32, 16), wo=(32, 32))
GQA = f"""{HEAD} g (float[B,S,32] x) => (float[B,S,32] y) {{
    q1 = MatMul(x, wq)  q2 = Reshape(q1, apart)  q = Transpose<perm=[0,2,1,3]>(q2)
    k1 = MatMul(x, wk)  k2 = Reshape(k1, few)  k3 = Transpose<perm=[0,2,1,3]>(k2)  k4 = Unsqueeze(k3, two)
    v1 = MatMul(x, wv)  v2 = Reshape(v1, few)  v3 = Transpose<perm=[0,2,1,3]>(v2)  v4 = Unsqueeze(v3, two)
    shape = Shape(x)  b = Gather<axis=0>(shape, zero)  s = Gather<axis=0>(shape, one)  target = Concat<axis=0>(b, two, two, s, eight)
    k5 = Expand(k4, target)  v5 = Expand(v4, target)  all = Concat<axis=0>(b, four, s, eight)
    k6 = Reshape(k5, all)  v = Reshape(v5, all)  kt = Transpose<perm=[0,1,3,2]>(k6)
    s1 = MatMul(q, kt)  s2 = Mul(s1, scale)  p = Softmax<axis=-1>(s2)  c1 = MatMul(p, v)  c2 = Transpose<perm=[0,2,1,3]>(c1)
    c = Reshape(c2, together)  y = MatMul(c, wo) }}"""
GQA_SIZES = integers(apart=[0, 0, 4, 8], few=[0, 0, 2, 8], two=[2], zero=[0], one=[1], eight=[8], four=[4], together=[0, 0, 32])


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("asked", [[1], [0, 1], [1, 0]])
def test_h01_grouped_heads_go_as_a_group(asked: list[int], spelling: str) -> None:
    model = load(parse(GQA, **GROUPED, **NUMBERS, **GQA_SIZES), spelling)
    wanted = masked(model, {units(model)["h0"]: [0, 1]})
    _, remarks = prune(model, "prune-heads{refit=false heads=" + "+".join(f"0:{h}" for h in asked) + "}")
    same(wanted, model, BATCHES)
    assert {n: shapes(model)[n] for n in ("wq", "wk", "wv", "wo")} == {"wq": (32, 16), "wk": (32, 8), "wv": (32, 8), "wo": (16, 32)}
    rounded = [r.message for r in remarks if "groups of 2" in r.message]
    assert bool(rounded) is (len(asked) == 1)


def test_h01_heads_without_weight_are_chosen_and_nothing_changes() -> None:
    silent = dict(GROUPED, wo=GROUPED["wo"].copy())
    silent["wo"][16:] = 0  # what heads 2 and 3 give is multiplied by zero
    for importance in ("magnitude", "obs", "fisher", "taylor", "reconstruction"):
        model = graphopt.load(parse(GQA, **silent, **NUMBERS, **GQA_SIZES))
        base = model.clone()
        _, remarks = prune(model, f"prune-heads{{ratio=0.25 importance={importance} refit=false}}", samples=BATCHES)
        assert [r.facts["removed"] for r in remarks if r.kind == "applied"] == [[2, 3]], importance
        same(base, model, BATCHES)


def test_h01_three_of_four_heads_leave_nothing_of_two_groups() -> None:
    model = graphopt.load(parse(GQA, **GROUPED, **NUMBERS, **GQA_SIZES))
    records, remarks = prune(model, "prune-heads{heads=0:0+0:1+0:2 refit=false}")
    assert records[0].changes == 0
    assert any("nothing of axis" in r.message for r in remarks)


def test_h10_a_quarter_is_whole_heads() -> None:
    text = f"{HEAD} g (float[B,S,32] x) => (float[B,S,32] y) {{ {core('x', 'y')} }}"
    model = graphopt.load(parse(text, **SQUARE, **NUMBERS, **integers(apart=[0, 0, 4, 8], together=[0, 0, 32])))
    prune(model, "prune-heads{ratio=0.25 importance=random refit=false}")
    assert shapes(model)["wo"] == (24, 32)
    assert units(model)["h0"].count == 3


# ---- H03: weights that several layers read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_h03_layers_that_share_weights_lose_the_same_heads(spelling: str) -> None:
    text = f"{HEAD} g (float[B,S,32] x) => (float[B,S,32] y) {{ {core('x', 'h')} {core('h', 'y', tag='_2')} }}"
    model = load(parse(text, **SQUARE, **NUMBERS, **integers(apart=[0, 0, 4, 8], together=[0, 0, 32])), spelling)
    before = model.clone()
    _, remarks = prune(model, "prune-heads{ratio=0.25 importance=obs}", samples=BATCHES)
    removed = [r.facts for r in remarks if r.kind == "applied" and "removed" in r.facts]
    assert [f["layer"] for f in removed] == [0, 1]
    assert removed[0]["removed"] == removed[1]["removed"]
    assert removed[0]["shared_with"] == [1]
    assert {n: shapes(model)[n] for n in ("wq", "wo")} == {"wq": (32, 24), "wo": (24, 32)}  # stored once, as before
    old = units(before)
    same(masked(before, {old["h0"]: removed[0]["removed"], old["h1"]: removed[1]["removed"]}), model, BATCHES)
    assert any("shared" in r.message for r in remarks if r.kind == "missed" and "refitted" in r.message)


# ---- H08: norms of query and key -----------------------------------------------------------------------------------------------------------


def normed(full: bool) -> onnx.ModelProto:
    """RMS norms over each head, or (`full`) over all of them, as OLMo has them."""

    def path(n: str) -> str:
        into, out = (f"{n}1", f"{n}5") if full else (f"{n}2", f"h{n}")
        norm = f"""{n}s = Mul({into}, {into})  {n}m = ReduceMean<keepdims=1>({n}s, last)  {n}e = Add({n}m, eps)  {n}r = Sqrt({n}e)
                   {n}d = Div({into}, {n}r)  {out} = Mul({n}d, g{n})"""
        start = f"{n}1 = MatMul(x, w{n})"
        return f"{start} {norm} h{n} = Reshape({n}5, apart) " if full else f"{start} {n}2 = Reshape({n}1, apart) {norm} "

    body = path("q") + path("k")
    text = f"""{HEAD} g (float[B,S,32] x) => (float[B,S,32] y) {{ {body}
        q = Transpose<perm=[0,2,1,3]>(hq)  kt = Transpose<perm=[0,2,3,1]>(hk)  v1 = MatMul(x, wv)  v2 = Reshape(v1, apart)
        v = Transpose<perm=[0,2,1,3]>(v2)  {AFTER} }}"""
    width = 32 if full else 8
    gains = {"gq": np.linspace(0.5, 2, width).astype(np.float32), "gk": np.linspace(2, 1, width).astype(np.float32)}
    numbers = {**NUMBERS, "eps": np.array(1e-6, np.float32), **integers(apart=[0, 0, 4, 8], together=[0, 0, 32], last=[-1])}
    return parse(text, **{n: SQUARE[n] for n in ("wq", "wk", "wv", "wo", "bo")}, **gains, **numbers)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_h08_a_norm_of_each_head_stays(spelling: str) -> None:
    model = load(normed(full=False), spelling)
    wanted = masked(model, {units(model)["h0"]: [1]})
    prune(model, "prune-heads{heads=0:1 refit=false}")
    same(wanted, model, BATCHES)
    assert [shapes(model)[n] for n in ("gq", "gk")] == [(8,), (8,)]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_h08_a_norm_over_all_heads_is_sliced(spelling: str) -> None:
    model = load(normed(full=True), spelling)
    _, remarks = prune(model, "prune-heads{heads=0:1 refit=false}")
    assert [shapes(model)[n] for n in ("gq", "gk")] == [(24,), (24,)]
    assert any("over the features that are left" in r.message for r in remarks if r.kind == "warning")
    assert run(model, BATCHES[0])["y"].shape == (2, 6, 32)


# ---- H09: a table that is looked up and multiplied with ------------------------------------------------------------------------------------

TIED = f"""{HEAD} g (int64[B,S] ids) => (float[B,S,512] y) {{
    e = Gather(table, ids)  x = LayerNormalization<axis=-1>(e, g0, b0)
    q1 = MatMul(x, wq)  q2 = Reshape(q1, apart)  q = Transpose<perm=[0,2,1,3]>(q2)
    k1 = MatMul(x, wk)  k2 = Reshape(k1, apart)  kt = Transpose<perm=[0,2,3,1]>(k2)
    v1 = MatMul(x, wv)  v2 = Reshape(v1, apart)  v = Transpose<perm=[0,2,1,3]>(v2)
    s1 = MatMul(q, kt)  s2 = Mul(s1, scale)  p = Softmax<axis=-1>(s2)  c1 = MatMul(p, v)  c2 = Transpose<perm=[0,2,1,3]>(c1)
    c = Reshape(c2, together)  o = MatMul(c, wo)  h = Add(o, x)  n = LayerNormalization<axis=-1>(h, g1, b1)
    u = MatMul(n, up)  a = Gelu(u)  d = MatMul(a, down)  z = Add(d, n)  f = LayerNormalization<axis=-1>(z, g2, b2)
    t = Transpose<perm=[1,0]>(table)  y = MatMul(f, t) }}"""
TABLE = weights(table=(512, 64), wq=(64, 32), wk=(64, 32), wv=(64, 32), wo=(32, 64), up=(64, 96), down=(96, 64))
VECTORS = {f"{n}{k}": np.random.default_rng(k).uniform(0.5, 1.5, 64).astype(np.float32) for n in "gb" for k in range(3)}
ATTENTION = integers(apart=[0, 0, 4, 8], together=[0, 0, 32])
IDS = [{"ids": np.random.default_rng(k).integers(0, 300, (2, 7))} for k in range(3)]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_h09_hidden_channels_of_a_tied_model(spelling: str) -> None:
    model = load(parse(TIED, **TABLE, **VECTORS, **NUMBERS, **ATTENTION), spelling)
    _, remarks = prune(model, "prune-hidden{width=48}", IDS)
    found = shapes(model)
    tables = [shape for shape in found.values() if 512 in shape]
    assert tables == [(512, 48)]
    left = model.graph.initializers["table"].const_value
    assert left is not None
    kept = [int(np.flatnonzero((TABLE["table"] == column[:, None]).all(0))[0]) for column in left.numpy().T]
    by_hand = {n: a[:, kept] if n in ("table", "wo", "down") else a[kept] if n in ("wq", "wk", "wv", "up") else a for n, a in TABLE.items()}
    expected = parse(TIED, **by_hand, **{n: a[kept] for n, a in VECTORS.items()}, **NUMBERS, **ATTENTION)
    for feeds in IDS:
        np.testing.assert_allclose(run(model, feeds)["y"], run(expected, feeds)["y"], atol=1e-5)
    assert any("over the features that are left" in r.message for r in remarks)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_h09_vocabulary_of_a_tied_model(spelling: str) -> None:
    model = load(parse(TIED, **TABLE, **VECTORS, **NUMBERS, **ATTENTION), spelling)
    kept = np.sort(np.random.default_rng(5).choice(512, 300, replace=False))
    sample = [{"ids": kept.reshape(2, 150)}]
    base = model.clone()
    _, remarks = prune(model, f"prune-vocabulary{{unknown={kept[7]}}}", sample)
    assert [shape for shape in shapes(model).values() if 300 in shape or 512 in shape] == [(300, 64)]
    assert json.loads(model.metadata_props["graphopt.vocabulary"]) == kept.tolist()
    feeds = {"ids": np.random.default_rng(6).choice(kept, (3, 5))}
    found, wanted = run(model, feeds)["y"], run(base, feeds)["y"]
    assert found.shape == (3, 5, 300)
    np.testing.assert_allclose(found, wanted[..., kept], atol=1e-5)
    gone = next(i for i in range(512) if i not in kept)
    np.testing.assert_array_equal(run(model, {"ids": np.array([[gone]])})["y"], run(model, {"ids": kept[None, 7:8]})["y"])
    assert any("512 -> 300" in r.message for r in remarks)


def test_h09_a_removed_id_is_an_error_unless_it_has_a_stand_in() -> None:
    model = graphopt.load(parse(TIED, **TABLE, **VECTORS, **NUMBERS, **ATTENTION))
    prune(model, "prune-vocabulary", [{"ids": np.arange(300)[None]}])
    with pytest.raises(TargetError, match="out of data bounds"):
        run(model, {"ids": np.array([[400]])})


# ---- errors ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prune-heads{heads=7:0}", "layers are 0"),
        ("prune-heads{heads=0:9}", "4 heads, 0 to 3; found 9"),
        ("prune-heads", "how much is to go"),
    ],
)
def test_what_does_not_exist_is_named(text: str, words: str) -> None:
    source = f"{HEAD} g (float[B,S,32] x) => (float[B,S,32] y) {{ {core('x', 'y')} }}"
    model = graphopt.load(parse(source, **SQUARE, **NUMBERS, **integers(apart=[0, 0, 4, 8], together=[0, 0, 32])))
    with pytest.raises(PassError, match=words):
        prune(model, text)


def test_a_head_whose_result_is_an_output_stays_with_the_reason() -> None:
    source = f"{HEAD} g (float[B,S,32] x) => (float[B,S,32] y, float[B,H,S,T] p) {{ {core('x', 'y')} }}"
    model = graphopt.load(parse(source, **SQUARE, **NUMBERS, **integers(apart=[0, 0, 4, 8], together=[0, 0, 32])))
    base = model.clone()
    records, remarks = prune(model, "prune-heads{ratio=0.25 importance=magnitude refit=false}")
    assert records[0].changes == 0
    assert any("`p` is an output of the model" in r.message for r in remarks)
    same(base, model, BATCHES)
