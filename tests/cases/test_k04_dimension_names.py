"""Kind 4: names of dimensions are text. Whatever they say, nothing is computed from it, and they come back unchanged."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import Array, assert_same, parse, run  # type: ignore[import-not-found]
from onnx import TensorProto, helper, numpy_helper

import graphopt
from graphopt.graph import shapes
from graphopt.graph.shape_rules import _join
from graphopt.io.bind_shapes import parse_shape
from graphopt.io.load import load
from graphopt.report.comparison import compare
from graphopt.report.inspection import inspect
from graphopt.run.samples import random_samples

RNG = np.random.default_rng(0)
HEAD = '<ir_version: 8, opset_import: ["" : 17]> '
TEXT = """g (float[B,S,4] x, int64[B,S] mask) => (float[B,S,2,2] y, float[B,S] z) <float[4,4] w, int64[1] one = {1}, int64[2] tail = {2,2}, int64 i = {1}> {
  shape = Shape (x)  cut = Slice (shape, i0, i2)  target = Concat <axis = 0> (cut, tail)  h = MatMul (x, w)  same = Identity (h)  y = Reshape (same, target)
  c = Cast <to = 1> (mask)  r = ReduceSum (c, one)  z = Mul (c, r)
  i0 = Constant <value_ints: ints = [0]> ()  i2 = Constant <value_ints: ints = [2]> ()
}"""
NAMES = [
    "2", "3", "0", "-1", "batch size", "1batch", "dyn[0]", "a:b", "?", "$N", "batch,seq", "", " ", "None", "seq-len", "a/b", "input::dim 0", "_d0", "_d7",
    "join_b_s", "Max", "Min(2, s)", "größe", "長さ", "²", "y", "h", "x", "w", "n" * 1000, "a" + "+b" * 300, "unk__12", "float", "lambda", "b'", 'b"', "a\tb", "1e3", "True",
]  # fmt: skip


def normal(*shape: int) -> Array:
    return RNG.normal(size=shape).astype(np.float32)


def dims(value: onnx.ValueInfoProto) -> list[int | str | None]:
    return [getattr(d, d.WhichOneof("value")) if d.WhichOneof("value") else None for d in value.type.tensor_type.shape.dim]


def named(batch: str | None, seq: str | None) -> onnx.ModelProto:
    """The model whose first two axes have these names; None is an axis that has none."""
    proto = parse(HEAD + TEXT, w=np.arange(16, dtype=np.float32).reshape(4, 4))
    for value in (*proto.graph.input, *proto.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in ("B", "S"):
                name = batch if dim.dim_param == "B" else seq
                dim.ClearField("dim_param")
                if name is not None:
                    dim.dim_param = name
    return proto


def feeds() -> list[dict[str, Array]]:
    return [{"x": normal(*size, 4), "mask": RNG.integers(0, 2, size)} for size in ((2, 5), (1, 3), (4, 1))]


def check(proto: onnx.ModelProto, out: Path) -> onnx.ModelProto:
    from graphopt.run.ort import session

    graphopt.optimize(proto, level=1, promise=False).save(out)
    for feed in feeds():
        base = run(proto, feed)
        assert_same(base, run(out, feed))
        assert_same(base, session(out).run(feed))
    written = onnx.load(out)
    assert [(i.name, dims(i)) for i in written.graph.input] == [(i.name, dims(i)) for i in proto.graph.input]
    assert [(i.name, dims(i)) for i in written.graph.output] == [(i.name, dims(i)) for i in proto.graph.output]
    assert "Identity" not in {n.op_type for n in written.graph.node}, "something was done at all"
    return written


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_k4_1_and_2_names_are_opaque_and_come_back(name: str, tmp_path: Path) -> None:
    check(named("batch", name), tmp_path / "out.onnx")
    check(named(name, "seq"), tmp_path / "out.onnx")


def test_k4_1_a_name_that_is_a_number_is_no_size(tmp_path: Path) -> None:
    """onnx#7698: `2` was baked into a Reshape, and made-up feeds believed it too."""
    proto = named("2", "3")
    sizes = {batch["x"].shape[:2] for batch in random_samples(load(proto))}
    assert len(sizes) > 1
    found = compare(proto, proto)
    assert found.outputs[0].max_abs == 0
    assert inspect(proto).inputs[0][1] == "float[2,3,4]", "as the file says it"


