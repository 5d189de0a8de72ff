"""A run as an object: it repeats, tells nothing twice, never times to judge, and stops assuming that an artifact is one .onnx file."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from test_api import BLOCK, FEEDS, LOSSY
from test_api import model as block_model
from test_cli import fails, run
from test_mix_precision import feeds as decoder_feeds
from test_mix_precision import source as decoder
from test_tuning import BLOCKS, SLOW, model, planted

import graphopt
from graphopt import Samples
from graphopt.core.errors import PassError, PipelineError, SaveError
from graphopt.core.registry import targets
from graphopt.driver.job import Job, parse_target
from graphopt.driver.loss import Loss
from graphopt.driver.lowering import ort_target as provider
from graphopt.driver.lowering.cache import Cache
from graphopt.driver.lowering.extract import signature
from graphopt.run.race import SHAPES


@pytest.fixture
def lossy(tmp_path: Path) -> str:
    path = tmp_path / "lossy.py"
    path.write_text(LOSSY)
    return str(path)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "cache" / "tuning.sqlite"))


# ---- the run --------------------------------------------------------------------------------------------------------------------------


def test_a_job_runs_again_with_other_fuel_and_loads_once() -> None:
    told: list[str] = []
    job = Job.make(block_model(BLOCK), "canonicalize, fuse-norm", target="cpu{tune=off}", progress=lambda text, done: told.append(text))
    whole, again = job.run(), job.run()
    assert [str(r.model) for r in (whole, again)] == [str(whole.model)] * 2
    assert [n.op_type for n in whole.model.graph] == [n.op_type for n in again.model.graph]
    assert whole.report.changes > 2
    for count in range(3):
        assert dataclasses.replace(job, fuel=count).run().report.changes == count
    assert told.count("load") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "2"}, "level expects a whole number, such as 2, found '2'"),
        ({"fuel": -1}, "fuel expects 0 or more changes, found -1"),
        ({"max_loss": float("nan")}, "max_loss expects a fraction of 0 or more, such as 0.01 for 1 %, found nan"),
        ({"max_loss": -1.0}, "found -1.0"),
        ({"require": "quantize"}, "require expects a list of names"),
    ],
)
def test_values_that_mean_nothing_are_refused_before_loading(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PipelineError, match=message.replace("[", r"\[")):
        Job.make("absent.onnx", **options)


def test_its_parts_know_the_run(lossy: str) -> None:
    job = Job.make(block_model(BLOCK), "shift-weights", samples=FEEDS, max_loss=0.1, plugins=[lossy], target="cpu{tune=off}")
    ctx = job.context(job.model)
    assert (ctx.target, ctx.samples, ctx.original, ctx.passes) == (job.target, job.samples, job.original, job.known)
    assert ctx.budget is not None
    assert ctx.budget.max_loss == 0.1
    assert "shift-weights" in job.known
    assert job.loss.of_graph(job.model) < 1e-5
    lowered = job.lower(job.model)
    assert lowered is not job.model
    job.target.session(lowered)


def test_options_of_loading_are_the_same_everywhere() -> None:
    for call in (graphopt.load, graphopt.optimize):
        with pytest.raises(TypeError, match="example_inputz`; did you mean `example_inputs`"):
            call(block_model(BLOCK), example_inputz=())  # type: ignore[operator]
        with pytest.raises(graphopt.GraphoptError, match="task and with_past are for Hugging Face folders"):
            call(block_model(BLOCK), task="x")  # type: ignore[operator]
    with pytest.raises(graphopt.GraphoptError, match="task and with_past are for Hugging Face folders"):
        graphopt.compare(block_model(BLOCK), block_model(BLOCK), task="x")


# ---- fuel -----------------------------------------------------------------------------------------------------------------------------

BURNING = '''
import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt import Pass


@dataclasses.dataclass(frozen=True)
class Shift(Pass):
    """Adds `by` times a weight to it, where there is fuel for the weight; a tenth of that is the milder setting."""

    by: float = 0.5
    exact: ClassVar[bool] = False

    def run(self, model, ctx):
        changes = 0
        for value in model.graph.initializers.values():
            if value.const_value.size > 32 and ctx.fuel.burn():
                value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1 + self.by), name=value.name)
                changes += 1
        return changes

    def weaker(self):
        return dataclasses.replace(self, by=self.by / 10)
'''


def test_an_undone_try_gives_its_fuel_back(tmp_path: Path) -> None:
    plugin = tmp_path / "burning.py"
    plugin.write_text(BURNING)
    text, more = "shift", {"plugins": [str(plugin)], "samples": FEEDS, "max_loss": 0.2, "target": "cpu{tune=off}"}
    whole = graphopt.optimize(block_model(BLOCK), text, **more)  # type: ignore[arg-type]
    assert "shift{by=0.05}" in [r.name for r in whole.report.passes], "the first try was undone"
    changes = whole.report.changes
    limited = graphopt.optimize(block_model(BLOCK), text, fuel=changes, **more)  # type: ignore[arg-type]
    assert limited.report.changes == changes, "so much fuel is enough for every change that stays"


# ---- what needs a clock -----------------------------------------------------------------------------------------------------------------


def nowhere(*args: object, **kwargs: object) -> Any:
    raise AssertionError("somebody asked the clock")


def test_the_loss_never_tunes(monkeypatch: pytest.MonkeyPatch) -> None:
    where, graph = planted(*SLOW), graphopt.load(model())
    loss = Loss(where, graph, Samples([{"x": np.ones((1, 4, 64), np.float32)}]), None)
    monkeypatch.setattr("graphopt.run.race.latency", nowhere)
    assert loss.of_graph(graph) < 1e-5
    assert not Cache().rows()


def portable() -> Any:
    """A target that runs here, and whose timings are not kept: it knows no `machine`."""
    base: Any = targets()["cpu"]

    class Portable(base):  # type: ignore[misc]
        def machine(self) -> None:
            return None

    return dataclasses.dataclass(frozen=True)(Portable)


def test_what_runs_here_can_be_timed_also_where_no_timing_is_kept() -> None:
    where = portable()(tune="off", shapes=("2x8",))
    result = graphopt.optimize(decoder(), "mix-precision{cost=time loss=0.9}", target=where, samples=decoder_feeds(), promise=False)
    assert any(" us" in r.message for r in result.report.remarks("applied") + result.report.remarks("missed"))
    result = graphopt.optimize(model(), "canonicalize", target=where, promise=True)
    assert result.report.speed_up.value is not None or not result.report.changes


def test_a_latency_budget_asks_whether_it_runs_here() -> None:
    here = portable()(tune="off", shapes=("2x8",))
    result = graphopt.optimize(model(), "prune-ffn{latency=0.1 importance=magnitude refit=false multiple=1}", target=here, promise=False)
    assert any("of the latency saved" in r.message for r in result.report.remarks("applied"))
    gone: Any = portable()
    gone.runs_here = lambda self: False
    with pytest.raises(PassError, match="a latency budget needs a target that runs here"):
        graphopt.optimize(model(), "prune-ffn{latency=0.1 importance=magnitude refit=false}", target=gone(tune="off"), promise=False)


def test_measure_takes_the_sizes_of_the_target_or_the_default_ones() -> None:
    for target, shapes in (("cpu{tune=off shapes=1x3+2x8}", ["1x3", "2x8"]), ("cpu{tune=off}", [f"{b}x{s}" for b, s in SHAPES])):
        result = graphopt.optimize(model(), "canonicalize", target=target)
        assert [t.shape for t in result.measure(quick=True).latency] == shapes


def test_tune_fill_says_what_can_be_timed(tmp_path: Path) -> None:
    source, plugin = tmp_path / "in.onnx", tmp_path / "bare.py"
    onnx.save(model(), source)
    plugin.write_text(BARE)
    assert "bare has no table of spellings: nothing to time" in run("tune", "fill", source, "--plugin", plugin, "--target", "bare").stdout
    assert "cannot run here" in fails(tmp_path, "tune", "fill", source, "--target", "tensorrt")


BARE = '''
import dataclasses

from graphopt import Target
from graphopt.io.save import save
from graphopt.run import reference


@dataclasses.dataclass(frozen=True)
class Bare(Target):
    """A runtime without a table, which says nothing of itself but what it must."""

    def pipeline(self, level):
        return ""

    def lowerings(self):
        return []

    def supports(self, node):
        return True

    def save(self, model, path):
        return save(model, path)

    def session(self, model):
        return reference.session(model)
'''


def test_the_key_of_a_piece_holds_how_it_divides() -> None:
    """Split [8, 56] and [32, 32] take another time, and so do other axes; numbers that are no sizes make no other work."""

    def key(split: tuple[int, int], scale: float = 1.0) -> str:
        text = """<ir_version: 10, opset_import: ["" : 23]> g (float[B, 64] x) => (float[B, P] y)
        <int64[2] sizes, float[1] scale> { a, b = Split <axis = 1> (x, sizes) y = Mul(a, scale) }"""
        graph = ir.from_onnx_text(
            text, initializers=[ir.tensor(np.array(split, np.int64), name="sizes"), ir.tensor(np.array([scale], np.float32), name="scale")]
        )
        return signature(graph, None)

    assert key((8, 56)) != key((32, 32))
    assert key((8, 56)) == key((8, 56), 2.0)


# ---- plugins --------------------------------------------------------------------------------------------------------------------------


def test_a_plugin_can_be_a_choice_of_mix_precision(lossy: str) -> None:
    text = 'mix-precision{choices=int8+"shift-weights{by=0.001}" loss=0.5}'
    result = graphopt.optimize(decoder(), text, target="cpu{tune=off}", samples=decoder_feeds(), plugins=[lossy])
    assert str(result.report.pipeline) == text
    assert any("shift-weights" in r.message for r in result.report.remarks("applied") + result.report.remarks("missed"))
    with pytest.raises(PipelineError, match="there is no pass `shift-weights`"):
        graphopt.optimize(decoder(), text, samples=decoder_feeds())


def test_compare_reads_the_plugins() -> None:
    with pytest.raises(PipelineError, match=r"plugin file absent\.py does not exist"):
        graphopt.compare(decoder(), decoder(), samples=decoder_feeds(), plugins=["absent.py"])


# ---- targets ------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_list(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A runtime in which listing the kernels fails, and would take this process along."""
    monkeypatch.setattr("onnxruntime.capi.onnxruntime_pybind11_state.get_all_opkernel_def", nowhere)
    provider.registered.cache_clear()
    yield
    provider.registered.cache_clear()


