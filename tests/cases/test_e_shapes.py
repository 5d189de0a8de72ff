"""Cases E: dynamic shapes, zero sizes, subgraphs, functions. Here: what loading and saving alone must get right."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import Array, assert_same, parse, run, to_proto  # type: ignore[import-not-found]

from graphopt.core.errors import LoadError
from graphopt.core.remarks import Remarks
from graphopt.graph.questions import all_nodes
from graphopt.io.bind_shapes import parse_shape
from graphopt.io.load import load

HEAD = '<ir_version: 8, opset_import: ["" : 17]> '
RNG = np.random.default_rng(0)


def normal(*shape: int) -> Array:
    return RNG.normal(size=shape).astype(np.float32)


def ops(model: ir.Model) -> list[str]:
    return [n.op_type for n in all_nodes(model)]


def check(proto: onnx.ModelProto, *feeds: dict[str, Any], remarks: Remarks | None = None) -> ir.Model:
    """The round trip is a valid model with the same interface and numbers; the runtime takes it with all its optimizations too."""
    from graphopt.run.ort import session

    model = load(proto, remarks=remarks)
    out = to_proto(model)
    onnx.checker.check_model(out, full_check=True)
    assert list(out.graph.input) == list(proto.graph.input)
    assert list(out.graph.output) == list(proto.graph.output)
    for feed in feeds:
        base = run(proto, feed)
        assert_same(base, run(out, feed))
        assert_same(base, session(out).run(feed))
    return model


def test_e01_sizes_of_the_example_are_not_baked() -> None:
    text = """g (float[b,s,32] x) => (float[b,8,s,4] y, float[s,32] p) <float[64,32] table> {
      shape = Shape (x)  zero = Constant <value_int: int = 0> ()  one = Constant <value_int: int = 1> ()
      b = Gather (shape, zero)  s = Gather (shape, one)  b1 = Unsqueeze (b, ax)  s1 = Unsqueeze (s, ax)
      ax = Constant <value_ints: ints = [0]> ()  h = Constant <value_ints: ints = [8]> ()  d = Constant <value_ints: ints = [4]> ()
      target = Concat <axis = 0> (b1, s1, h, d)  r = Reshape (x, target)  y = Transpose <perm = [0,2,1,3]> (r)  p = Slice (table, ax, s1, ax) }"""
    check(parse(HEAD + text, table=normal(64, 32)), *({"x": normal(*size, 32)} for size in ((1, 1), (3, 9), (2, 64))))


def test_e02_lying_value_info_is_dropped() -> None:
    text = """g (float[b,s,4] x, float[b,p,4] past) => (float[b,t,4] y) <float[b,s,4] r, float[b,s,4] k, float[b,s,4] k2, int64[1] one = {1}> {
      r = Relu (x)  m = ReduceMax <axes = [1], keepdims = 1> (r)  k = Concat <axis = 1> (past, x)  k2 = Mul (k, m)  y = Relu (k2) }"""
    remarks = Remarks()
    proto = parse(HEAD + text)
    feed = {"x": normal(1, 1, 4), "past": normal(1, 5, 4)}
    model = load(proto, remarks=remarks)
    assert {r.node for r in remarks} == {"k", "k2"}
    assert all(r.kind == "warning" and "[b,s,4]" in r.message for r in remarks)
    out = to_proto(model)
    shapes = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in out.graph.value_info}
    assert shapes["r"] == ["b", "s", 4]
    assert "k" not in shapes
    assert "k2" not in shapes
    truth = parse(HEAD + text)
    del truth.graph.value_info[:]
    assert_same(run(truth, feed), run(out, feed))


def test_e04_a_zero_in_a_reshape_copies_from_its_own_input() -> None:
    text = """g (float[2,3,4] x) => (float[4,6,1] y) <int64[3] a = {4,3,2}, int64[3] b = {0,6,-1}> { r = Reshape (x, a)  y = Reshape (r, b) }"""
    check(parse(HEAD + text), {"x": normal(2, 3, 4)})


# ---- E05: If ------------------------------------------------------------------------------------------------------------------------------


def test_e05_constant_condition() -> None:
    text = """g (float[N,2] x) => (float[N,2] y) <bool c = {1}> {
      y = If (c) <then_branch = t () => (float[N,2] p) <float[2] k = {1.0, 2.0}> { p = Add (x, k) },
                  else_branch = e () => (float[N,2] q) <float[2] k = {3.0, 4.0}> { q = Mul (x, k) }> }"""
    model = check(parse(HEAD + text), {"x": normal(3, 2)}, {"x": normal(1, 2)})
    assert ops(model) == ["Add"]


def test_e05_squeeze_as_torch_exports_it() -> None:
    """The condition follows from a static size, and the axes initializer lives in the branch."""
    text = """g (float[1,4] x) => (float[4] y) <int64 one = {1}> {
      s = Shape (x)  zero = Constant <value_int: int = 0> ()  d = Gather (s, zero)  c = Equal (d, one)
      y = If (c) <then_branch = t () => (float[4] p) <int64[1] axes = {0}> { p = Squeeze (x, axes) },
                  else_branch = e () => (float[1,4] q) { q = Identity (x) }> }"""
    model = check(parse(HEAD + text), {"x": normal(1, 4)})
    assert ops(model) == ["Squeeze"]


def test_e05_two_ifs_that_share_their_branches() -> None:
    text = """g (float[2] x) => (float[2] y) <bool c = {1}> {
      h = If (c) <then_branch = t () => (float[2] p) <float[2] k = {1.0, 2.0}> { p = Add (x, k) },
                  else_branch = e () => (float[2] q) <float[2] k = {3.0, 4.0}> { q = Mul (x, k) }>
      h2 = If (c) <then_branch = t () => (float[2] p) <float[2] k = {1.0, 2.0}> { p = Add (x, k) },
                  else_branch = e () => (float[2] q) <float[2] k = {3.0, 4.0}> { q = Mul (x, k) }>
      y = Sub (h2, h) }"""
    proto = parse(HEAD + text)
    assert ops(check(proto, {"x": normal(2)})) == ["Add", "Add", "Sub"]


def test_e05_condition_that_is_not_constant_keeps_both_branches() -> None:
    text = """g (bool c, float[2] x) => (float[2] y) {
      y = If (c) <then_branch = t () => (float[2] p) <float[2] k = {1.0, 2.0}> { p = Add (x, k) },
                  else_branch = e () => (float[2] q) <float[2] k = {3.0, 4.0}> { n = Constant <value: tensor = bool[1] {0}> ()
                    q = If (n) <then_branch = t2 () => (float[2] r) { r = Neg (x) }, else_branch = e2 () => (float[2] s) { s = Mul (x, k) }> }> }"""
    x = normal(2)
    model = check(parse(HEAD + text), {"c": np.array(True), "x": x}, {"c": np.array(False), "x": x})
    assert sorted(ops(model)) == ["Add", "If", "Mul"]


@pytest.mark.parametrize(
    "branch",
    ["p = Identity (x)", "p = Relu (x)  unused = Exp (x)"],
)
def test_e05_branch_that_returns_what_is_outside_or_several_values(branch: str) -> None:
    text = f"""g (float[2] x) => (float[2] y, float[2] z) <bool c = {{1}}> {{
      y, z = If (c) <then_branch = t () => (float[2] p, float[2] p2) {{ {branch}  p2 = Identity (p) }},
                     else_branch = e () => (float[2] q, float[2] q2) {{ q = Neg (x)  q2 = Exp (x) }}> }}"""
    proto = parse(HEAD + text)
    proto.graph.node[0].attribute[0].g.output[1].name = "p"  # one value for both outputs
    del proto.graph.node[0].attribute[0].g.node[-1:]
    model = load(proto)
    x = normal(2)
    expected = x if "Identity" in branch else np.maximum(x, 0)
    assert_same({"y": expected, "z": expected}, run(to_proto(model), {"x": x}))


# ---- E06: functions -----------------------------------------------------------------------------------------------------------------------

FUNCTIONS = """<ir_version: 8, opset_import: ["" : 17, "my" : 1, "unused" : 3]>
g (float[N,4] x) => (float[N,4] y, float[N,4] z) <float[4,4] w, float[4,4] v> {
  a = my.Lin (x, w)  b = my.Lin (a, v)  c = my.Outer <scale = 2.0> (b)  d = my.Outer (c)  y = my.F (d)  z = my.Same (x)
}
<domain: "my", opset_import: ["" : 16]> F (a) => (r) { one = Constant <value_float: float = 1.0> ()  c = CastLike (one, a)  r = Sub (c, a) }
<domain: "my", opset_import: ["" : 17]> Lin (a, w) => (r) { r = MatMul (a, w) }
<domain: "my", opset_import: ["" : 12]> Old (a) => (r) { m = ReduceMean <axes = [-1]> (a)  r = Sub (a, m) }
<domain: "my", opset_import: ["" : 17, "my" : 1]> Outer <scale: float = 3.0> (a) => (r) {
  s = Constant <value_float: float = @scale> ()  h = my.Old (a)  r = Mul (h, s) }
