"""`optimize` from Python: what it promises about its input, its output and its report."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graphopt
from graphopt.core.errors import GraphoptError, LoadError, PassError, PipelineError, SampleError, SaveError, TargetError, VerifyError
from graphopt.driver.job import parse_target
from graphopt.run.ort import session

RNG = np.random.default_rng(0)

RELU = '<ir_version: 8, opset_import: ["" : 17]> g (float[n, 4] x) => (float[n, 4] y) { y = Relu(x) }'

# A feed-forward block behind a layer normalization, spelled out node by node.
BLOCK = """
<ir_version: 8, opset_import: ["" : 17]>
block (float[batch, seq, 8] x) => (float[batch, seq, 8] y)
<float[8, 32] up, float[32, 8] down, float[8] gamma, float[8] beta>
{
  mean = ReduceMean<axes: ints = [-1], keepdims: int = 1>(x)
  centred = Sub(x, mean)
  two = Constant<value: tensor = float {2.0}>()
  squared = Pow(centred, two)
  variance = ReduceMean<axes: ints = [-1], keepdims: int = 1>(squared)
  eps = Constant<value: tensor = float {0.00001}>()
  safe = Add(variance, eps)
  deviation = Sqrt(safe)
  normed = Div(centred, deviation)
  scaled = Mul(normed, gamma)
  normal = Add(scaled, beta)
  h = MatMul(normal, up)
  root = Constant<value: tensor = float {1.4142135}>()
  inner = Div(h, root)
  e = Erf(inner)
  one = Constant<value: tensor = float {1.0}>()
  f = Add(e, one)
  g = Mul(h, f)
  half = Constant<value: tensor = float {0.5}>()
  gelu = Mul(g, half)
  out = MatMul(gelu, down)
  y = Add(out, x)
}
"""
# Layer normalization with keepdims=0: it looks right and must not be fused.
DECLINED = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[4, 4] x) => (float[4, 4] y)
<float[4] gamma, float[4] beta, float two = {2.0}, float eps = {0.00001}>
{
  mean = ReduceMean<axes: ints = [-1], keepdims: int = 0>(x)
  centred = Sub(x, mean)
  squared = Mul(centred, centred)
  variance = ReduceMean<axes: ints = [-1], keepdims: int = 0>(squared)
  safe = Add(variance, eps)
  deviation = Sqrt(safe)
  normed = Div(centred, deviation)
  scaled = Mul(normed, gamma)
  y = Add(scaled, beta)
}
"""

LOSSY = '''
import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt import Context, Pass
from graphopt.core.strength import Dial


@dataclasses.dataclass(frozen=True)
class ShiftWeights(Pass):
    """Adds `by` times a weight to it; half of that is the milder setting."""

    by: float = 0.1
    stubborn: bool = False
    exact: ClassVar[bool] = False

    def run(self, model: ir.Model, ctx: Context) -> int:
        for value in model.graph.initializers.values():
            if value.const_value.size > 32:
                value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1 + self.by), name=value.name)
        return 1

    def weaker(self):
        return None if self.stubborn or self.by < 0.001 else dataclasses.replace(self, by=self.by / 2)


@dataclasses.dataclass(frozen=True)
class DialedShift(ShiftWeights):
    """The same, with a dial: `weaker` and what lies between two settings follow from it."""

    dials = (Dial("by", mild=0.001),)
    weaker = Pass.weaker

    def run(self, model: ir.Model, ctx: Context) -> int:
        return super().run(model, ctx) if ctx.fuel.burn() else 0


@dataclasses.dataclass(frozen=True)
class Rename(Pass):
    """Breaks the interface."""

    def run(self, model: ir.Model, ctx: Context) -> int:
        model.graph.outputs[0].name = "z"
        return 1


@dataclasses.dataclass(frozen=True)
class Broken(Pass):
    """Raises."""

    def run(self, model: ir.Model, ctx: Context) -> int:
        raise ValueError("no such luck")
'''


def model(text: str) -> onnx.ModelProto:
    """Parse, and give every declared weight seeded values: small integers around 1 for vectors, normal ones for matrices."""
    proto = onnx.parser.parse_model(text)
    shaped = list(proto.graph.value_info)
    rng = np.random.default_rng(1)
    have = {t.name for t in proto.graph.initializer}
    produced = {name for node in proto.graph.node for name in node.output}
    for info in shaped:
        if info.name in have | produced:
            continue
        dims = [d.dim_value for d in info.type.tensor_type.shape.dim]
        values = rng.standard_normal(dims) * (0.3 if len(dims) > 1 else 1.0)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values.astype(np.float32), info.name))
    del proto.graph.value_info[:]
    return proto


