"""Saving: whole or not at all, external data, never over the input, and nothing of the user's lost."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import assert_same, parse, run, to_proto  # type: ignore[import-not-found]

from graphopt.core.errors import SaveError
from graphopt.graph import serialize
from graphopt.io import save as save_module
from graphopt.io.load import load
from graphopt.io.save import save, save_as_is

WIDE = 512  # a weight of 1 MiB


def wide(seed: int = 0, layers: int = 1) -> onnx.ModelProto:
    rng = np.random.default_rng(seed)
    names = [f"w{k}" for k in range(layers)]
    body = " ".join(f"a{k + 1} = MatMul (a{k}, {w})" for k, w in enumerate(names))
    declared = ", ".join(f"float[{WIDE},{WIDE}] {w}" for w in names)
    text = f'<ir_version: 8, opset_import: ["" : 17]> g (float[N,{WIDE}] a0) => (float[N,{WIDE}] y) <{declared}> {{ {body} y = Relu (a{layers}) }}'
    return parse(text, **{w: rng.normal(size=(WIDE, WIDE)).astype(np.float32) / 32 for w in names})


def feeds() -> dict[str, Any]:
    return {"a0": np.random.default_rng(1).normal(size=(3, WIDE)).astype(np.float32)}


def test_one_file(tmp_path: Path) -> None:
    proto = wide()
    info = save(load(proto), tmp_path / "out.onnx")
    assert info.files == (tmp_path / "out.onnx",)
    assert info.nbytes == (tmp_path / "out.onnx").stat().st_size
    assert os.listdir(tmp_path) == ["out.onnx"]
    assert_same(run(proto, feeds()), run(tmp_path / "out.onnx", feeds()))


def test_external_data_above_the_limit_through_one_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D01: with the limit at 1 MiB a 3 MiB model goes outside by itself, and nothing ever serializes it whole."""
    monkeypatch.setenv("GRAPHOPT_PROTO_LIMIT", str(2**20))
    monkeypatch.setattr(save_module, "to_bytes", None)
    proto = wide(layers=3)
    info = save(load(proto), tmp_path / "out.onnx")
    assert [f.name for f in info.files] == ["out.onnx", "out.onnx.data"]
    assert (tmp_path / "out.onnx").stat().st_size < 10_000
    assert_same(run(proto, feeds()), run(tmp_path / "out.onnx", feeds()))
    monkeypatch.setattr(save_module, "to_bytes", serialize.to_bytes)
    with pytest.raises(SaveError, match="save it with external data"):
        save(load(proto), tmp_path / "inside.onnx", external=False)
    assert sorted(os.listdir(tmp_path)) == ["out.onnx", "out.onnx.data"]


def referenced(path: Path) -> int:
    """The bytes of the data file that the model refers to, up to the padding between weights."""
    proto = onnx.load(path, load_external_data=False)
    ends = []
    for tensor in proto.graph.initializer:
        place = {e.key: e.value for e in tensor.external_data}
        if place:
            assert place["location"] == f"{path.name}.data"
            ends.append(int(place["offset"]) + int(place["length"]))
    return max(ends)


def test_saving_again_rewrites_the_data_file(tmp_path: Path) -> None:
    """D02."""
    out = tmp_path / "out.onnx"
    for model in (wide(layers=2), wide(layers=2), wide(layers=1)):
        save(load(model), out, external=True)
        assert (tmp_path / "out.onnx.data").stat().st_size == referenced(out)
        assert_same(run(model, feeds()), run(out, feeds()))
    assert (tmp_path / "out.onnx.data").stat().st_size == WIDE * WIDE * 4
    save(load(wide()), out)
    assert os.listdir(tmp_path) == ["out.onnx"], "the data file of the model that was replaced would be dead"


