"""Shape inference says only what holds for every size: each case is one in which it once said more, and a pass believed it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from harness import build, check  # type: ignore[import-not-found]

import graphopt
from graphopt.graph.dims import extent
from graphopt.graph.questions import all_nodes

_END = 2**63 - 1


def ints(*values: int) -> Any:
    return np.array(values, np.int64)


def inferred(text: str, op_type: str, **weights: Any) -> list[str] | None:
    """The shape of the first output of the node of this type."""
    model = graphopt.load(build(text, weights))
    shape = next(n for n in all_nodes(model) if n.op_type == op_type).outputs[0].shape
    return None if shape is None else [str(d) for d in shape]


def value_of(dim: Any, size: int) -> int:
    return dim if isinstance(dim, int) else int(dim.evaluate({"s": size}))


# ---- Slice --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 2, 3, -1, -2])
def test_the_length_of_a_slice(step: int) -> None:
    ends = (0, 1, 2, 5, 512, 2**31 - 1, 2**62, _END, -1, -3, -512, -(2**63))
    for start, end in itertools.product((0, 1, 3, -1, -3, _END), ends):
        found = extent(ir.SymbolicDim("s"), start, end, step)
        for size in (1, 2, 3, 4, 5, 6, 511, 512, 513, 700):
            expected = len(range(size)[start:end:step])
            assert extent(size, start, end, step) == expected
            assert found is None or value_of(found, size) == expected, (start, end, str(found), size)


@pytest.mark.parametrize(
    ("bounds", "length"),
    [((0, 512), "Min(512, s)"), ((0, _END), "s"), ((0, 2**62), "s"), ((2, _END), "Max(0, s - 2)"), ((0, -3), "Max(0, s - 3)")],
)
def test_slices_that_stay_known(bounds: tuple[int, int], length: str) -> None:
    text = "g (float[s,4] x) => (float[?,?] y) { v = Slice (x, a, e, z)  y = Neg (v) }"
    assert inferred(text, "Slice", a=ints(bounds[0]), e=ints(bounds[1]), z=ints(0)) == [length, "4"]


@pytest.mark.parametrize("start", [-3, 0])
def test_slices_with_bounds_that_may_be_negative(start: int) -> None:
    text = """g (float[s,4] x) => (float[?,?] y) {
      n = Shape <start = 0, end = 1> (x)  e = Sub (n, k)  v = Slice (x, a, e, z)  y = Neg (v) }"""
    shape = inferred(text, "Slice", a=ints(start), k=ints(5), z=ints(0))
    assert shape is not None
    assert shape[1] == "4"
    assert "s" not in shape[0]


@pytest.mark.parametrize("end", [512, 2**62, 0, -2, 3])
def test_the_mean_over_the_first_rows(end: int) -> None:
    text = """g (float[s,4] x) => (float[?] y) {
      v = Slice (x, a, e, a)  t = ReduceSum <keepdims = 0> (v, a)  n = Shape <start = 0, end = 1> (v)  one = Max (n, k)
      f = Cast <to = 1> (one)  y = Div (t, f) }"""
    feeds = [{"x": np.ones((size, 4), np.float32)} for size in (1, 5, 600)]
    check(build(text, {"a": ints(0), "e": ints(end), "k": ints(1)}), "canonicalize", feeds=feeds)


# ---- Squeeze, If --------------------------------------------------------------------------------------------------------------------------


def feeds_of(*shapes: Sequence[int]) -> list[dict[str, Any]]:
    return [{"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)} for shape in shapes]


def test_squeeze_without_axes() -> None:
    text = "g (float[b,s,4] x) => (int64[?] n, float y) { z = Squeeze (x)  n = Shape (z)  y = ReduceSum <keepdims = 0> (z) }"
    assert inferred(text, "Squeeze") is None
    check(build(text), "canonicalize", feeds=feeds_of((1, 3, 4), (2, 1, 4), (1, 1, 4), (2, 3, 4)))
    assert inferred("g (float[1,3,1] x) => (float[3] y) { z = Squeeze (x)  y = Neg (z) }", "Squeeze") == ["3"]


def test_one_branch_without_a_shape() -> None:
    text = """g (float[b,4] x, bool c) => (int64[?] n) {
      y = If (c) <then_branch = t () => (float t1) { t1 = Squeeze (x) }, else_branch = e () => (float[b,4] e1) { e1 = Neg (x) }>  n = Shape (y) }"""
    proto = build(text)
    proto.graph.node[0].attribute[0].g.output[0].type.tensor_type.ClearField("shape")
    feeds = [{**feed, "c": np.array(flag)} for feed in feeds_of((1, 4), (2, 4)) for flag in (True, False)]
    check(proto, "canonicalize", feeds=feeds)


# ---- Loop, Scan ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("trips", [0, 1, 3])
def test_a_state_that_grows(trips: int, declared: bool) -> None:
    text = """g (float[1,4] x, bool c) => (float[?,?] y, int64[?] z, int64[?] n) <int64 trips, int64[1] l0 = {0}> {
      y, z = Loop (trips, c, x, l0) <body = b (int64 i, bool cc, float[?,?] st, int64[1] ln) => (bool co, float[?,?] so, int64[1] lo) {
        co = Identity (cc)  so = Concat <axis = 0> (st, st)  lo = Shape <start = 0, end = 1> (st) }>  n = Shape (y) }"""
    proto = build(text, {"trips": np.array(trips, np.int64)})
    if not declared:
        proto.graph.node[0].attribute[0].g.input[2].type.tensor_type.ClearField("shape")
    check(proto, "canonicalize", feeds=[{"x": np.ones((1, 4), np.float32), "c": np.array(True)}])


def test_a_state_that_changes_once_and_a_loop_that_ends_early() -> None:
    text = """g (float[1,4] x) => (float[?,?] y, int64[?] n, int64[?] m) <int64 trips, bool yes = {1}, int64 two = {2}, int64[2] to = {2,2}> {
      y, all = Loop (trips, yes, x) <body = b (int64 i, bool cc, float[?,?] st) => (bool co, float[2,2] so, float[?] e) {
        co = Less (i, two)  so = Reshape (st, to)  e = ReduceSum <keepdims = 0> (so, axis) }>  n = Shape (y)  m = Shape (all) }"""
    for trips in (0, 9):
        check(build(text, {"trips": np.array(trips, np.int64), "axis": ints(0)}), "canonicalize", feeds=feeds_of((1, 4)))


def test_a_state_that_keeps_its_declared_shape_is_known() -> None:
    text = """g (float[N,8] x) => (float[N,8] y) <int64 three = {3}, bool yes = {1}> {
      y = Loop (three, yes, x) <body = b (int64 i, bool c, float[N,8] st) => (bool c2, float[N,8] out) { c2 = Identity (c)  out = Relu (st) }> }"""
    assert inferred(text, "Loop") == ["N", "8"]


# ---- Cast, Einsum -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", [2, 3, 4, 5, 9, 1, 10])
def test_a_length_that_wraps_around(to: int) -> None:
    text = (
        f"g (float[s,4] x) => (int64 y) {{ n = Shape <start = 0, end = 1> (x)  h = Cast <to = {to}> (n)  m = Cast <to = 7> (h)  y = Squeeze (m, z) }}"
    )
    check(build(text, {"z": ints(0)}), "canonicalize", feeds=feeds_of((600, 4), (5, 4)))


@pytest.mark.parametrize(
    ("equation", "left", "right"),
    [("bqd,bkd->bqk", "b,q,d", "b,k,e"), ("bqd,bkd->bqk", "b,q,d", "c,k,d"), ("bd,bd->bd", "b,d", "c,d"), ("bd,bd->b", "b,d", "b,d")],
)
def test_an_index_that_is_1_in_one_operand(equation: str, left: str, right: str) -> None:
    """Einsum broadcasts it; a matrix product neither sums over it nor, as a batch, has it as its size."""
    text = f"""g (float[{left}] x, float[{right}] w) => (float y, int64[?] n) {{ e = Einsum <equation = "{equation}"> (x, w)  y = Neg (e)  n = Shape (e) }}"""
    proto = build(text)
    for shape in ("b", "c"):
        proto.graph.output[0].type.tensor_type.ClearField("shape")
        names = {"b": 1 if shape == "b" else 3, "c": 3 if shape == "b" else 1, "q": 2, "k": 5, "d": 4 if "e" not in right else 1, "e": 4}
        sizes = {key: names[key] for key in {*left, *right} - {","}}
        rng = np.random.default_rng(1)
        feed = {n: rng.standard_normal([sizes[k] for k in dims.split(",")]).astype(np.float32) for n, dims in (("x", left), ("w", right))}
        check(proto, "canonicalize", feeds=[feed], sizes=[dict.fromkeys(sizes, 3)])


def test_an_einsum_whose_sizes_agree_is_a_product() -> None:
    text = 'g (float[b,q,d] x, float[b,k,d] w) => (float[b,q,k] y) { y = Einsum <equation = "bqd,bkd->bqk"> (x, w) }'
    outcome = check(build(text), "canonicalize")
    assert (outcome.ops["MatMul"], outcome.ops["Einsum"]) == (1, 0)


def test_a_length_that_is_rounded_up() -> None:
    """onnx_ir writes `ceiling` and cannot read it: an attention behind such a pool failed."""
    text = """g (float[b,1,s,8] x) => (float[b,n,8] y) {
        p = AveragePool <ceil_mode = 1, kernel_shape = [2, 1], strides = [2, 1]> (x)
        q = Squeeze (p, z)
        t = Transpose <perm = [0, 2, 1]> (q)
        r = MatMul (q, t)
        m = Add (r, mask)
        w = Softmax <axis = -1> (m)
        y = MatMul (w, q)
    }"""
    weights = {"z": ints(1), "mask": np.zeros((1, 1, 1), np.float32)}
    assert inferred(text, "AveragePool", **weights) == ["b", "1", "floor(s/2 + 1/2)", "8"]
    outcome = check(build(text, weights), "canonicalize, fuse-attention", feeds=feeds_of((2, 1, 6, 8), (3, 1, 7, 8)))
    assert outcome.ops["Attention"] == 1