def test_kernels_are_listed_in_a_process_of_their_own(no_list: None, monkeypatch: pytest.MonkeyPatch) -> None:
    where, fused = parse_target("cpu"), ir.node("DynamicQuantizeMatMul", [None], domain="com.microsoft")
    assert where.supports(fused)
    provider.registered.cache_clear()
    monkeypatch.setattr(provider, "_LISTING", "import os; os.abort()")
    assert not where.supports(fused), "nothing is known of the runtime's own operators"
    assert where.supports(ir.node("Add", [None, None])), "of the standard, all is expected"


def test_no_target_is_asked_for_what_it_may_not_have() -> None:
    """What the driver reads is declared by the base: a target with no field runs through all of it."""
    bare: dict[str, Any] = {}
    exec(compile(BARE, "bare.py", "exec"), bare)
    where = bare["Bare"]()
    assert (where.shapes, where.threads, where.opset, where.tune, where.processor) == ((), 1, None, "on", None)
    assert where.runs_here()
    result = graphopt.optimize(block_model(BLOCK), "canonicalize", target=where, promise=True, shapes="1x2")
    assert [t.shape for t in result.report.latency] == ["1x2"]


FOLDER = '''
import dataclasses
from pathlib import Path
from typing import ClassVar

from graphopt.core import Artifact, Target
from graphopt.core.contract import Context
from graphopt.run import reference


@dataclasses.dataclass(frozen=True)
class Parts(Target):
    """Writes a folder: the operators as text, the weights as bytes."""

    writes_onnx: ClassVar[bool] = False

    def pipeline(self, level):
        return "canonicalize"

    def lowerings(self):
        return []

    def supports(self, node):
        return True

    def session(self, model):
        return reference.session(model)

    def finish(self, model):
        copy = model.clone()
        copy.graph.name = "finished"
        return copy, ()

    def files(self, path):
        return path, path / "graph.txt", path / "weights.bin"

    def size(self, model):
        assert model.graph.name == "finished"
        return sum(map(len, _contents(model)))

    def save(self, model, path):
        model, _ = self.finish(model)
        path.mkdir(exist_ok=True)
        for file, content in zip(self.files(path)[1:], _contents(model)):
            file.write_bytes(content)
        return Artifact(tuple(self.files(path)[1:]), self.size(model))


def _contents(model):
    weights = b"".join(v.const_value.tobytes() for v in model.graph.initializers.values())
    return " ".join(n.op_type for n in model.graph).encode(), weights
'''


