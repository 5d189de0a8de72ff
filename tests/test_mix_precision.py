"""mix-precision: within the budget, the cheaper the larger it is, each weight once, and a reason for what stays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import parse as model_of  # type: ignore[import-not-found]
from models import run

import graphopt
from graphopt.core.contract import Budget, Context
from graphopt.core.errors import PassError, PipelineError
from graphopt.core.pipeline import PassManager, parse
from graphopt.core.registry import passes
from graphopt.core.remarks import Remark
from graphopt.graph.interface import interface
from graphopt.graph.questions import nbytes
from graphopt.graph.verify import verify
from graphopt.run.distance import relative_l2
from graphopt.run.race import race
from graphopt.run.samples import Samples

Array = np.ndarray[Any, Any]
WIDTH = 64
LAYERS = "abcdefgh"
HEAD = """<ir_version: 10, opset_import: ["": 21]>
g (int64[B,S] ids) => (float[B,S,100] y) <float[100,64] table, """


def source() -> onnx.ModelProto:
    """A decoder in small: residual layers, and a head that reads the table."""
    rng = np.random.default_rng(11)
    stored = {name: (rng.standard_normal((WIDTH, WIDTH)) / 12 * 1.5**k).astype(np.float32) for k, name in enumerate(LAYERS)}
    lines = ["r0 = Gather(table, ids)"]
    for k, name in enumerate(LAYERS):
        lines += [f"p{k} = MatMul(r{k}, {name})", f"q{k} = Tanh(p{k})", f"r{k + 1} = Add(r{k}, q{k})"]
    lines += ["turned = Transpose <perm = [1, 0]> (table)", f"y = MatMul(r{len(LAYERS)}, turned)"]
    text = HEAD + ", ".join(f"float[64,64] {name}" for name in LAYERS) + "> {\n" + "\n".join(lines) + "\n}"
    return model_of(text, table=rng.standard_normal((100, WIDTH)).astype(np.float32), **stored)


def feeds() -> list[dict[str, Array]]:
    rng = np.random.default_rng(3)
    return [{"ids": rng.integers(0, 100, shape)} for shape in ((2, 7), (1, 12), (3, 4))]


def mixed(text: str, budget: float | None = None, proto: onnx.ModelProto | None = None, data: Any = None) -> tuple[ir.Model, list[Remark], int]:
    """The graph after the passes, checked; the remarks of the last one; its changes."""
    proto = source() if proto is None else proto
    model = graphopt.load(proto)
    public = interface(model)
    samples = Samples.load(feeds() if data is None else data, model)
    ctx = Context(model, samples=samples, budget=None if budget is None else Budget(budget))
    records = PassManager(parse(text, passes())).run(model, ctx)
    verify(model, interface=public)
    return model, records[-1].remarks, records[-1].changes


def loss(model: ir.Model, proto: onnx.ModelProto | None = None) -> float:
    proto = source() if proto is None else proto
    return relative_l2([run(proto, f) for f in feeds()], [run(model, f) for f in feeds()])


def choices(remarks: Sequence[Remark]) -> Mapping[str, str]:
    return {str(r.facts["weight"]): str(r.facts["choice"]) for r in remarks if "choice" in r.facts}


# ---- the pass -------------------------------------------------------------------------------------------------------------------------


def test_the_larger_the_budget_the_smaller_the_model_and_never_over_it() -> None:
    sizes = []
    for budget in (0.01, 0.05, 0.2, 0.4):
        model, remarks, changes = mixed("mix-precision", budget)
        assert loss(model) <= budget
        assert remarks[-1].facts["loss"] == pytest.approx(loss(model), rel=1e-2, abs=1e-6)
        assert changes == sum(r.kind == "applied" for r in remarks[:-1]) + choices(remarks)["table"].startswith("int")
        sizes.append(nbytes(model))
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4


def test_of_weights_of_one_size_those_that_suffer_most_keep_more_bits() -> None:
    _, remarks, _ = mixed("mix-precision{choices=int4+int8 loss=0.3}")
    suffers = {r.facts["weight"]: r.facts["effects"]["int4"] for r in remarks if "choice" in r.facts and r.facts["weight"] != "table"}
    found = choices(remarks)
    kept, cut = ([suffers[w] for w in suffers if (found[w] == "int4") == four] for four in (False, True))
    assert len(kept) >= 2
    assert len(cut) >= 2
    assert min(kept) > max(cut)


def test_the_graph_is_what_quantize_writes_and_tied_weights_are_stored_once() -> None:
    model, remarks, _ = mixed("mix-precision{loss=0.3}")
    found = choices(remarks)
    plain = graphopt.load(source())
    names = {str(r.facts["weight"]): r.node for r in remarks if "choice" in r.facts}
    head = next(str(n.name) for n in plain.graph if n.outputs[0].name == "y")
    steps = []
    for choice, options in (("int4", "bits=4"), ("int8", "block=64")):
        included = [names[w] for w, c in found.items() if c == choice] + ([head] if found["table"] == choice else [])
        assert included
        steps.append(f"quantize{{mode=weight-only {options} include={'+'.join(included)}}}")
    text = ", ".join(steps)
    PassManager(parse(text, passes())).run(plain, Context(plain))
    assert nbytes(model) == nbytes(plain)
    for feed in feeds():
        np.testing.assert_array_equal(run(model, feed)["y"], run(plain, feed)["y"])


@pytest.mark.parametrize("text", ["quantize", "quantize{rows=true}", "quantize{mode=static}", "quantize{mode=weight-only symmetric=false}"])
def test_one_choice_and_a_large_budget_is_that_pass(text: str) -> None:
    model, _, _ = mixed(f'mix-precision{{choices="{text}" loss=100}}')
    plain, _, _ = mixed(text)
    assert Counter(n.op_type for n in model.graph) == Counter(n.op_type for n in plain.graph)
    assert nbytes(model) == nbytes(plain)
    for feed in feeds():
        np.testing.assert_array_equal(run(model, feed)["y"], run(plain, feed)["y"])


def test_integer_products_share_the_rounding_of_their_input() -> None:
    text = """<ir_version: 10, opset_import: ["": 21]>
    g (float[B,64] x) => (float[B,64] y, float[B,64] z) <float[64,64] a, float[64,64] b> {
      y = MatMul(x, a)
      z = MatMul(x, b)
    }"""
    rng = np.random.default_rng(1)
    proto = model_of(text, a=rng.standard_normal((64, 64)).astype(np.float32), b=rng.standard_normal((64, 64)).astype(np.float32))
    model, _, changes = mixed("mix-precision{choices=dynamic loss=0.1}", proto=proto, data=[{"x": rng.standard_normal((5, 64)).astype(np.float32)}])
    assert changes == 2
    assert [n.op_type for n in model.graph].count("DynamicQuantizeLinear") == 1


def test_a_second_run_finds_nothing_left_and_an_exact_budget_changes_nothing() -> None:
    _, remarks, changes = mixed("mix-precision{loss=0.9}, mix-precision{loss=0.9}")
    assert changes == 0
    assert remarks[-1].kind == "missed"
    model, remarks, changes = mixed("mix-precision{loss=1e-6}")
    assert changes == 0
    assert loss(model) == 0
    assert {r.message.partition(";")[0] for r in remarks[:-1]} == {"stays as it is"}


def test_exclude_and_choices_that_save_nothing_are_named() -> None:
    plain = graphopt.load(source())
    name = next(str(n.name) for n in plain.graph if n.outputs[0].name == "p0")
    _, remarks, _ = mixed(f"mix-precision{{loss=0.5 exclude={name}}}")
    assert "a" not in choices(remarks)
    assert any(r.node == name and "excluded by" in r.message for r in remarks)


def test_what_no_choice_can_change_is_named() -> None:
    text = """<ir_version: 10, opset_import: ["": 21]>
    g (float[B,64] x, bool hot) => (float[B,64] y) <float[64,64] a, float[64,64] b, float[64,64] bad> {
      p = MatMul(x, a)
      q = MatMul(p, bad)
      y = If(hot) <then_branch = t() => (float[B,64] u) { u = MatMul(q, b) }, else_branch = e() => (float[B,64] w) { w = Neg(q) }>
    }"""
    rng = np.random.default_rng(1)
    stored = {name: rng.standard_normal((64, 64)).astype(np.float32) for name in ("a", "b", "bad")}
    stored["bad"][0, 0] = np.inf
    data = [{"x": rng.standard_normal((5, 64)).astype(np.float32), "hot": np.array(False)}]
    _, remarks, _ = mixed("mix-precision{loss=0.5}", proto=model_of(text, **stored), data=data)
    assert any("inside a subgraph, where its effect cannot be measured" in r.message for r in remarks)
    assert any("`bad` holds numbers that are not finite" in r.message for r in remarks)


def test_probabilities_on_a_grid_save_nothing_and_are_declined() -> None:
    text = """<ir_version: 10, opset_import: ["": 21]>
    g (float[B,2,S,16] q, float[B,2,S,16] k, float[B,2,S,16] v) => (float[B,2,S,16] y) {
      turned = Transpose <perm = [0, 1, 3, 2]> (k)
      scores = MatMul(q, turned)
      p = Softmax <axis = -1> (scores)
      y = MatMul(p, v)
    }"""
    rng = np.random.default_rng(1)
    data = [{name: rng.standard_normal((1, 2, 9, 16)).astype(np.float32) for name in "qkv"}]
    _, remarks, changes = mixed("mix-precision{choices=quantize-probabilities loss=0.5}", proto=model_of(text), data=data)
    assert changes == 0
    assert any("quantize-probabilities is no choice: 0 -> 5 bytes" in r.message for r in remarks)


def test_any_lossy_pass_is_a_choice_and_the_better_rounding_wins() -> None:
    gptq = "quantize{mode=weight-only bits=4 method=gptq}"
    model, remarks, _ = mixed(f'mix-precision{{choices=int8+int4+"{gptq}" loss=0.3}}')
    assert 0.15 < loss(model) <= 0.3
    assert gptq in choices(remarks).values()
    assert sum(c == "int4" for c in choices(remarks).values()) <= 1, "of equal sizes the smaller effect; the table is rounded to nearest by both"


@pytest.mark.parametrize(("batches", "largest"), [(1, 1.0), (2, 50.0)])
def test_choices_are_fitted_to_other_samples_where_there_are_enough(batches: int, largest: float) -> None:
    text = '<ir_version: 10, opset_import: ["": 21]> g (float[B,64] x) => (float[B,64] y) <float[64,64] w> { y = MatMul(x, w) }'
    proto = model_of(text, w=np.random.default_rng(1).standard_normal((64, 64)).astype(np.float32))
    data = [{"x": np.linspace(-size, size, 320, dtype=np.float32).reshape(5, 64)} for size in (50.0, 1.0)]
    model, _, _ = mixed(f'mix-precision{{choices="quantize{{mode=static}}" loss=100 batches={batches}}}', proto=proto, data=data)
    scale = next(n.inputs[1] for n in model.graph if n.op_type == "QuantizeLinear").const_value
    assert float(scale.numpy()) == pytest.approx(2 * largest / 255, rel=1e-3)


def test_weights_in_external_files_are_measured_too(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    ir.save(ir.from_proto(source()), path, external_data="weights.bin", size_threshold_bytes=0)
    result = graphopt.optimize(path, "mix-precision{loss=0.3}", target="cpu{tune=off}", samples=feeds(), promise=False)
    inside, _, _ = mixed("mix-precision{loss=0.3}")
    assert result.report.loss.value == pytest.approx(loss(inside), rel=0.02)


def test_a_run_over_the_budget_halves_its_share() -> None:
    (step,) = parse("mix-precision{loss=0.1}", passes())
    shares = []
    while step is not None:
        shares.append(step.share)
        step = step.weaker()
    assert shares == [1, 0.5, 0.25, 0.125, 0.0625]


def test_max_loss_of_the_run_is_the_budget() -> None:
    result = graphopt.optimize(source(), "mix-precision", target="cpu{tune=off}", samples=feeds(), max_loss=0.3, promise=False)
    assert 0.15 < result.report.loss.value <= 0.3
    assert result.report.output.bytes < result.report.input.bytes / 3


@pytest.mark.parametrize(
    ("text", "budget", "reason"),
    [
        ("mix-precision", None, "needs a budget; add --max-loss"),
        ("mix-precision{loss=0.1 exclude=nothing}", None, "fits the name of no"),
    ],
)
def test_errors_when_it_runs(text: str, budget: float | None, reason: str) -> None:
    with pytest.raises(PassError, match=reason):
        mixed(text, budget)


@pytest.mark.parametrize("options", ["choices=int5", "choices=canonicalize", "choices=mix-precision", "loss=0", "share=2", "batches=-1"])
def test_wrong_options_are_refused_with_a_caret(options: str) -> None:
    with pytest.raises(PipelineError, match=r"mix-precision|int5") as caught:
        parse(f"mix-precision{{{options}}}", passes())
    assert "^" in str(caught.value)


def test_text_round_trips() -> None:
    text = 'mix-precision{choices=int8+"quantize{mode=weight-only bits=4 method=gptq}" loss=0.02}'
    (step,) = parse(text, passes())
    assert parse(str(step), passes()) == [step]


# ---- measured time instead of bytes ---------------------------------------------------------------------------------------------------


def timed(monkeypatch: pytest.MonkeyPatch, seconds: Mapping[str, float], text: str) -> list[Remark]:
    """The remarks of a run in which every part takes these seconds."""

    def latency(sessions: Mapping[str, Any], given: Mapping[str, Any], **_: Any) -> dict[str, tuple[float, ...]]:
        for runner in sessions.values():
            assert all(np.isfinite(y).all() for y in runner.run(given).values())
        return {label: (seconds[label],) for label in sessions}

    monkeypatch.setattr("graphopt.run.race.latency", latency)
    result = graphopt.optimize(source(), text, target="quantized{tune=off}", samples=feeds(), promise=False)
    return [r for r in result.report.remarks("applied") + result.report.remarks("missed") if r.pass_name == "mix-precision"]


def test_what_is_not_clearly_faster_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"": 100e-6, "int4": 98e-6, "int8": 120e-6, "dynamic": 40e-6}
    said = timed(monkeypatch, seconds, "mix-precision{choices=int4+int8+dynamic cost=time loss=0.9}")
    assert set(choices(said).values()) == {"dynamic"}
    assert any("dynamic: effect" in r.message and "100 -> 40 us" in r.message for r in said)
    assert any(r.message == "int4 is no choice: 100 -> 100 us" for r in said)
    assert any(r.message == "int8 is no choice: 100 -> 120 us" for r in said)


def test_each_part_is_timed_as_the_target_runs_it_and_equal_parts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    kept = race
    monkeypatch.setattr("graphopt.run.race.race", lambda sessions, *rest, **more: runs.append(sessions) or kept(sessions, *rest, **more))
    result = graphopt.optimize(source(), "mix-precision{cost=time loss=0.5}", target="cpu{tune=off}", samples=feeds(), promise=False)
    assert [list(sessions) for sessions in runs] == [["", "int4", "int8"]] * 2, "the table with the head, and eight layers of one shape"
    assert result.report.remarks("applied") or result.report.remarks("missed")


def test_time_needs_a_target_that_runs_here_and_whole_projections() -> None:
    with pytest.raises(PassError, match="cost=time needs a target that runs on this machine"):
        mixed("mix-precision{cost=time loss=0.1}")
    with pytest.raises(PipelineError, match="expects bytes with heads=true"):
        parse("mix-precision{cost=time heads=true}", passes())
