"""The gate: nothing is written that its target cannot open and run, or that the runtime computes wrongly."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import assert_same, parse, run  # type: ignore[import-not-found]
from test_cli import fails  # type: ignore[import-not-found]
from test_cli import run as cli
from test_pruning import CACHED  # type: ignore[import-not-found]
from test_tuning import model as blocks  # type: ignore[import-not-found]
from test_tuning import planted

import graphopt
from graphopt import Match, RewritePass
from graphopt.analysis.pieces import Activation
from graphopt.core.contract import Alternative, Context
from graphopt.core.errors import GraphoptError, TargetError
from graphopt.driver.lowering.ort_target import OrtTarget
from graphopt.graph.questions import all_nodes

# In ONNX text: three Relus, of which a planted pass spoils one or all.
TEXT = """<ir_version: 10, opset_import: ["": 21]> g (float[B,4] x) => (float[B,4] y) {
    a = Relu (x)  b = Neg (a)  c = Abs (b)  d = Identity (c)  e = Neg (d)  y = Abs (e) }"""
FEEDS = [{"x": np.linspace(-2, 2, 4 * n, dtype=np.float32).reshape(n, 4)} for n in (1, 3)]
PLUGIN = '''
import dataclasses
from typing import ClassVar

import numpy as np

from graphopt import Match, RewritePass
from graphopt.rewrite.engine import Driver


class Once(RewritePass[Match]):
    def match(self, node, ctx):
        return Match((node,), (node.outputs[0],))

    def run(self, model, ctx):
        return Driver(model, ctx).round(self)[0]


@dataclasses.dataclass(frozen=True)
class Plant(Once):
    """Each Abs -> itself, and one of them (`at`: its output; all = every one) -> an operator that the runtime has no kernel for."""

    at: str = "c"
    anchors: ClassVar[frozenset[str]] = frozenset({"Abs"})

    def build(self, op, m):
        if self.at in ("all", m.outputs[0].name):
            return [op.node("Absolute", (m.nodes[0].inputs[0],), _domain="nobody")]
        return [op.Max(m.nodes[0].inputs[0], op.Neg(m.nodes[0].inputs[0]))]


@dataclasses.dataclass(frozen=True)
class LossyPlant(Plant):
    """The same, asked for as a lossy pass."""

    exact: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True)
class LossyNan(Once):
    """Abs -> 0 / 0, as where 16 bits overflow."""

    exact: ClassVar[bool] = False
    anchors: ClassVar[frozenset[str]] = frozenset({"Abs"})

    def build(self, op, m):
        nothing = op.Sub(m.nodes[0].inputs[0], m.nodes[0].inputs[0])
        return [op.Div(nothing, nothing)]


@dataclasses.dataclass(frozen=True)
class Raises(Once):
    """It says two lines."""

    anchors: ClassVar[frozenset[str]] = frozenset({"Abs"})

    def build(self, op, m):
        raise ValueError("one\\ntwo")


@dataclasses.dataclass(frozen=True)
class Wrong(Once):
    """One of the Negs -> its input and a number more, which is another function."""

    anchors: ClassVar[frozenset[str]] = frozenset({"Neg"})

    def build(self, op, m):
        extra = 1.5 if m.outputs[0].name == "e" else 0.0
        return [op.Sub(op.const(np.array(extra, np.float32), "zero"), m.nodes[0].inputs[0])]
'''


@pytest.fixture
def plugin(tmp_path: Path) -> str:
    path = tmp_path / "planted.py"
    path.write_text(PLUGIN)
    return str(path)


def ops(model: Any) -> list[str]:
    return [node.op_type for node in all_nodes(model)]


def optimized(pipeline: str, plugin: str, **options: Any) -> graphopt.Result:
    return graphopt.optimize(parse(TEXT), pipeline, target="cpu{tune=off}", plugins=[plugin], **options)


def same(result: graphopt.Result) -> None:
    for feed in FEEDS:
        assert_same(run(parse(TEXT), feed), result.session().run(feed))


def test_what_loads_passes_and_the_report_says_so() -> None:
    report = graphopt.optimize(parse(TEXT), "canonicalize", target="cpu{tune=off}").report
    assert report.gate.passed is True
    assert report.as_dict()["gate"] == {"passed": True, "reason": "loaded and run; its numbers are those of the input"}


def test_a_single_change_is_taken_back_and_the_others_stay(plugin: str) -> None:
    result = optimized("canonicalize, plant{at=c}", plugin)
    assert sorted(ops(result.model)).count("Max") == 1
    assert ops(result.model).count("Abs") == 1
    assert result.report.gate.passed is True
    (remark,) = [r for r in result.report.remarks("missed") if r.message.startswith("taken back")]
    assert remark.pass_name == "plant"
    assert "change 1 of 2" in remark.message
    assert "Abs" in remark.message
    assert "Absolute" in remark.message  # what the runtime said
    same(result)


@pytest.mark.parametrize("promise", [False, True])
def test_a_step_is_taken_back_where_every_change_is_guilty(plugin: str, promise: bool) -> None:
    result = optimized("canonicalize, plant{at=all}", plugin, promise=promise)
    assert "Absolute" not in ops(result.model)
    assert "Identity" not in ops(result.model)
    assert {r.name: r.changes for r in result.report.passes}["plant{at=all}"] == 0
    same(result)


def test_wrong_numbers_of_an_exact_pass_are_taken_back(plugin: str) -> None:
    result = optimized("canonicalize, wrong", plugin)
    assert ops(result.model).count("Sub") == 1
    assert any("are not those of the input with runtime optimizations off: output `y`" in r.message for r in result.report.remarks("missed"))
    same(result)


def test_what_was_asked_for_is_refused_in_one_line(plugin: str, tmp_path: Path) -> None:
    for pipeline, options in (("lossy-plant", {}), ("plant", {"require": ["plant"]})):
        with pytest.raises(
            TargetError, match=r"nothing was written: step 2 of \d+, `.*plant`, change 1 of 2, breaks it at .*Abs.*Absolute.*asked for; --no-gate"
        ) as caught:
            optimized(f"canonicalize, {pipeline}", plugin, **options)
        assert "\n" not in str(caught.value)


def test_a_nan_is_no_loss_but_a_failure(plugin: str) -> None:
    with pytest.raises(TargetError, match=r"step 2 of \d+, `lossy-nan`, change 1 of 2, breaks it at .*output `y` has become NaN"):
        optimized("canonicalize, lossy-nan", plugin)
    text = TEXT.replace("Relu (x)", "Log (x)")  # of the same feeds, some of which are negative: NaN in the input
    result = graphopt.optimize(parse(text), "lossy-nan", target="cpu{tune=off}", plugins=[plugin], samples=[{"x": -np.ones((1, 4), np.float32)}])
    assert result.report.gate.passed is True


def test_what_a_pass_raises_is_one_line(plugin: str) -> None:
    with pytest.raises(GraphoptError, match=r"^pass 1 `raises` failed: ValueError: one two \(.*planted.py:\d+\)$"):
        optimized("raises", plugin)


def test_the_command_line_ends_with_one_line_and_no_file(plugin: str, tmp_path: Path) -> None:
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(parse(TEXT), source)
    command = ("optimize", source, "-o", out, "--plugin", plugin, "--pipeline", "lossy-plant", "--no-measure", "--target", "cpu{tune=off}")
    error = fails(tmp_path, *command)
    assert error.startswith("error: nothing was written: step 1 of ")
    assert "\n" not in error
    told = json.loads(cli(*command, "--no-gate", "--json").stdout)
    assert told["gate"] == {"passed": None, "reason": "--no-gate"}
    assert out.exists()


def test_the_input_itself_where_the_step_is_all_there_is(plugin: str, tmp_path: Path) -> None:
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(parse(TEXT), source)
    result = graphopt.optimize(source, "plant{at=all}", target="cpu{tune=off}", plugins=[plugin])
    result.save(out)
    assert out.read_bytes() == source.read_bytes()
    assert result.report.gate.passed is True


def test_without_the_gate_it_is_written_and_said(plugin: str) -> None:
    result = optimized("canonicalize, plant", plugin, gate=False)
    assert "Absolute" in ops(result.model)
    assert "not judged by opening and running it as its target does: --no-gate" in str(result.report)
    assert json.loads(json.dumps(result.report.as_dict()))["gate"]["passed"] is None


def test_an_input_that_does_not_load_itself_passes_with_a_word() -> None:
    text = TEXT.replace("Identity (c)", "nobody.Thing (c)").replace('"": 21', '"": 21, "nobody": 1')
    report = graphopt.optimize(parse(text), "canonicalize, fuse-norm", target="cpu{tune=off}").report
    assert report.gate.passed is (True if not report.changes else None)


def test_a_target_that_is_not_here() -> None:
    report = graphopt.optimize(parse(TEXT), "canonicalize", target="cuda").report
    assert report.gate.passed is None
    assert report.gate.reason == "target cuda cannot run here"
    report = graphopt.optimize(parse(TEXT), "canonicalize", target="cpu{processor=another}").report
    assert report.gate.reason.startswith("it is for another processor")


def test_two_guilty_changes_are_found_one_after_the_other(plugin: str) -> None:
    """Of a spoiled Abs and a wrong Neg each is taken back alone, and each has its remark."""
    result = optimized("canonicalize, plant{at=c}, wrong", plugin)
    told = [(r.pass_name, r.message) for r in result.report.remarks("missed") if r.message.startswith("taken back")]
    assert sorted(name for name, _ in told) == ["plant", "wrong"]
    assert (ops(result.model).count("Max"), ops(result.model).count("Sub")) == (1, 2)  # one Neg came with the Max
    same(result)


def test_with_check_numerics_several_samples_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    probe = OrtTarget.probe

    def listening(self: OrtTarget, model: ir.Model, feed: Any = None) -> Any:
        asked.append(feed["x"].shape)
        return probe(self, model, feed)

    monkeypatch.setattr(OrtTarget, "probe", listening)
    for check, expected in ((False, {(1, 4)}), (True, {(1, 4), (3, 4)})):
        asked.clear()
        result = graphopt.optimize(parse(TEXT), "canonicalize", target="cpu{tune=off}", samples=FEEDS, check_numerics=check)
        assert result.report.gate.passed is True
        assert set(asked) == expected


def test_inputs_that_became_smaller_are_fed_by_their_own_sizes() -> None:
    """A cache loses heads with the attention: the feed of the input does not fit the artifact."""
    rng = np.random.default_rng(0)
    sizes = {"wq": (32, 32), "wk": (32, 16), "wv": (32, 16), "wo": (32, 32)}
    source = parse(CACHED, **{name: (0.2 * rng.standard_normal(size)).astype(np.float32) for name, size in sizes.items()})
    pipeline = "prune-heads{heads=0:0+0:1 refit=false resize=past_k+past_v+present_k+present_v}"
    result = graphopt.optimize(source, pipeline, target="cpu{tune=off}")
    assert [list(v.shape or ())[1] for v in result.model.graph.inputs[1:]] == [1, 1]
    assert result.report.gate.passed is True


CRASH = '''
import dataclasses
from typing import ClassVar

from graphopt import Match, RewritePass
from graphopt.driver.lowering.ort_target import OrtTarget
from graphopt.graph.questions import producer


@dataclasses.dataclass(frozen=True)
class Plain(OrtTarget):
    """The CPU provider, told nothing in another way."""

    provider: ClassVar[str] = "CPUExecutionProvider"
    package: ClassVar[str] = "onnxruntime"

    def pipeline(self, level):
        return "canonicalize"

    def providers(self):
        return ()


@dataclasses.dataclass(frozen=True)
class Twice(RewritePass[Match]):
    """Neg(Neg(x)) -> x."""

    anchors: ClassVar[frozenset[str]] = frozenset({"Neg"})

    def match(self, node, ctx):
        inner = producer(node.inputs[0], "Neg")
        return None if inner is None else Match((inner, node), (node.outputs[0],))

    def build(self, op, m):
        return [m.nodes[0].inputs[0]]
'''


def test_a_change_that_kills_the_runtime_is_found_and_taken_back(tmp_path: Path) -> None:
    """A Transpose of 16 bits in front of a product: with nothing in front of it that is computed wide, ONNX Runtime dies of it."""
    plugin = tmp_path / "crash.py"
    plugin.write_text(CRASH)
    text = """<ir_version: 10, opset_import: ["": 21]> g (float16[S,B,8] x, float16[S,B,8] u) => (float16[B,S,8] y, float16[S,B,8] z) {
        c = Neg (u)  z = Neg (c)  a = Neg (x)  b = Neg (a)  t = Transpose <perm = [1,0,2]> (b)  y = MatMul (t, w) }"""
    source = parse(text, w=np.eye(8, dtype=np.float16))
    for promise in (False, True):
        result = graphopt.optimize(source, "twice", target="plain", plugins=[str(plugin)], promise=promise, shapes="1x4")
        assert ops(result.model).count("Neg") == 2
        (remark,) = [r for r in result.report.remarks("missed") if r.message.startswith("taken back")]
        assert "change 2 of 2" in remark.message
        assert "SIGSEGV" in remark.message
        feed = {name: np.linspace(-1, 1, 24, dtype=np.float16).reshape(1, 3, 8) for name in "xu"}
        assert_same(run(source, feed), result.session().run(feed), 2e-3)


@dataclasses.dataclass(frozen=True)
class Deadly(RewritePass[Match]):
    """A spelling of Gelu that the runtime dies of when it loads it."""

    anchors: ClassVar[frozenset[str]] = frozenset({"Gelu"})

    def match(self, node: ir.Node, ctx: Context) -> Match:
        return Match((node,), (node.outputs[0],))

    def build(self, op: Any, m: Match) -> Sequence[ir.Value]:
        turned = op.Transpose(op.Cast(m.nodes[0].inputs[0], to=ir.DataType.FLOAT16), perm=[1, 0, 2])
        product = op.MatMul(turned, op.const(np.eye(256, dtype=np.float16), "eye"))
        return [op.Gelu(op.Cast(op.Transpose(product, perm=[1, 0, 2]), to=ir.DataType.FLOAT))]


def test_a_candidate_that_kills_the_runtime_is_refused_and_not_timed() -> None:
    where = planted(Alternative(Activation(), "gelu"), Alternative(Activation(), "deadly", (Deadly(),)))
    result = graphopt.optimize(blocks(), "", target=where)
    (remark,) = [r for r in result.report.remarks("missed") if "deadly" in r.message]
    assert "it ended the process by SIGSEGV" in remark.message
    assert ops(result.model).count("Gelu") == 2