@pytest.fixture
def block() -> onnx.ModelProto:
    return model(BLOCK)


@pytest.fixture
def lossy(tmp_path: Path) -> str:
    path = tmp_path / "lossy.py"
    path.write_text(LOSSY)
    return str(path)


FEEDS = [{"x": RNG.standard_normal(shape).astype(np.float32)} for shape in ((1, 3, 8), (2, 5, 8))]


def ops(graph: ir.Model) -> list[str]:
    return [node.op_type for node in graph.graph]


def agree(before: onnx.ModelProto, after: graphopt.Result) -> None:
    base, ours = session(before, optimize=False), session(after.model, optimize=False)
    for feed in FEEDS:
        expected, found = base.run(feed)["y"], ours.run(feed)["y"]
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= 1e-5 * (1 + np.abs(expected).max())


# ---- the flow -------------------------------------------------------------------------------------------------------------------------


def test_a_block_is_fused_and_the_numbers_stay(block: onnx.ModelProto) -> None:
    result = graphopt.optimize(block)
    assert "LayerNormalization" in ops(result.graph)
    assert "Gelu" in ops(result.graph)
    assert "Erf" not in ops(result.graph)
    assert result.report.changes > 0
    agree(block, result)


@pytest.mark.parametrize("kind", ["file", "proto", "model"])
def test_every_way_in_gives_the_same_graph(block: onnx.ModelProto, tmp_path: Path, kind: str) -> None:
    onnx.save(block, tmp_path / "in.onnx")
    source = {"file": tmp_path / "in.onnx", "proto": block, "model": ir.from_proto(block)}[kind]
    assert ops(graphopt.optimize(source).model) == ops(graphopt.optimize(block).model)


def test_the_callers_model_is_not_touched(block: onnx.ModelProto, tmp_path: Path) -> None:
    before, graph = block.SerializeToString(), ir.from_proto(block)
    text = str(graph)
    onnx.save(block, tmp_path / "in.onnx")
    content = (tmp_path / "in.onnx").read_bytes()
    for source in (block, graph, tmp_path / "in.onnx"):
        graphopt.optimize(source, level=2, target="quantized").save(tmp_path / "out.onnx")
    assert block.SerializeToString() == before
    assert str(graph) == text
    assert (tmp_path / "in.onnx").read_bytes() == content


def test_the_callers_module_is_not_touched() -> None:
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Dropout(0.1), torch.nn.Linear(32, 8)).train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    result = graphopt.optimize(module, example_inputs=(torch.zeros(2, 8),))
    assert "Gelu" in ops(result.model)
    assert module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_text_or_level(block: onnx.ModelProto) -> None:
    assert graphopt.optimize(block, "canonicalize, fuse-activation").report.pipeline == "canonicalize, fuse-activation"
    assert "quantize" in graphopt.optimize(block, level=2).report.pipeline
    assert graphopt.optimize(block, "", level=2).report.pipeline == ""