@pytest.fixture
def parts(tmp_path: Path) -> str:
    path = tmp_path / "parts.py"
    path.write_text(FOLDER)
    return str(path)


@pytest.mark.parametrize("changed", [True, False])
def test_an_artifact_can_be_a_folder(tmp_path: Path, parts: str, changed: bool) -> None:
    """Also where no pass changed anything: the input's own file is no answer for such a target."""
    source, out, report = tmp_path / "in.onnx", tmp_path / "out", tmp_path / "report.json"
    onnx.save(model(BLOCKS.replace("a = Gelu(hb)", "i = Identity(hb)  a = Gelu(i)") if changed else BLOCKS), source)
    options = ["--plugin", parts, "--target", "parts", "--no-measure", "--report", report]
    for _ in range(2):  # into a folder that is new, and into one that is there
        run("optimize", source, "-o", out, *options)
        assert sorted(p.name for p in out.iterdir()) == ["graph.txt", "weights.bin"]
        assert (out / "graph.txt").read_text().split().count("Gelu") == 2
        written = json.loads(report.read_text())["output"]["bytes"]
        assert written == sum(file.stat().st_size for file in out.iterdir())
    result = graphopt.optimize(source, target="parts", plugins=[parts], promise=False)
    assert result.report.output.bytes == (written if changed else source.stat().st_size), "known before it is written"