def test_an_expression_of_other_names_is_computed_with() -> None:
    proto = parse(HEAD + "g (float[b,s,4] x, float[b,p,4] past) => (float[b,t,4] y) { y = Concat <axis = 1> (past, x) }")
    for value in proto.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            dim.dim_param = {"s": "p + 1"}.get(dim.dim_param, dim.dim_param) if dim.dim_param else ""
            if not dim.dim_param:
                dim.dim_value = 4
    (batch, *_) = random_samples(load(proto))
    assert batch["x"].shape[1] == batch["past"].shape[1] + 1


def test_k4_2_where_inference_ends_early_types_are_still_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from onnx_shape_inference import registry

    def broken(ctx: Any, node: ir.Node) -> None:
        raise RuntimeError("no")

    load(named("b", "s"))
    rules = registry.registry if hasattr(registry, "registry") else registry
    get = rules.get
    monkeypatch.setattr(
        rules, "get", lambda domain, op_type, version: broken if (domain, op_type) == ("", "MatMul") else get(domain, op_type, version=version)
    )
    model = load(named("b", "s"))
    assert not [v.name for n in model.graph for v in n.outputs if v.dtype is None]
    assert next(n for n in model.graph if n.op_type == "Mul").outputs[0].shape is not None, "the others are inferred all the same"
    graphopt.optimize(named("b", "s"), level=1, promise=False).save(tmp_path / "out.onnx")


# ---- K4.3: the interface is written as it came ---------------------------------------------------------------------------------------------------


def test_k4_3_axes_without_a_name_stay_without(tmp_path: Path) -> None:
    for batch, seq in (("b", None), (None, None), (None, "s")):
        check(named(batch, seq), tmp_path / "out.onnx")


def test_k4_3_declared_outputs_are_kept_also_where_they_are_wrong(tmp_path: Path) -> None:
    for wrong in (["b", "s", 2, 2], ["x", "y", 2, 2], ["b", 7, 2, 2], ["b", "s", 4], None):
        proto = named("b", "s")
        proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, wrong))
        written = check(proto, tmp_path / "out.onnx")
        assert written.graph.output[0].type.tensor_type.HasField("shape") == (wrong is not None)
        assert compare(proto, str(tmp_path / "out.onnx"), samples=feeds()).outputs[0].l2 < 1e-6


def test_k4_3_compare_takes_outputs_that_are_only_declared_otherwise() -> None:
    a, b = named("b", "s"), named("b", "s")
    b.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 7, 2, 2]))
    a.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 9, 2, 2]))
    assert compare(a, b, samples=feeds()).outputs[0].max_abs == 0


def test_a_size_is_bound_by_the_name_that_the_file_has() -> None:
    model = load(named("batch size", "2"), input_shapes=dict([parse_shape("x:3,0,4")]))
    assert [str(d) for d in model.graph.inputs[0].shape or ()] == ["3", "dim_2", "4"]
    again = load(model, input_shapes=dict([parse_shape("x:0,6,4")]))
    assert [str(d) for d in again.graph.inputs[0].shape or ()] == ["3", "6", "4"]


# ---- K4.4: joins -------------------------------------------------------------------------------------------------------------------------------


def test_k4_4_a_join_is_a_flat_set() -> None:
    a, b, c, long = (ir.SymbolicDim(name) for name in ("a", "b", "c", "n" * 60))
    assert _join(a, b) == _join(b, a) == _join(_join(a, b), b) == _join(a, _join(b, a))
    assert len({str(_join(_join(x, y), z)) for x, y, z in itertools.permutations((a, b, c))}) == 1
    assert len({str(_join(_join(x, y), z)) for x, y, z in itertools.permutations((a, b, long))}) == 1
    assert _join(a, b) != _join(a, c)
    many: Any = a
    for k in range(200):
        many = _join(many, ir.SymbolicDim(f"dim{k}"))
    assert len(str(many)) < 100


