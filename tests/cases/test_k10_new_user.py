"""Kind 10: what a new user meets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import onnx
import pytest
from test_api import BLOCK, RELU, model
from typer.testing import CliRunner, Result

from graphopt.cli.root import app


def cli(*arguments: str | Path, code: int = 0) -> Result:
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == code, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done


def error(*arguments: str | Path) -> str:
    """The error of a command that must fail, which is one line."""
    text = cli(*arguments, code=1).stderr.rstrip("\n")
    assert text.startswith("error: ")
    assert "internal" not in text
    return text


def saved(folder: Path, text: str) -> Path:
    onnx.save(model(text), folder / "in.onnx")
    return folder / "in.onnx"


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """The command line in a process of its own, as a shell starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "graphopt", *arguments], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | environment, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


# ---- view -----------------------------------------------------------------------------------------------------------------------------


def test_view_serves_the_file_and_leaves_it_as_it_was(tmp_path: Path) -> None:
    pytest.importorskip("netron", reason="netron is not installed")
    source = saved(tmp_path, RELU)
    before = source.read_bytes()
    child = start(tmp_path, "view", "in.onnx", "--no-browser", "--port", "0")
    try:
        assert child.stdout is not None
        told = child.stdout.readline()
        assert told.startswith("in.onnx is shown at http://localhost:")
        url = told.split()[4].rstrip(";")
        local = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        assert b"/data/in.onnx" in local.open(url, timeout=30).read()
        assert local.open(f"{url}/data/in.onnx", timeout=30).read() == before
        taken = start(tmp_path, "view", "in.onnx", "--no-browser", "--port", url.rpartition(":")[2])
        _, text = taken.communicate(timeout=60)
        assert (taken.returncode, text.count("\n")) == (1, 1)
        assert "give another --port" in text
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=30)
        assert (child.returncode, out, err) == (0, "", "")
    finally:
        child.kill()
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("in.onnx", before)]


def test_view_without_netron_and_without_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(tmp_path, RELU)
    monkeypatch.setitem(sys.modules, "netron", None)
    assert "pip install 'graphopt[view]'" in error("view", source)
    assert "there is no such file" in error("view", tmp_path / "absent.onnx")
    assert f"give {source}" in error("view", tmp_path)
    (tmp_path / "folder").mkdir()
    assert "-O0 -o model.onnx` writes one" in error("view", tmp_path / "folder")


# ---- options --------------------------------------------------------------------------------------------------------------------------


def test_levels_that_there_are(tmp_path: Path) -> None:
    """The help offers none that every target refuses, and the message of a wrong one is true."""
    source, out = saved(tmp_path, RELU), tmp_path / "out.onnx"
    assert "3 also" not in cli("optimize", "--help").stdout
    for level in ("9", "3"):
        text = " ".join(cli("optimize", source, "-o", out, "-O", level, code=2).stderr.replace("│", " ").split())
        assert f"target cpu has the levels 0, 1, 2, found {level}" in text
    assert not out.exists()


@pytest.mark.parametrize(("text", "value"), [("1%", 0.01), ("0.5%", 0.005), ("0.25", 0.25), ("0", 0.0)])
def test_a_loss_in_percent(tmp_path: Path, text: str, value: float) -> None:
    source = saved(tmp_path, BLOCK)
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).normal(size=(1, 4, 8)).astype(np.float32))
    run = ("optimize", source, "-o", tmp_path / "out.onnx", "-O2", "--no-measure", "--json", "--target", "cpu{tune=off}")
    report = cli(*run, "--samples", tmp_path / "x.npz", "--max-loss", text).stdout
    assert f'"max_loss": {value}' in report or f"within the budget {value:g}" in report


@pytest.mark.parametrize("text", ["1%%", "one", "-1", "-1%", "nan", ""])
def test_a_loss_that_is_no_fraction(tmp_path: Path, text: str) -> None:
    cli("optimize", saved(tmp_path, RELU), "-o", tmp_path / "out.onnx", "-O2", "--max-loss", text, code=2)


# ---- where it runs --------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such locale")
def test_a_plain_ascii_locale(tmp_path: Path) -> None:
    """Help, names of files that are not ASCII, also inside of a model, and an error that names one."""
    os.mkdir(tmp_path / "größe")
    large = model(BLOCK.replace("8, 32", "8, 999").replace("32, 8", "999, 8"))
    onnx.save(large, tmp_path / "größe" / "ü.onnx", save_as_external_data=True, location="gewichte_ü.data")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    for arguments, code, part in (
        (("optimize", "--help"), 0, "An .onnx file"),
        (("optimize", "größe/ü.onnx", "-o", "größe/ö.onnx", "--report", "ä.html", "--shapes", "1x4"), 0, "speed-up"),
        (("inspect", "größe/ß.onnx"), 1, "größe/ß.onnx: No such file"),
    ):
        child = start(tmp_path, *arguments, **ascii_only)
        out, err = child.communicate(timeout=120)
        assert (child.returncode, part in out + err) == (code, True), out + err
        assert "Traceback" not in err
    assert (tmp_path / "größe" / "ö.onnx").is_file()
    assert "größe/ü.onnx" in (tmp_path / "ä.html").read_text(encoding="utf-8")


def test_text_samples_without_their_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts.txt").write_text("one\ntwo\n")
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    run = ("optimize", saved(tmp_path, RELU), "-o", tmp_path / "out.onnx", "--samples", tmp_path / "texts.txt")
    assert "text samples need an extra that is not installed" in error(*run, "--tokenizer", tmp_path / "tokenizer.json")
    assert "pip install 'graphopt[text]'" in error(*run, "--tokenizer", tmp_path / "tokenizer.json")


def test_a_shape_without_a_length(tmp_path: Path) -> None:
    """`16` would be read as 16x16; it is refused before any work, but for a model that has a batch alone."""
    out = tmp_path / "out.onnx"
    for command in (("optimize", saved(tmp_path, BLOCK), "-o", out), ("bench", saved(tmp_path, BLOCK))):
        assert "a batch without a length, which the model has in `seq`; write 1x16" in error(*command, "--shapes", "16")
    assert "16" in cli("optimize", saved(tmp_path, RELU), "-o", out, "--shapes", "16").stdout


def test_a_file_that_is_there_and_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(tmp_path, RELU)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert error("inspect", source) == f"error: {source}: Permission denied; it is there, and cannot be read"
