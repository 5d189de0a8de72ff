"""Cases A01, A02, A04, A23, A25, A27, B01, B03, B08 and J02: attention is found in every export, and the numbers hold under every mask."""

from __future__ import annotations

import numpy as np
import pytest
from models import Array, assert_same, parse, run  # type: ignore[import-not-found]
from tiny import tiny  # type: ignore[import-not-found]

import graphopt

Feeds = dict[str, Array]


def feeds(names: list[str], batch: int, length: int) -> Feeds:
    """Rows: all ones, left-padded, with holes, and (from batch 4) masked everywhere."""
    rng = np.random.default_rng(length)
    if names == ["pixel_values"]:
        return {"pixel_values": rng.standard_normal((batch, 3, 32, 32), dtype=np.float32)}
    mask = np.ones((batch, length), np.int64)
    for row, hidden in enumerate(([], range(4), [3, 5], range(length))):
        if row < batch:
            mask[row, list(hidden)] = 0
    return {"input_ids": rng.integers(4, 99, (batch, length)), "attention_mask": mask}


def check(path: object, blocks: int, sizes: tuple[tuple[int, int], ...] = ((3, 9), (1, 7), (4, 12))) -> dict[str, int]:
    """-O1 keeps the numbers; returns the operators of the fused graph, before lowering."""
    result = graphopt.optimize(path, level=1)
    names = [str(v.name) for v in result.graph.graph.inputs]
    for size in sizes:
        given = feeds(names, *size)
        assert_same(run(path, given), run(result.model, given))
    ops = [n.op_type for n in result.graph.graph]
    assert ops.count("Attention") == blocks, [r for p in result.report.as_dict()["passes"] for r in p["remarks"] if r["kind"] == "missed"]
    return {op: ops.count(op) for op in ops}


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_a01_b01_sdpa_of_torchscript(name: str) -> None:
    counts = check(tiny(name, "sdpa", "ts17"), 2)
    assert counts["LayerNormalization"] == 5
    assert "Softmax" not in counts


@pytest.mark.parametrize("name", ["bert", "distilbert", "vit"])
def test_a02_the_count_does_not_depend_on_the_exporter(name: str) -> None:
    found = [check(tiny(name, attention, route), 2) for attention in ("eager", "sdpa") for route in ("ts17", "18")]
    for op in ("Attention", "LayerNormalization", "Gelu", "MatMul", "Erf"):
        assert len({f.get(op, 0) for f in found}) == 1, (op, found)


@pytest.mark.parametrize("route", ["18", "ts17"])
def test_a04_gpt2_keeps_its_gemms_flat(route: str) -> None:
    path = tiny("gpt2", "sdpa", route)
    check(path, 2)
    for node in graphopt.optimize(path, level=1).graph.graph:
        if node.op_type == "Gemm":
            assert node.inputs[0] is not None
            assert node.inputs[0].shape is not None
            assert len(node.inputs[0].shape) == 2


BLOCK = """
   <ir_version: 8, opset_import: ["" : 17]>
   g (float[B, S, 32] x) => (float[B, S, 32] y)
   <int64[4] s0 = {0, 0, %d, 8}, int64[4] sv = {0, 0, %d, %d}, int64[3] flat = {0, 0, %d}, float c = {2.828427}, float[1] unused = {0}> {
      q0 = MatMul(x, wq)
      k0 = MatMul(x, wk)
      v0 = MatMul(x, wv)
      q1 = Add(q0, bq)
      k1 = Add(k0, bq)
      q2 = Reshape(q1, s0)
      k2 = Reshape(k1, s0)
      v2 = Reshape(v0, sv)
      q = Transpose <perm = [0, 2, 1, 3]> (q2)
      k = Transpose <perm = [0, 2, 3, 1]> (k2)
      v = Transpose <perm = [0, 2, 1, 3]> (v2)
      s = MatMul(q, k)
      t = Div(s, c)
      p = Softmax <axis = -1> (t)
      o = MatMul(p, v)
      o1 = Transpose <perm = [0, 2, 1, 3]> (o)
      o2 = Reshape(o1, flat)
      y = MatMul(o2, wo)
   }
"""


def weights(inner: int, value: int) -> Feeds:
    rng = np.random.default_rng(0)
    shapes = {"wq": (32, inner), "wk": (32, inner), "wv": (32, value), "wo": (value, 32), "bq": (inner,)}
    return {k: rng.standard_normal(s, dtype=np.float32) / 4 for k, s in shapes.items()}


@pytest.mark.parametrize(("heads", "value_dim"), [(4, 8), (2, 8), (2, 16), (3, 8)])
def test_a23_a25_heads_and_widths_are_read_from_the_graph(heads: int, value_dim: int) -> None:
    model = parse(BLOCK % (heads, heads, value_dim, heads * value_dim), **weights(heads * 8, heads * value_dim))
    result = graphopt.optimize(model, level=1)
    (node,) = [n for n in result.graph.graph if n.op_type == "Attention"]
    assert node.attributes["q_num_heads"].as_int() == heads
    for size in ((2, 5), (3, 1)):
        x = np.random.default_rng(1).standard_normal((*size, 32), dtype=np.float32)
        assert_same(run(model, {"x": x}), run(result.model, {"x": x}))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("route", ["18", "ts17"])
