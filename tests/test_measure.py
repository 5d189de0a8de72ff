"""Measures: that each one says what it claims, and that no tolerance passes a wrong weight."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.core.errors import LoadError
from graphopt.graph import questions, shapes, size
from graphopt.run import clock as measure
from graphopt.run.distance import Running, compare_outputs, relative_l2

Array = np.ndarray[Any, Any]


class Clock:
    """A time of its own, so that these tests do not depend on the machine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("graphopt.run.clock.time.perf_counter", lambda: self.now)


class Fake:
    """A session that takes a given time; the first run of a block takes ten times as long (cold caches)."""

    last: Fake | None = None

    def __init__(self, clock: Clock, seconds: float, log: list[str], name: str) -> None:
        self.clock, self.seconds, self.log, self.name = clock, seconds, log, name

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        cold, Fake.last = Fake.last is not self, self
        self.clock.now += self.seconds * float(feeds["n"]) * (10 if cold else 1)
        self.log.append(self.name)
        return {}


def test_latency_is_interleaved_blocks_without_their_first_run(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log, done = Clock(monkeypatch), [], []
    sessions = {"base": Fake(clock, 1.0, log, "b"), "fast": Fake(clock, 0.5, log, "f")}
    feeds = {"one": {"n": np.array(1)}, "two": {"n": np.array(2)}}
    timings = measure.Timings({k: measure.latency(sessions, feed, rounds=2, block=3, progress=done.append) for k, feed in feeds.items()})
    assert "".join(log) == "bbbbffff" + "ffffbbbb" + "bbbbffff" + "ffffbbbb"
    assert timings.seconds["fast"] == (0.5, 1.0)
    assert timings.ratios("fast") == (2.0, 2.0)
    assert timings.speedup("fast") == pytest.approx(2.0)
    assert timings.speedup("base") == 1.0
    assert done[-1] == 1.0
    assert timings.as_dict()["models"]["fast"] == {"milliseconds": [500.0, 1000.0], "speedup": 2.0}


@pytest.mark.parametrize(
    ("seconds", "verdict"),
    [((1.0, 1.0), True), ((1.01, 1.01), True), ((1.03, 1.03), False), ((0.9, 1.06), False)],
)
def test_not_slower(seconds: tuple[float, float], verdict: bool) -> None:
    timed = {label: {"base": (1.0,), "new": (second,)} for label, second in zip("ab", seconds, strict=True)}
    assert measure.Timings(timed).not_slower("new") is verdict


def test_one_slow_round_makes_no_model_slower() -> None:
    """The paired rounds and the best ones must both say so; and rounds of several runs are judged together."""
    first = measure.Timings({"a": {"base": (1.0, 1.0, 1.0), "new": (1.0, 1.5, 1.5)}})
    assert first.not_slower("new"), "its best round is as good"
    slow = measure.Timings({"a": {"base": (1.0,), "new": (1.2,)}})
    assert not slow.not_slower("new")
    assert slow.plus(first).not_slower("new")
    assert slow.plus(first).rounds["a"]["new"] == (1.2, 1.0, 1.5, 1.5)


def test_size_counts_external_data_once(tmp_path: Path) -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["": 23]>'
        "g (float[64,64] x) => (float[64,64] y) <float[64,64] a, float[64,64] b> { h = Add(x, a) y = Add(h, b) }",
        initializers=[ir.tensor(np.ones((64, 64), np.float32), name=n) for n in "ab"],
    )
    ir.save(model, tmp_path / "in.onnx")
    ir.save(model, tmp_path / "out.onnx", external_data="out.data")
    assert size.size(tmp_path / "in.onnx") == (tmp_path / "in.onnx").stat().st_size
    together = (tmp_path / "out.onnx").stat().st_size + (tmp_path / "out.data").stat().st_size
    assert size.size(tmp_path / "out.onnx") == together > 2 * 64 * 64 * 4
    (tmp_path / "out.data").unlink()
    with pytest.raises(LoadError, match=r"out.data, which does not exist"):
        size.size(tmp_path / "out.onnx")
    with pytest.raises(LoadError, match="does not exist"):
        size.size(tmp_path / "absent.onnx")
    assert questions.parameters(model) == 2 * 64 * 64


def flops(text: str, **sizes: int) -> size.Flops:
    model = ir.from_onnx_text('<ir_version: 10, opset_import: ["": 23]>\n' + text)
    shapes.infer_shapes(model)
    return size.flops(model, sizes)


def test_flops() -> None:
    assert flops("g (float[b,s,4] x, float[4,6] w) => (float[b,s,6] y) { y = MatMul(x, w) }", b=2, s=3).total == 2 * 2 * 3 * 4 * 6
    assert flops("g (float[4,b] x, float[4,6] w) => (float[b,6] y) { y = Gemm<transA=1>(x, w) }", b=5).total == 2 * 5 * 4 * 6
    conv = flops("g (float[b,8,n] x, float[6,4,3] w) => (float[b,6,m] y) { y = Conv<group=2>(x, w) }", b=2, n=10)
    assert conv.total == 2 * (2 * 6 * 8) * (4 * 3)
    attention = "y = Attention<q_num_heads=4, kv_num_heads=2>(q, k, v)"
    grouped = flops(f"g (float[b,s,32] q, float[b,t,16] k, float[b,t,16] v) => (float[b,s,32] y) {{ {attention} }}", b=2, s=3, t=5)
    assert grouped.total == 2 * 2 * (2 * 4 * 3 * 5 * 8)


