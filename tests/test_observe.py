"""Observation of values inside a graph: what the reference evaluator computes, one batch at a time."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from harness import build  # type: ignore[import-not-found]

import graphopt
from graphopt.calibration.moments import input_moments
from graphopt.core.contract import Context
from graphopt.core.errors import GraphoptError, SampleError
from graphopt.core.pipeline import PassManager, parse
from graphopt.core.registry import passes
from graphopt.run.observe import Limited, observable, shown

LOOP = """<ir_version: 10, opset_import: ["": 23]>
g (float[B,8] x) => (float[B,8] y) <float[8,8] v, float[8,8] w, int64 three = {3}, bool yes = {1}> {
  s = MatMul(x, v)
  y = Loop(three, yes, s) <body = b (int64 i, bool c, float[B,8] state) => (bool d, float[B,8] next) {
    d = Identity(c)  t = MatMul(state, w)  next = Tanh(t)
  }>
}"""
TEXT = """<ir_version: 10, opset_import: ["": 23]>
g (float[B,4] x, bool c) => (float[B,4] y) <float[4,4] w> {
  h = MatMul(x, w)
  z = Relu(h)
  y = If(c) <then_branch = t () => (float[B,4] a) { a = Neg(z) }, else_branch = e () => (float[B,4] b) { b = Exp(z) }>
}"""


def model() -> onnx.ModelProto:
    proto = onnx.parser.parse_model(TEXT)
    del proto.graph.value_info[:]
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.arange(16, dtype=np.float32).reshape(4, 4) - 7, "w"))
    return proto


def feeds(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal((k + 1, 4)).astype(np.float32), "c": np.array(True)} for k in range(count)]


def test_every_batch_is_seen_once_and_right() -> None:
    graph = graphopt.load(model())
    before = graphopt.load(model())
    values = {str(v.name): v for node in graph.graph for v in node.outputs} | {str(v.name): v for v in graph.graph.inputs}
    seen: dict[str, list[np.ndarray]] = {"x": [], "h": [], "z": []}
    batches = 0
    for _, arrays in shown(graph, [values[name] for name in seen], feeds(3)):
        batches += 1
        for name in seen:
            seen[name].append(arrays[values[name]])
    assert batches == 3
    weight = np.arange(16, dtype=np.float32).reshape(4, 4) - 7
    for k, feed in enumerate(feeds(3)):
        np.testing.assert_array_equal(seen["x"][k], feed["x"])
        np.testing.assert_allclose(seen["h"][k], feed["x"] @ weight, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(seen["z"][k], np.maximum(feed["x"] @ weight, 0), rtol=1e-5, atol=1e-5)
    assert [v.name for v in graph.graph.outputs] == [v.name for v in before.graph.outputs], "the graph itself stays as it was"


def test_what_cannot_be_observed_says_so() -> None:
    graph = graphopt.load(model())
    branch = next(n for n in graph.graph if n.op_type == "If").attributes["then_branch"].as_graph()
    inside = branch.outputs[0]
    with pytest.raises(GraphoptError, match="inside a subgraph"):
        next(shown(graph, [inside], feeds(1)))
    with pytest.raises(SampleError, match="0 samples"):
        next(shown(graph, [next(iter(graph.graph)).outputs[0]], []))


def test_inputs_alone_can_be_observed() -> None:
    graph = graphopt.load(model())
    seen = [arrays[graph.graph.inputs[0]] for _, arrays in shown(graph, [graph.graph.inputs[0]], feeds(2))]
    assert [x.shape for x in seen] == [(1, 4), (2, 4)]


def test_limited_batches_start_anew_for_every_group_of_values() -> None:
    graph, batches = graphopt.load(model()), feeds(4)
    few = Limited(batches, 6)  # 1 + 2 + 3 rows
    assert [len(list(few)) for _ in range(2)] == [3, 3]
    values = [graph.graph.inputs[0], next(iter(graph.graph)).outputs[0]]
    together, apart = (list(input_moments(Context(graph, samples=batches), values, rows=6, limit=limit)) for limit in (2**20, 1))
    assert [v for v, _ in together] == [v for v, _ in apart] == values
    for (_, a), (_, b) in zip(together, apart, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    x = np.concatenate([feed["x"] for feed in batches[:3]])
    np.testing.assert_allclose(apart[0][1], x.T @ x / len(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "step",
    ["quantize{mode=static}", "quantize{bias-correction=true}", "quantize{rows=auto}", "quantize{mode=weight-only bits=4 method=gptq block=0}",
     "quantize{mode=weight-only bits=4 method=awq block=0}", "smooth", "factorize{rank=2}"],
)  # fmt: skip
def test_what_a_loop_carries_is_not_observed(step: str) -> None:
    """Neither computed in the body nor an input of the model: calibrations leave it out, and none ends in an error."""
    graph, rng = graphopt.load(build(LOOP)), np.random.default_rng(0)
    (loop,) = (n for n in graph.graph if n.op_type == "Loop")
    assert not observable(graph, loop.attributes["body"].value.inputs[2])
    given = Context(graph, samples=[{"x": rng.standard_normal((4, 8)).astype(np.float32)}])
    PassManager(parse(step, passes())).run(graph, given)