def test_the_places_of_a_folder_are_checked_before_any_work(tmp_path: Path, parts: str) -> None:
    source, taken = tmp_path / "in.onnx", tmp_path / "taken"
    onnx.save(model(), source)
    taken.write_text("a file")
    options = ["--plugin", parts, "--target", "parts", "--no-measure"]
    assert "it is a file, and a folder goes there" in fails(tmp_path, "optimize", source, "-o", taken, *options)
    assert "there is no folder" in fails(tmp_path, "optimize", source, "-o", tmp_path / "absent" / "out", *options)
    (tmp_path / "home").mkdir()
    own = tmp_path / "home" / "weights.bin"
    own.write_bytes(source.read_bytes())
    assert "it belongs to the input" in fails(tmp_path, "optimize", source.rename(own.with_name("graph.txt")), "-o", tmp_path / "home", *options)
    with pytest.raises(SaveError, match="it is a file, and a folder goes there"):
        graphopt.optimize(own, target="parts", plugins=[parts], out=taken)


# ---- the demo -------------------------------------------------------------------------------------------------------------------------


def test_the_demo_leaves_logging_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.cli.demo_race import quantize_dynamic

    monkeypatch.setattr("onnxruntime.quantization.quantize_dynamic", lambda *args, **kwargs: None)
    logging.disable(logging.ERROR)
    try:
        quantize_dynamic(tmp_path, tmp_path)
        assert logging.root.manager.disable == logging.ERROR
    finally:
        logging.disable(logging.NOTSET)
