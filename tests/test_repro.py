"""`--repro DIR`: what shows an error again to somebody else, with nothing of the user in it."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import numpy as np
import onnx
import pytest
from harness import build  # type: ignore[import-not-found]
from planted import CHAIN, PLUGIN  # type: ignore[import-not-found]
from test_cli import fails, run
from tiny import tiny  # type: ignore[import-not-found]

import graphopt
from graphopt.core.errors import PassError, SaveError
from graphopt.driver.debug import elide

SECRET = "secret-room"  # a folder whose name must not be told


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / SECRET / "planted.py"
    path.parent.mkdir()
    path.write_text(PLUGIN, encoding="utf-8")
    return path


def again(folder: Path, monkeypatch: pytest.MonkeyPatch, code: int = 1) -> str:
    """What the written command says on stderr; it must fail again."""
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        return run(*shlex.split((folder / "command.sh").read_text(encoding="utf-8").splitlines()[-1])[1:], code=code).stderr


def test_an_error_writes_what_reproduces_it(plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, folder = plugin.with_name("model.onnx"), tmp_path / "repro"
    onnx.save(build(CHAIN), source)
    asked = ("optimize", source, "-o", tmp_path / "out.onnx", "--plugin", plugin, "--pipeline", "canonicalize, raises", "--no-measure")
    said = run(*asked, "--repro", folder, code=1).stderr.splitlines()
    assert said[0].startswith("error: pass 2 `raises` failed: ValueError: three is too many")
    assert said[1] == f"what reproduces it is in {folder} (the model with made-up weights; run command.sh)"
    assert len(said) == 2
    assert sorted(p.name for p in folder.iterdir()) == ["command.sh", "model.onnx", "planted.py", "repro.json"]
    told = json.loads((folder / "repro.json").read_text(encoding="utf-8"))
    assert told["pipeline"] == "canonicalize, raises"
    assert {"graphopt", "onnx", "onnxruntime"} <= set(told["versions"])
    assert any(line.startswith("graphopt/core/pipeline.py:") for line in told["from"])
    assert "three is too many" in again(folder, monkeypatch)
    for file in folder.iterdir():
        assert SECRET.encode() not in file.read_bytes(), file
    run(*asked, "--repro", folder, code=1)  # an earlier one is written over
    assert not [p for p in tmp_path.iterdir() if p.name not in ("repro", SECRET)]


def test_nothing_is_written_where_all_is_well(tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    onnx.save(build(CHAIN), source)
    run("optimize", source, "-o", tmp_path / "out.onnx", "--repro", tmp_path / "repro", "--no-measure")
    run("inspect", source, "--repro", tmp_path / "repro")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "out.onnx"]


def test_a_folder_of_the_user_is_not_touched(tmp_path: Path) -> None:
    source, folder = tmp_path / "model.onnx", tmp_path / "mine"
    onnx.save(build(CHAIN), source)
    folder.mkdir()
    (folder / "thesis.txt").write_text("years", encoding="utf-8")
    said = fails(tmp_path, "optimize", source, "-o", tmp_path / "out.onnx", "--repro", folder)
    assert "it is there already; name a new folder" in said
    assert "there is no folder" in fails(tmp_path, "inspect", source, "--repro", tmp_path / "none" / "repro")


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    source.write_bytes(b"\xff" * 100)
    for verb in (("inspect", source), ("optimize", source, "-o", tmp_path / "o.onnx"), ("bench", source), ("compare", source, source)):
        said = run(*verb, "--repro", tmp_path / verb[0], code=1).stderr
        assert "not in it: the model model.onnx, which cannot be read" in said
        assert sorted(p.name for p in (tmp_path / verb[0]).iterdir()) == ["command.sh", "repro.json"]
        assert (tmp_path / verb[0] / "command.sh").read_text(encoding="utf-8").splitlines()[-1].startswith(f"graphopt {verb[0]} model")


def test_python(plugin: Path, tmp_path: Path) -> None:
    proto = build(CHAIN)
    with pytest.raises(PassError) as caught:
        graphopt.optimize(
            proto, "raises", plugins=(str(plugin),), repro=tmp_path / "repro", with_weights=True, samples=[{"x": np.ones((2, 4), np.float32)}]
        )
    assert "what reproduces it is in" in caught.value.__notes__[0]
    assert {"model.onnx", "samples.npz"} <= {p.name for p in (tmp_path / "repro").iterdir()}
    assert "--samples samples.npz" in (tmp_path / "repro" / "command.sh").read_text(encoding="utf-8")
    (tmp_path / "file").touch()
    with pytest.raises(SaveError):
        graphopt.optimize(proto, "raises", repro=tmp_path / "file")


def test_a_folder_that_cannot_be_written_in_the_end_hides_no_error(plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(elide, "write", full)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(PassError, match="three is too many") as caught:
        graphopt.optimize(build(CHAIN), "raises", plugins=(str(plugin),), repro=tmp_path / "repro")
    assert "could not be written" in caught.value.__notes__[0]
    assert [p.name for p in tmp_path.iterdir()] == [SECRET]


# ---- weights ----------------------------------------------------------------------------------------------------------------------------


def arrays(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}


@pytest.mark.parametrize("outside", [False, True])
def test_weights_are_made_up_and_the_model_works_as_before(outside: bool, tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    whole = onnx.load(tiny("bert", "sdpa", "18"))
    onnx.save(whole, source, save_as_external_data=outside, size_threshold=1100)
    elided, same = elide.load(source, weights=False), elide.load(source, weights=True)
    before, after, kept = arrays(onnx.load(source)), arrays(elided), arrays(same)
    large = [name for name, a in before.items() if a.size > 64 and a.dtype.kind == "f" and len(np.unique(a)) > 4]
    assert len(large) > 10
    for name, array in before.items():
        assert (after[name].shape, after[name].dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(kept[name], array)
        if name in large:
            assert (after[name] != array).any()
            assert abs(after[name].mean() - array.mean()) < 0.3 * array.std()
            assert 0.5 < after[name].std() / array.std() < 2
        else:
            np.testing.assert_array_equal(after[name], array)
    elide.write(elided, tmp_path / "elided.onnx")
    plain, made = (graphopt.optimize(path, promise=False).report for path in (source, tmp_path / "elided.onnx"))
    assert [(p.name, p.changes) for p in plain.passes if p.name != "strip-metadata"] == [
        (p.name, p.changes) for p in made.passes if p.name != "strip-metadata"
    ]
    assert not any(node.metadata_props or node.doc_string for node in elided.graph.node)
    assert b"site-packages" not in elided.SerializeToString(), "notes of the exporter name files"


def test_types_that_numpy_lacks_and_data_that_is_not_there(tmp_path: Path) -> None:
    import ml_dtypes

    rng = np.random.default_rng(1)
    for kind in ("bfloat16", "float8_e4m3fn", "int4", "uint4"):
        array = (rng.standard_normal(200) * 3).astype(getattr(ml_dtypes, kind))
        made = elide.made_up(array)
        assert (made.dtype, made.shape) == (array.dtype, array.shape)
        assert (made.astype(np.float32) != array.astype(np.float32)).any(), kind
    codes = rng.integers(3, 90, (10, 20)).astype(np.uint8)
    assert elide.made_up(codes).min() >= 3
    positions, mask = np.arange(512), np.triu(np.full((9, 9), np.float32(-1e9)), 1)
    assert elide.made_up(positions) is positions
    assert elide.made_up(mask) is mask
    assert np.isfinite(elide.made_up(np.append(rng.standard_normal(99), np.nan).astype(np.float32))).all()
    path = tmp_path / "model.onnx"
    onnx.save(onnx.load(tiny("bert", "sdpa", "18")), path, save_as_external_data=True, location="model.data", size_threshold=0)
    (tmp_path / "model.data").unlink()
    assert all(t.data_location != onnx.TensorProto.EXTERNAL for t in elide.tensors(elide.load(path, weights=False)))


def test_what_stands_for_files_is_named_and_what_stands_for_nodes_stays() -> None:
    from graphopt.driver.debug.repro import _public

    assert _public(f"cannot read {Path(__file__)}: bad") == "cannot read test_repro.py: bad"
    assert _public("node `/model/layer.0/attention/MatMul` is bad, 3/4/5") == "node `/model/layer.0/attention/MatMul` is bad, 3/4/5"
