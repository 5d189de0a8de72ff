"""The command line: what it prints and where, exit codes, and that a failure is one line and leaves no file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from test_api import BLOCK, DECLINED, FEEDS, LOSSY, RELU, model
from typer.testing import CliRunner, Result

from graphopt.cli import app

runner = CliRunner()


def run(*arguments: str | Path, code: int = 0) -> Result:
    """Run in this process; the exit code must be `code`, and no traceback may be shown."""
    done = runner.invoke(app, [str(a) for a in arguments])
    assert done.exit_code == code, f"exit {done.exit_code}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stdout + done.stderr
    return done


def fails(folder: Path, *arguments: str | Path) -> str:
    """The error line of a run that must fail with exit code 1 and leave `folder` as it was."""
    before = sorted(folder.rglob("*"))
    done = run(*arguments, code=1)
    assert done.stdout == "", "an error leaves stdout empty"
    assert done.stderr.startswith("error: ")
    assert sorted(folder.rglob("*")) == before
    return done.stderr.rstrip("\n")


@pytest.fixture
def block(tmp_path: Path) -> Path:
    path = tmp_path / "block.onnx"
    onnx.save(model(BLOCK), path)
    return path


def optimize(source: Path, *arguments: str | Path) -> Result:
    return run("optimize", source, "-o", source.with_name("out.onnx"), "--no-measure", *arguments)


# ---- what works -----------------------------------------------------------------------------------------------------------------------


def test_optimize_writes_the_model_and_tells_what_it_did(block: Path) -> None:
    shown = run("optimize", block, "-o", block.with_name("out.onnx"), "--shapes", "1x4").stdout
    for word in ("size", "nodes", "opset", "speed-up", "fuse-norm", "geometric mean", "loss not known"):
        assert word in shown
    assert "LayerNormalization" in [node.op_type for node in onnx.load(block.with_name("out.onnx")).graph.node]


def test_levels_and_pipelines(block: Path) -> None:
    recipe = block.with_name("recipe.txt")
    recipe.write_text("canonicalize\nfuse-norm # exact\n")
    assert "quantize" in json.loads(optimize(block, "-O2", "--json").stdout)["pipeline"]
    assert "quantize" in json.loads(optimize(block, "--level", "2", "--json").stdout)["pipeline"]
    assert json.loads(optimize(block, "--pipeline", "canonicalize, fuse-norm", "--json").stdout)["pipeline"] == "canonicalize, fuse-norm"
    assert json.loads(optimize(block, "--pipeline", f"@{recipe}", "--json").stdout)["pipeline"] == "canonicalize, fuse-norm"
    assert json.loads(optimize(block, "--target", "cpu{threads=2}", "--json").stdout)["target"]["name"] == "cpu{threads=2}"


def test_reports(block: Path) -> None:
    optimize(block, "--report", block.with_name("r.json"))
    optimize(block, "--report", block.with_name("r.html"))
    assert json.loads(block.with_name("r.json").read_text())["changes"] > 0
    assert block.with_name("r.html").read_text().startswith("<!doctype html>")


def test_nothing_to_do_is_said(tmp_path: Path) -> None:
    source = tmp_path / "relu.onnx"
    onnx.save(model(RELU), source)
    assert "0 changes" in optimize(source).stdout
    assert (tmp_path / "out.onnx").read_bytes() == source.read_bytes()


def test_remarks_one_a_line(block: Path, tmp_path: Path) -> None:
    source = tmp_path / "declined.onnx"
    onnx.save(model(DECLINED), source)
    missed = [line for line in optimize(source, "--pipeline", "fuse-norm", "--remarks", "missed").stdout.splitlines() if line.startswith("missed")]
    assert missed
    assert all("fuse-norm at `" in line for line in missed)
    assert "applied fuse-activation" in optimize(block, "--remarks", "applied").stdout


def test_samples_metric_and_budget(block: Path) -> None:
    samples, plugin, judge = (block.with_name(name) for name in ("samples", "lossy.py", "judge.py"))
    samples.mkdir()
    for k, feed in enumerate(FEEDS):
        np.savez(samples / f"{k}.npz", **feed)
    plugin.write_text(LOSSY)
    judge.write_text(
        "import numpy as np\n\ndef metric(session):\n    feeds = {'x': np.ones((1, 2, 8), np.float32)}\n"
        "    return float(np.abs(session.run(feeds)['y']).mean())\n"
    )
    shift = ("--pipeline", "shift-weights{by=0.4}", "--plugin", plugin, "--max-loss", "0.05", "--json")
    by_distance = json.loads(optimize(block, *shift, "--samples", samples).stdout)
    assert 0 < by_distance["loss"]["value"] <= 0.05
    assert by_distance["loss"]["how"] == "relative L2 distance of the outputs on the samples"
    by_metric = json.loads(optimize(block, *shift, "--metric", f"{judge}:metric").stdout)
    assert by_metric["loss"]["value"] <= 0.05
    assert by_metric["loss"]["how"] == "relative fall of the metric"


def test_debugging_flags(block: Path) -> None:
    dump = block.with_name("dump")
    done = optimize(block, "--verify-each", "--check-numerics", "--time", "--print-changed", "--dump", dump, "--fuel", "3", "--json")
    assert json.loads(done.stdout)["changes"] <= 3
    assert "fuse-norm" in done.stderr
    assert (dump / "00-input.txt").is_file()


def test_input_shapes_can_be_fixed(block: Path) -> None:
    optimize(block, "--input-shape", "x:1,16,0")
    (x,) = onnx.load(block.with_name("out.onnx")).graph.input
    assert [d.dim_value for d in x.type.tensor_type.shape.dim] == [1, 16, 8]


def test_inspect(block: Path) -> None:
    shown = run("inspect", block).stdout
    for word in ("MatMul", "float[batch,seq,8]", "no attention found"):
        assert word in shown
    facts = json.loads(run("inspect", block, "--json").stdout)
    assert facts["ops"]["MatMul"] == 2
    assert (facts["nodes"], facts["opset"], facts["parameters"]) == (22, 17, 2 * 8 * 32 + 16)
    assert facts["bytes"] == block.stat().st_size


def test_bench(block: Path) -> None:
    optimize(block)
    timings = json.loads(run("bench", block, block.with_name("out.onnx"), "--shapes", "1x4,2x8", "--json").stdout)
    assert timings["shapes"] == ["1x4", "2x8"]
    assert timings["models"][str(block)]["speedup"] == 1.0
    assert "speed-up" in run("bench", block, "--shapes", "1x4").stdout


def test_lists() -> None:
    names = {row["name"] for row in json.loads(run("passes", "--json").stdout)}
    assert {"canonicalize", "fuse-attention", "fuse-norm", "fuse-activation", "merge-projections", "quantize", "simplify"} <= names
    assert {row["name"] for row in json.loads(run("targets", "--json").stdout)} >= {"cpu", "quantized"}
    rows = {row["name"]: row for row in json.loads(run("passes", "-v", "--json").stdout)}
    assert "mode" in rows["quantize"]["options"]
    assert all(row["purpose"] and row["owner"] == "graphopt" and "cannot be imported" not in row["purpose"] for row in rows.values())
    assert "options: " in run("passes", "quantize").stdout
    assert "threads: int = 1" in run("targets", "cpu").stdout


def test_version() -> None:
    from graphopt import __version__

    assert run("--version").stdout == f"graphopt {__version__}\n"


# ---- what fails -----------------------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_line_and_no_file(block: Path, tmp_path: Path) -> None:
    content = block.read_bytes()
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "truncated.onnx").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.onnx").write_text("this is no model\n")
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.write(block, "block.onnx")
    (tmp_path / "zip.onnx").write_bytes((tmp_path / "archive.zip").read_bytes())
    onnx.save(model(BLOCK), tmp_path / "parted.onnx", save_as_external_data=True, location="gone.data", size_threshold=0)
    (tmp_path / "gone.data").unlink()
    for name in ("absent.onnx", "folder", "empty.onnx", "truncated.onnx", "text.onnx", "archive.zip", "zip.onnx", "parted.onnx"):
        for command in (("optimize", tmp_path / name, "-o", tmp_path / "out.onnx"), ("inspect", tmp_path / name), ("bench", tmp_path / name)):
            error = fails(tmp_path, *command)
            assert "\n" not in error, error
            assert name in error, error
            assert "internal" not in error, error


def test_wrong_texts_show_where(block: Path, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "out.onnx")
    unknown = fails(tmp_path, "optimize", block, *out, "--pipeline", "canonicalize, fuse-nrom")
    assert unknown.splitlines()[0] == "error: there is no pass `fuse-nrom`; did you mean `fuse-norm`?"
    assert unknown.splitlines()[1:3] == ["  canonicalize, fuse-nrom", "                ^^^^^^^^^"]
    option = fails(tmp_path, "optimize", block, *out, "--pipeline", "quantize{mood=dynamic}")
    assert "has no option `mood`; did you mean `mode`" in option
    assert "options: " in option
    assert "there is no target `gpu`" in fails(tmp_path, "optimize", block, *out, "--target", "gpu")
    assert "recipe" in fails(tmp_path, "optimize", block, *out, "--pipeline", "@absent.txt")
    assert "there is no pass `quantise`" in fails(tmp_path, "passes", "quantise")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--require", "fuse-attention"], "fuse-attention is required and changed nothing"),
        (["--samples", "absent.npz"], "absent.npz"),
        (["-O2", "--max-loss", "0.01"], "--samples"),
        (["--plugin", "absent.py"], "absent.py"),
        (["--metric", "nonsense"], "FILE.py:FUNCTION"),
        (["--report", "report.txt"], "FILE.json or FILE.html"),
        (["--report", "absent/report.json"], "absent"),
        (["--shapes", "many"], "BATCHxSEQUENCE"),
        (["--input-shape", "x"], "NAME:DIM"),
        (["--input-shape", "z:1,1,8"], "`z`"),
        (["--task", "text-classification"], "Hugging Face"),
    ],
)
def test_failures_are_one_line(block: Path, tmp_path: Path, arguments: list[str], part: str) -> None:
    error = fails(tmp_path, "optimize", block, "-o", tmp_path / "out.onnx", *arguments)
    assert part in error
    assert "\n" not in error


def test_a_pass_that_raises_is_named(block: Path, tmp_path: Path) -> None:
    plugin = tmp_path / "lossy.py"
    plugin.write_text(LOSSY)
    run("passes", "--plugin", plugin)  # so that the byte code is not counted as left behind
    error = fails(tmp_path, "optimize", block, "-o", tmp_path / "out.onnx", "--pipeline", "canonicalize, broken", "--plugin", plugin)
    assert error == "error: pass 2 `broken` failed: ValueError: no such luck"


def test_outputs_that_cannot_be(block: Path, tmp_path: Path) -> None:
    assert "input" in fails(tmp_path, "optimize", block, "-o", block, "--no-measure")
    assert "no folder" in fails(tmp_path, "optimize", block, "-o", tmp_path / "absent" / "out.onnx")
    assert "is a folder" in fails(tmp_path, "optimize", block, "-o", tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["optimize"],
        ["optimize", "a.onnx"],
        ["optimize", "a.onnx", "-o", "b.onnx", "-O", "9"],
        ["optimize", "a.onnx", "-o", "b.onnx", "-O", "1", "--pipeline", "canonicalize"],
        ["optimize", "a.onnx", "-o", "b.onnx", "--max-loss", "-1"],
        ["optimize", "a.onnx", "-o", "b.onnx", "--remarks", "some"],
        ["optimize", "a.onnx", "-o", "b.onnx", "--no-such-flag"],
        ["no-such-command"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    run(*arguments, code=2)


def test_a_defect_is_one_line_too(block: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setattr("graphopt.api.optimize", defect)
    error = fails(tmp_path, "optimize", block, "-o", tmp_path / "out.onnx")
    assert error.startswith("error: internal: ZeroDivisionError: first line (GRAPHOPT_TRACEBACK=1")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for a child process")
def test_ctrl_c_leaves_nothing(block: Path, tmp_path: Path) -> None:
    plugin, started = tmp_path / "slow.py", tmp_path / "started"
    plugin.write_text(
        "import dataclasses\nimport pathlib\nimport time\n\nfrom graphopt import Pass\n\n\n@dataclasses.dataclass(frozen=True)\nclass Slow(Pass):\n"
        f"    def run(self, model, ctx):\n        pathlib.Path({str(started)!r}).touch()\n        time.sleep(60)\n        return 0\n"
    )
    command = [sys.executable, "-m", "graphopt", "optimize", str(block), "-o", str(tmp_path / "out.onnx")]
    child = subprocess.Popen(
        [*command, "--pipeline", "slow", "--plugin", str(plugin)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not started.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=30)
    assert started.exists(), err
    assert child.returncode not in (0, 2)
    assert "Traceback" not in out + err
    assert {path.name for path in tmp_path.iterdir()} == {"block.onnx", "slow.py", "started"}


def test_the_installed_command_runs() -> None:
    script = Path(sys.executable).with_name("graphopt")
    for command in ([str(script), "passes"], [sys.executable, "-m", "graphopt", "passes"]):
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
        assert "fuse-attention" in done.stdout
        assert done.stderr == ""
