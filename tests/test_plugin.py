"""Passes from outside: a real package with an entry point, installed as a user would, and one file through --plugin."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from test_api import RELU, model

import graphopt
from graphopt.compress.prune.criterion import criteria
from graphopt.core import registry
from graphopt.core.errors import PipelineError

HERE = Path(__file__).resolve().parent
TWICE = '<ir_version: 8, opset_import: ["" : 17]> g (float[n] x) => (float[n] y) { a = Neg(x) b = Neg(a) y = Relu(b) }'
NEGATED = '<ir_version: 8, opset_import: ["" : 17]> g (bool[n] x) => (bool[n] y) { a = Not(x) b = Not(a) c = And(b, x) y = Not(c) }'
ONE_FILE = '''"""A pass in one file."""

import dataclasses
from typing import ClassVar

from graphopt import Match, RewritePass


@dataclasses.dataclass(frozen=True)
class {name}(RewritePass[Match]):
    """Relu becomes {op}."""

    anchors: ClassVar[frozenset[str]] = frozenset({{"Relu"}})

    def match(self, node, ctx):
        return Match(nodes=(node,), outputs=(node.outputs[0],))

    def build(self, op, m):
        return [op.{op}(m.nodes[0].inputs[0])]
'''


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that pip installed tests/plugin into; on PYTHONPATH, its entry point is visible."""
    folder = tmp_path_factory.mktemp("plugin")
    source = shutil.copytree(HERE / "plugin", folder / "source")  # building leaves files behind
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    done = subprocess.run([*command, "--target", str(folder / "site"), str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


def command(site: Path, *arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """The graphopt command of a process that sees the plugin."""
    done = subprocess.run(
        [sys.executable, "-m", "graphopt", *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd=site, env=os.environ | {"PYTHONPATH": str(site)},
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done


def ops(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def test_an_installed_package_shows_up(installed: Path) -> None:
    rows = {row["name"]: row for row in json.loads(command(installed, "passes", "-v", "--json").stdout)}
    assert rows["remove-involutions"] == {
        "name": "remove-involutions",
        "options": "ops: tuple[str, ...] = Neg+Not+BitwiseNot",
        "numbers": "exact",
        "samples": "",
        "purpose": "Neg(Neg(x)), Not(Not(x)) and BitwiseNot(BitwiseNot(x)) become x.",
        "owner": "graphopt-involutions",
    }
    assert rows["fuse-attention"]["owner"] == "graphopt"


def test_it_runs_from_a_text_pipeline(installed: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(onnx.parser.parse_model(TWICE), source)
    run = ("optimize", source, "-o", out, "--no-measure", "--verify-each", "--check-numerics", "--json")
    report = json.loads(command(installed, *run, "--pipeline", "remove-involutions{ops=Neg}").stdout)
    assert (report["pipeline"], report["changes"]) == ("remove-involutions{ops=Neg}", 1)
    assert ops(out) == ["Relu"]


def test_its_near_miss_is_reported(installed: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(onnx.parser.parse_model(NEGATED), source)
    run = ("optimize", source, "-o", out, "--no-measure", "--pipeline", "remove-involutions{ops=Neg}", "--remarks", "missed")
    assert "Not is not among ops=Neg; add it to the option" in command(installed, *run).stdout
    assert out.read_bytes() == source.read_bytes()


PEAK = '''"""A criterion in one file."""

import numpy as np

from graphopt.compress.prune.criterion import Scores


class {name}(Scores):
    """The largest output weight."""

    def scores(self, candidates, asked):
        return [(c, np.max([np.abs(u.output.matrix()).reshape(c.count, -1).max(1) for u in c.units], axis=0)) for c in candidates]
'''
FFN = """<ir_version: 10, opset_import: ["" : 21]> g (float[B,S,16] x) => (float[B,S,16] y) <float[16,64] up, float[64,16] down>
    { h = MatMul(x, up) a = Relu(h) y = MatMul(a, down) }"""


def ffn(folder: Path) -> tuple[Path, list[dict[str, np.ndarray]]]:
    """A feed-forward block whose neurons matter in the order of their numbers, and samples."""
    rng = np.random.default_rng(0)
    down = rng.standard_normal((64, 16)) * np.linspace(0.05, 1, 64)[:, None] ** 2
    proto = onnx.parser.parse_model(FFN)
    stored = (("up", rng.standard_normal((16, 64))), ("down", down))
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in stored)
    onnx.save(proto, folder / "ffn.onnx")
    return folder / "ffn.onnx", [{"x": rng.standard_normal((2, 5, 16)).astype(np.float32)} for _ in range(4)]


def zeros(path: Path) -> list[int]:
    (down,) = (onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer if t.dims == [64, 16])
    return np.flatnonzero((down == 0).all(1)).tolist()


def test_a_compression_pass_and_a_criterion_of_a_package(installed: Path, tmp_path: Path) -> None:
    """It is built from the public rooms, and is a transaction as every lossy pass: within the budget, and close to it."""
    source, samples = ffn(tmp_path)
    np.savez(tmp_path / "x.npz", **samples[0])
    for options in ("ratio=0.9", "ratio=0.9 importance=peak"):
        out = tmp_path / "out.onnx"
        run = ("optimize", source, "-o", out, "--no-measure", "--json", "--samples", tmp_path / "x.npz", "--max-loss", "0.1")
        report = json.loads(command(installed, *run, "--pipeline", f"zero-units{{{options}}}").stdout)
        (name,) = (step["name"] for step in report["passes"] if step["name"].startswith("zero-units"))
        gone = zeros(out)
        assert 0.01 < float(re.findall(r"ratio=([\d.]+)", name)[0]) < 0.9
        assert len(gone) > 10
        assert 0.05 < report["loss"]["value"] <= 0.1
        assert np.mean(gone) < 20, "those that matter least"
    assert "one of attention, entropy" in command(installed, *run, "--pipeline", "zero-units{importance=speak}", code=1).stderr


def test_a_metric_of_a_package(installed: Path, tmp_path: Path) -> None:
    """`--metric NAME` judges, and what it takes stands in its text."""
    source, samples = ffn(tmp_path)
    feeds = samples[0]
    np.savez(tmp_path / "x.npz", **feeds)
    np.savez(tmp_path / "seen.npz", **feeds, y=graphopt.optimize(source, "").session().run(feeds)["y"])
    run = ("optimize", source, "-o", tmp_path / "out.onnx", "--no-measure", "--json", "--samples", tmp_path / "x.npz", "--max-loss", "0.02")
    step = ("--pipeline", "zero-units{ratio=0.9}", "--metric")
    report = json.loads(command(installed, *run, *step, f"same-sign{{data={tmp_path / 'seen.npz'}}}").stdout)
    assert report["loss"]["how"] == "relative fall of the metric"
    assert 0 < report["loss"]["value"] <= 0.02
    assert len(zeros(tmp_path / "out.onnx")) > 5
    assert "did you mean `same-sign`?" in command(installed, *run, *step, "same-signs", code=1).stderr


def test_a_criterion_in_one_file(tmp_path: Path) -> None:
    source, samples = ffn(tmp_path)
    plugin = tmp_path / "mine.py"
    plugin.write_text(PEAK.format(name="MyPeak"))
    text = "prune-ffn{ratio=0.9 multiple=1 importance=my-peak}"
    with pytest.raises(PipelineError, match=r"option `importance` expects one of .*found `my-peak`"):
        graphopt.optimize(source, text, samples=samples, max_loss=0.3)
    result = graphopt.optimize(source, text, samples=samples, max_loss=0.3, plugins=[str(plugin)])
    (facts,) = (r.facts for r in result.report.remarks("applied") if "removed" in r.facts)
    assert facts["importance"] == "my-peak"
    assert 10 < facts["removed"] < 0.9 * 64
    assert result.report.loss.value <= 0.3
    plugin.write_text(PEAK.format(name="Magnitude"))
    with pytest.raises(PipelineError, match=r"`magnitude` in graphopt\.criteria is claimed by"):
        criteria(registry.passes((str(shutil.copy(plugin, tmp_path / "other.py")),)))


def test_a_clash_names_both_owners(installed: Path, tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(ONE_FILE.format(name="RemoveInvolutions", op="Abs"))
    error = command(installed, "passes", "--plugin", plugin, code=1).stderr
    assert error.count("\n") == 1
    assert "the name `remove-involutions`" in error
    assert "graphopt-involutions" in error
    assert str(plugin) in error


def test_one_file(tmp_path: Path) -> None:
    plugin, source, out = tmp_path / "mine.py", tmp_path / "in.onnx", tmp_path / "out.onnx"
    plugin.write_text(ONE_FILE.format(name="ReluToAbs", op="Abs"))
    onnx.save(model(RELU), source)
    shown = command(tmp_path, "passes", "relu-to-abs", "--plugin", plugin).stdout
    assert f"relu-to-abs ({plugin})" in shown
    assert "Relu becomes Abs." in shown
    command(tmp_path, "optimize", source, "-o", out, "--no-measure", "--no-gate", "--plugin", plugin, "--pipeline", "relu-to-abs")
    assert ops(out) == ["Abs"]
    assert graphopt.optimize(source, "relu-to-abs", plugins=[str(plugin)], gate=False).report.changes == 1


def test_one_file_may_not_take_a_built_in_name(tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(ONE_FILE.format(name="FuseNorm", op="Abs"))
    with pytest.raises(PipelineError, match=r"`fuse-norm` in graphopt.passes is claimed by graphopt and by .*mine\.py"):
        registry.passes((str(plugin),))


def test_the_same_plugin_twice_is_no_clash(tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(ONE_FILE.format(name="ReluToNeg", op="Neg"))
    assert "relu-to-neg" in registry.passes((str(plugin), str(plugin)))


@pytest.mark.parametrize(
    ("text", "reason"),
    [("import absent_module\n", "ModuleNotFoundError: No module named 'absent_module'"), ("def f(:\n", "SyntaxError")],
)
def test_a_plugin_that_cannot_be_imported_says_why(tmp_path: Path, text: str, reason: str) -> None:
    plugin = tmp_path / "broken.py"
    plugin.write_text(text)
    with pytest.raises(PipelineError, match=reason) as raised:
        registry.passes((str(plugin),))
    assert str(plugin) in str(raised.value)
    assert "\n" not in str(raised.value)
