"""Loading: every kind of source, what normal form means, what must be kept, and one clear line for bad input."""

from __future__ import annotations

import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import FOREIGN, MINILM_ROUTES, Array, assert_same, foreign, minilm, parse, run, text_feeds, to_proto  # type: ignore[import-not-found]

from graphopt.core.errors import LoadError
from graphopt.core.remarks import Remarks
from graphopt.graph.questions import all_nodes, graphs
from graphopt.io.load import load
from graphopt.io.save import save

LINEAR = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N,4] x) => (float[N,3] y) <float[4,3] w> { h = MatMul (x, w)  y = Relu (h) }"""


def linear() -> onnx.ModelProto:
    return parse(LINEAR, w=np.arange(12, dtype=np.float32).reshape(4, 3) - 5)


def assert_normal(model: ir.Model) -> None:
    """The contract of design.md, checked from scratch."""
    assert not model.functions
    assert model.opset_imports[""] == 23
    values: list[str] = []
    for graph in graphs(model):
        assert graph is model.graph or not graph.initializers
        values += [str(v.name) for v in graph.inputs] + [k for k, v in graph.initializers.items() if not v.is_graph_input()]
    nodes = list(all_nodes(model))
    values += [str(v.name) for n in nodes for v in n.outputs if v.name != ""]
    names = [n.name for n in nodes]
    assert all(values)
    assert len(values) == len(set(values))
    assert all(names)
    assert len(names) == len(set(names))
    assert not [n for n in nodes if n.op_type == "Constant"]
    assert not [n.name for n in nodes if not any(v.uses() or v.is_graph_output() for v in n.outputs)]
    made = set(model.graph.inputs) | set(model.graph.initializers.values())
    for node in model.graph:
        assert all(v is None or v in made for v in node.inputs), f"{node.name} stands before its inputs"
        made.update(node.outputs)


# ---- whole models -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*MINILM_ROUTES, *FOREIGN])
def test_real_model_round_trip(name: str, tmp_path: Path) -> None:
    path = minilm(name) if name in MINILM_ROUTES else foreign(name)
    before = onnx.load(path, load_external_data=False)
    remarks = Remarks()
    model = load(path, remarks=remarks)
    assert_normal(model)
    assert not [v.name for n in model.graph for v in n.outputs if v.dtype is None]
    assert not list(remarks), "a clean model gives nothing to remark"
    info = save(model, tmp_path / "out.onnx")
    after = onnx.load(tmp_path / "out.onnx")
    onnx.checker.check_model(after, full_check=True)
    assert (info.opset, info.ir_version, info.rises) == (before.opset_import[0].version, before.ir_version, ())
    assert list(after.graph.input) == list(before.graph.input)
    assert list(after.graph.output) == list(before.graph.output)
    assert info.nbytes <= path.stat().st_size
    names = [i.name for i in before.graph.input]
    for batch, length in ((4, 16), (2, 9)):
        feeds = text_feeds(names, batch, length) if "atoms" not in names else reaction_feeds(length)
        assert_same(run(path, feeds), run(tmp_path / "out.onnx", feeds))


def reaction_feeds(length: int) -> dict[str, Array]:
    rng = np.random.default_rng(length)
    one = {name: rng.integers(1, high, (1, length)) for name, high in (("atoms", 100), ("neighbors", 15), ("roles", 4))}
    return {**one, "distances": rng.integers(0, 10, (1, length, length))}


def test_a_wrong_weight_is_seen_by_the_comparison(tmp_path: Path) -> None:
    """The round trip's tolerance can fail: one weight off by 1 % does."""
    path = minilm(MINILM_ROUTES[0])
    model = load(path)
    victim = next(v for v in model.graph.initializers.values() if v.const_value is not None and v.const_value.size == 384 * 384)
    assert victim.const_value is not None
    array = victim.const_value.numpy().copy()
    array[0] *= 1.01
    victim.const_value = ir.tensor(array, name=victim.name)
    feeds = text_feeds(["input_ids", "attention_mask"], 2, 9)
    with pytest.raises(AssertionError, match="off by"):
        assert_same(run(path, feeds), run(to_proto(model), feeds))