def test_a27_grouped_query_attention(name: str, attention: str, route: str) -> None:
    path = tiny(name, attention, route)
    counts = check(path, 2)
    assert counts["RMSNormalization"] == (9 if name == "qwen3" else 5)
    assert counts["RotaryEmbedding"] == 4
    for node in graphopt.optimize(path, level=1).graph.graph:
        if node.op_type == "Attention":
            heads, dims = node.attributes.get("kv_num_heads"), node.inputs[1].shape if node.inputs[1] is not None else None
            assert dims is not None
            assert (heads.as_int() if heads is not None else dims[1]) == 2
            causal = node.attributes.get("is_causal")
            assert causal is None or not causal.as_int(), "the mask has holes: it is not only causal"


def test_j02_a_rotary_export_of_opset_23_runs_for_every_batch() -> None:
    """torch 2.13 writes caches of batch 1, which runtimes refuse; the door repairs it with a remark. The numbers are those of opset 18."""
    path = tiny("llama", "sdpa", "23")
    result = graphopt.optimize(path, level=1)
    for size in ((1, 7), (2, 9), (5, 6)):
        given = feeds(["input_ids"], *size)
        given["attention_mask"][:, :] = 1
        assert_same(run(tiny("llama", "sdpa", "18"), given), run(result.model, given), 1e-4)
    assert any("batch 1" in r["message"] for p in result.report.as_dict()["passes"] for r in p["remarks"])


def test_b03_the_fill_of_the_graph_is_kept() -> None:
    """Scores of up to 2e4: a fill of -1e4 would let a padded key win."""
    text = (
        BLOCK % (4, 4, 8, 32)
    ).replace("float[B, S, 32] x)", "float[B, S, 32] x, bool[B, 1, 1, S] keep)").replace("float c = {2.828427}", "float c = {0.001}, float z = {0}, float low = {-3.4028235e38}").replace(
        "p = Softmax <axis = -1> (t)", "m = Where(keep, z, low)\n      u = Add(t, m)\n      p = Softmax <axis = -1> (u)"
    )  # fmt: skip
    model = parse(text, **weights(32, 32))
    result = graphopt.optimize(model, level=1)
    assert [n.op_type for n in result.graph.graph].count("Attention") == 1
    rng = np.random.default_rng(3)
    for size in ((2, 6), (3, 4)):
        x = rng.standard_normal((*size, 32), dtype=np.float32)
        keep = rng.random((size[0], 1, 1, size[1])) < 0.5
        keep[..., 0] = True
        keep[-1] = False  # masked everywhere
        x[:, 1] *= 20  # a huge score, often padded
        assert_same(run(model, {"x": x, "keep": keep}), run(result.model, {"x": x, "keep": keep}), 2e-5)


PAST = """
   <ir_version: 8, opset_import: ["" : 17]>
   g (float[B, S, 16] x, float[B, 2, P, 8] past_k, float[B, 2, P, 8] past_v, float[B, T] mask)
     => (float[B, S, 16] y, float[B, 2, U, 8] present_k, float[B, 2, U, 8] present_v)
   <int64[4] s0 = {0, 0, 2, 8}, int64[3] flat = {0, 0, 16}, float c = {2.828427}, float one = {1}, float low = {-3.4028235e38}, int64[2] a = {1, 2}> {
      q0 = MatMul(x, wq)
      k0 = MatMul(x, wk)
      v0 = MatMul(x, wv)
      q1 = Reshape(q0, s0)
      k1 = Reshape(k0, s0)
      v1 = Reshape(v0, s0)
      q = Transpose <perm = [0, 2, 1, 3]> (q1)
      k2 = Transpose <perm = [0, 2, 1, 3]> (k1)
      v2 = Transpose <perm = [0, 2, 1, 3]> (v1)
      present_k = Concat <axis = 2> (past_k, k2)
      present_v = Concat <axis = 2> (past_v, v2)
      k = Transpose <perm = [0, 1, 3, 2]> (present_k)
      s = MatMul(q, k)
      t = Div(s, c)
      hidden = Sub(one, mask)
      m0 = Mul(hidden, low)
      m = Unsqueeze(m0, a)
      u = Add(t, m)
      p = Softmax <axis = -1> (u)
      o = MatMul(p, present_v)
      o1 = Transpose <perm = [0, 2, 1, 3]> (o)
      y = Reshape(o1, flat)
   }
"""


def test_b08_past_and_present() -> None:
    rng = np.random.default_rng(0)
    model = parse(PAST, **{k: rng.standard_normal((16, 16), dtype=np.float32) / 4 for k in ("wq", "wk", "wv")})
    result = graphopt.optimize(model, level=1)
    assert [n.op_type for n in result.graph.graph].count("Attention") == 1
    assert [v.name for v in result.graph.graph.outputs] == ["y", "present_k", "present_v"]
    for past, length in ((0, 3), (3, 1), (5, 2)):
        given = {
            "x": rng.standard_normal((2, length, 16), dtype=np.float32),
            "past_k": rng.standard_normal((2, 2, past, 8), dtype=np.float32),
            "past_v": rng.standard_normal((2, 2, past, 8), dtype=np.float32),
            "mask": np.ones((2, past + length), np.float32),
        }
        given["mask"][1, 0] = 0
        assert_same(run(model, given), run(result.model, given))
