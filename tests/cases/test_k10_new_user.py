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
