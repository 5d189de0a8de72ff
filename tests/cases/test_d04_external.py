"""Case D04: external data, read from a folder that cannot be written, by every kind of path."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from models import assert_same, parse, run  # type: ignore[import-not-found]

from graphopt.io.load import load
from graphopt.io.save import save

FEEDS = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}


@pytest.mark.parametrize("name", ["absolute", "relative", "bare"])
@pytest.mark.parametrize("location", ["m.data", "w/x.bin"])
def test_read_only_folder(name: str, location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, c = (tmp_path / folder for folder in "abc")
    for folder in (a, a / "w", b, c):
        folder.mkdir()
    weight = np.arange(1200, dtype=np.float32).reshape(3, 400)
    proto = parse('<ir_version: 8, opset_import: ["" : 17]> g (float[N,3] x) => (float[N,400] y) <float[3,400] w> { y = MatMul (x, w) }', w=weight)
    base = run(proto, FEEDS)
    onnx.save(proto, a / "m.onnx", save_as_external_data=True, location=location, size_threshold=0)
    files = {str(f): f.read_bytes() for f in a.rglob("*") if f.is_file()}
    a.chmod(0o555)
    try:
        cwd = a if name == "bare" else c
        monkeypatch.chdir(cwd)
        model = load({"absolute": a / "m.onnx", "relative": Path("../a/m.onnx"), "bare": "m.onnx"}[name])
        monkeypatch.chdir(tmp_path)  # the data are found wherever the process goes
        save(model, b / "out.onnx", external=True)
    finally:
        a.chmod(0o755)
    assert {str(f): f.read_bytes() for f in a.rglob("*") if f.is_file()} == files
    assert not os.listdir(c)
    written = onnx.load(b / "out.onnx", load_external_data=False)
    places = [e.value for t in written.graph.initializer for e in t.external_data if e.key == "location"]
    assert places == ["out.onnx.data"]
    b.rename(tmp_path / "moved")
    assert_same(base, run(tmp_path / "moved" / "out.onnx", FEEDS))


def test_data_behind_links(tmp_path: Path) -> None:
    """The cache of the Hugging Face hub is made of links into another folder."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    proto = parse(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,3] x) => (float[N,400] y) <float[3,400] w> { y = MatMul (x, w) }',
        w=np.ones((3, 400), np.float32),
    )
    base = run(proto, FEEDS)
    onnx.save(proto, blobs / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    for name in ("m.onnx", "m.data"):
        (blobs / name).rename(blobs / f"hash-{name}")
        (snapshot / name).symlink_to(blobs / f"hash-{name}")
    save(load(snapshot / "m.onnx"), tmp_path / "out.onnx")
    assert_same(base, run(tmp_path / "out.onnx", FEEDS))
