"""Kind 11: what cases.md left open, and its siblings."""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import Array, assert_same, parse, run  # type: ignore[import-not-found]
from test_api import BLOCK, RELU, model

import graphopt
from graphopt.core.errors import LoadError, PassError, PipelineError
from graphopt.driver import loss as losses
from graphopt.driver.loss import Loss
from graphopt.io.load import load
from graphopt.report.comparison import compare
from graphopt.report.elements import Line
from graphopt.report.inspection import inspect
from graphopt.run import ort
from graphopt.run.samples import Samples

HEAD = '<ir_version: 8, opset_import: ["" : 17]> '


def normal(*shape: int) -> Array:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def written(source: Any, out: Path, level: int = 0, pipeline: str | None = None) -> onnx.ModelProto:
    graphopt.optimize(source, pipeline, level=level, promise=False).save(out)
    return onnx.load(out)


# ---- what the door mended is in the output, also where no pass changed anything -----------------------------------------------------------------

LIES = """g (float[b,s,4] x, float[b,p,4] past) => (float[b,t,4] y) <float[b,s,4] k, float[2,2] r> { r = Relu (x)  k = Concat <axis = 1> (past, r)  y = Relu (k) }"""
DECIDED = """g (float[N,2] x) => (float[N,2] y) <bool c = {1}> {
  y = If (c) <then_branch = t () => (float[N,2] p) <float[2] k = {1.0, 2.0}> { p = Add (x, k) }, else_branch = e () => (float[N,2] q) { q = Neg (x) }> }"""
TWICE = "g (float[N,2] x) => (float[N,2] y) { [same] h = Relu (x)  [same] y = Neg (h) }"
UNSORTED = "g (float[N,2] x) => (float[N,2] y) { y = Neg (h)  h = Relu (x) }"


@pytest.mark.parametrize("pipeline", [None, "fuse-norm"])
@pytest.mark.parametrize("text", [LIES, DECIDED, TWICE, UNSORTED], ids=["E02", "E05", "names", "order"])
def test_repairs_at_the_door_are_kept(text: str, pipeline: str | None, tmp_path: Path) -> None:
    proto = parse(HEAD + text)
    found = written(proto, tmp_path / "out.onnx", 0, pipeline)
    onnx.checker.check_model(found, full_check=True)
    assert not {i.name for i in found.graph.value_info} & {"k"}
    assert "If" not in {n.op_type for n in found.graph.node}
    assert len({n.name for n in found.graph.node}) == len(found.graph.node)
    feed = {"x": normal(2, 3, 4), "past": normal(2, 5, 4)} if text is LIES else {"x": normal(3, 2)}
    truth = parse(HEAD + text)
    del truth.graph.value_info[:]
    for node in truth.graph.node:
        node.name = ""  # the runtime refuses names that several nodes have
    assert_same(run(truth, feed), run(found, feed))


def test_what_needs_no_repair_comes_back_byte_for_byte(tmp_path: Path) -> None:
    proto, path = parse(HEAD + "g (float[N,2] x) => (float[N,2] y) <float[N,2] h> { h = Relu (x)  y = Neg (h) }"), tmp_path / "m.onnx"
    onnx.save(proto, path)
    written(path, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == path.read_bytes()


# ---- order ----------------------------------------------------------------------------------------------------------------------------------------

LATER = """g (float[N,2] x, bool c) => (float[N,2] y) {
  y = If (c) <then_branch = t () => (float[N,2] p) { p = Add (h, x) }, else_branch = e () => (float[N,2] q) { q = Mul (x, h) }>
  i = Identity (x)  h = Relu (i) }"""
INSIDE = """g (float[N,2] x, bool c) => (float[N,2] y) {
  y = If (c) <then_branch = t () => (float[N,2] p) { p = Add (h, x)  h = Relu (x) }, else_branch = e () => (float[N,2] q) { q = Mul (x, x) }> }"""
FUNCTION = """<ir_version: 8, opset_import: ["" : 17, "my" : 1]> g (float[N,2] x) => (float[N,2] y) { y = Neg (h)  h = my.F (x) }
<domain: "my", opset_import: ["" : 17]> F (a) => (r) { r = Neg (b)  b = Relu (a) }"""


@pytest.mark.parametrize("text", [HEAD + UNSORTED, HEAD + LATER, HEAD + INSIDE, FUNCTION], ids=["main", "captured", "body", "function"])
def test_nodes_in_any_order(text: str, tmp_path: Path) -> None:
    proto, path = parse(text), tmp_path / "m.onnx"
    onnx.save(proto, path)
    known = load(parse(text))
    feeds = [{"x": normal(n, 2), **({"c": np.array(bool(n % 2))} if len(proto.graph.input) > 1 else {})} for n in (1, 2)]
    for source in (path, proto):
        for level in (0, 1):
            found = written(source, tmp_path / "out.onnx", level)
            onnx.checker.check_model(found, full_check=True)
            for feed in feeds:
                assert_same(run(known, feed), run(found, feed))
        assert inspect(source).size.nodes >= 2
        assert compare(source, found, samples=feeds).outputs[0].max_abs == 0


# ---- errors of other libraries -----------------------------------------------------------------------------------------------------------------


def test_any_error_of_another_library_names_the_file_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: object, **__: object) -> None:
        raise AttributeError("'NoneType' object has no attribute 'shape'")

    path = tmp_path / "m.onnx"
    onnx.save(parse(HEAD + TWICE), path)
    monkeypatch.setattr("graphopt.io.normal_form.repair", broken)
    for call in (load, inspect, graphopt.optimize, lambda p: compare(p, p)):
        with pytest.raises(LoadError, match=r"m\.onnx: .*AttributeError: 'NoneType' object has no attribute 'shape'; check the model with") as caught:
            call(path)
        assert "\n" not in str(caught.value)
        assert isinstance(caught.value.__cause__, AttributeError)


