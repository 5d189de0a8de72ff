"""Passes from outside: a real package with an entry point, installed as a user would, and one file through --plugin."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from test_api import RELU, model

import graphopt
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
    command(tmp_path, "optimize", source, "-o", out, "--no-measure", "--plugin", plugin, "--pipeline", "relu-to-abs")
    assert ops(out) == ["Abs"]
    assert graphopt.optimize(source, "relu-to-abs", plugins=[str(plugin)]).report.changes == 1


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