@pytest.mark.timed
def test_time_is_linear() -> None:
    """J04: 9,600 nodes load in seconds, and so do 2,000 in a chain and 1,000 nested Identity."""
    x, nodes = "x", []
    for k in range(2400):
        nodes += [
            onnx.helper.make_node("MatMul", [x, "w"], [f"a{k}"]),
            onnx.helper.make_node("Constant", [], [f"c{k}"], value_float=1.0),
            onnx.helper.make_node("ReduceMean", [f"a{k}"], [f"m{k}"], axes=[-1], keepdims=1),
            onnx.helper.make_node("Add", [f"m{k}", f"c{k}"], [f"b{k}"]),
            onnx.helper.make_node("Sub", [f"a{k}", f"b{k}"], [x := f"x{k}"]),
        ]
    info = onnx.helper.make_tensor_value_info
    weights = [onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")]
    graph = onnx.helper.make_graph(nodes, "g", [info("x", 1, ["N", 4])], [info(x, 1, ["N", 4])], weights)
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    load(linear())  # the imports do not count
    start = time.process_time()  # other work on the machine does not count either
    model = load(proto)
    assert time.process_time() - start < 5
    assert len(model.graph) == 9600


# ---- sources ------------------------------------------------------------------------------------------------------------------------------


def test_the_callers_objects_are_not_changed() -> None:
    """J07; the subgraph constants and functions make normal form rename and move what the caller's objects hold."""
    proto = parse(BRANCHES, k=np.ones(2, np.float32))
    before = proto.SerializeToString(deterministic=True)
    model = load(proto)
    to_proto(model)
    for value in list(model.graph.initializers.values()):
        value.name = f"renamed_{value.name}"
    assert proto.SerializeToString(deterministic=True) == before
    graph = ir.from_proto(proto)
    before = ir.to_proto(graph).SerializeToString(deterministic=True)
    to_proto(load(graph))
    assert ir.to_proto(graph).SerializeToString(deterministic=True) == before


def test_weights_of_an_ir_model_are_shared() -> None:
    source = ir.from_proto(linear())
    weight = ir.tensor(np.ones((4, 3), np.float32), name="w")
    source.graph.initializers["w"].const_value = weight
    loaded = load(source).graph.initializers["w"].const_value
    assert loaded is not None
    assert np.shares_memory(loaded.numpy(), weight.numpy())


def test_a_loaded_model_loads_again_and_remembers_its_versions() -> None:
    again = to_proto(load(load(linear())))
    assert (again.opset_import[0].version, again.ir_version) == (17, 8)


# ---- normal form --------------------------------------------------------------------------------------------------------------------------

BRANCHES = """<ir_version: 8, opset_import: ["" : 17]>
g (bool c, float[2] x) => (float[2] y) <float[2] k> {
  a = Constant <value_float: float = 2.0> ()
  z = Mul (x, a)
  y = If (c) <
    then_branch = t () => (float[2] p) <float[2] k2 = {1.0, 2.0}> {
      b = Constant <value_floats: floats = [3.0, 4.0]> ()  q = Add (z, k2)  p = Mul (q, b) },
    else_branch = e () => (float[2] r) { r = Constant <value_floats: floats = [5.0, 6.0]> () }
  >
}"""


def test_constants_become_initializers_of_the_main_graph() -> None:
    proto = parse(BRANCHES)
    model = load(proto)
    assert_normal(model)
    for c in (True, False):
        feeds = {"c": np.array(c), "x": np.array([1, 2], np.float32)}
        assert_same(run(proto, feeds), run(to_proto(model), feeds))


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ("value_float: float = 1.5", np.array(1.5, np.float32)),
        ("value_floats: floats = [1.5, 2.5]", np.array([1.5, 2.5], np.float32)),
        ("value_int: int = 7", np.array(7, np.int64)),
        ("value_ints: ints = [7, 8]", np.array([7, 8], np.int64)),
        ('value_string: string = "ab"', np.array(b"ab", object)),
        ("value: tensor = float[1] {4.0}", np.array([4], np.float32)),
    ],
)
def test_every_spelling_of_a_constant(spelling: str, expected: Array) -> None:
    kind = {"f": "float", "i": "int64", "O": "string"}[expected.dtype.kind]
    dims = ",".join(map(str, expected.shape))
    model = load(parse(f'<ir_version: 8, opset_import: ["" : 17]> g () => ({kind}[{dims}] y) {{ c = Constant <{spelling}> () y = Identity (c) }}'))
    stored = model.graph.initializers["c"].const_value
    assert stored is not None
    assert (stored.dtype.numpy(), stored.numpy().shape) == (expected.dtype, expected.shape)
    assert stored.numpy().reshape(-1).tolist() == expected.reshape(-1).tolist()