def raw(change: Any) -> onnx.ModelProto:
    proto = parse(HEAD + "g (float[N,2] x) => (float[N,2] y) <float[2] w = {1.0, 2.0}> { h = Add (x, w)  i = Identity (h)  y = Neg (i) }")
    change(proto)
    return proto


def without(field: str) -> Any:
    return lambda p: p.ClearField(field)


def setting(path: str, value: Any) -> Any:
    def change(proto: onnx.ModelProto) -> None:
        *way, last = path.split(".")
        at: Any = proto
        for step in way:
            at = at[int(step)] if step.isdigit() else getattr(at, step)
        setattr(at, last, value)

    return change


def adding(path: str, item: Any) -> Any:
    def change(proto: onnx.ModelProto) -> None:
        at: Any = proto
        for step in path.split("."):
            at = getattr(at, step)
        at.append(item)

    return change


def info(name: str, *dims: Any) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, dims)


def unknown_size(proto: onnx.ModelProto, size: int) -> None:
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = size


STRANGE: dict[str, tuple[Any, str]] = {  # a file as a stranger may bring it -> "" where it is right, else what the one line says
    "no ir version": (without("ir_version"), ""),
    "a newer ir version": (setting("ir_version", 99), ""),
    "no name of the graph": (setting("graph.name", ""), ""),
    "no producer": (setting("producer_name", ""), ""),
    "the standard domain twice": (adding("opset_import", onnx.helper.make_opsetid("", 17)), ""),
    "the standard domain twice, otherwise": (adding("opset_import", onnx.helper.make_opsetid("ai.onnx", 13)), ""),
    "an unknown domain": (adding("opset_import", onnx.helper.make_opsetid("nobody.knows", 3)), ""),
    "no opset": (lambda p: p.opset_import.pop(), "imports no opset"),
    "value_info of nothing": (adding("graph.value_info", info("nothing", "N", 2)), ""),
    "value_info of an input": (adding("graph.value_info", info("x", "M", 3)), ""),
    "value_info twice": (lambda p: p.graph.value_info.extend([info("h", "N", 2), info("h", 7, 2)]), ""),
    "an output that is an input": (adding("graph.output", info("x", "N", 2)), ""),
    "an output that is a weight": (adding("graph.output", info("w", 2)), ""),
    "an output listed twice": (adding("graph.output", info("y", "N", 2)), "listed 2 times"),
    "an input listed twice": (adding("graph.input", info("x", "N", 2)), "x"),
    "a weight stored twice": (lambda p: p.graph.initializer.append(p.graph.initializer[0]), ""),
    "a weight that nothing reads": (adding("graph.initializer", onnx.numpy_helper.from_array(normal(3), "spare")), ""),
    "a weight without a name": (adding("graph.initializer", onnx.numpy_helper.from_array(normal(3), "")), ""),
    "a weight that a node makes as well": (adding("graph.initializer", onnx.numpy_helper.from_array(normal(2), "h")), "h"),
    "two nodes that make one value": (adding("graph.node", onnx.helper.make_node("Relu", ["x"], ["h"])), "h"),
    "an empty input at the end": (lambda p: (p.graph.node[2].input.extend(["", ""]), setattr(p.graph.node[2], "op_type", "Clip")), ""),
    "an empty input too many": (lambda p: p.graph.node[2].input.append(""), "`Neg` of opset 13 does not take 2 inputs"),
    "an input that is read and not there": (lambda p: p.graph.node[2].input.append("ghost"), "ghost"),
    "a node without outputs": (adding("graph.node", onnx.helper.make_node("Relu", ["x"], [])), ""),
    "an operator that nobody knows": (setting("graph.node.1.op_type", "Sinkhorn"), ""),
    "a domain that is not imported": (setting("graph.node.1.domain", "elsewhere"), ""),
    "a size of 0 at an input": (lambda p: unknown_size(p, 0), ""),
    "a size of -1 at an input": (lambda p: unknown_size(p, -1), ""),
    "a size of -7 at an input": (lambda p: unknown_size(p, -7), ""),
    "a huge size": (lambda p: unknown_size(p, 2**62), ""),
    "a function that nothing calls": (
        lambda p: p.functions.append(onnx.helper.make_function("my", "F", ["a"], ["b"], [onnx.helper.make_node("Relu", ["a"], ["b"])], [onnx.helper.make_opsetid("", 17)])),
        "",
    ),
    "an attribute that is not known": (lambda p: p.graph.node[2].attribute.append(onnx.helper.make_attribute("speed", 3)), "has no attribute `speed`"),
    "an output of no type": (lambda p: p.graph.output[0].ClearField("type"), ""),
    "a weight of another length than it says": (lambda p: p.graph.initializer[0].dims.__setitem__(0, 3), "w"),
}  # fmt: skip


