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

from graphopt.cli.root import app

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
    optimize(block, "--report", block.with_name("r.md"))
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
        (["--report", "report.txt"], "FILE.json or FILE.html or FILE.md"),
        (["--report", "absent/report.json"], "absent"),
        (["--shapes", "many"], "BATCHxSEQUENCE"),
        (["--input-shape", "x"], "NAME:DIM"),
        (["--input-shape", "z:1,1,8"], "`z`"),
        *(
            (["--input-shape", f"x:{dim},1,8"], f"`{dim}` is no axis of input `x`")
            for dim in ("2.5", "--", "?", "9" * 20, "b-1", "None", "1e3", "b*2")
        ),
        (["--task", "text-classification"], "Hugging Face"),
    ],
)
def test_failures_are_one_line(block: Path, tmp_path: Path, arguments: list[str], part: str) -> None:
    error = fails(tmp_path, "optimize", block, "-o", tmp_path / "out.onnx", *arguments)
    assert part in error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("target", "part"),
    [
        ("cpu{threads=-3}", "cpu: option `threads` expects 1 or more, found -3"),
        ("cpu{opset=5}", "cpu: option `opset` expects a number from 7 to"),
        ("quantized{opset=99}", "quantized: option `opset` expects a number from 7 to"),
    ],
)
def test_a_number_out_of_its_range_gets_a_caret(block: Path, tmp_path: Path, target: str, part: str) -> None:
    head, line, caret = fails(tmp_path, "optimize", block, "-o", tmp_path / "out.onnx", "--target", target).split("\n")
    assert part in head
    assert line[caret.index("^") :].startswith(target[:-1].partition("{")[2])


def test_a_pass_that_raises_is_named(block: Path, tmp_path: Path) -> None:
    plugin = tmp_path / "lossy.py"
    plugin.write_text(LOSSY)
    run("passes", "--plugin", plugin)  # so that the byte code is not counted as left behind
    error = fails(tmp_path, "optimize", block, "-o", tmp_path / "out.onnx", "--pipeline", "canonicalize, broken", "--plugin", plugin)
    line = LOSSY.splitlines().index('        raise ValueError("no such luck")') + 1
    assert error == f"error: pass 2 `broken` failed: ValueError: no such luck ({plugin}:{line})"


def test_outputs_that_cannot_be(block: Path, tmp_path: Path) -> None:
    assert "input" in fails(tmp_path, "optimize", block, "-o", block, "--no-measure")
    assert "no folder" in fails(tmp_path, "optimize", block, "-o", tmp_path / "absent" / "out.onnx")
    assert "is a folder" in fails(tmp_path, "optimize", block, "-o", tmp_path)


