"""Kind 5: sequences, optionals and maps pass through everywhere, or are islands that nothing touches; never a raw error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from models import parse  # type: ignore[import-not-found]
from typer.testing import CliRunner

import graphopt
from graphopt.calibration.padding import Padding
from graphopt.cli.root import app
from graphopt.core.errors import SampleError
from graphopt.core.replay import Spool
from graphopt.graph.questions import is_tensor
from graphopt.report.inspection import inspect
from graphopt.run import ort
from graphopt.run.distance import compare_outputs, relative_l2
from graphopt.run.samples import Samples, random_samples

Array = np.ndarray[Any, Any]
HEAD = '<ir_version: 10, opset_import: ["": 21, "ai.onnx.ml": 3]>'
RNG = np.random.default_rng(0)
WEIGHTS = {
    "w": (RNG.standard_normal((8, 8)) / 3).astype(np.float32), "v": (RNG.standard_normal((8, 8)) / 3).astype(np.float32),
    "c": RNG.standard_normal((4, 8)).astype(np.float32), "zero": np.array(0), "one": np.array(1), "two": np.array(2), "four": np.array(4),
    "yes": np.array(True),
}  # fmt: skip
X, SEQ = "float[b,s,8] x", "seq(float[b,s,8])"
BRANCHES = f"""<then_branch = g1 () => ({SEQ} q1) {{ q1 = SequenceConstruct(m, x) }},
                else_branch = g2 () => ({SEQ} q2) {{ q2 = SequenceConstruct(x) }}>"""
CONSTANT = """<then_branch = g1 () => (seq(float[p,8]) q1) { q1 = SequenceConstruct(c, w) },
               else_branch = g2 () => (seq(float[p,8]) q2) { q2 = SequenceConstruct(c) }>"""
STATE = f"""<body = bd (int64 i, bool cin, {SEQ} qin) => (bool cout, {SEQ} qout) {{
                cout = Identity(cin) t = Relu(m) qout = SequenceInsert(qin, t) }}>"""
TEST = "k = ReduceSum<keepdims=0>(x) z = CastLike(zero, k) pick = Greater(k, z) m = MatMul(x, w)"
# name -> inputs, outputs, nodes; everything multiplies by a stored weight, so that every pass has something to do
GRAPHS = {
    "constants": (X, "float[b,s,8] y", "q = SequenceConstruct(c, c) t = SequenceAt(q, one) e = ReduceMean<keepdims=1>(t) m = MatMul(x, w) y = Add(m, e)"),
    "constants out": (X, "float[b,s,8] y, seq(float[p,8]) q", "y = MatMul(x, w) q = SequenceConstruct(c, w)"),
    "length of constants": (X, "float[b,s,8] y", "q = SequenceConstruct(c, c) k = SequenceLength(q) f = Cast<to=1>(k) m = MatMul(x, w) y = Mul(m, f)"),
    "split of a constant": (X, "float[b,s,8] y",
        "q = SplitToSequence<axis=1>(w, four) a = SequenceAt(q, zero) d = SequenceAt(q, one) k = Concat<axis=1>(d, a) y = MatMul(x, k)"),
    "split of a constant out": (X, "float[b,s,8] y, seq(float[8,4]) q", "q = SplitToSequence<axis=1>(w, four) y = MatMul(x, w)"),
    "If of constants": (X, "float[b,s,8] y", f"m = MatMul(x, w) q = If(yes){CONSTANT} t = SequenceAt(q, zero) e = ReduceMean<keepdims=1>(t) y = Add(m, e)"),
    "construct": (X, "float[b,s,8] y", "m = MatMul(x, w) n = MatMul(x, v) q = SequenceConstruct(m, n) y = SequenceAt(q, one)"),
    "beside a tensor": (X, f"float[b,s,8] y, {SEQ} q", "m = MatMul(x, w) y = Relu(m) q = SequenceConstruct(m, y)"),
    "alone": (X, f"{SEQ} q", "m = MatMul(x, w) y = Relu(m) q = SequenceConstruct(m, y)"),
    "insert": (X, "float[b,t,8] y, int64 k", """q0 = SequenceEmpty<dtype=1>() m = MatMul(x, w) q1 = SequenceInsert(q0, m) q = SequenceInsert(q1, x, zero)
        y = ConcatFromSequence<axis=1>(q) k = SequenceLength(q)"""),
    "empty": (X, "float[b,s,8] y, seq(float[n,8]) q", "q = SequenceEmpty<dtype=1>() y = MatMul(x, w)"),
    "erase": (X, f"float[b,t,8] y, {SEQ} q",
        "m = MatMul(x, w) q0 = SequenceConstruct(m, x, m) q = SequenceErase(q0, one) y = ConcatFromSequence<axis=1, new_axis=0>(q)"),
    "split": (X, "seq(float[b,s,4]) q, float[b,s,4] y", "m = MatMul(x, w) q = SplitToSequence<axis=2>(m, four) y = SequenceAt(q, zero)"),
    "split of integers": (X, "float[b,s,8] y, seq(int64[1]) q", "m = MatMul(x, w) size = Shape(m) q = SplitToSequence(size) y = Relu(m)"),
    "optional": (X, "float[b,s,8] y, bool k", "m = MatMul(x, w) o = Optional(m) n = OptionalGetElement(o) k = OptionalHasElement(o) y = Relu(n)"),
    "optional out": (X, "float[b,s,8] y, optional(float[b,s,8]) o", "m = MatMul(x, w) o = Optional(m) y = Relu(m)"),
    "optional sequence": (X, "float[b,s,8] y", "m = MatMul(x, w) q = SequenceConstruct(m, x) o = Optional(q) n = OptionalGetElement(o) y = SequenceAt(n, zero)"),
    "If": (X, f"float[b,s,8] y, {SEQ} q", f"{TEST} q = If(pick){BRANCHES} y = SequenceAt(q, zero)"),
    "Loop": (X, f"float[b,t,8] y, {SEQ} q", f"q0 = SequenceEmpty<dtype=1>() m = MatMul(x, w) q = Loop(two, yes, q0){STATE} y = ConcatFromSequence<axis=1>(q)"),
    "SequenceMap": (X, "float[b,s,8] y", """m = MatMul(x, w) q0 = SplitToSequence<axis=2>(m, four)
        q = SequenceMap(q0)<body = bd (float[b,s,4] t) => (float[b,s,4] u) { u = Relu(t) }> y = ConcatFromSequence<axis=2>(q)"""),
    "sequence in": (f"{X}, {SEQ} q", "float[b,s,8] y", "m = MatMul(x, w) k = SequenceAt(q, zero) y = Add(m, k)"),
    "sequence in and out": (f"{X}, {SEQ} q", f"float[b,s,8] y, {SEQ} r", "m = MatMul(x, w) k = SequenceAt(q, zero) y = Add(m, k) r = SequenceInsert(q, m)"),
    "optional in": (f"{X}, optional(float[b,s,8]) o", "float[b,s,8] y", "m = MatMul(x, w) k = OptionalGetElement(o) y = Add(m, k)"),
    "map": ("float[b,8] r", "float[b,8] p, seq(map(int64, float)) z",
        "m = MatMul(r, w) p = Softmax(m) z = ai.onnx.ml.ZipMap<classlabels_int64s=[0,1,2,3,4,5,6,7]>(p)"),
    "map alone": ("float[b,8] r", "seq(map(string, float)) z",
        'm = MatMul(r, w) p = Softmax(m) z = ai.onnx.ml.ZipMap<classlabels_strings=["a","b","c","d","e","f","g","h"]>(p)'),
}  # fmt: skip


def build(name: str) -> onnx.ModelProto:
    ins, outs, nodes = GRAPHS[name]
    text = f"{HEAD} g ({ins}) => ({outs}) {{ {nodes} }}"
    bare = onnx.parser.parse_model(text)
    read = {i for n in bare.graph.node for i in n.input} | {
        i for n in bare.graph.node for a in n.attribute if a.HasField("g") for inner in a.g.node for i in inner.input
    }
    proto: onnx.ModelProto = parse(text, **{key: array for key, array in WEIGHTS.items() if key in read})
    return proto


def feeds(proto: onnx.ModelProto) -> list[dict[str, Any]]:
    made = []
    for turn, (b, s) in enumerate(((2, 3), (1, 5))):
        rng = np.random.default_rng(turn)
        parts: dict[str, Any] = {}
        for value in proto.graph.input:
            shape = (b, 8) if value.name == "r" else (b, s, 8)
            arrays = [rng.standard_normal(shape).astype(np.float32) for _ in range(2)]
            parts[value.name] = arrays if value.type.HasField("sequence_type") else arrays[0]
        made.append(parts)
    return made


def check(proto: onnx.ModelProto, batches: list[dict[str, Any]], path: Path, tolerance: float) -> None:
    """The artifact gives the numbers of the input, in the same form, at both levels of the runtime."""
    base = ort.session(proto, optimize=False)
    for optimize in (False, True):
        artifact = ort.session(path, optimize=optimize)
        for feed in batches:
            assert compare_outputs(base.run(feed), artifact.run(feed), tolerance) is None


FEW = ("constants out", "split of a constant", "If of constants", "beside a tensor", "insert", "optional", "Loop", "sequence in and out", "map")


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in GRAPHS])
def test_they_pass_through(name: str, tmp_path: Path) -> None:
    proto = build(name)
    batches, out = feeds(proto), tmp_path / "out.onnx"
    exact = graphopt.optimize(proto, promise=False, samples=batches, check_numerics=True, verify_each=True, dump=tmp_path / "dump")
    exact.save(out, tmp_path / "report.json")
    check(proto, batches, out, 1e-5)
    assert exact.report.loss.value == pytest.approx(0, abs=1e-6)
    kinds = [[(v.name, v.type.WhichOneof("value")) for v in (*m.graph.input, *m.graph.output)] for m in (proto, onnx.load(out))]
    assert kinds[0] == kinds[1]
    halved = graphopt.optimize(proto, "canonicalize, to-half", promise=False, samples=batches, check_numerics=True)
    halved.save(out)
    check(proto, batches, out, 5e-3)
    assert "MatMul" in {n.op_type for n in halved.graph.graph if n.outputs[0].dtype == ir.DataType.FLOAT16}, "the rest is halved"
    quantized = graphopt.optimize(proto, "canonicalize, quantize{mode=dynamic}", promise=False, samples=batches, max_loss=0.5)
    quantized.save(out)
    check(proto, batches, out, 0.1)
    assert quantized.report.loss.value is not None
    assert (quantized.report.loss.value > 0) == (name != "split of a constant"), "the weight there is no stored one"
    assert quantized.report.loss.value < 0.1
    assert max(x.l2 for x in graphopt.compare(proto, out, samples=batches).outputs) < 0.1
    assert str(inspect(proto))


@pytest.mark.parametrize("name", ["sequence in and out", "optional in", "beside a tensor"])
def test_made_up_samples(name: str) -> None:
    proto = build(name)
    model = graphopt.load(proto)
    session = ort.session(proto)
    for feed in random_samples(model):
        assert set(session.run(feed)) == {v.name for v in model.graph.outputs}
    assert graphopt.compare(proto, proto).made_up


def test_samples_of_sequences() -> None:
    """A list of arrays, which need not have one size, or one array; from a generator, too."""
    proto = build("sequence in and out")
    model, batches = graphopt.load(proto), feeds(proto)
    ragged = {"x": np.zeros((1, 2, 8)), "q": [np.zeros((1, 2, 8)), np.zeros((1, 3, 8))]}
    stacked = {"x": np.zeros((1, 2, 8), np.float32), "q": np.zeros((4, 1, 2, 8), np.float32)}
    for source in ([*batches, ragged, stacked], iter([*batches, ragged, stacked])):
        read = list(Samples.load(source, model))
        assert [[x.shape for x in feed["q"]] for feed in read[2:]] == [[(1, 2, 8), (1, 3, 8)], [(1, 2, 8)] * 4]
        assert all(x.dtype == np.float32 for feed in read for x in (*feed["q"], feed["x"]))
    for wrong, text in (
        ({"x": batches[0]["q"], "q": batches[0]["q"]}, "must have 3 axes"),
        ({"x": [np.zeros(3), np.zeros(4)], "q": []}, "input `x` is ragged"),
        ({"x": None, "q": []}, "input `x` is not an array of numbers"),
        ({"x": batches[0]["x"], "q": {"a": 1}}, "input `q` is a sequence, and takes a list of arrays, found dict"),
        ({"x": batches[0]["x"], "q": [np.zeros((2, 3, 9))]}, "must be"),
    ):
        with pytest.raises(SampleError, match=text):
            Samples.load([wrong], model)
    spool = Spool([{"a": [np.ones(2), np.ones(3)], "b": None, "c": np.ones(1), "d": {1: 0.5}}])
    assert [type(x) for x in spool[0].values()] == [list, type(None), np.ndarray, dict]


def test_distances() -> None:
    one, other = [np.ones(3), np.ones(2)], [np.ones(3), np.full(2, 1.5)]
    assert compare_outputs({"q": one}, {"q": one}) is None
    assert str(compare_outputs({"q": one}, {"q": other})).startswith("output `q[1]` at [0] is 1.5, expected 1.0")
    assert "`q[1]` is missing" in str(compare_outputs({"q": one}, {"q": one[:1]}))
    assert "`q[1]` is new" in str(compare_outputs({"q": one[:1]}, {"q": one}))
    assert relative_l2([{"q": one}], [{"q": other}]) == pytest.approx((0.5 / 5) ** 0.5)
    assert relative_l2([{"q": one}], [{"q": one[:1]}]) == np.inf
    assert relative_l2([{"o": None}], [{"o": None}]) == 0
    assert relative_l2([{"o": None}], [{"o": np.ones(2)}]) == np.inf
    assert relative_l2([{"z": [{"a": 3.0, "b": 4.0}]}], [{"z": [{"b": 4.5, "a": 3.0}]}]) == pytest.approx(0.1)
    assert relative_l2([{"z": [{"a": 3.0}]}], [{"z": [{"b": 3.0}]}]) == np.inf


def test_padding_in_sequences() -> None:
    """What a sequence holds is judged like any other output: rows of padding do not count."""
    text = f"""{HEAD} g (float[b,s,8] x, int64[b,s] mask) => ({SEQ} q)
    {{ f = Cast<to=1>(mask) e = Unsqueeze(f, last) k = Mul(x, e) t = ReduceSum<keepdims=1>(k, axes) a = MatMul(x, w) y = Add(a, t) q = SequenceConstruct(y, a) }}"""
    proto = parse(text, w=WEIGHTS["w"], last=np.array([-1]), axes=np.array([1]))
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    feed = {"x": np.random.default_rng(1).standard_normal((3, 4, 8)).astype(np.float32), "mask": mask}
    kept = Padding(graphopt.load(proto)).kept(feed)
    assert [x.shape for x in kept.counted(ort.session(proto).run(feed))["q"]] == [(9, 8), (9, 8)]


def test_half_is_an_island() -> None:
    """Elements of sequences keep float32, with the reason; also at the border, where the user gives up float32."""
    proto = build("sequence in and out")
    result = graphopt.optimize(proto, "to-half{keep-io=false}", promise=False)
    assert [v.dtype for v in result.graph.graph.outputs] == [ir.DataType.FLOAT16, ir.DataType.FLOAT]
    assert not is_tensor(result.graph.graph.outputs[1])
    remarks = [r.message for record in result.report.passes for r in record.remarks]
    assert any("whose elements keep their type" in message for message in remarks)
    feed = feeds(proto)[0]
    found = result.session().run(feed)  # float32 feeds are cast to what an input takes
    assert np.allclose(found["y"], ort.session(proto, optimize=False).run(feed)["y"], atol=5e-3)


@pytest.mark.parametrize("name", ["beside a tensor", "map", "sequence in"])
def test_command_line(name: str, tmp_path: Path) -> None:
    proto = build(name)
    path, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(proto, path)
    lines = [
        [
            "optimize",
            str(path),
            "-o",
            str(out),
            "--pipeline",
            "canonicalize, quantize",
            "--check-numerics",
            "--verify-each",
            "--report",
            str(tmp_path / "r.json"),
        ],
        ["compare", str(path), str(out)],
        ["bench", str(path), str(out), "--shapes", "2x3"],
        ["inspect", str(path)],
    ]
    for line in lines:
        done = CliRunner().invoke(app, line)
        assert done.exit_code == 0, (line[0], done.output)
    assert json.loads((tmp_path / "r.json").read_text())["output"]["nodes"] > 0