def test_flops_name_the_nodes_that_they_cannot_count() -> None:
    model = ir.from_onnx_text('<ir_version: 10, opset_import: ["": 23]> g (float[b,4] x, float[4,6] w) => (float[b,6] y) { y = MatMul(x, w) }')
    shapes.infer_shapes(model)
    model.graph.node(0).name = "project"
    assert size.flops(model, {}) == size.Flops(0, ("project",))


def distance(base: Array, other: Array) -> Running:
    found = Running()
    found.add(base, other)
    return found


def test_distance() -> None:
    base = np.array([[3.0, 4.0], [1.0, 0.0]], np.float32)
    other = np.array([[3.0, 4.5], [1.0, 0.0]], np.float32)
    found = distance(base, other)
    assert found.max_abs == 0.5
    assert found.l2 == pytest.approx(0.5 / math.sqrt(26))
    assert found.cosine_min == pytest.approx((9 + 18) / (5 * math.hypot(3, 4.5)))
    assert found.cosine == pytest.approx((1 + found.cosine_min) / 2)
    same = distance(base, base)
    assert (same.max_abs, same.l2, same.cosine, same.cosine_min) == (0.0, 0.0, 1.0, 1.0)
    assert distance(np.array(2.0), np.array(3.0)).max_abs == 1.0
    texts = np.array(["a"], object), np.array(["b"], object)
    assert distance(*texts).max_abs == 1.0
    for a, b in ((base, base.astype(np.float64)), (base, base[:1]), texts):
        difference = compare_outputs({"y": a}, {"y": b})
        assert difference is not None
        assert difference.error == math.inf


def test_nan_equals_nan_only_where_the_baseline_has_it() -> None:
    clean, nan = np.array([1.0, 2.0], np.float32), np.array([1.0, np.nan], np.float32)
    assert distance(nan, nan).max_abs == 0.0
    assert distance(clean, nan).max_abs == math.inf
    assert distance(nan, clean).max_abs == math.inf
    assert compare_outputs({"y": nan}, {"y": nan}) is None
    assert compare_outputs({"y": clean}, {"y": nan}) is not None
    assert compare_outputs({"y": nan}, {"y": clean}) is not None
    infinite = np.array([1.0, -np.inf], np.float32)
    assert compare_outputs({"y": infinite}, {"y": infinite}) is None
    assert compare_outputs({"y": infinite}, {"y": -infinite}) is not None


def test_relative_l2_takes_the_worst_output_over_all_batches() -> None:
    base = [{"a": np.array([3.0]), "b": np.array([1.0])}, {"a": np.array([4.0]), "b": np.array([1.0])}]
    other = [{"a": np.array([3.0]), "b": np.array([1.0])}, {"a": np.array([4.5]), "b": np.array([1.0])}]
    assert relative_l2(base, other) == pytest.approx(0.1)
    assert relative_l2(base, [{"a": np.zeros(2)}] * 2) == math.inf


def test_compare_outputs_names_the_worst_element() -> None:
    base = np.zeros((2, 3), np.float32)
    other = base.copy()
    other[1, 2], other[0, 1] = 0.5, 0.1
    found = compare_outputs({"x": base, "y": base}, {"x": base, "y": other})
    assert found is not None
    assert (found.output, found.index, found.error) == ("y", (1, 2), 0.5)
    assert str(found) == "output `y` at [1, 2] is 0.5, expected 0.0: off by 0.5, allowed 1e-05"
    assert "is float64[2, 3], expected float32[2, 3]" in str(compare_outputs({"y": base}, {"y": base.astype(np.float64)}))
    assert str(compare_outputs({"y": base}, {})) == "output `y` is missing"
    assert "is new" in str(compare_outputs({}, {"y": base}))
    big = np.array([2**60, 2**60 + 1])
    assert compare_outputs({"y": big}, {"y": big[::-1]}) is not None, "integers must be equal, also where float64 cannot tell"


def test_a_wrong_weight_is_seen_and_rounding_is_not() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((8, 64)), rng.standard_normal((64, 32))
    base = (x @ w).astype(np.float32)
    rounded = (x.astype(np.float32) @ w.astype(np.float32)).astype(np.float32)
    assert compare_outputs({"y": base}, {"y": rounded}) is None
    w[3, 5] *= 1.01
    assert compare_outputs({"y": base}, {"y": (x @ w).astype(np.float32)}) is not None


def test_a_fill_excuses_nothing() -> None:
    """Masked scores hold -3e38; measured by that, anything would be equal."""
    base = np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32)
    base[:, 12:] = np.finfo(np.float32).min
    wrong = base.copy()
    wrong[2, 3] += 0.01
    assert compare_outputs({"y": base}, {"y": wrong}) is not None
    other_fill = base.copy()
    other_fill[:, 12:] = -1e4
    assert compare_outputs({"y": base}, {"y": other_fill}) is not None


def test_the_steady_clock_does_not_count_what_others_take() -> None:
    """A session that sleeps takes no processor time; with more threads, or elsewhere, only the wall clock knows."""

    class Sleeper:
        def run(self, feeds: object) -> dict[str, np.ndarray]:
            time.sleep(0.01)
            return {}

    own, wall = (measure.latency({"s": Sleeper()}, {}, rounds=1, block=2, clock=measure.steady_clock(threads)) for threads in (1, None))
    assert own["s"][0] < 0.005 < wall["s"][0]
    assert measure.steady_clock(2) is time.perf_counter
