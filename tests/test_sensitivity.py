"""graphopt.calibration.effects: the effect of one change alone, measured by running what stands behind it and no more."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import parse, run  # type: ignore[import-not-found]

import graphopt
from graphopt.calibration.effects import effects, recipes
from graphopt.core import pipeline, registry
from graphopt.core.contract import Context
from graphopt.core.errors import GraphoptError, SampleError
from graphopt.run.distance import relative_l2
from graphopt.run.ort import OrtSession
from graphopt.run.segments import Segments

Array = np.ndarray[Any, Any]
TEXT = """
<ir_version: 10, opset_import: ["": 21]>
g (float[B,32] x, bool hot) => (float[B,32] y, float[B,32] z) <float[32,32] v, float[32,32] w, float[32,32] u, float[32] b> {
  p = MatMul(x, v)
  q = Tanh(p)
  r = MatMul(q, w)
  s = If(hot) <then_branch = hotter() => (float[B,32] t) { m = MatMul(r, u) t = Add(m, q) }, else_branch = colder() => (float[B,32] t) { t = Identity(q) }>
  y = MatMul(s, v)
  z = Gemm(r, u, b)
}
"""


def weights() -> dict[str, Array]:
    rng = np.random.default_rng(5)
    found = {name: (rng.standard_normal((32, 32)) / 6).astype(np.float32) for name in "vwu"}
    return {**found, "b": rng.standard_normal(32).astype(np.float32)}


def model() -> onnx.ModelProto:
    return parse(TEXT, **weights())


def samples() -> list[dict[str, Array]]:
    rng = np.random.default_rng(2)
    return [{"x": rng.standard_normal((n, 32)).astype(np.float32), "hot": np.array(hot)} for n, hot in ((3, True), (1, False), (6, True))]


def quantized(source: ir.Model, text: str) -> ir.Model:
    copy = source.clone()
    pipeline.PassManager(pipeline.parse(text, registry.passes())).run(copy, Context(copy))
    return copy


def loss(a: ir.Model, b: ir.Model) -> float:
    return relative_l2([run(a, f) for f in samples()], [run(b, f) for f in samples()])


CHOICES = {"dynamic": "quantize", "int4": "quantize{mode=weight-only bits=4 block=16}"}


@pytest.mark.parametrize("label", CHOICES)
def test_each_effect_is_that_of_the_whole_graph_with_one_node_changed(label: str) -> None:
    graph = graphopt.load(model())
    found = recipes(graph, quantized(graph, CHOICES[label]), label)
    assert {*found} == {"p", "r", "y", "z"}, "the multiply inside the branch is not of the main graph"
    got = effects(graph, samples(), {name: {name: recipe} for name, recipe in found.items()})
    for name, effect in got.items():
        node = next(n for n in graph.graph if n.outputs[0].name == name)
        text = CHOICES[label]
        text = text[:-1] + f" include={node.name}}}" if "{" in text else f"{text}{{include={node.name}}}"
        assert effect == pytest.approx(loss(graph, quantized(graph, text)), rel=1e-3), name
        assert 1e-3 < effect < 0.2


def test_values_of_one_change_are_changed_together_and_labels_do_not_mix() -> None:
    graph = graphopt.load(model())
    found = {label: recipes(graph, quantized(graph, text), label) for label, text in CHOICES.items()}
    both = {"p": found["int4"]["p"], "y": found["int4"]["y"], "r": found["dynamic"]["r"]}
    got = effects(graph, samples(), {"all": both, "none": {}})
    names = {name: next(str(n.name) for n in graph.graph if n.outputs[0].name == name) for name in both}
    text = f"quantize{{mode=weight-only bits=4 block=16 include={names['p']}+{names['y']}}}, quantize{{include={names['r']}}}"
    assert got["all"] == pytest.approx(loss(graph, quantized(graph, text)), rel=1e-3)
    assert got["none"] == 0


def test_only_what_stands_behind_a_change_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graphopt.load(model())
    found = recipes(graph, quantized(graph, CHOICES["int4"]), "int4")
    runs: list[int] = []
    kept = OrtSession.run
    monkeypatch.setattr(OrtSession, "run", lambda self, feeds: runs.append(1) or kept(self, feeds))
    effects(graph, samples()[:1], {"z": {"z": found["z"]}})
    assert len(runs) == 2 + 1 + 1, "the base: both pieces; the state at the cut: the first; the change: the second"


def test_the_state_holds_only_what_is_still_read() -> None:
    graph = graphopt.load(model())
    runner = Segments(graph, ["p", "r", "y", "z"])
    state = runner.begin(samples()[0])
    crossing = []
    for piece in range(len(runner)):
        state = runner.step(piece, state)
        crossing.append(set(state))
    assert crossing == [{"q", "hot"}, {"s", "r"}, {"y", "r"}, {"y", "z"}]
    expected = run(model(), samples()[0])
    for name, array in state.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-6)


def test_a_graph_is_not_changed_by_itself_and_shares_its_weights() -> None:
    graph = graphopt.load(model())
    assert recipes(graph, graph.clone(), "same") == {}


def test_errors_say_what_to_do() -> None:
    graph = graphopt.load(model())
    with pytest.raises(SampleError, match="there were 0"):
        effects(graph, [], {})
    with pytest.raises(GraphoptError, match="`nowhere` is made by no node"):
        Segments(graph, ["nowhere"])


def test_outputs_that_leave_the_numbers_are_infinitely_far() -> None:
    source = parse('<ir_version: 10, opset_import: ["": 21]> g (float[B,4] x) => (float[B,4] y) { p = Abs(x) y = Log(p) }')
    graph = graphopt.load(source)
    other = graphopt.load(parse('<ir_version: 10, opset_import: ["": 21]> g (float[B,4] x) => (float[B,4] y) { p = Neg(x) y = Log(p) }'))
    feed = {"x": np.ones((1, 4), np.float32)}
    assert effects(graph, [feed], {0: recipes(graph, other, "other")}) == {0: float("inf")}
