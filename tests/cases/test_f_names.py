"""Cases F: names, initializers, inputs and outputs, metadata. Here: what loading and saving alone must keep."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from models import MINILM_ROUTES, Array, assert_same, minilm, parse, run, to_proto  # type: ignore[import-not-found]

from graphopt.graph.questions import is_constant
from graphopt.io.load import load
from graphopt.io.save import save

HEAD = '<ir_version: 8, opset_import: ["" : 17]> '
RNG = np.random.default_rng(0)


def normal(*shape: int) -> Array:
    return RNG.normal(size=shape).astype(np.float32)


def with_default(ir_version: int) -> onnx.ModelProto:
    """y = x + c + 2 c, where c has a default value."""
    proto = parse(f"""<ir_version: {ir_version}, opset_import: ["" : 8]> g (float[4] x, float[4] c) => (float[4] y) {{
      two = Constant <value: tensor = float[1] {{2.0}}> ()  d = Mul (c, two)  e = Add (x, c)  y = Add (e, d) }}""")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(4, np.float32), "c"))
    return proto


def test_f01_default_value_stays_overridable() -> None:
    proto = with_default(8)
    model = load(proto)
    out = to_proto(model)
    assert [i.name for i in out.graph.input] == ["x", "c"]
    assert [i.name for i in out.graph.initializer if i.name == "c"] == ["c"]
    assert not is_constant(model.graph.initializers["c"])
    for feeds in ({"x": normal(4)}, {"x": normal(4), "c": normal(4)}):
        assert_same(run(proto, feeds), run(out, feeds))


def test_f01_before_ir_4_every_weight_is_listed_and_none_is_meant() -> None:
    proto = with_default(3)
    model = load(proto)
    out = to_proto(model)
    assert [i.name for i in out.graph.input] == ["x"]
    assert is_constant(model.graph.initializers["c"])
    assert out.ir_version == 4
    feeds = {"x": normal(4)}
    assert_same(run(proto, feeds), run(out, feeds))


def test_f02_unused_inputs_stay_in_order() -> None:
    proto = parse(HEAD + "g (int64[N] token_type_ids, float[N,4] x, float[2,3] z) => (float[N,4] y, int64[2] s) { y = Relu (x)  s = Shape (z) }")
    out = to_proto(load(proto))
    assert list(out.graph.input) == list(proto.graph.input)


def test_f03_what_the_user_wrote_is_kept(tmp_path: Path) -> None:
    proto = parse(HEAD + "g (float[N,4] x) => (float[N,1] y) { r = Relu (x)  y = ReduceMean <axes = [1]> (r) }")
    proto.doc_string, proto.model_version, proto.producer_name, proto.producer_version, proto.domain = "model", 7, "me", "1.2", "org.me"
    proto.metadata_props.add(key="vocab", value="abc")
    proto.graph.doc_string = "graph"
    proto.graph.metadata_props.add(key="g", value="1")
    proto.graph.input[0].doc_string, proto.graph.output[0].doc_string = "in", "out"
    proto.graph.input[0].metadata_props.add(key="i", value="1")
    proto.graph.output[0].metadata_props.add(key="o", value="1")
    proto.graph.quantization_annotation.add(tensor_name="r").quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="s")
    for node in proto.graph.node:
        node.name, node.doc_string = f"n_{node.op_type}", f"does {node.op_type}"
        node.metadata_props.add(key="who", value=node.op_type)
    save(load(proto), tmp_path / "out.onnx")
    out = onnx.load(tmp_path / "out.onnx")
    for field in ("doc_string", "model_version", "producer_name", "producer_version", "domain", "metadata_props"):
        assert getattr(out, field) == getattr(proto, field), field
    for node in proto.graph.node:
        node.ClearField("domain")
    for field in ("name", "doc_string", "metadata_props", "input", "output", "quantization_annotation", "node"):
        assert getattr(out.graph, field) == getattr(proto.graph, field), field


def test_f06_node_names_are_not_value_names() -> None:
    proto = parse(
        HEAD
        + """g (float[2] x) => (float[2] y) {
      [Cast_9] v_cast = Cast <to = 1> (x)  [v_cast] e = Exp (v_cast)  [y] s = Sqrt (e)  [last] y = Neg (s) }"""
    )
    out = to_proto(load(proto))
    assert [(n.name, n.op_type, *n.output) for n in out.graph.node] == [(n.name, n.op_type, *n.output) for n in proto.graph.node]
    feeds = {"x": normal(2)}
    assert_same(run(proto, feeds), run(out, feeds))


def test_f07_readers_of_one_weight_keep_its_value() -> None:
    text = """g (float[N,4] x) => (float[N,4] a, float[N,4] b) <float[4,4] w> {
      wt = Transpose <perm = [1,0]> (w)  a = MatMul (x, wt)  b = MatMul (x, w) }"""
    proto = parse(HEAD + text, w=normal(4, 4))
    feeds = {"x": normal(3, 4)}
    assert_same(run(proto, feeds), run(to_proto(load(proto)), feeds))


@pytest.mark.parametrize("route", [MINILM_ROUTES[0], "sdpa_ts17"])
def test_f08_a_second_round_trip_changes_nothing(route: str, tmp_path: Path) -> None:
    """Once through memory and once through files, byte for byte."""
    once = to_proto(load(minilm(route)))
    assert to_proto(load(once)).SerializeToString(deterministic=True) == once.SerializeToString(deterministic=True)
    save(load(minilm(route)), tmp_path / "1.onnx")
    save(load(tmp_path / "1.onnx"), tmp_path / "2.onnx")
    assert (tmp_path / "1.onnx").read_bytes() == (tmp_path / "2.onnx").read_bytes()


def test_f10_order_and_types_of_the_interface() -> None:
    text = """g (int64[N] zeta, int32[N] ids, bool[N] mask, float[N] alpha) => (float[N] out_b, int32[N] out_a, bool[N] out_c) {
      f = Cast <to = 1> (zeta)  out_b = Add (f, alpha)  out_a = Neg (ids)  out_c = Not (mask) }"""
    proto = parse(HEAD + text)
    out = to_proto(load(proto))
    assert list(out.graph.input) == list(proto.graph.input)
    assert list(out.graph.output) == list(proto.graph.output)
