"""What fuzzing found, each as the smallest input that shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from harness import build, check  # type: ignore[import-not-found]

import graphopt
from graphopt.core.errors import GraphoptError, LoadError
from graphopt.graph.text import graph_text

SUM = "(float[B,4] x) => (float[B,4] y) <float[4] w> { y = Add(x, w) }"


def refused(model: onnx.ModelProto | bytes, tmp_path: Path) -> str:
    """The one line with which a file is refused."""
    path = tmp_path / "m.onnx"
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    with pytest.raises(LoadError) as raised:
        graphopt.load(path)
    text = str(raised.value)
    assert "\n" not in text
    return text


# ---- the door -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ("y = If()", "needs the attribute `"),
        ("y = Softmax(x, x)", "does not take 2 inputs"),
        ("y = Softmax<axes = 1>(x)", "has no attribute `axes`"),
        ("y = Softmax<axis = [1]>(x)", "wants the attribute `axis` as INT, found INTS"),
        ("y = Cast(x)", "needs the attribute `to`"),
    ],
)
def test_a_node_that_no_runtime_takes_is_refused(nodes: str, reason: str, tmp_path: Path) -> None:
    """It ended in KeyError, IndexError or TypeError wherever the attribute was read first."""
    text = refused(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 23]> g (float[B,4] x) => (float[B,4] y) {{ {nodes} }}'), tmp_path)
    assert reason in text


def test_a_body_of_another_arity_than_its_node_is_refused(tmp_path: Path) -> None:
    """A decided If was spliced by pairing its outputs with those of the branch: ValueError of zip."""
    model = build(
        "(float[B,4] x) => (float[B,4] y) <bool c = {1}> { y = If(c) <then_branch = t () => (float[B,4] a) { a = Neg(x) }, else_branch = e () => (float[B,4] b) { b = Abs(x) }> }"
    )
    del model.graph.node[0].attribute[1].g.output[:]
    assert "0 outputs instead of 0 and 1" in refused(model, tmp_path)


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    """protobuf reads such a name as bytes, and serializing it again failed deep inside."""
    assert "is not UTF-8" in refused(build(SUM).SerializeToString().replace(b"Add", b"A\xffd"), tmp_path)


def test_a_description_that_is_no_text_is_read(tmp_path: Path) -> None:
    model = build(SUM)
    model.doc_string = "made by Mueller"
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString().replace(b"Mueller", b"M\xfcller "))
    graphopt.optimize(path).save(tmp_path / "out.onnx")


@pytest.mark.parametrize("domain", ["", "ai.onnx.ml"])
def test_an_attribute_without_a_type_is_refused(domain: str, tmp_path: Path) -> None:
    """It could be read, and not be written again: SerdeError."""
    model = build(SUM)
    node = model.graph.node[0]
    node.domain = domain
    node.attribute.add(name="axis")
    assert "the attribute 'axis' has no type" in refused(model, tmp_path)


def test_a_line_break_in_a_name_stays_one_line(tmp_path: Path) -> None:
    model = build(SUM)
    model.graph.output[0].name = "y\n\n"
    assert "nothing makes the output `y\\n\\n`" in refused(model, tmp_path)


@pytest.mark.parametrize("dims", [[8], [4, 2], [-4], []])
def test_a_weight_of_another_size_than_its_shape_is_refused(dims: list[int], tmp_path: Path) -> None:
    """It was a ValueError of whoever read the weight first."""
    model = build(SUM)
    model.graph.initializer[0].dims[:] = dims
    assert "`w`" in refused(model, tmp_path)


# ---- folding ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "(float[B] x) => (int64 y) <int64 zero = {0}> { y = Div(zero, zero) }",  # was 1, as a / a
        "(float[B] x) => (int64[2] y) <int64[2] a = {3, 4}, int64[2] b = {1, 0}> { y = Mod(a, b) }",
        "(float[B] x) => (int32 y) <float big = {1e30}> { y = Cast<to = 6>(big) }",
        "(float[B] x) => (uint8 y) <float less = {-1}> { y = Cast<to = 2>(less) }",
    ],
)
def test_what_onnx_does_not_define_is_not_folded(text: str) -> None:
    """Each runtime gives a number of its own; that of the one that runs the model stays."""
    model = graphopt.load(build(text))
    assert not graphopt.optimize(model, "canonicalize", promise=False).report.passes[1].changes


# ---- a second run -------------------------------------------------------------------------------------------------------------------------


def twice(model: Any, tmp_path: Path, **options: Any) -> None:
    """A second run over the artifact finds nothing to do."""
    first, second = tmp_path / "1.onnx", tmp_path / "2.onnx"
    graphopt.optimize(model, promise=False, **options).save(first)
    result = graphopt.optimize(first, promise=False, **options)
    result.save(second)
    changed = [(r.name, r.changes) for r in result.report.passes if r.changes]
    assert first.read_bytes() == second.read_bytes(), f"{changed}\n{graph_text(result.model)}"


def test_a_mask_that_the_door_mended_is_not_mended_again(tmp_path: Path) -> None:
    mask = "(float[B,S,8] q, float[B,S,8] k, float[B,S,8] v, float[B,1,S,S] m) => (float[B,S,8] y) { y = Attention<q_num_heads = 2, kv_num_heads = 2>(q, k, v, m) }"
    twice(build(mask), tmp_path, level=0)
    twice(build(mask), tmp_path, level=1, target="cpu{tune=off}")


def test_a_bias_with_a_factor_is_stored_as_it_is_added(tmp_path: Path) -> None:
    text = """(float[B,64] x) => (float[B,8] y) <int8[8,64] codes, float[8] scale = {1, 2, 3, 4, 5, 6, 7, 8}, float[8] bias> {
      w = DequantizeLinear<axis = 0>(codes, scale)  y = Gemm<transB = 1, beta = 2.0>(x, w, bias) }"""
    twice(build(text), tmp_path, level=1, target="cpu{tune=off}")


def test_a_table_that_is_only_looked_up_is_stored_as_rows(tmp_path: Path) -> None:
    text = """(int64[B,S] ids) => (float[B,S,32] y) <int4[64,32] codes, float[64,2] scale> {
      t = DequantizeLinear<axis = 1, block_size = 16>(codes, scale)  y = Gather(t, ids) }"""
    twice(build(text), tmp_path, level=1, target="cpu{tune=off}")


def test_a_mask_that_fusion_raised_is_not_raised_by_the_door(tmp_path: Path) -> None:
    """Max(mask, -1e30) holds nothing below, whatever constants stand behind it."""
    text = """(float[B,S,8] q, float[B,S,8] k, float[B,S,8] v, float[B,1,1,S] m) => (float[B,S,8] y)
    <int64[4] apart = {0, 0, 2, 4}, int64[3] together = {0, 0, 8}, float one = {1}, float low = {-3.4028235e38}, float scale = {0.5}> {
      q4 = Reshape(q, apart)  q1 = Transpose<perm = [0, 2, 1, 3]>(q4)  k4 = Reshape(k, apart)  k1 = Transpose<perm = [0, 2, 3, 1]>(k4)
      v4 = Reshape(v, apart)  v1 = Transpose<perm = [0, 2, 1, 3]>(v4)  i = Sub(one, m)  f = Mul(i, low)  s = MatMul(q1, k1)  c = Mul(s, scale)
      a = Add(c, f)  p = Softmax<axis = -1>(a)  o = MatMul(p, v1)  t = Transpose<perm = [0, 2, 1, 3]>(o)  y = Reshape(t, together) }"""
    twice(build(text), tmp_path, level=1, target="cpu{tune=off}")


# ---- checks -------------------------------------------------------------------------------------------------------------------------------


def test_no_feed_of_a_size_that_only_the_file_says_is_made_up() -> None:
    """A declared size of two billion was a MemoryError of numpy."""
    model = build(SUM.replace("float[B,4] x", "float[2147483648,4] x").replace("[B,4] y", "[2147483648,4] y"))
    with pytest.raises(GraphoptError, match="too many numbers to make up"):
        graphopt.optimize(model, "canonicalize", check_numerics=True, promise=False)


def test_numbers_in_half_precision_are_checked_as_such() -> None:
    """Fused or not, a Gelu in float16 has its rounding also where the output is cast to float32."""
    text = """(float[B,8] x) => (float[B,8] y) <float s = {0.70710678}, float one = {1}, float half = {0.5}> {
      a = Mul(x, s)  e = Erf(a)  b = Add(e, one)  c = Mul(x, b)  y = Mul(c, half) }"""
    samples = [{"x": np.linspace(-3, 3, 8 * n, dtype=np.float32).reshape(n, 8)} for n in (3, 5)]
    result = graphopt.optimize(build(text), "to-half, fuse-activation", samples=samples, check_numerics=True, promise=False)
    assert any(n.op_type == "Gelu" for n in result.graph.graph)
    check(build(text), "fuse-activation")