def decoder(layers: int, cut: str) -> onnx.ModelProto:
    """Attention layers that all read one position bias, cut to the last rows: `bias[:, :, -length:]`, as T5 does."""
    width, heads = 8, 2
    stored = {"table": normal(heads, 1, 1), "split": np.array([0, 0, heads, 4]), "merge": np.array([0, 0, width]), "zero": np.array([0]), "one": np.array([1]),
              "two": np.array([2]), "minus": np.array([-1]), "end": np.array([2**63 - 1]), "heads": np.array([heads])}  # fmt: skip
    nodes: list[onnx.NodeProto] = []

    def add(op: str, inputs: str, output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs.split(), [output], name=output, **attributes))
        return output

    add("Shape", "x", "shape")
    add("Slice", "shape one two", "length")
    add("Concat", "heads length length", "square", axis=0)
    add("Expand", "table square", "bias0")
    add("Unsqueeze", "bias0 zero", "bias1")
    add("Add", "bias1 mask", "bias")
    x = "x"
    for k in range(layers):
        for n in "qkvo":
            stored[f"{n}{k}w"] = normal(width, width) / 4
        for n in "qkv":
            add("Transpose", add("Reshape", add("MatMul", f"{x} {n}{k}w", f"{n}{k}m") + " split", f"{n}{k}r"), f"{n}{k}", perm=[0, 2, 1, 3])
        scores = add("MatMul", f"q{k} " + add("Transpose", f"k{k}", f"t{k}", perm=[0, 1, 3, 2]), f"s{k}")
        add("Slice", add("Shape", x if cut == "length" else f"k{k}", f"shape{k}") + " one two", f"length{k}")
        rows = add("Slice", "bias " + add("Mul", f"length{k} minus", f"start{k}") + " end two", f"rows{k}")
        p = add("Softmax", add("Add", f"{scores} {rows}", f"a{k}"), f"p{k}", axis=-1)
        merged = add("Reshape", add("Transpose", add("MatMul", f"{p} v{k}", f"c{k}"), f"d{k}", perm=[0, 2, 1, 3]) + " merge", f"e{k}")
        x = add("Add", add("MatMul", f"{merged} o{k}w", f"f{k}") + f" {x}", f"x{k}")
    info = helper.make_tensor_value_info
    inputs = [info("x", 1, ["b", "s", width]), info("mask", 1, ["b", 1, "s", "k"])]
    weights = [numpy_helper.from_array(array, name) for name, array in stored.items()]
    graph = helper.make_graph(nodes, "g", inputs, [info(x, 1, ["b", "s", width])], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("cut", ["length", "unknown"])
def test_k4_4_the_work_is_linear_in_the_layers(cut: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of dimensions do not grow, up to 24 layers; where the cut is the whole axis, that is known."""
    model = load(decoder(24, cut))
    texts = {str(d) for n in model.graph for v in n.outputs if v.shape is not None for d in v.shape}
    assert max(map(len, texts)) < 100
    rows = [n.outputs[0].shape for n in model.graph if (n.name or "").startswith("rows")]
    assert len(rows) == 24
    if cut == "length":
        assert len(texts) < 12
        assert {str(shape[2]) for shape in rows if shape is not None} == {"s"}


def test_k4_4_numbers(tmp_path: Path) -> None:
    proto = decoder(2, "length")
    graphopt.optimize(proto, level=1, promise=False).save(tmp_path / "out.onnx")
    for batch, length in ((2, 5), (1, 3), (3, 1)):
        feed = {"x": normal(batch, length, 8), "mask": normal(batch, 1, length, length)}
        assert_same(run(proto, feed), run(tmp_path / "out.onnx", feed))


def test_shapes_are_as_long_as_they_say() -> None:
    """The slice from -length on is the whole axis at every size, also at none."""
    assert shapes.contents(None) is None
    from graphopt.graph.dims import extent

    s, t = ir.SymbolicDim("s"), ir.SymbolicDim("t")
    assert extent(s, -s, 2**63 - 1, 1) == s
    assert extent(s + t, -(s + t), 2**63 - 1, 1) == s + t
    assert extent(s, -t, 2**63 - 1, 1) is None
    assert extent(s + t, -s, 2**63 - 1, 1) is None, "with s = 0 it is all of it"