<domain: "my", opset_import: ["" : 17]> Same (a) => (a) { }
"""


def test_e06_functions_are_inlined() -> None:
    """Called twice with two weights, nested, with an attribute and its default, with other opsets, and one that returns its input."""
    proto = parse(FUNCTIONS.replace("Same (a) => (a) { }", "Same (a) => (r) { r = Identity (a) }"), w=normal(4, 4), v=normal(4, 4))
    before = proto.SerializeToString(deterministic=True)
    model = check(proto, {"x": normal(2, 4)}, {"x": normal(1, 4)})
    assert proto.SerializeToString(deterministic=True) == before
    assert not model.functions
    assert ops(model).count("MatMul") == 2
    assert ops(model).count("ReduceMean") == 2
    out = to_proto(model)
    assert [(o.domain, o.version) for o in out.opset_import] == [("", 17)]
    assert not out.functions


def test_e06_a_function_that_returns_its_input() -> None:
    proto = parse(FUNCTIONS, w=normal(4, 4), v=normal(4, 4))
    x = normal(2, 4)
    out = to_proto(load(proto))
    assert [i.name for i in out.graph.input] == ["x"]
    assert_same({"z": x}, {"z": run(out, {"x": x})["z"]})


# ---- E09: input shapes --------------------------------------------------------------------------------------------------------------------

SUM = HEAD + "g (float[b,4] x, float[b,4] z) => (float[b,4] y) { y = Add (x, z) }"


def dims(values: Any) -> list[str]:
    return [str(v.shape) for v in values]


@pytest.mark.parametrize("shape", ["x:0,4", "x:-1,4", "x:b,4", "x:b,0"])
def test_e09_a_size_below_one_keeps_the_symbol(shape: str) -> None:
    proto = to_proto(load(parse(SUM), input_shapes=dict([parse_shape(shape)])))
    dim = proto.graph.input[0].type.tensor_type.shape.dim
    assert (dim[0].WhichOneof("value"), dim[0].dim_param, dim[1].dim_value) == ("dim_param", "b", 4)


def test_e09_a_size_binds_its_symbol_everywhere() -> None:
    fixed = load(parse(SUM), input_shapes=dict([parse_shape("x:8,4")])).graph
    assert dims((*fixed.inputs, *fixed.outputs)) == ["[8,4]"] * 3
    renamed = load(parse(SUM), input_shapes=dict([parse_shape("x:n,4")])).graph
    assert dims((*renamed.inputs, *renamed.outputs)) == ["[n,4]"] * 3


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (["nope:1,4"], "no input `nope`.*inputs: x, z"),
        (["x:1,4,4"], "has 2 axes.*not 3"),
        (["x:1"], "has 2 axes.*not 1"),
        (["x:1,5"], "axis 1.*fixed at 4"),
        (["x:1,4", "z:2,4"], "cannot be both 1 and 2"),
        (["x"], "no input shape"),
        (["x:1,"], "no input shape"),
    ],
)
def test_e09_wrong_shapes(shapes: list[str], message: str) -> None:
    with pytest.raises(LoadError, match=message) as caught:
        load(parse(SUM), input_shapes=dict(map(parse_shape, shapes)))
    assert "\n" not in str(caught.value)


# ---- E10, E12 -----------------------------------------------------------------------------------------------------------------------------


def test_e10_loop_with_a_captured_weight() -> None:
    text = """g (float[N,8] x) => (float[N,8] y) <float[8,8] w, int64 three = {3}, bool yes = {1}> {
      y = Loop (three, yes, x) <body = b (int64 i, bool c, float[N,8] st) => (bool c2, float[N,8] out) {
        c2 = Identity (c)  m = MatMul (st, w)  g = Constant <value_float: float = 0.5> ()  h = Mul (m, g)  out = Relu (h) }> }"""
    model = check(parse(HEAD + text, w=normal(8, 8)), {"x": normal(2, 8)}, {"x": normal(5, 8)})
    assert "w" in model.graph.initializers
    assert ops(model) == ["Loop", "Identity", "MatMul", "Mul", "Relu"]


def test_e10_scan() -> None:
    text = """g (float[N,8] x, float[T,N,8] xs) => (float[N,8] y, float[T,N,8] ys) <float[8,8] w> {
      y, ys = Scan <num_scan_inputs = 1, body = b (float[N,8] st, float[N,8] e) => (float[N,8] out, float[N,8] e2) {
        m = MatMul (st, w)  s = Add (m, e)  out = Tanh (s)  e2 = Identity (out) }> (x, xs) }"""
    check(parse(HEAD + text, w=normal(8, 8)), {"x": normal(2, 8), "xs": normal(3, 2, 8)}, {"x": normal(1, 8), "xs": normal(1, 1, 8)})


def test_e10_body_that_needs_conversion() -> None:
    """A body at opset 12: its reductions are respelled inside."""
    text = """<ir_version: 7, opset_import: ["" : 12]> g (float[N,8] x) => (float[N,8] y) <int64 three = {3}, bool yes = {1}> {
      y = Loop (three, yes, x) <body = b (int64 i, bool c, float[N,8] st) => (bool c2, float[N,8] out) {
        c2 = Identity (c)  m = ReduceSum <axes = [-1]> (st)  out = Sub (st, m) }> }"""
    model = check(parse(text), {"x": normal(2, 8)})
    assert to_proto(model).opset_import[0].version == 12


def test_e12_empty_parts() -> None:
    text = """g (float[N,32] x) => (float[M,32] y, float[N,32] z) <float[0,32] e, int64[1] two = {2}, int64[1] zero = {0}> {
      cut = Slice (x, two, two, zero)  y = Concat <axis = 0> (e, x, cut)  z = Concat <axis = 0> (x) }"""
    check(parse(HEAD + text, e=normal(0, 32)), {"x": normal(3, 32)}, {"x": normal(0, 32)})
