"""The promise: an artifact that is slower than its input is taken back, as far as needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
from test_tuning import ATTENTION, BLOCKS, SlowGelu, model, ops, planted

import graphopt
from graphopt.analysis.pieces import Activation
from graphopt.core.contract import Alternative
from graphopt.core.errors import TargetError
from graphopt.run.clock import not_slower

PLUGIN = '''
import dataclasses
from typing import ClassVar

import numpy as np

from graphopt import Match, Pass, RewritePass
from graphopt.rewrite.engine import Driver


@dataclasses.dataclass(frozen=True)
class SlowDown(RewritePass[Match]):
    """Every Gelu is preceded by 20 Sin whose result counts for nothing: the numbers stay, the time does not."""

    exact: ClassVar[bool] = True
    anchors: ClassVar[frozenset[str]] = frozenset({"Gelu"})

    def match(self, node, ctx):
        return Match((node,), (node.outputs[0],))

    def build(self, op, m):
        x = wave = m.nodes[0].inputs[0]
        for _ in range(20):
            wave = op.Sin(wave)
        return [op.Gelu(op.Add(x, op.Mul(wave, op.const(np.zeros((), np.float32), "zero"))))]

    def run(self, model, ctx):
        return Driver(model, ctx).round(self)[0]


@dataclasses.dataclass(frozen=True)
class LossySlowDown(SlowDown):
    """The same, asked for as a lossy pass."""

    exact: ClassVar[bool] = False
'''


@pytest.fixture
def slow(tmp_path: Path) -> str:
    path = tmp_path / "slow.py"
    path.write_text(PLUGIN)
    return str(path)


def test_a_planted_regression_is_taken_back_and_the_rest_stays(slow: str) -> None:
    text = BLOCKS.replace("a = Gelu(hb)", "a0 = Gelu(hb)  u1 = Identity(a0)  a = Identity(u1)")
    result = graphopt.optimize(model(text), "canonicalize, slow-down", plugins=[slow], promise=True, shapes="4x32")
    assert "Sin" not in ops(result.model)
    assert "Sum" in ops(result.model)
    assert "Identity" not in ops(result.model)
    records = {r.name: r for r in result.report.passes}
    assert records["slow-down"].changes == 0
    (remark,) = [r for r in records["slow-down"].remarks if "taken back" in r.message]
    assert remark.kind == "missed"
    assert remark.facts["without"]["models"]["output"]["speedup"] > 2 * remark.facts["with"]["models"]["output"]["speedup"]
    assert result.report.speed_up.value is not None
    assert [t.shape for t in result.report.latency] == ["4x32"]


def test_a_slow_lowering_is_taken_back() -> None:
    """The table lists one spelling only, so that nothing is timed apart; the whole is."""
    where = planted(Alternative(Activation(), "fused", (SlowGelu(),)))
    result = graphopt.optimize(model(), "canonicalize", target=where, promise=True)
    assert "Sin" not in ops(result.model)
    assert any("taken back" in r.message and r.pass_name == "slow-gelu" for r in result.report.remarks("missed"))


def test_the_last_resort_is_the_input_byte_for_byte(slow: str, tmp_path: Path) -> None:
    """A pass that ran alone and is slow: nothing is left to keep."""
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(model(ATTENTION.replace("y = Attention", "z = Attention").replace("(q, k, v) }", "(q, k, v)  y = Gelu(z) }")), source)
    where = planted()
    result = graphopt.optimize(source, "slow-down", target=where, plugins=[slow], promise=True)
    assert result.report.changes == 0
    result.save(out)
    assert out.read_bytes() == source.read_bytes()


MISREAD = """
   <ir_version: 10, opset_import: ["" : 23]>
   g (float[B, S, 32] x, bool[B, 1, S, S] keep) => (float[B, S, 32] y) <float zero = {0}, float low = {-3.4028235e38}> {
      mask = Where(keep, zero, low)
      z = Attention <q_num_heads = 2, kv_num_heads = 2> (x, x, x, mask)
      y = Gelu(z)
   }
"""


def test_a_repair_of_the_input_is_never_taken_back(slow: str) -> None:
    """The input would be as fast, but the runtime misreads it: its own bytes are no answer."""
    result = graphopt.optimize(onnx.parser.parse_model(MISREAD), "slow-down", target=planted(), plugins=[slow], promise=True, shapes="4x32")
    assert "Sin" not in ops(result.model)
    assert "Max" in ops(result.model), "the mask stays raised"


@pytest.mark.parametrize(("pipeline", "require"), [("slow-down", ["slow-down"]), ("lossy-slow-down", [])])
def test_what_was_asked_for_by_name_stays_with_a_warning(slow: str, pipeline: str, require: list[str]) -> None:
    result = graphopt.optimize(model(), pipeline, target=planted(), plugins=[slow], promise=True, require=require)
    assert "Sin" in ops(result.model)
    (warning,) = [r for r in result.report.remarks("warning") if r.pass_name == "promise"]
    assert f"{pipeline} stays as it was asked for" in warning.message


def test_a_pipeline_of_your_own_is_not_judged_unless_asked(slow: str) -> None:
    result = graphopt.optimize(model(), "slow-down", plugins=[slow])
    assert "Sin" in ops(result.model)
    assert result.report.speed_up.value is None


def test_a_level_is_judged() -> None:
    result = graphopt.optimize(model(), level=1, shapes="4x32")
    assert result.report.speed_up.value is not None
    assert str(result.target) == "cpu{shapes=4x32}"


def test_a_target_that_cannot_run_here_says_so() -> None:
    where: Any = planted()

    def session(self: object, graph: object) -> Any:
        raise TargetError("no such device here")

    type(where).session = session
    result = graphopt.optimize(model(BLOCKS.replace("a = Gelu(hb)", "i = Identity(hb)  a = Gelu(i)")), "canonicalize", target=where, promise=True)
    assert result.report.changes
    assert result.report.speed_up.reason == "not measured: no such device here"


@pytest.mark.parametrize(
    ("ratios", "saved", "verdict"),
    [
        ((1.0, 1.0), (0.0, 0.0), True),
        ((0.96, 1.02), (-1.0, 1.0), True),
        ((0.94, 2.0), (-1.0, 1.0), False),
        ((0.97, 0.97), (-1.0, -1.0), False),
        ((0.8, 1.0), (-3e-6, 0.0), True),
    ],
)
def test_the_verdict(ratios: Sequence[float], saved: Sequence[float], verdict: bool) -> None:
    assert not_slower(ratios, saved) is verdict


def test_a_limit_of_the_user_is_not_taken_back(slow: str) -> None:
    """opset=17 has no Gelu: however slow the older spelling is, the input's own is no answer to what was asked for."""
    result = graphopt.optimize(model(), "slow-down", target="cpu{opset=17 tune=off}", plugins=[slow], promise=True, shapes="4x32")
    assert "Sin" not in ops(result.model)
    assert "Gelu" not in ops(result.model)