def test_recipe_file(block: onnx.ModelProto, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.txt"
    recipe.write_text("# fuse what is exact\ncanonicalize\nfuse-norm\n")
    assert graphopt.optimize(block, f"@{recipe}").report.pipeline == "canonicalize, fuse-norm"


def test_fuel_stops_after_so_many_changes(block: onnx.ModelProto) -> None:
    counts = [graphopt.optimize(block, "fuse-activation, fuse-norm", fuel=fuel).report.changes for fuel in (0, 1, 2)]
    assert counts == [0, 1, 2]


def test_instruments_run(block: onnx.ModelProto, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dump = tmp_path / "dump"
    graphopt.optimize(block, verify_each=True, check_numerics=True, time=True, print_changed=True, dump=dump)
    assert "canonicalize" in capsys.readouterr().err
    assert {path.name for path in dump.iterdir()} >= {"00-input.onnx", "01-canonicalize.onnx"}


def test_progress_names_every_pass(block: onnx.ModelProto) -> None:
    told: list[tuple[str, float]] = []
    graphopt.optimize(block, "canonicalize, fuse-norm", progress=lambda text, done: told.append((text, done)))
    assert any("fuse-norm" in text for text, _ in told)
    assert [done for _, done in told] == sorted(done for _, done in told)


# ---- nothing to do --------------------------------------------------------------------------------------------------------------------


def test_nothing_to_do_gives_the_input_back(tmp_path: Path) -> None:
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(model(RELU), source)
    result = graphopt.optimize(source, level=2, target="quantized")
    result.save(out)
    assert result.report.changes == 0
    assert out.read_bytes() == source.read_bytes()
    assert result.report.output == result.report.input
    assert result.report.output.opset == 17
    assert "0 changes" in str(result.report)


def test_declined_candidates_say_why() -> None:
    result = graphopt.optimize(model(DECLINED), "fuse-norm")
    assert result.report.changes == 0
    missed = result.report.remarks("missed")
    assert missed, "the near miss is named"
    assert all(remark.node and remark.message for remark in missed)
    assert "LayerNormalization" not in ops(result.graph)


def test_quantize_without_weights_says_why() -> None:
    result = graphopt.optimize(model(RELU), "quantize{mode=dynamic}")
    assert result.report.changes == 0
    assert any("nothing to quantize" in remark.message for remark in result.report.remarks("missed"))


def test_a_larger_output_is_said(tmp_path: Path) -> None:
    plugin = tmp_path / "grow.py"
    plugin.write_text(
        "import dataclasses\nimport onnx_ir as ir\nfrom graphopt import Pass\n\n\n@dataclasses.dataclass(frozen=True)\nclass Grow(Pass):\n"
        "    def run(self, model, ctx):\n        model.metadata_props['note'] = 'x' * 1000\n        return 1\n"
    )
    report = graphopt.optimize(model(RELU), "grow", plugins=[str(plugin)]).report
    assert report.output.bytes > report.input.bytes
    assert any("bytes more than the input" in remark.message for remark in report.remarks("warning"))


@pytest.mark.parametrize(("level", "target"), [(1, "cpu{tune=off}"), (2, "cpu{tune=off}"), (2, "quantized{tune=off}")])
def test_a_second_run_changes_nothing(block: onnx.ModelProto, tmp_path: Path, level: int, target: str) -> None:
    first, second, third = (tmp_path / f"{name}.onnx" for name in ("first", "second", "third"))
    onnx.save(block, first)
    graphopt.optimize(first, level=level, target=target, promise=False).save(second)
    again = graphopt.optimize(second, level=level, target=target, promise=False)
    again.save(third)
    assert again.report.changes == 0
    assert third.read_bytes() == second.read_bytes()


# ---- require --------------------------------------------------------------------------------------------------------------------------


def test_require_is_content_when_the_pass_applied(block: onnx.ModelProto) -> None:
    graphopt.optimize(block, require=("fuse-norm", "fuse-activation"))


def test_require_gives_the_reason() -> None:
    with pytest.raises(GraphoptError, match="fuse-norm is required and changed nothing: "):
        graphopt.optimize(model(DECLINED), "fuse-norm", require=("fuse-norm",))


def test_require_of_a_pass_that_is_not_in_the_pipeline(block: onnx.ModelProto) -> None:
    with pytest.raises(PipelineError, match="`fuse-norm`"):
        graphopt.optimize(block, "canonicalize, fuse-norm", require=("fuse-nrom",))


# ---- errors ---------------------------------------------------------------------------------------------------------------------------


def test_a_pass_that_raises_is_named(block: onnx.ModelProto, lossy: str) -> None:
    with pytest.raises(PassError, match="pass 2 `broken` failed: ValueError: no such luck") as raised:
        graphopt.optimize(block, "canonicalize, broken", plugins=[lossy])
    assert (raised.value.pass_text, raised.value.position) == ("broken", 2)
    assert isinstance(raised.value.cause, ValueError)


def test_a_broken_interface_never_gets_out(block: onnx.ModelProto, lossy: str) -> None:
    with pytest.raises(VerifyError, match="the outputs were y, and are now z"):
        graphopt.optimize(block, "rename", plugins=[lossy])


def test_wrong_texts_are_found_before_anything_is_loaded(tmp_path: Path) -> None:
    absent = tmp_path / "absent.onnx"
    with pytest.raises(PipelineError, match="there is no pass `fuse-nrom`; did you mean `fuse-norm`"):
        graphopt.optimize(absent, "fuse-nrom")
    with pytest.raises(PipelineError, match="there is no target `cpuu`; did you mean `cpu`"):
        graphopt.optimize(absent, target="cpuu")
    with pytest.raises(PipelineError, match="has no option `thread`; did you mean `threads`"):
        graphopt.optimize(absent, target="cpu{thread=2}")
    with pytest.raises(PipelineError, match="expected one target"):
        graphopt.optimize(absent, target="cpu, quantized")
    with pytest.raises(LoadError, match=r"absent\.onnx"):
        graphopt.optimize(absent)


def test_numbers_out_of_range_in_a_target_are_refused(block: onnx.ModelProto) -> None:
    made: Any = parse_target("cpu")
    for field, value in (("threads", 0), ("opset", 6), ("opset", 99)):
        with pytest.raises(PipelineError, match=f"cpu: option `{field}` expects"):
            graphopt.optimize(block, target=dataclasses.replace(made, **{field: value}))


def test_what_cannot_be_written_is_refused_before_any_pass(block: onnx.ModelProto, tmp_path: Path) -> None:
    source = tmp_path / "in.onnx"
    onnx.save(block, source)
    told: list[str] = []
    with pytest.raises(SaveError, match="belongs to the input"):
        graphopt.optimize(source, writes=[source], progress=lambda text, done: told.append(text))
    assert told == ["load"]


def test_the_input_file_is_never_overwritten(block: onnx.ModelProto, tmp_path: Path) -> None:
    onnx.save(block, tmp_path / "in.onnx")
    before = (tmp_path / "in.onnx").read_bytes()
    with pytest.raises(SaveError, match="input"):
        graphopt.optimize(tmp_path / "in.onnx").save(tmp_path / "in.onnx")
    assert (tmp_path / "in.onnx").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["in.onnx"]


# ---- lossy passes are transactions ----------------------------------------------------------------------------------------------------


def test_within_the_budget_a_lossy_pass_stays(block: onnx.ModelProto, lossy: str) -> None:
    result = graphopt.optimize(block, "shift-weights{by=0.001}", samples=FEEDS, max_loss=0.01, plugins=[lossy])
    record = next(r for r in result.report.passes if r.name.startswith("shift-weights"))
    assert (record.name, record.changes) == ("shift-weights{by=0.001}", 1)
    assert 0 < result.report.loss.value <= 0.01


def test_over_the_budget_it_is_weakened(block: onnx.ModelProto, lossy: str) -> None:
    result = graphopt.optimize(block, "canonicalize, shift-weights{by=0.4}", samples=FEEDS, max_loss=0.05, plugins=[lossy])
    record = next(r for r in result.report.passes if r.name.startswith("shift-weights"))
    assert record.changes == 1
    assert 0 < float(record.name.partition("by=")[2].rstrip("}")) < 0.4
    tried = [remark for remark in record.remarks if remark.kind == "missed"]
    assert tried
    assert all(remark.facts["loss"] > 0.05 for remark in tried)
    assert 0 < result.report.loss.value <= 0.05


@pytest.mark.parametrize("budget", [0.04, 0.05, 0.06, 0.07])
def test_between_the_first_setting_within_the_budget_and_the_last_over_it(block: onnx.ModelProto, lossy: str, tmp_path: Path, budget: float) -> None:
    """Halving alone would stop at half of what may be; and what was tried last is not what stays."""
    options: dict[str, Any] = {"samples": FEEDS, "max_loss": budget, "plugins": [lossy]}
    halved = graphopt.optimize(block, "shift-weights{by=0.4}", **options)
    result = graphopt.optimize(block, "dialed-shift{by=0.4}", dump=tmp_path, fuel=1, **options)
    record = next(r for r in result.report.passes if r.name.startswith("dialed-shift"))
    by = float(record.name.partition("by=")[2].rstrip("}"))
    assert halved.report.loss.value <= result.report.loss.value <= budget
    assert result.report.loss.value > 0.85 * budget
    kept = [r for r in record.remarks if r.kind == "applied"]
    assert kept[-1].facts["loss"] == pytest.approx(result.report.loss.value)
    assert all(r.facts["loss"] > budget for r in record.remarks if r.kind == "missed")
    assert len(record.remarks) <= 16
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in block.graph.initializer}
    (dumped,) = tmp_path.glob("01-*.onnx")
    for graph in (result.graph, ir.load(dumped)):
        for name, value in graph.graph.initializers.items():
            if value.const_value is not None and value.const_value.size > 32:
                np.testing.assert_allclose(value.const_value.numpy(), stored[name] * (1 + by), rtol=1e-6)


def test_over_the_budget_without_a_weaker_setting_it_is_undone(block: onnx.ModelProto, lossy: str) -> None:
    result = graphopt.optimize(block, "shift-weights{by=0.4 stubborn}", samples=FEEDS, max_loss=0.05, plugins=[lossy])
    record = next(r for r in result.report.passes if r.name.startswith("shift-weights"))
    assert record.changes == 0
    assert "undone" in record.remarks[-1].message
    assert result.report.loss.value < 1e-6
    agree(block, result)


def test_after_an_undo_later_passes_see_the_old_graph(block: onnx.ModelProto, lossy: str) -> None:
    text = "canonicalize, shift-weights{by=0.4 stubborn}, fuse-norm, fuse-activation"
    result = graphopt.optimize(block, text, samples=FEEDS, max_loss=0.05, plugins=[lossy], verify_each=True)
    assert {"LayerNormalization", "Gelu"} <= set(ops(result.graph))
    agree(block, result)


def test_a_metric_judges_instead_of_the_distance(block: onnx.ModelProto, lossy: str) -> None:
    def metric(run: graphopt.core.Session) -> float:
        return float(np.abs(run.run(FEEDS[1])["y"] - FEEDS[1]["x"]).mean())  # grows with the weights: the pass is an improvement

    result = graphopt.optimize(block, "shift-weights{by=0.4}", metric=metric, max_loss=0.0, plugins=[lossy])
    assert result.report.changes >= 1
    assert result.report.loss.value < 0
    assert result.report.loss.how == "relative fall of the metric"


def test_a_budget_without_samples_names_the_flag(block: onnx.ModelProto, lossy: str) -> None:
    with pytest.raises(SampleError, match="--samples"):
        graphopt.optimize(block, "shift-weights", max_loss=0.01, plugins=[lossy])
    graphopt.optimize(block, "canonicalize", max_loss=0.01)  # nothing lossy, nothing to judge


def test_int8_within_a_budget(block: onnx.ModelProto) -> None:
    kept = graphopt.optimize(block, "quantize{mode=dynamic}", target="quantized", samples=FEEDS, max_loss=0.2)
    undone = graphopt.optimize(block, "quantize{mode=dynamic}", target="quantized", samples=FEEDS, max_loss=1e-6)
    assert kept.report.loss.value is not None
    assert undone.report.loss.value < 1e-5
    assert not any(record.changes for record in undone.report.passes if record.name.startswith("quantize"))


# ---- the report -----------------------------------------------------------------------------------------------------------------------


def test_report_as_json(block: onnx.ModelProto, tmp_path: Path) -> None:
    onnx.save(block, tmp_path / "in.onnx")
    result = graphopt.optimize(tmp_path / "in.onnx", samples=FEEDS)
    result.measure("1x4", quick=True)
    artifact = result.save(tmp_path / "out.onnx")
    result.report.write(tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report) >= {"input", "output", "passes", "latency", "loss", "target", "speed_up", "compression_ratio"}
    assert set(report["input"]) == set(report["output"]) == {"nodes", "bytes", "parameters", "opset", "ir_version", "metadata"}
    assert report["input"]["bytes"] == (tmp_path / "in.onnx").stat().st_size
    assert report["output"]["bytes"] == artifact.nbytes == (tmp_path / "out.onnx").stat().st_size
    assert report["latency"][0]["input_ms"] > 0
    assert report["speed_up"]["value"] > 0
    assert report["loss"]["value"] < 1e-5
    kinds = {remark["kind"] for entry in report["passes"] for remark in entry["remarks"]}
    assert kinds <= {"applied", "missed", "warning"}
    assert all(set(entry) == {"name", "changes", "seconds", "remarks"} for entry in report["passes"])
    assert any(rise["what"] == "opset" and rise["before"] == 17 for rise in report["rises"])


def test_numbers_that_are_missing_say_why(block: onnx.ModelProto) -> None:
    report = graphopt.optimize(block, promise=False).report.as_dict()
    assert report["loss"]["value"] is None
    assert "--samples" in report["loss"]["reason"]
    assert report["speed_up"]["value"] is None
    assert report["speed_up"]["reason"]


def test_a_target_that_cannot_run_here_leaves_the_reason(block: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    result = graphopt.optimize(block)

    def absent(self: object, graph: object) -> None:
        raise TargetError("the runtime is not on this machine")

    monkeypatch.setattr(type(result.target), "session", absent)
    report = result.measure("1x4", quick=True)
    assert report.speed_up.value is None
    assert "the runtime is not on this machine" in str(report.speed_up.reason)


def test_report_as_html_needs_nothing_else(block: onnx.ModelProto, tmp_path: Path) -> None:
    graphopt.optimize(block).report.write(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "fuse-norm" in page
    assert not any(word in page for word in ("http://", "https://", "<script", "src="))


def test_a_report_of_another_kind_is_refused(block: onnx.ModelProto, tmp_path: Path) -> None:
    with pytest.raises(SaveError, match=r"FILE\.json or FILE\.html or FILE\.md"):
        graphopt.optimize(block).report.write(tmp_path / "report.txt")


def test_measure_names_its_shapes(block: onnx.ModelProto) -> None:
    result = graphopt.optimize(block)
    report = result.measure("1x4,2x6", quick=True)
    assert [timing.shape for timing in report.latency] == ["1x4", "2x6"]
    with pytest.raises(GraphoptError, match="BATCHxSEQUENCE"):
        result.measure("4 by 6")
