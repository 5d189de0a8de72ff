"""Rotary embeddings (case A26): each spelling is fused as what it is, and near misses are refused."""

from __future__ import annotations

import numpy as np
import pytest
from test_attention import build, fuse

from graphopt.run.ort import session

HALF = """  x1 = Slice (x, i0, i4, last)
  x2 = Slice (x, i4, i8, last)
  n = Neg (x2)
  r = Concat <axis = -1> (n, x1)
"""
INTERLEAVED = """  x1 = Slice (x, i0, i8, last, step2)
  x2 = Slice (x, i1, i8, last, step2)
  n = Neg (x2)
  u2 = Unsqueeze (n, a4)
  u1 = Unsqueeze (x1, a4)
  s = Concat <axis = -1> (u2, u1)
  r = Reshape (s, shape)
"""
DOUBLED_HALF = "  e = Concat <axis = -1> (angles, angles)\n"
DOUBLED_NEXT = "  e0 = Unsqueeze (angles, a3)\n  e1 = Concat <axis = -1> (e0, e0)\n  e = Reshape (e1, flat)\n"
SUM = "  xc = Mul (x, cos)\n  rs = Mul (r, sin)\n  y = Add (xc, rs)\n"
ANGLES = "  c = Cos (e)\n  s0 = Sin (e)\n  cos = Unsqueeze (c, a1)\n  sin = Unsqueeze (s0, a1)\n"


def text(rotated: str, doubled: str, tail: str = SUM, angles: str = ANGLES) -> str:
    return f"""g (float[B,2,S,8] x, float[B,S,4] angles) => (float[B,2,S,8] y)
<int64[1] i0 = {{0}}, int64[1] i1 = {{1}}, int64[1] i4 = {{4}}, int64[1] i8 = {{8}}, int64[1] last = {{-1}}, int64[1] step2 = {{2}}, int64[1] a1 = {{1}},
 int64[1] a3 = {{3}}, int64[1] a4 = {{4}}, int64[4] shape = {{0,0,0,8}}, int64[3] flat = {{0,0,8}}>
{{
{doubled}{angles}{rotated}{tail}}}"""


WRITTEN_OUT = """  c = Unsqueeze (e, a1)
  cos = Cos (c)
  sin = Sin (c)
  x1 = Slice (x, i0, i4, last)
  x2 = Slice (x, i4, i8, last)
  a = Mul (x1, cos)
  b = Mul (x2, sin)
  d = Mul (x2, cos)
  f = Mul (x1, sin)
  p = Sub (a, b)
  q = Add (d, f)
  y = Concat <axis = -1> (p, q)
"""
FUSED = {
    "half": (text(HALF, DOUBLED_HALF), 0),
    "interleaved": (text(INTERLEAVED, DOUBLED_NEXT), 1),
    "operands_swapped": (text(HALF, DOUBLED_HALF, "  xc = Mul (cos, x)\n  rs = Mul (sin, r)\n  y = Add (rs, xc)\n"), 0),
    "written_out": (text("", "  e = Identity (angles)\n", WRITTEN_OUT, ""), 0),
}
REFUSED = {
    "negation on the first half": text(HALF.replace("n = Neg (x2)", "n = Neg (x1)").replace("(n, x1)", "(x2, n)"), DOUBLED_HALF),
    "angles of the other pairing": text(HALF, DOUBLED_NEXT),
    "two different halves of angles": text(HALF, "  w = Neg (angles)\n  e = Concat <axis = -1> (angles, w)\n"),
    "another tensor rotated": text(HALF.replace("n = Neg (x2)", "z = Identity (x2)\n  zz = Exp (z)\n  n = Neg (zz)"), DOUBLED_HALF),
}


def feeds(batch: int, length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(length)
    start = rng.integers(0, 50, (batch, 1, 1))  # positions that do not start at 0 and differ for each row
    angles = (start + np.arange(length).reshape(1, length, 1)) * np.array([1, 0.3, 0.1, 0.03])
    return {"x": rng.standard_normal((batch, 2, length, 8), dtype=np.float32), "angles": angles.astype(np.float32)}


def ops_after(source: str, pipeline: str = "fuse-rotary") -> list[str]:
    model = build(source)
    sizes = ((2, 5), (3, 4))
    before = [session(model, optimize=False).run(feeds(*s))["y"] for s in sizes]
    fuse(model, pipeline)
    for size, expected in zip(sizes, before, strict=True):
        np.testing.assert_allclose(session(model, optimize=False).run(feeds(*size))["y"], expected, rtol=0, atol=2e-6)
    return [n.op_type for n in model.graph]


@pytest.mark.parametrize("name", FUSED)
def test_a26_spellings(name: str) -> None:
    source, interleaved = FUSED[name]
    assert ops_after(source).count("RotaryEmbedding") == 1
    model = build(source)
    fuse(model, "fuse-rotary")
    node = next(n for n in model.graph if n.op_type == "RotaryEmbedding")
    attribute = node.attributes.get("interleaved")
    assert (0 if attribute is None else attribute.as_int()) == interleaved


def test_a26_a_part_of_the_features() -> None:
    source = text(HALF, DOUBLED_HALF)
    source = source.replace("float[B,2,S,8] x, float[B,S,4] angles", "float[B,2,S,12] whole, float[B,S,4] angles").replace(
        "=> (float[B,2,S,8] y)", "=> (float[B,2,S,12] out)"
    )
    source = source.replace("int64[1] i0", "int64[1] i12 = {12}, int64[1] i0").replace(
        "  e = Concat", "  x = Slice (whole, i0, i8, last)\n  rest = Slice (whole, i8, i12, last)\n  e = Concat", 1
    )
    source = source.replace("  y = Add (xc, rs)\n", "  y = Add (xc, rs)\n  out = Concat <axis = -1> (y, rest)\n")
    model = build(source)
    given = feeds(2, 5)
    given["whole"] = np.concatenate([given.pop("x"), np.ones((2, 2, 5, 4), np.float32)], axis=-1)
    before = session(model, optimize=False).run(given)["out"]
    fuse(model, "fuse-rotary")
    (node,) = [n for n in model.graph if n.op_type == "RotaryEmbedding"]
    assert node.attributes["rotary_embedding_dim"].as_int() == 8
    np.testing.assert_allclose(session(model, optimize=False).run(given)["out"], before, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_a26_near_misses(name: str) -> None:
    assert "RotaryEmbedding" not in ops_after(REFUSED[name])


@pytest.mark.parametrize(("rotated", "doubled"), [(HALF, DOUBLED_HALF), (INTERLEAVED, DOUBLED_NEXT)])
def test_a26_rows_before_heads(rotated: str, doubled: str) -> None:
    """GPT-J rotates [batch, rows, heads, features] before it moves the heads."""
    angles = ANGLES.replace("(c, a1)", "(c, a2)").replace("(s0, a1)", "(s0, a2)")
    source = (
        text(rotated, doubled, angles=angles).replace("int64[1] a3", "int64[1] a2 = {2}, int64[1] a3").replace("float[B,2,S,8]", "float[B,S,2,8]")
    )
    model = build(source)
    given = {k: np.ascontiguousarray(v.transpose(0, 2, 1, 3)) if k == "x" else v for k, v in feeds(2, 5).items()}
    before = session(model, optimize=False).run(given)["y"]
    fuse(model, "fuse-rotary")
    assert [n.op_type for n in model.graph].count("RotaryEmbedding") == 1
    np.testing.assert_allclose(session(model, optimize=False).run(given)["y"], before, rtol=0, atol=2e-6)
