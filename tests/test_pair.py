"""A pupil and its teacher walk over the samples once, side by side."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import parse  # type: ignore[import-not-found]

import graphopt
from graphopt.analysis.linear import Linears
from graphopt.calibration.pair import Pair
from graphopt.core.contract import Context
from graphopt.core.errors import SampleError
from graphopt.core.pipeline import PassManager
from graphopt.core.pipeline import parse as steps
from graphopt.core.registry import passes
from graphopt.core.replay import Spool
from graphopt.run import ort, segments

Array = np.ndarray[Any, Any]


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def stack(layers: int) -> onnx.ModelProto:
    """x + relu(x U) D, so many times."""
    text, weights, x = "", {}, "x"
    for k in range(layers):
        weights |= {f"u{k}": normal(16, 32, seed=k) / 4, f"d{k}": normal(32, 16, seed=k + 99) / 4}
        last = "y" if k == layers - 1 else f"s{k}"
        text += f"a{k} = MatMul({x}, u{k}) r{k} = Relu(a{k}) b{k} = MatMul(r{k}, d{k}) {last} = Add({x}, b{k})\n"
        x = last
    declared = ", ".join(f"float[{16 if n[0] == 'u' else 32},{32 if n[0] == 'u' else 16}] {n}" for n in weights)
    return parse(f'<ir_version: 10, opset_import: ["": 20]>\ng (float[B,S,16] x) => (float[B,S,16] y) <{declared}> {{ {text} }}', **weights)


def batches(count: int = 3) -> list[dict[str, Array]]:
    return [{"x": normal(2, 5 + k, 16, seed=50 + k)} for k in range(count)]


def nodes_run(monkeypatch: pytest.MonkeyPatch, layers: int) -> int:
    """How many nodes factorize{sequential} runs over all batches."""
    total = 0

    class Counted:
        def __init__(self, model: onnx.ModelProto, session: ort.OrtSession) -> None:
            self._size, self._session, self.inputs = len(model.graph.node), session, session.inputs

        def run(self, feeds: Any) -> dict[str, Array]:
            nonlocal total
            total += self._size
            return self._session.run(feeds)

    model, plain = graphopt.load(stack(layers)), ort.session
    with monkeypatch.context() as patch:
        patch.setattr(segments.ort, "session", lambda m, **more: Counted(m, plain(m, **more)) if isinstance(m, onnx.ModelProto) else plain(m, **more))
        text = "factorize{rank=4 sequential=true}"
        (record,) = PassManager(steps(text, passes())).run(model, Context(model, samples=batches()))
    assert record.changes == 2 * layers
    return total


def test_sequential_factors_cost_one_walk_of_each_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four nodes a layer of the teacher, six of the pupil with its factors, once a batch: twice the layers are twice the work."""
    small, large = (nodes_run(monkeypatch, layers) for layers in (4, 8))
    assert 0 < small <= 3 * 4 * (4 + 6)
    assert large <= 2.2 * small


def pair() -> tuple[Pair, ir.Model, ir.Model]:
    teacher = graphopt.load(stack(3))
    pupil = teacher.clone()
    weight = pupil.graph.initializers["u0"]
    weight.const_value = ir.tensor(weight.const_value.numpy() * 0.9, name="u0")  # type: ignore[union-attr]
    return Pair(pupil, teacher, batches(), Linears().compute(teacher, Context(teacher))), pupil, teacher


def test_what_both_are_fed_is_what_they_compute() -> None:
    """Own inputs, the teacher's, their moments, and the drift of the stream, beside runs of the whole models."""
    both, pupil, teacher = pair()
    own, other = ([x for x in Linears().compute(m, Context(m)) if x.node.outputs[0].name == "b2"] for m in (pupil, teacher))
    met = both.at(own[0], other[0])
    seen = met.moments()

    def values(model: ir.Model, feed: dict[str, Array]) -> tuple[Array, ...]:
        x = feed["x"].reshape(-1, 16)
        for k in range(3):
            u, d = (model.graph.initializers[f"{n}{k}"].const_value.numpy() for n in "ud")  # type: ignore[union-attr]
            before, r = x, np.maximum(x @ u, 0)
            x = x + r @ d
        return r, before

    (r, s), (z, t) = ([np.concatenate(v) for v in zip(*(values(m, f) for f in batches()), strict=True)] for m in (pupil, teacher))
    for expected, found in ((r.T @ r, seen.own), (r.T @ z, seen.cross), (z.T @ z, seen.other), (r.T @ (t - s), seen.drift)):
        assert found is not None
        np.testing.assert_allclose(found, expected / len(r), rtol=1e-4, atol=1e-5)
    assert len(met) == 3


def test_many_states_are_kept_in_files() -> None:
    model = graphopt.load(stack(2))
    stops = [x.node for x in Linears().compute(model, Context(model))]
    small, large = segments.Walk(model, batches(), held=1), segments.Walk(model, batches())
    assert isinstance(small.states, Spool)
    for node in stops:
        for ours, theirs in zip(small.until(node), large.until(node), strict=True):
            assert ours.keys() == theirs.keys()
            assert all(np.array_equal(ours[k], theirs[k]) for k in ours)


def test_a_pair_without_samples_says_so() -> None:
    model = graphopt.load(stack(1))
    with pytest.raises(SampleError, match="0 samples"):
        Pair(model, model.clone(), [], [])