@pytest.mark.parametrize("name", STRANGE)
def test_what_a_strangers_file_can_bring(name: str, tmp_path: Path) -> None:
    """Each goes through loading, both levels, inspect and compare, or ends with one line that says why."""
    change, said = STRANGE[name]
    proto, path = raw(change), tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    calls = [load, inspect, lambda p: written(p, tmp_path / "o0.onnx", 0), lambda p: written(p, tmp_path / "o1.onnx", 1)]
    if said:
        for call in calls:
            with pytest.raises(LoadError, match=said) as caught:
                call(path)
            assert "\n" not in str(caught.value)
            assert str(path) in str(caught.value)
        return
    for call in calls:
        call(path)
    feed = {"x": normal(0 if "0" in name else 3, 2)}
    try:
        base = run(path, feed)
    except graphopt.GraphoptError:
        return  # the runtime takes no such file, nor need it take ours
    for out in ("o0.onnx", "o1.onnx"):
        assert_same(base, run(tmp_path / out, feed))
    assert compare(path, tmp_path / "o1.onnx", samples=[feed]).outputs[0].max_abs == 0


def test_a_function_that_calls_itself_in_a_circle() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "my" : 1]> g (float[2] x) => (float[2] y) { y = my.F (x) }
    <domain: "my", opset_import: ["" : 17, "my" : 1]> F (a) => (b) { b = my.G (a) }
    <domain: "my", opset_import: ["" : 17, "my" : 1]> G (a) => (b) { b = my.F (a) }"""
    with pytest.raises(LoadError, match="calls itself"):
        load(parse(text))
    assert load(ir.from_proto(parse(HEAD + TWICE))).graph.outputs[0].name == "y"


# ---- the loss streams over samples ---------------------------------------------------------------------------------------------------------


class Counted:
    """A session that knows how many of its outputs are alive."""

    alive = most = 0

    def __init__(self, model: Any) -> None:
        self.session = ort.session(model)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Array]:
        outputs = self.session.run(feeds)
        for array in outputs.values():
            Counted.alive += 1
            Counted.most = max(Counted.most, Counted.alive)
            weakref.finalize(array, self._gone)
        return outputs

    @staticmethod
    def _gone() -> None:
        Counted.alive -= 1


@pytest.mark.parametrize("small", [True, False])
def test_the_loss_streams(small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small outputs of the original are remembered; of large ones, as logits are, two batches of each model are alive at most."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((8, 64)).astype(np.float32)
    source, other = (
        parse('<ir_version: 10, opset_import: ["": 21]> g (float[b,8] x) => (float[b,64] y) { y = MatMul(x, w) }', w=array) for array in (w, 1.25 * w)
    )
    model = graphopt.load(source)
    samples = Samples([{"x": rng.standard_normal((4, 8)).astype(np.float32)} for _ in range(40)])
    monkeypatch.setattr(losses, "_HELD", 40 * 4 * 64 * 4 if small else 5 * 4 * 64 * 4)

    class Here:
        session = staticmethod(Counted)

        @staticmethod
        def probe(model: Any, feed: Any) -> None:
            """It would run elsewhere."""

    loss = Loss(Here(), model, samples, None)  # type: ignore[arg-type]
    for _ in range(2):
        Counted.alive = Counted.most = 0
        assert loss.of(Counted(other)) == pytest.approx(0.25)  # type: ignore[arg-type]
        assert Counted.most <= (44 if small else 9)


def test_the_report_says_how_much_was_read() -> None:
    source = parse('<ir_version: 10, opset_import: ["": 21]> g (float[b,8] x) => (float[b,4] y) { y = MatMul(x, w) }', w=np.ones((8, 4), np.float32))
    batches = [{"x": np.ones((n, 8), np.float32)} for n in (3, 5)]
    report = graphopt.optimize(source, samples=batches, promise=False).report
    assert report.as_dict()["samples"] == {"batches": 2, "rows": 8}
    assert Line("samples: 2 batches, 8 tokens or rows") in report.elements()
    assert graphopt.optimize(source, promise=False).report.as_dict()["samples"] is None


# ---- caches that change with their heads ---------------------------------------------------------------------------------------------------

CACHED = """<ir_version: 10, opset_import: ["": 23]> g (float[B,S,32] x, float[B,4,P,8] past_k, float[B,4,P,8] past_v)
    => (float[B,S,32] y, float[B,4,T,8] present_k, float[B,4,T,8] present_v) {
    q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
    a, present_k, present_v = Attention<q_num_heads=4, kv_num_heads=4, is_causal=1>(q, k, v, "", past_k, past_v)
    y = MatMul(a, wo) }"""


@pytest.mark.parametrize("pipeline", ["merge-heads{kv-heads=2", "prune-heads{ratio=0.5 importance=magnitude"])
def test_samples_with_a_cache_of_heads(pipeline: str) -> None:
    """An empty cache fits in any size, also for the refit; a full one is refused in one line that says what to do."""
    rng = np.random.default_rng(0)
    source = parse(CACHED, **{n: (rng.standard_normal((32, 32)) / 6).astype(np.float32) for n in ("wq", "wk", "wv", "wo")})

    def batches(past: int) -> list[dict[str, Array]]:
        shapes = {"x": (4, 6, 32), "past_k": (4, 4, past, 8), "past_v": (4, 4, past, 8)}
        return [{n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()} for _ in range(5)]

    text = pipeline + " resize=past_k+past_v+present_k+present_v}"
    result = graphopt.optimize(source, text, samples=batches(0), promise=False)
    assert any("refitted: error" in r.message for record in result.report.passes for r in record.remarks)
    with pytest.raises(graphopt.GraphoptError, match=r"feed `past_k` as .* give samples with an empty `past_k`, or refit=false"):
        graphopt.optimize(source, text, samples=batches(3), promise=False)


# ---- messages -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pipeline", "without"),
    [
        ("prune-ffn{ratio=0.5}", "importance=magnitude refit=false"),
        ("factorize", "method=svd"),
        ("quantize{mode=static}", "mode=dynamic"),
        ("drop-layers", "layers=0+1"),
    ],
)
def test_an_error_about_samples_names_what_does_without(pipeline: str, without: str) -> None:
    with pytest.raises(PassError, match=f"add --samples DATA.*; or do without: {re.escape(without)}") as error:
        graphopt.optimize(model(BLOCK), pipeline, target="cpu{tune=off}")
    assert "\n" not in str(error.value)


def test_a_lossy_pass_that_did_nothing_says_so_at_the_end(tmp_path: Path) -> None:
    report = graphopt.optimize(model(RELU), "quantize, canonicalize", target="cpu{tune=off}").report
    told = [str(x) for x in report.remarks("warning")]
    assert told == [
        "warning quantize: `quantize` was asked for and changed nothing: nothing to quantize: no MatMul, Gemm or Gather reads a stored weight that fits"
    ]
    assert str(report).splitlines()[-1] == told[0]
    assert not graphopt.optimize(model(BLOCK), "quantize, fuse-rotary", target="cpu{tune=off}").report.remarks("warning")


def test_an_unknown_option_points_to_the_command_that_explains() -> None:
    for pipeline, target, command in (
        ("factorize{enrgy=0.5}", "cpu", "graphopt passes factorize"),
        ("canonicalize", "cpu{treads=2}", "graphopt targets cpu"),
    ):
        with pytest.raises(PipelineError) as error:
            graphopt.optimize(onnx.ModelProto(), pipeline, target=target)
        assert str(error.value).splitlines()[-1] == f"  `{command}` explains them"
