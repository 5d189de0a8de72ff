"""Lifting to the working opset keeps the numbers, and lowering brings the input's own opset back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import Array, assert_same, parse, run, to_proto  # type: ignore[import-not-found]
from onnx import TensorProto, helper, numpy_helper

import graphopt
from graphopt.core.errors import LoadError, TargetError
from graphopt.graph.opset.node_form import WORKING
from graphopt.graph.opset.versions import lower
from graphopt.graph.verify import verify
from graphopt.io.load import load
from graphopt.io.save import finish
from graphopt.report.inspection import inspect

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 3, 4)).astype(np.float32)
IMAGE = RNG.normal(size=(1, 2, 4, 4)).astype(np.float32)


def one_node(
    op: str, version: int, x: Array = X, constants: Mapping[str, Array] | None = None, outputs: int = 1, **attributes: Any
) -> onnx.ModelProto:
    constants = constants or {}
    node = helper.make_node(op, ["x", *constants], [f"y{k}" for k in range(outputs)], name="n", **attributes)
    dims: list[int | str] = ["N", *x.shape[1:]]
    infos = [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in node.output]
    for info in infos:
        info.ClearField("type")
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(x.dtype), dims)], infos,
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)], ir_version=4)
    return onnx.shape_inference.infer_shapes(model)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


CASES: dict[str, onnx.ModelProto] = {
    "ReduceMean-17": one_node("ReduceMean", 17, axes=[-1], keepdims=1),
    "ReduceMean-9": one_node("ReduceMean", 9, axes=[1, 2], keepdims=0),
    "ReduceMax-12 of all": one_node("ReduceMax", 12, keepdims=0),
    "ReduceSum-12": one_node("ReduceSum", 12, axes=[1], keepdims=0),
    "Softmax-11 flattens": one_node("Softmax", 11, axis=1),
    "Softmax-11 of one axis": one_node("Softmax", 11, axis=2),
    "Softmax-9 by default": one_node("Softmax", 9),
    "LogSoftmax-12": one_node("LogSoftmax", 12, axis=-1),
    "Clip-6": one_node("Clip", 10, min=-0.5, max=0.5),
    "Clip-6 of one side": one_node("Clip", 9, max=0.5),
    "Dropout-10": one_node("Dropout", 10, ratio=0.3),
    "Slice-9": one_node("Slice", 9, starts=[0, 1], ends=[1, 3], axes=[1, 2]),
    "TopK-9": one_node("TopK", 9, outputs=2, k=2, axis=2),
    "TopK-10": one_node("TopK", 10, constants={"k": ints(2)}, outputs=2),
    "Split-12 by sizes": one_node("Split", 12, outputs=2, axis=2, split=[1, 3]),
    "Split-12 in equal parts": one_node("Split", 12, outputs=2, axis=2),
    "Split-13": one_node("Split", 13, outputs=2, axis=-1),
    "Unsqueeze-12": one_node("Unsqueeze", 12, axes=[0, -1]),
    "Unsqueeze-9": one_node("Unsqueeze", 9, axes=[0, 4]),
    "Squeeze-12": one_node("Squeeze", 12, x=X[:, :1], axes=[1]),
    "Pad-10": one_node("Pad", 10, pads=[0, 0, 0, 0, 1, 2], value=1.5),
    "Resize-10 linear": one_node("Resize", 10, x=IMAGE, constants={"s": np.array([1, 1, 2, 2], np.float32)}, mode="linear"),
    "Resize-10 nearest": one_node("Resize", 10, x=IMAGE, constants={"s": np.array([1, 1, 1.5, 2.5], np.float32)}, mode="nearest"),
    "Upsample-9": one_node("Upsample", 9, x=IMAGE, constants={"s": np.array([1, 1, 2, 2], np.float32)}, mode="linear"),
    "BatchNormalization-9": one_node("BatchNormalization", 9, x=IMAGE, constants={k: np.array([1.5, 0.5], np.float32) for k in "sbmv"}),
    "Gemm-9": one_node("Gemm", 9, x=X[0], constants={"w": X[1].T.copy(), "b": np.ones(3, np.float32)}),
    "ArgMax-11": one_node("ArgMax", 11, axis=-1),
    "Cast-9": one_node("Cast", 9, to=TensorProto.INT32),
    "Gelu-20": one_node("Gelu", 20),
    "Reshape-13": one_node("Reshape", 13, constants={"s": ints(0, -1)}),
    "Flatten-9": one_node("Flatten", 9, axis=2),
    "QuantizeLinear-10": one_node("QuantizeLinear", 10, constants={"s": np.array(0.1, np.float32), "z": np.array(3, np.uint8)}),
    "Pow-7": one_node("Pow", 7, constants={"e": np.array(2, np.float32)}),
}
RISES = {"Resize-10 linear": 11, "Resize-10 nearest": 11, "Upsample-9": 11}  # the old operators said it otherwise; the new ones came with 11


@pytest.mark.parametrize("name", CASES)
def test_up_and_down_again(name: str) -> None:
    proto = CASES[name]
    model = load(proto)
    assert model.opset_imports[""] == WORKING
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    x = IMAGE if proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value == 2 else X
    x = x[0] if name.startswith("Gemm") else x[:, :1] if name.startswith("Squeeze") else x
    lowered = to_proto(model)
    onnx.checker.check_model(lowered, full_check=True)
    assert lowered.opset_import[0].version == RISES.get(name, proto.opset_import[0].version)
    for feed in (x, x[:1]):
        base = run(proto, {"x": feed})
        assert_same(base, run(ir.to_proto(model), {"x": feed}))
        assert_same(base, run(lowered, {"x": feed}))


def test_lifting_keeps_node_fields() -> None:
    proto = one_node("ReduceMean", 17, axes=[-1])
    proto.graph.node[0].doc_string = "why"
    proto.graph.node[0].metadata_props.add(key="k", value="v")
    (node,) = load(proto).graph
    assert (node.name, node.doc_string, node.metadata_props["k"]) == ("n", "why", "v")


def test_equal_new_constants_are_stored_once() -> None:
    text = "".join(f"a{k + 1} = ReduceMean <axes = [-1]> (a{k}) " for k in range(5))
    model = load(parse(f'<ir_version: 8, opset_import: ["" : 17]> g (float[2,3] a0) => (float[2,1] a5) {{ {text} }}'))
    assert len(model.graph.initializers) == 1


@pytest.mark.parametrize(
    ("proto", "message"),
    [
        (
            one_node("GroupNormalization", 18, x=IMAGE, constants={k: np.ones(1, np.float32) for k in "sb"}, num_groups=1),
            "per group before opset 21",
        ),
    ],
)
def test_what_has_no_spelling_is_refused_with_its_reason(proto: onnx.ModelProto, message: str) -> None:
    with pytest.raises(LoadError, match=message) as caught:
        load(proto)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", [24, 25, 26, 27, 28])
def test_newer_opsets_come_down_and_go_back_up(version: int) -> None:
    proto = parse(f"""<ir_version: 11, opset_import: ["" : {version}]> g (float[N,2,4,8] q) => (float[N,2,4,8] y, int64[4] s) {{
      a = Attention (q, q, q)  b = Cast <to = 1> (a)  y = Relu (b)  s = Shape (b) }}""")
    model = load(proto)
    assert model.opset_imports[""] == WORKING
    lowered = to_proto(model)
    assert lowered.opset_import[0].version == version
    onnx.checker.check_model(lowered, full_check=True)


def test_softmax_of_unknown_rank_before_13_is_refused() -> None:
    proto = one_node("Softmax", 11, axis=1)
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(LoadError, match="rank of its input"):
        load(proto)


# ---- lowering -----------------------------------------------------------------------------------------------------------------------------


def graph_at(version: int, body: str, head: str = "float[N,4] x) => (float[N,4] y)") -> ir.Model:
    return load(parse(f'<ir_version: 8, opset_import: ["" : {version}]> g ({head} {{ {body} }}'))


def test_a_new_operator_raises_the_opset_and_is_blamed() -> None:
    model = graph_at(12, "[r] h = ReduceSum <axes = [1]> (x)  [a] y = Add (x, h)")
    node = next(n for n in model.graph if n.op_type == "Add")
    node.op_type = "Gelu"
    node.resize_inputs(1)
    copy, rises = finish(model)
    assert copy.opset_imports[""] == 20
    (rise,) = rises
    assert (rise.what, rise.before, rise.after) == ("opset", 12, 20)
    assert "node `a`" in rise.reason
    assert "no `Gelu`" in rise.reason
    assert model.opset_imports[""] == WORKING, "the model itself stays as it is"


def test_a_type_can_raise_the_opset() -> None:
    """Add takes int8 since opset 14 only: a change of types, with no other difference in the schema."""
    model = graph_at(13, "y = Add (x, x)", head="float[N] x) => (float[N] y)")
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.type = ir.TensorType(ir.DataType.INT8)
    copy, rises = finish(model)
    assert copy.opset_imports[""] == 14
    assert "int8" in rises[0].reason


def test_a_ceiling_below_the_input_respells_or_refuses() -> None:
    model = graph_at(18, "a = Constant <value_ints: ints = [1]> ()  [m] y = ReduceMean (x, a)", head="float[N,4] x) => (float[N,1] y)")
    copy, rises = finish(model, opset=17)
    assert copy.opset_imports[""] == 17
    assert not rises
    assert not copy.graph.initializers, "the axes are an attribute there"
    onnx.checker.check_model(ir.to_proto(copy), full_check=True)
    gelu = graph_at(20, "[g] y = Gelu (x)")
    with pytest.raises(TargetError, match=r"cannot write opset 17: node `g`: opset 17 has no `Gelu`"):
        finish(gelu, opset=17)
    with pytest.raises(TargetError, match="too old"):
        finish(gelu, opset=6)


@pytest.mark.parametrize(
    ("body", "opset", "reason"),
    [
        ("t = Relu (x)  y = Softmax <axis = 0> (t)", 13, "means something else before opset 13"),
        ("m = Max (x, c)  y = Relu (m)", 8, "means something else before opset 8"),
        ("y = Concat <axis = -2> (x, x)", 7, ""),
    ],
)
def test_changes_of_meaning_that_schemas_do_not_show(body: str, opset: int, reason: str) -> None:
    model = graph_at(13, "c = Constant <value_float: float = 1.0> () " + body)
    rises = lower(model, 7, ir_floor=4)
    assert model.opset_imports[""] == opset
    assert not reason or reason in rises[0].reason
    if "Concat" in body:
        assert next(n for n in model.graph if n.op_type == "Concat").attributes["axis"].as_int() == 0


def test_uneven_split_needs_18() -> None:
    model = graph_at(18, "y, z = Split <axis = 1, num_outputs = 2> (x)", head="float[N,5] x) => (float[N,3] y, float[N,2] z)")
    assert lower(model, 13, ir_floor=8)[0].after == 18
    even = graph_at(18, "y, z = Split <axis = 1, num_outputs = 2> (x)", head="float[N,4] x) => (float[N,2] y, float[N,2] z)")
    assert not lower(even, 13, ir_floor=8)


def test_ir_version_rises_for_types_and_free_initializers() -> None:
    model = graph_at(21, "c = Constant <value: tensor = int64[1] {1}> ()  d = Cast <to = 1> (c)  y = Add (x, d)")
    model.graph.initializers["c"].const_value = ir.Tensor(np.array([1], ir.DataType.INT4.numpy()), dtype=ir.DataType.INT4, name="c")
    model.graph.initializers["c"].type = ir.TensorType(ir.DataType.INT4)
    (rise,) = lower(model, 21, ir_floor=8)
    assert (rise.what, rise.before, rise.after) == ("ir_version", 8, 10)
    assert "int4" in rise.reason
    plain = graph_at(13, "c = Constant <value_float: float = 1.0> ()  y = Add (x, c)")
    (rise,) = lower(plain, 13, ir_floor=3)
    assert (rise.before, rise.after, rise.reason) == (3, 4, "initializers that are not graph inputs")


# ---- newer files (kind 8) ------------------------------------------------------------------------------------------------------------------------

NEWER = """<ir_version: 11, opset_import: ["" : %d]> g (float[B,S,8] x) => (float[B,S,8] y) <float[8] scale, float[8,8] w> {
  axis = Constant <value_ints: ints = [-1]> ()  eps = Constant <value_float: float = 0.00001> ()  sq = Mul (x, x)  m = ReduceMean <keepdims = 1> (sq, axis)  e = Add (m, eps)  d = Sqrt (e)  n = Div (x, d)  h = Mul (n, scale)  i = Identity (h)
  %s  r = Add (a, x)  y = MatMul (r, w)
}"""
ISLANDS = {
    "Swish": (24, "a = Swish (i)"),
    "BitCast": (26, "q = BitCast <to = 6> (i)  a = BitCast <to = 1> (q)"),
    "CumProd": (26, "last = Constant <value_int: int = 1> ()  a = CumProd (i, last)"),
    "Attention": (25, "a = Attention <q_num_heads = 2, kv_num_heads = 2, left_window_size = 2> (i, i, i)"),
    "nonpad": (24, "b = Shape <start = 0, end = 1> (i)  s = Shape <start = 1, end = 2> (i)  k = Expand (s, b)  a = Attention <q_num_heads = 2, kv_num_heads = 2> (i, i, i, , , , k)"),
}  # fmt: skip


@pytest.mark.parametrize("name", ISLANDS)
@pytest.mark.parametrize("pipeline", [None, "canonicalize, fuse-norm, fuse-attention, quantize"])
def test_one_newer_node_is_an_island(name: str, pipeline: str | None, tmp_path: Path) -> None:
    """The file goes through at its own opset, the rest is optimized, and the node stays as it is, and is named."""
    from graphopt.run.reference import session

    version, node = ISLANDS[name]
    proto, out = (
        parse(NEWER % (version, node), scale=RNG.normal(size=8).astype(np.float32), w=RNG.normal(size=(8, 8)).astype(np.float32)),
        tmp_path / "out.onnx",
    )
    verify(load(proto))
    result = graphopt.optimize(proto, pipeline, level=1, target="cpu{vendor=false}", promise=False, verify_each=True)
    result.save(out)
    told = [r.message for record in result.report.passes for r in record.remarks]
    assert any(f"has no form at opset {WORKING}" in text and f"stays at opset {version}" in text for text in told)
    written = onnx.load(out)
    assert [(o.domain, o.version) for o in written.opset_import if not o.domain] == [("", version)]
    assert {n.op_type for n in written.graph.node} >= {"RMSNormalization"}, "the rest is optimized"
    assert not {n.domain for n in written.graph.node if "newer" in n.domain}
    kept = next(n for n in proto.graph.node if n.output[0] == "a")
    assert [n.attribute for n in written.graph.node if n.op_type == kept.op_type][-1:] == [kept.attribute]
    for size in ((2, 5), (1, 3)):
        feed = {"x": RNG.normal(size=(*size, 8)).astype(np.float32)}
        assert_same(session(proto).run(feed), session(written).run(feed), 1e-5 if pipeline is None else 0.1)
    inspect(proto)


def test_an_island_below_its_opset_is_refused_by_name(tmp_path: Path) -> None:
    proto = parse(NEWER % ISLANDS["Swish"], scale=np.ones(8, np.float32), w=np.eye(8, dtype=np.float32))
    with pytest.raises(TargetError, match="cannot write opset 20: node `Swish`: opset 20 has no `Swish`"):
        finish(load(proto), opset=20)


# ---- sparse tensors (kind 8) --------------------------------------------------------------------------------------------------------------------


def sparse(values: Any, indices: Any, dims: list[int], name: str = "w") -> onnx.SparseTensorProto:
    stored = onnx.numpy_helper.from_array(np.array(values, np.float32), name)
    return onnx.helper.make_sparse_tensor(stored, onnx.numpy_helper.from_array(np.array(indices, np.int64), "indices"), dims)


def sparse_model(tensor: onnx.SparseTensorProto) -> onnx.ModelProto:
    proto = parse('<ir_version: 8, opset_import: ["" : 17]> g (float[n,4] x) => (float[n,3] y) { i = Identity (x)  h = MatMul (i, w)  y = Relu (h) }')
    proto.graph.sparse_initializer.append(tensor)
    return proto


@pytest.mark.parametrize("indices", [[1, 5, 11], [[0, 1], [1, 2], [3, 2]]], ids=["elements", "places"])
def test_sparse_weights_are_read_as_dense(indices: Any, tmp_path: Path) -> None:
    proto = sparse_model(sparse([1, -2, 3], indices, [4, 3]))
    before = proto.SerializeToString(deterministic=True)
    for level in (0, 1):
        graphopt.optimize(proto, level=level, promise=False).save(tmp_path / "out.onnx")
        for n in (2, 5):
            x = np.random.default_rng(n).standard_normal((n, 4), np.float32)
            dense = np.zeros((4, 3), np.float32)
            dense.reshape(-1)[[1, 5, 11]] = [1, -2, 3]
            assert_same({"y": np.maximum(x @ dense, 0)}, run(tmp_path / "out.onnx", {"x": x}))
    assert proto.SerializeToString(deterministic=True) == before


def test_a_sparse_constant_is_read_as_dense() -> None:
    proto = sparse_model(sparse([1, -2], [0, 11], [4, 3]))
    node = onnx.helper.make_node("Constant", [], ["w"])
    node.attribute.append(onnx.helper.make_attribute("sparse_value", sparse([1, -2], [0, 11], [4, 3])))
    proto.graph.node.insert(0, node)
    del proto.graph.sparse_initializer[:]
    found = load(proto).graph.initializers["w"].const_value
    assert found is not None
    assert found.numpy().reshape(-1)[[0, 5, 11]].tolist() == [1, 0, -2]


@pytest.mark.parametrize(
    ("tensor", "said"),
    [(([1], [12], [4, 3]), "do not fit its shape"), (([1], [-1], [4, 3]), "do not fit its shape"), (([1], [[0, 3]], [4, 3]), "do not fit its shape"),
     (([1], [[0]], [4, 3]), "do not fit its shape"), (([1, 2], [0], [4, 3]), "do not fit its shape"), (([1], [0], [2**40, 2**20]), "too large as a dense one")],
)  # fmt: skip
def test_a_sparse_tensor_that_is_wrong_is_one_line(tensor: Any, said: str) -> None:
    with pytest.raises(LoadError, match=f"the ModelProto: .*`w`.*{said}"):
        load(sparse_model(sparse(*tensor)))