def test_a_data_file_that_is_not_ours_stays(tmp_path: Path) -> None:
    (tmp_path / "out.onnx.data").write_text("mine")
    save(load(wide()), tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx.data").read_text() == "mine"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError])
@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_leaves_everything_as_it_was(error: type[BaseException], existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every step: while the data or the model are written, and at each of the moves into place."""
    out = tmp_path / "out.onnx"
    if existing:
        save(load(wide(seed=5)), out, external=True)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    new = load(wide(seed=6))

    def fail(*_: object) -> None:
        raise error("stop")

    moves = os.replace

    def failing_move(number: int) -> Callable[[Any, Any], None]:
        counter = iter(range(100))
        return lambda a, b: fail() if next(counter) == number else moves(a, b)

    steps: list[tuple[Any, str, Callable[..., None]]] = [(Path, "write_bytes", fail), (save_module, "_append", fail)]
    steps += [(os, "replace", failing_move(number)) for number in range(4 if existing else 2)]
    for owner, name, replacement in steps:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, replacement)
            with pytest.raises(SaveError if error is OSError else error):
                save(new, out, external=True)
        assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before, name
    save(new, out, external=True)
    assert sorted(os.listdir(tmp_path)) == ["out.onnx", "out.onnx.data"]


def test_the_input_is_never_written(tmp_path: Path) -> None:
    source = tmp_path / "in.onnx"
    onnx.save(wide(), source, save_as_external_data=True, location="out.onnx.data", size_threshold=0)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    model = load(source)
    link = tmp_path / "link.onnx"
    link.symlink_to(source)
    with pytest.raises(SaveError, match="belongs to the input"):
        save(model, source)
    with pytest.raises(SaveError, match="belongs to the input"):
        save(model, link)
    with pytest.raises(SaveError, match=r"out\.onnx\.data: it belongs to the input"):
        save(model, tmp_path / "out.onnx", external=True)
    link.unlink()
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before
    save(model, tmp_path / "other.onnx", external=True)
    (tmp_path / "other.onnx").rename(tmp_path / "x.onnx")
    assert {f: (tmp_path / f).read_bytes() for f in before} == before


@pytest.mark.parametrize(("place", "message"), [("no/such/out.onnx", "no folder"), (".", "is a folder")])
def test_impossible_places(place: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SaveError, match=message) as caught:
        save(load(wide()), tmp_path / place)
    assert "\n" not in str(caught.value)
    assert not os.listdir(tmp_path)


def test_external_weights_stay_on_disk_until_they_are_read(tmp_path: Path) -> None:
    source = tmp_path / "in.onnx"
    onnx.save(wide(layers=3), source, save_as_external_data=True, location="data.bin", size_threshold=0)
    model = load(source)
    tensors = [v.const_value for v in model.graph.initializers.values()]
    assert all(isinstance(t, ir.ExternalTensor) and t.raw is None for t in tensors)
    base = run(source, feeds())
    save(model, tmp_path / "inside.onnx")
    save(model, tmp_path / "outside.onnx", external=True)
    os.makedirs(tmp_path / "moved")
    for name in ("outside.onnx", "outside.onnx.data"):
        os.replace(tmp_path / name, tmp_path / "moved" / name)
    for name in ("inside.onnx", "moved/outside.onnx"):
        assert_same(base, run(tmp_path / name, feeds()))
    assert_same(base, run(to_proto(model), feeds()))


def test_as_is(tmp_path: Path) -> None:
    source = tmp_path / "in.onnx"
    source.write_bytes(wide().SerializeToString())
    model = load(source)
    save_as_is(model, tmp_path / "same.onnx", source)
    assert (tmp_path / "same.onnx").read_bytes() == source.read_bytes()
    with pytest.raises(SaveError, match="belongs to the input"):
        save_as_is(model, source, source)
    outside = tmp_path / "outside.onnx"
    onnx.save(wide(), outside, save_as_external_data=True, location="data.bin", size_threshold=0)
    info = save_as_is(load(outside), tmp_path / "copy.onnx", outside)
    assert [f.name for f in info.files] == ["copy.onnx", "copy.onnx.data"]
    (tmp_path / "data.bin").unlink()
    assert_same(run(source, feeds()), run(tmp_path / "copy.onnx", feeds()))
    save_as_is(load(wide()), tmp_path / "memory.onnx")
    assert_same(run(source, feeds()), run(tmp_path / "memory.onnx", feeds()))


def test_a_round_trip_never_grows_a_file(tmp_path: Path) -> None:
    """J01: a model with nothing to do."""
    proto = parse('<ir_version: 8, opset_import: ["" : 17]> g (float[N] x) => (float[N] y) { [r] y = Relu (x) }')
    (tmp_path / "in.onnx").write_bytes(proto.SerializeToString())
    info = save(load(tmp_path / "in.onnx"), tmp_path / "out.onnx")
    assert info.nbytes <= (tmp_path / "in.onnx").stat().st_size


def test_saving_does_not_change_the_model(tmp_path: Path) -> None:
    model = load(wide(layers=2))
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    save(model, tmp_path / "out.onnx", external=True)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