def test_names_are_unique_and_the_interface_keeps_its_own() -> None:
    """F06: node names and value names are two things; missing and double ones are made up."""
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[2] y, float[2] x2) {
      [Cast_9] v_cast = Cast <to = 1> (x)
      [v_cast] e = Exp (v_cast)
      [y] s = Sqrt (e)
      [y] y = Neg (s)
      x2 = Identity (x)
    }"""
    proto = parse(text)
    model = load(proto)
    assert_normal(model)
    assert [n.name for n in model.graph][:3] == ["Cast_9", "v_cast", "y"]
    assert [v.name for v in model.graph.outputs] == ["y", "x2"]
    x = np.array([0.5, 2], np.float32)
    assert_same({"y": -np.sqrt(np.exp(x)), "x2": x}, run(to_proto(model), {"x": x}))


def test_outputs_that_are_inputs_or_weights_survive() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[2] x) => (float[2] x, float[2] w, float[2] r) <float[2] w = {1.0, 2.0}> { r = Relu (x) }"""
    model = load(parse(text))
    assert [v.name for v in model.graph.outputs] == ["x", "w", "r"]
    assert [o.name for o in to_proto(model).graph.output] == ["x", "w", "r"]


def test_nodes_are_sorted_and_dead_ones_removed() -> None:
    proto = parse("""<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[2] y) <float[2] unused = {1.0, 2.0}> {
      a = Relu (x)  b = Exp (a)  y = Neg (a)  d = If (c) <then_branch = t () => (float[2] p) { p = Add (unused, x) },
      else_branch = e () => (float[2] q) { q = Relu (x) }>  c = Constant <value: tensor = bool[1] {1}> () }""")
    model = load(proto)
    assert_normal(model)
    assert [n.op_type for n in model.graph] == ["Relu", "Neg"]
    assert not model.graph.initializers, "what only a dead branch read is dead too"


def test_optional_outputs_that_nobody_reads_go() -> None:
    proto = parse("""<ir_version: 8, opset_import: ["" : 17]> g (float[2,3] x) => (float[2,3] y) <float[3] s = {1.0,1.0,1.0}> {
      y, mean, inv = LayerNormalization (x, s) }""")
    assert len(next(iter(load(proto).graph)).outputs) == 1