def refused(folder: Path, *arguments: str | Path) -> str:
    """As `fails`, and no file has other bytes than before, and the error is one line."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    error = fails(folder, "optimize", *arguments, "--no-measure")
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert "\n" not in error
    assert "internal" not in error
    return error


def test_no_file_of_the_input_is_written_over(block: Path, tmp_path: Path) -> None:
    dump, out = tmp_path / "dump", tmp_path / "out.onnx"
    dump.mkdir()
    (dump / "00-input.onnx").write_bytes(block.read_bytes())
    (tmp_path / "in.json").write_bytes(block.read_bytes())
    (tmp_path / "link.json").symlink_to(block)
    onnx.save(model(BLOCK), tmp_path / "parted.onnx", save_as_external_data=True, location="weights.json", size_threshold=0)
    for arguments in (
        (dump / "00-input.onnx", "-o", out, "--dump", dump),
        (tmp_path / "in.json", "-o", out, "--report", tmp_path / "in.json"),
        (block, "-o", out, "--report", tmp_path / "link.json"),
        (tmp_path / "parted.onnx", "-o", out, "--report", tmp_path / "weights.json"),
        (tmp_path / "parted.onnx", "-o", tmp_path / "weights.json"),
    ):
        assert "belongs to the input" in refused(tmp_path, *arguments)


def test_two_outputs_are_two_files(block: Path, tmp_path: Path) -> None:
    dump = tmp_path / "dump"
    dump.mkdir()
    for arguments in (
        ("-o", tmp_path / "same.json", "--report", tmp_path / "dump" / ".." / "same.json"),
        ("-o", dump / "01-canonicalize.onnx", "--dump", dump),
    ):
        assert "another output of this run" in refused(tmp_path, block, *arguments)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_what_is_no_file_is_not_replaced(block: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")
    for arguments in (("-o", pipe), ("-o", "/dev/null"), ("-o", tmp_path / "out.onnx", "--report", pipe), ("-o", tmp_path / "stdout")):
        assert "a device, a pipe or a socket" in refused(tmp_path, block, *arguments)
    assert pipe.is_fifo()


def test_output_and_report_are_written_together(block: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = ("--report", tmp_path / "r.json")
    if Path("/proc/version").exists():
        assert "cannot write into the folder /proc" in refused(tmp_path, block, "-o", tmp_path / "out.onnx", "--report", "/proc/r.json")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("graphopt.report.document.Document._text", fail)
        assert "No space left" in refused(tmp_path, block, "-o", tmp_path / "out.onnx", *report)
    with monkeypatch.context() as patched:
        patched.setattr("graphopt.io.save.to_bytes", fail)
        assert "No space left" in refused(tmp_path, block, "-o", tmp_path / "out.onnx", *report)


def test_files_that_are_not_what_they_are_named(block: Path, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "out.onnx")
    np.save(tmp_path / "x.npy", np.ones((1, 2, 8), np.float32))
    (tmp_path / "x.npy").rename(tmp_path / "x.npz")
    assert "is a .npy file" in refused(tmp_path, block, *out, "--samples", tmp_path / "x.npz")
    (tmp_path / "recipe").write_bytes(b"\xff\xfe\x00" * 9)
    assert "it is no text" in refused(tmp_path, block, *out, "--pipeline", f"@{tmp_path / 'recipe'}")


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ("raise ValueError('boom')", "the metric failed: ValueError: boom"),
        ("raise SystemExit(0)", "the metric failed: SystemExit: 0"),
        ("return 'good'", "the metric failed: ValueError: could not convert"),
        ("return None", "the metric failed: TypeError"),
        ("return float('nan')", "the metric failed: it gave nan, and must give a finite number"),
    ],
)
@pytest.mark.parametrize("budget", [[], ["-O2", "--max-loss", "0.5"]])
def test_a_metric_that_fails(block: Path, tmp_path: Path, body: str, part: str, budget: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "judge.py").write_text(f"def metric(session):\n    {body}\n")
    assert part in refused(tmp_path, block, "-o", tmp_path / "out.onnx", "--metric", f"{tmp_path / 'judge.py'}:metric", *budget)


def test_a_pass_or_plugin_cannot_end_the_program(block: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "leave.py").write_text(
        "import dataclasses\n\nfrom graphopt import Pass\n\n\n@dataclasses.dataclass(frozen=True)\nclass Leave(Pass):\n"
        "    def run(self, model, ctx):\n        raise SystemExit(0)\n"
    )
    (tmp_path / "gone.py").write_text("raise SystemExit(0)\n")
    out = ("-o", tmp_path / "out.onnx")
    assert "pass 1 `leave` failed: SystemExit: 0" in refused(tmp_path, block, *out, "--pipeline", "leave", "--plugin", tmp_path / "leave.py")
    assert "failed to import: SystemExit" in refused(tmp_path, block, *out, "--plugin", tmp_path / "gone.py")


def test_an_output_that_is_listed_twice(tmp_path: Path) -> None:
    proto = model(RELU)
    proto.graph.output.append(proto.graph.output[0])
    onnx.save(proto, tmp_path / "twice.onnx")
    assert "twice.onnx: the output `y` is listed 2 times" in refused(tmp_path, tmp_path / "twice.onnx", "-o", tmp_path / "out.onnx")


def test_an_opset_is_kept_where_nothing_else_changes(tmp_path: Path) -> None:
    newer = RELU.replace("17", "20")
    onnx.save(model(newer), tmp_path / "relu.onnx")
    for limit, opset in ((17, 17), (20, 20), (21, 20)):
        optimize(tmp_path / "relu.onnx", "--target", f"cpu{{opset={limit}}}", "-O0")
        assert onnx.load(tmp_path / "out.onnx").opset_import[0].version == opset
    (tmp_path / "out.onnx").unlink()
    bits = '<ir_version: 8, opset_import: ["" : 18]> g (int32[n, 4] x) => (int32[n, 4] y) { y = BitwiseNot(x) }'
    onnx.save(model(bits), tmp_path / "bits.onnx")
    assert "cannot write opset 17" in refused(tmp_path, tmp_path / "bits.onnx", "-o", tmp_path / "out.onnx", "--target", "cpu{opset=17}")


@pytest.mark.parametrize("flags", [["-O0"], ["-O1"], ["--pipeline", "fuse-norm"]])
def test_nothing_changed_is_byte_for_byte(tmp_path: Path, flags: list[str]) -> None:
    proto = model(RELU)
    proto.doc_string = "as its author wrote it"
    content = proto.SerializeToString() + onnx.ModelProto(producer_name="and written in two parts").SerializeToString()
    (tmp_path / "relu.onnx").write_bytes(content)
    optimize(tmp_path / "relu.onnx", *flags)
    assert (tmp_path / "out.onnx").read_bytes() == content


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

    monkeypatch.setattr("graphopt.driver.optimize.optimize", defect)
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
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell ignores it for what runs in its background
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not started.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=30)
    assert started.exists(), err
    assert (child.returncode, out, err) == (130, "", "interrupted\n")
    assert {path.name for path in tmp_path.iterdir()} == {"block.onnx", "slow.py", "started"}


def test_the_installed_command_runs() -> None:
    script = Path(sys.executable).with_name("graphopt")
    for command in ([str(script), "passes"], [sys.executable, "-m", "graphopt", "passes"]):
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
        assert "fuse-attention" in done.stdout
        assert done.stderr == ""
