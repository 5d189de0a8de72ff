"""Heads that keep more bits than others: right slices, reordered alike everywhere, in every layout; and what is no set of separate heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import parse as model_of  # type: ignore[import-not-found]
from models import run

import graphopt
from graphopt.analysis.heads import AttentionHeads, Heads
from graphopt.compress.mix.split_heads import shares, why_together
from graphopt.core.contract import Context
from graphopt.core.pipeline import PassManager, parse
from graphopt.core.registry import passes
from graphopt.core.remarks import Remark
from graphopt.graph.interface import interface
from graphopt.graph.verify import verify
from graphopt.run.distance import relative_l2
from graphopt.run.samples import Samples

Array = np.ndarray[Any, Any]
WIDTH, HEADS, GROUPS, DIM = 96, 6, 3, 16
ROWS = HEADS // GROUPS * DIM  # of the output projection, and columns of the query projection, of a group
LAYOUTS: dict[str, str] = {
    "packed": "a = Attention <q_num_heads = 6, kv_num_heads = 3, scale = 0.25> (qp, kp, vp)\n z = MatMul(a, o)",
    "rotary": """qr = RotaryEmbedding <num_heads = 6> (qp, cos, sin)
      kr = RotaryEmbedding <num_heads = 3> (kp, cos, sin)
      a = Attention <q_num_heads = 6, kv_num_heads = 3, scale = 0.25> (qr, kr, vp)
      z = MatMul(a, o)""",
    "apart": """qs = Reshape(qp, six)
      qn = RMSNormalization <axis = -1> (qs, gain)
      qt = Transpose <perm = [0, 2, 1, 3]> (qn)
      ks = Reshape(kp, three)
      kt = Transpose <perm = [0, 2, 1, 3]> (ks)
      vs = Reshape(vp, three)
      vt = Transpose <perm = [0, 2, 1, 3]> (vs)
      a = Attention <scale = 0.25> (qt, kt, vt, mask)
      at = Transpose <perm = [0, 2, 1, 3]> (a)
      ap = Reshape(at, flat)
      z = MatMul(ap, o)""",
    "repeated": """qs = Reshape(qp, six)
      qt = Transpose <perm = [0, 2, 1, 3]> (qs)
      kr = RotaryEmbedding <num_heads = 3> (kp, cos, sin)
      ks = Reshape(kr, three)
      kt = Transpose <perm = [0, 2, 1, 3]> (ks)
      ku = Unsqueeze(kt, two)
      ke = Expand(ku, pairs)
      kk = Reshape(ke, all)
      vs = Reshape(vp, three)
      vt = Transpose <perm = [0, 2, 1, 3]> (vs)
      vu = Unsqueeze(vt, two)
      ve = Expand(vu, pairs)
      vv = Reshape(ve, all)
      a = Attention <scale = 0.25> (qt, kk, vv)
      at = Transpose <perm = [0, 2, 1, 3]> (a)
      ap = Reshape(at, flat)
      z = MatMul(ap, o)""",
}
SMALL = "int64[4] six = {0,0,6,16}, int64[4] three = {0,0,3,16}, int64[3] flat = {0,0,96}, int64[1] two = {2}, \
  int64[5] pairs = {1,1,2,1,1}, int64[4] all = {0,6,8,16}"


def source(layout: str = "packed", **weights: Array) -> onnx.ModelProto:
    """One attention with biases of query and value, and a residual; `weights` replace the random ones."""
    rng = np.random.default_rng(4)
    stored = {"q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH // 2), "v": (WIDTH, WIDTH // 2), "o": (WIDTH, WIDTH), "bq": (WIDTH,), "bv": (WIDTH // 2,)}
    made = {name: (rng.standard_normal(shape) / 6).astype(np.float32) for name, shape in stored.items()}
    made |= {"cos": np.cos(np.arange(8 * 8).reshape(1, 8, 8)).astype(np.float32), "sin": np.sin(np.arange(8 * 8).reshape(1, 8, 8)).astype(np.float32)}
    made |= {"gain": rng.random(DIM).astype(np.float32), "mask": rng.standard_normal((8, 8)).astype(np.float32)}
    body = LAYOUTS[layout]
    used = {name: array for name, array in {**made, **weights}.items() if name in stored or f"{name})" in body or f" {name}," in body}
    declared = ", ".join(f"float[{','.join(map(str, a.shape))}] {name}" for name, a in used.items())
    text = f"""<ir_version: 10, opset_import: ["": 23]>
    g (float[1,8,96] x) => (float[1,8,96] y) <{declared}, {SMALL}> {{
      qm = MatMul(x, q)
      qp = Add(qm, bq)
      kp = MatMul(x, k)
      vm = MatMul(x, v)
      vp = Add(vm, bv)
      {body}
      y = Add(z, x)
    }}"""
    return model_of(text, **used)


def weights(proto: onnx.ModelProto) -> dict[str, Array]:
    return {t.name: onnx.numpy_helper.to_array(t).copy() for t in proto.graph.initializer if t.name in ("q", "k", "v", "o")}


def feeds() -> list[dict[str, Array]]:
    rng = np.random.default_rng(9)
    return [{"x": rng.standard_normal((1, 8, WIDTH)).astype(np.float32)} for _ in range(3)]


def mixed(proto: onnx.ModelProto, options: str) -> tuple[ir.Model, list[Remark], int]:
    model = graphopt.load(proto)
    public = interface(model)
    ctx = Context(model, samples=Samples.load(feeds(), model))
    records = PassManager(parse(f"mix-precision{{heads=true {options}}}", passes())).run(model, ctx)
    verify(model, interface=public)
    return model, records[-1].remarks, records[-1].changes


def loss(proto: onnx.ModelProto, model: Any) -> float:
    return relative_l2([run(proto, f) for f in feeds()], [run(model, f) for f in feeds()])


def ops(model: ir.Model) -> list[str]:
    return [n.op_type for n in model.graph]


def columns(name: str, groups: Sequence[int]) -> Array:
    """Columns of the query, key and value projections, or rows of the output projection, of these groups."""
    width = ROWS if name in "qo" else DIM
    return np.concatenate([np.arange(g * width, (g + 1) * width) for g in groups])


def on_int8_grid(array: Array) -> Array:
    """Numbers k / 128 with the largest k = 127 in each column, which blocks of 64 or fewer rows hold exactly."""
    rng = np.random.default_rng(8)
    codes = rng.integers(-127, 128, array.shape)
    codes[::16] = 127
    return (codes / 128 / 4).astype(np.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_heads_are_taken_apart_and_reordered_exactly(layout: str) -> None:
    """Group 0 loses nothing in int8, the others would: they stay float, come first, and the outputs are the same."""
    plain = weights(source(layout))
    for name, array in plain.items():
        place = columns(name, [0])
        if name == "o":
            array[place] = on_int8_grid(array[place])
        else:
            array[:, place] = on_int8_grid(array[:, place])
    proto = source(layout, **plain)
    model, remarks, changes = mixed(proto, "choices=int8 loss=2e-6")
    assert ops(model).count("Split") == 1
    assert ops(model).count("Concat") == 3
    assert ops(model).count("DequantizeLinear") == 4
    assert changes == 1 + 4, "one block, and the four pieces of group 0"
    assert loss(proto, model) < 2e-6
    assert [r.facts["group"] for r in remarks if r.facts.get("choice") == "int8"] == [0]
    assert [r.facts["group"] for r in remarks if r.facts.get("choice") == ""] == [1, 2]


def fake(array: Array, bits: int, block: int) -> Array:
    """`array` rounded along axis 0 to the grid of least squared error among shrunken ranges, block by block: what quantize promises, in numpy."""
    high = 2 ** (bits - 1) - 1
    out = np.empty_like(array)
    for start in range(0, len(array), block):
        part = array[start : start + block]
        full = np.maximum(np.maximum(-part.min(0), 0) / high, np.maximum(part.max(0), 0) / high)
        best = np.full(part.shape[1], np.inf)
        for shrink in np.linspace(1.06, 0.58, 13) if bits == 4 else np.linspace(1, 0.94, 3):
            scale = (full * np.float32(shrink)).astype(np.float32)
            rounded = np.clip(np.rint(part / scale), -high - 1, high) * scale
            error = np.square(rounded - part).sum(0)
            out[start : start + block] = np.where(error < best, rounded, out[start : start + block])
            best = np.minimum(best, error)
    return out


def test_the_numbers_are_those_of_the_same_slices_rounded_in_numpy() -> None:
    plain = weights(source())
    for name in "vo":  # what group 1 adds is small, so that it may be coarse
        place = columns(name, [1])
        plain[name][place if name == "o" else (slice(None), place)] /= 8
    proto = source(**plain)
    model, remarks, _ = mixed(proto, "choices=int4+int8 loss=0.03")
    chosen = {r.facts["group"]: r.facts["choice"] for r in remarks if "group" in r.facts}
    assert chosen == {0: "int8", 1: "int4", 2: "int8"}
    rounded = {name: array.copy() for name, array in plain.items()}
    for groups, bits, block in (([0, 2], 8, 64), ([1], 4, 32)):
        for name in "qkvo":
            place = columns(name, groups)
            index = place if name == "o" else (slice(None), place)
            rounded[name][index] = fake(plain[name][index], bits, block)
    reference = source(**rounded)
    assert loss(reference, model) < 1e-6
    assert 0.005 < loss(proto, model) <= 0.03


def test_one_choice_for_all_heads_splits_nothing() -> None:
    model, remarks, changes = mixed(source(), "choices=int8 loss=0.5")
    assert "Split" not in ops(model)
    assert changes == 4
    assert remarks[-1].message.startswith("4 int8")


def test_integer_products_of_some_heads() -> None:
    plain = weights(source())
    for name in "vo":
        place = columns(name, [0])
        plain[name][place if name == "o" else (slice(None), place)] /= 30
    proto = source(**plain)
    model, remarks, _ = mixed(proto, "choices=dynamic loss=0.007")
    chosen = {r.facts["group"]: r.facts["choice"] for r in remarks if "group" in r.facts}
    assert chosen[0] == "dynamic"
    assert "" in chosen.values()
    assert ops(model).count("DynamicQuantizeLinear") == 2, "the input of query, key and value once, and that of the output projection"
    assert 0 < loss(proto, model) <= 0.007


# ---- what is declined -----------------------------------------------------------------------------------------------------------------


def facts(text: str, **stored: Array) -> list[Heads | str]:
    model = graphopt.load(model_of(text, **stored))
    found = Context(model).get(AttentionHeads()).values()
    return [h if isinstance(h, str) else why_together(h) or h for h in found]


def changed(old: str, new: str, extra: str = "") -> list[Heads | str]:
    """The facts of the packed layout with something else in it."""
    rng = np.random.default_rng(0)
    shapes = {"q": (96, 96), "k": (96, 48), "v": (96, 48), "o": (96, 96)}
    stored = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()} | {"gain": np.ones(48, np.float32)}
    text = f"""<ir_version: 10, opset_import: ["": 23]>
    g (float[1,8,96] x, float[1,6,8,8] each, float[8,8] all) => (float[1,8,96] z{extra}) <float[96,96] q, float[96,48] k, float[96,48] v, float[96,96] o,
      float[48] gain> {{
      qp = MatMul(x, q)
      kp = MatMul(x, k)
      vp = MatMul(x, v)
      a = Attention <q_num_heads = 6, kv_num_heads = 3> (qp, kp, vp)
      z = MatMul(a, o)
    }}"""
    assert old in text
    return facts(text.replace(old, new), **stored)


def test_the_facts_of_a_block() -> None:
    (block,) = changed("(qp, kp, vp)", "(qp, kp, vp, all)")
    assert isinstance(block, Heads)
    assert (block.heads, block.kv_heads, block.head_dim, block.value_dim) == (6, 3, 16, 16)
    assert [(x.weight.name, width) for x, width in shares(block)] == [("q", 32), ("k", 16), ("v", 16), ("o", 32)]


@pytest.mark.parametrize(
    ("old", "new", "extra", "reason"),
    [
        ("(qp, kp, vp)", "(qp, kp, vp, each)", "", "may differ from head to head"),
        ("z = MatMul(a, o)", "z = MatMul(a, o) other = Neg(a)", ", float[1,8,96] other", "something else reads its result, `a`"),
        ("vp = MatMul(x, v)", "vp = MatMul(x, v) other = Neg(vp)", ", float[1,8,48] other", "something else reads its value, `vp`"),
        ("vp = MatMul(x, v)", "vp = MatMul(x, k)", "", "its key projection is not a MatMul with a float matrix of its own"),
        (
            "kp = MatMul(x, k)",
            "km = MatMul(x, k) kp = RMSNormalization <axis = -1> (km, gain)",
            "",
            "no projection with a stored weight makes its key",
        ),
        ("z = MatMul(a, o)", "n = Neg(a) z = MatMul(n, o)", "", "no projection with a stored weight reads its result"),
    ],
)
def test_heads_that_cannot_be_told_apart(old: str, new: str, extra: str, reason: str) -> None:
    (found,) = changed(old, new, extra)
    assert reason in str(found)


def test_without_separate_heads_a_remark_says_so() -> None:
    proto = model_of(
        '<ir_version: 10, opset_import: ["": 23]> g (float[1,8,96] x) => (float[1,8,96] y) <float[96,96] w> { y = MatMul(x, w) }',
        w=np.random.default_rng(0).standard_normal((96, 96)).astype(np.float32),
    )
    _, remarks, changes = mixed(proto, "loss=0.5")
    assert changes == 1
    assert any("no attention whose heads can be told apart; put fuse-attention before" in r.message for r in remarks)


def test_a_result_that_is_not_laid_out_head_by_head_has_no_output_projection() -> None:
    """Its features stand under each other: the first of all heads, then the second. Rows of the projection are then no heads."""
    text = """<ir_version: 10, opset_import: ["": 23]>
    g (float[2,6,8,16] q) => (float[2,8,96] z) <float[96,96] o, int64[3] flat = {0,0,96}> {
      a = Attention (q, q, q)
      t = Transpose <perm = [0, 2, %s]> (a)
      r = Reshape(t, flat)
      z = MatMul(r, o)
    }"""
    outputs = []
    for order in ("1, 3", "3, 1"):
        model = graphopt.load(model_of(text % order, o=np.ones((96, 96), np.float32)))
        (heads,) = Context(model).get(AttentionHeads()).values()
        assert isinstance(heads, Heads)
        outputs.append(heads.output)
    assert outputs[0] is not None
    assert outputs[1] is None