def test_live_dropout_is_named() -> None:
    """B09: exported in training mode."""
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[2] y, float[2] z) <float r = {0.1}, bool t = {1}, bool f = {0}> {
      [live] a = Dropout (x, r, t)  y = Relu (a)  [quiet] z = Dropout (x, r, f) }"""
    remarks = Remarks()
    model = load(parse(text), remarks=remarks)
    (remark,) = remarks
    assert (remark.kind, remark.node) == ("warning", "live")
    assert remark.message.startswith("1 live Dropout nodes")
    assert [n.op_type for n in model.graph] == ["Dropout", "Relu", "Dropout"]


def test_unknown_operators_are_left_alone_and_named() -> None:
    """J05: a custom operator, a contrib operator, and shape info that contradicts itself."""
    text = """<ir_version: 8, opset_import: ["" : 17, "my" : 1, "com.microsoft" : 1]>
    g (float[N,4] x) => (float[N,4] y) <float[N,4] a, float[N,4] b, float[N,7] c> {
      a = Relu (x)  [foo] b = my.Foo (a)  [g] c = com.microsoft.ScaledSiLU (a)  d = Exp (b)  y = Add (c, d) }"""
    remarks = Remarks()
    model = load(parse(text), remarks=remarks)
    found = {r.node: r for r in remarks}
    assert set(found) == {"foo", "g", "c"}
    assert "my.Foo has no schema" in found["foo"].message
    assert found["g"].kind == "missed"
    assert "[N,7]" in found["c"].message
    assert "[N,4]" in found["c"].message
    assert [n.op_type for n in model.graph] == ["Relu", "Foo", "ScaledSiLU", "Exp", "Add"]
    assert {(o.domain, o.version) for o in to_proto(model).opset_import} == {("", 17), ("my", 1), ("com.microsoft", 1)}


# ---- errors: one line that names the source, what was found and what to do ------------------------------------------------------------------


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", "y")


def _truncated(path: Path) -> None:
    path.write_bytes(linear().SerializeToString()[:-40])


def _missing_data(path: Path) -> None:
    onnx.save(linear(), path, save_as_external_data=True, location="gone.bin", size_threshold=0)
    (path.parent / "gone.bin").unlink()


def _short_data(path: Path) -> None:
    onnx.save(linear(), path, save_as_external_data=True, location="short.bin", size_threshold=0)
    (path.parent / "short.bin").write_bytes(b"12")


def _outside(path: Path) -> None:
    proto = linear()
    onnx.external_data_helper.set_external_data(proto.graph.initializer[0], "../secret.bin")
    proto.graph.initializer[0].ClearField("raw_data")
    path.write_bytes(proto.SerializeToString())


def _without_opset(path: Path) -> None:
    proto = linear()
    del proto.opset_import[:]
    path.write_bytes(proto.SerializeToString())


def _future(path: Path) -> None:
    proto = linear()
    proto.opset_import[0].version = 999
    path.write_bytes(proto.SerializeToString())


def _undeclared(path: Path) -> None:
    proto = linear()
    proto.graph.node[0].input[0] = "ghost"
    path.write_bytes(proto.SerializeToString())


def _cycle(path: Path) -> None:
    proto = linear()
    proto.graph.node[0].input[0] = "y"
    path.write_bytes(proto.SerializeToString())


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder": (lambda p: p.mkdir(), "without config.json"),
    "nothing": (lambda p: None, "No such file"),
    "empty": (lambda p: p.write_bytes(b""), "is empty"),
    "zip": (_zip, "zip archive"),
    "text": (lambda p: p.write_text("hello, this is\nno model"), "found text"),
    "bytes": (lambda p: p.write_bytes(bytes(range(7, 256))), "no ONNX parser reads"),
    "truncated": (_truncated, "truncated"),
    "missing data": (_missing_data, "gone.bin is missing"),
    "short data": (_short_data, "short.bin has 2 bytes"),
    "data outside": (_outside, "outside the model's folder"),
    "no opset": (_without_opset, "imports no opset"),
    "new opset": (_future, "opset 999 is newer"),
    "undeclared": (_undeclared, "reads `ghost`"),
    "cycle": (_cycle, "cycle"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gives_one_line(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make, message = BAD[name]
    path = tmp_path / "m.onnx"
    make(path)
    with pytest.raises(LoadError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert not caplog.records, "the error says it; nobody else does"


def test_options_of_other_sources_are_refused() -> None:
    with pytest.raises(LoadError, match="task and with_past are for Hugging Face folders"):
        load(linear(), task="fill-mask")
    with pytest.raises(LoadError, match=r"example inputs are for a torch\.nn\.Module"):
        load(linear(), example_inputs=(1,))
    with pytest.raises(LoadError, match=r"cannot load an object of type builtins\.int"):
        load(3)  # type: ignore[arg-type]


def test_recursive_functions_are_refused() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "my" : 1]> g (float[2] x) => (float[2] y) { y = my.F (x) }
    <domain: "my", opset_import: ["" : 17, "my" : 1]> F (a) => (b) { b = my.F (a) }"""
    with pytest.raises(LoadError, match="calls itself"):
        load(parse(text))


def test_one_output_listed_twice_is_refused() -> None:
    proto = parse('<ir_version: 8, opset_import: ["" : 17]> g (float[n] x) => (float[n] y) { y = Relu (x) }')
    proto.graph.output.append(proto.graph.output[0])
    with pytest.raises(LoadError, match="the output `y` is listed 2 times"):
        load(proto)


@pytest.mark.parametrize("dim", [2.5, "?", "b-1", 2**31, True, None, ""])
def test_an_axis_is_a_size_or_a_name(dim: object) -> None:
    wanted: dict[str, list[int | str]] = {"x": [dim]}  # type: ignore[list-item]
    with pytest.raises(LoadError, match="is no axis of input `x`"):
        load(parse('<ir_version: 8, opset_import: ["" : 17]> g (float[n] x) => (float[n] y) { y = Relu (x) }'), input_shapes=wanted)
