"""simplify: onnxsim does its work, and the public interface survives it. (Each call starts a process: few tests, each with much to say.)"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from harness import build, check  # type: ignore[import-not-found]

import graphopt
from graphopt.core.contract import Context
from graphopt.core.errors import PassError
from graphopt.core.pipeline import PassManager, parse
from graphopt.core.registry import passes
from graphopt.graph.text import graph_text

pytest.importorskip("onnxsim", reason="onnxsim is not installed")

USEFUL = """(float[B,S,8] x, float[B] unused, float[8] c) => (float[B,S,8] y, int64[3] s) <
  float[8] c = {1,1,1,1,1,1,1,1}, float[8,8] w, float two = {2}, int64[1] e = {-1}> {
  d = Mul(c, two)
  a = Add(x, d)
  t = Transpose<perm = [0, 2, 1]>(a)
  u = Transpose<perm = [0, 2, 1]>(t)
  m = MatMul(u, w)
  i = Identity(m)
  q = Unsqueeze(i, e)
  r = Squeeze(q, e)
  y = Relu(r)
  s = Shape(x)
}"""
NOTHING = "(float[B,4] x) => (float[B,4] y) { y = Relu(x) }"
# what onnxsim 0.8 turns into a constant of 4 MB
GROWING = "(float[1024,1024] x) => (float[1024,1024] y) <int64[2] s = {1024, 1024}> { c = ConstantOfShape(s)\n y = Add(x, c) }"


def run(model: ir.Model, pipeline: str) -> tuple[int, list[str]]:
    context = Context(model)
    records = PassManager(parse(pipeline, passes())).run(model, context)
    return records[0].changes, [str(r) for r in context.remarks]


def test_f01_f02_the_interface_survives() -> None:
    rng = np.random.default_rng(0)
    feed = {"x": rng.standard_normal((2, 3, 8)), "unused": rng.standard_normal(2), "c": rng.standard_normal(8)}
    outcome = check(build(USEFUL), "simplify", feeds=[{k: v.astype(np.float32) for k, v in feed.items()}])
    assert [v.name for v in outcome.model.graph.inputs] == ["x", "unused", "c"]
    assert outcome.model.graph.inputs[2].const_value is not None
    assert [str(d) for d in outcome.model.graph.inputs[0].shape] == ["B", "S", "8"]
    assert outcome.ops["Transpose"] == 0
    assert outcome.said("applied", "onnxsim")


def test_weights_stay_in_the_order_of_the_input() -> None:
    """Not in that of a set of their names, which is another one in every process."""
    names = [f"w{k}" for k in (3, 1, 4, 15, 9, 2, 6, 5, 35, 8)]
    steps = "\n".join(f"  h{k + 1} = MatMul(h{k}, {name})" for k, name in enumerate(names))
    text = f"(float[B,40] h0) => (float[B,40] y) <{', '.join(f'float[40,40] {name}' for name in names)}> {{\n{steps}\n  i = Identity(h10)\n  y = Relu(i)\n}}"
    model = graphopt.load(build(text))
    order = list(model.graph.initializers)
    run(model, "simplify")
    assert (sorted(order), list(model.graph.initializers)) == (sorted(names), order)


def test_nothing_to_do_is_no_change() -> None:
    model = graphopt.load(build(NOTHING))
    before = graph_text(model)
    assert run(model, "simplify")[0] == 0
    assert graph_text(model) == before


def test_d05_weights_do_not_grow() -> None:
    outcome = check(build(GROWING), "simplify")
    assert outcome.ops["ConstantOfShape"] == 1


def test_d05_a_result_that_grew_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should onnxsim not heed its threshold, the limit holds all the same."""
    cls: Any = passes()["simplify"]
    monkeypatch.setattr(__import__(cls.__module__, fromlist=["_WORKER"]), "_WORKER", WORKER)
    model = graphopt.load(build(GROWING))
    before = graph_text(model)
    changes, remarks = run(model, "simplify{max-growth=2048}")
    assert changes == 0
    assert graph_text(model) == before
    assert any("its weights would grow by 4194288 bytes, max-growth is 2048" in r for r in remarks), remarks


WORKER = """
import sys
sys.modules["torch"] = None
import onnx, onnxsim
model, _ = onnxsim.simplify(onnx.load(sys.argv[1]), certify=False)
onnx.save(model, sys.argv[2])
"""


@pytest.mark.parametrize(
    ("worker", "complaint"),
    [
        ("import os\nos.abort()", "onnxsim crashed (signal 6)"),
        ("raise ValueError('no such thing')", "onnxsim failed: ValueError: no such thing"),
        ("import time\ntime.sleep(60)", "onnxsim took more than 1 seconds"),
        (
            "import sys, onnx\nm = onnx.load(sys.argv[1])\nm.graph.output[0].name = m.graph.node[0].output[0] = 'z'\nonnx.save(m, sys.argv[2])",
            "changed the outputs",
        ),
        (
            "import sys, onnx\nm = onnx.load(sys.argv[1])\nm.graph.node[0].input[0] = m.graph.input[0].name = 'q'\nonnx.save(m, sys.argv[2])",
            "made up the input `q`",
        ),
    ],
    ids=["crash", "error", "timeout", "outputs", "inputs"],
)
def test_whatever_goes_wrong_the_graph_stays_and_the_reason_is_told(worker: str, complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls: Any = passes()["simplify"]
    monkeypatch.setattr(__import__(cls.__module__, fromlist=["_WORKER"]), "_WORKER", worker)
    model = graphopt.load(build(NOTHING))
    before = graph_text(model)
    changes, remarks = run(model, "simplify{timeout=1}" if "sleep" in worker else "simplify")
    assert changes == 0
    assert graph_text(model) == before
    assert any("the graph stays as it was" in r and complaint in r for r in remarks), remarks


def test_without_onnxsim_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxsim" else known(name))
    with pytest.raises(PassError, match="pip install onnxsim"):
        run(graphopt.load(build(NOTHING)), "simplify")


def test_large_weights_do_not_leave_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What onnxsim is given is the structure: 1 MB of weights, a few hundred bytes of file."""
    sizes = []
    cls: Any = passes()["simplify"]
    call = cls._call

    def spy(self: object, source: Path, target: Path, skipped: Any) -> str | None:
        sizes.append(source.stat().st_size)
        return call(self, source, target, skipped)  # type: ignore[no-any-return]

    monkeypatch.setattr(cls, "_call", spy)
    text = "(float[B,512] x) => (float[B,512] y) <float[512,512] w> { a = Identity(x)\n m = MatMul(a, w)\n n = Identity(m)\n y = Tanh(n) }"
    outcome = check(build(text), "simplify")
    assert max(sizes) < 2000
    assert outcome.model.graph.initializers["w"].const_value.nbytes == 512 * 512 * 4


def test_e05_branches_with_initializers_of_one_name() -> None:
    text = """(float[B,4] x, bool c) => (float[B,4] y) <float zero = {0}> {
      y = If(c) <
        then_branch = t () => (float[B,4] a) <float k = {1}> { a1 = Add(x, k)
          a2 = Identity(a1)
          a = Relu(a2) },
        else_branch = e () => (float[B,4] b) <float k = {2}> { b = Mul(x, k) }
      >
    }"""
    outcome = check(build(text), "simplify", feeds=[{"x": np.ones((2, 4), np.float32), "c": np.array(flag)} for flag in (True, False)])
    assert outcome.ops["If"] == 1
