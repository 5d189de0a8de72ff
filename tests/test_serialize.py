"""Bytes of a model: counted without making them, read without a second copy, and one limit for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import minilm, parse  # type: ignore[import-not-found]

from graphopt.core.errors import GraphoptError
from graphopt.graph.serialize import fits, model_bytes, proto_limit, read, to_bytes
from graphopt.graph.size import size
from graphopt.io.load import load
from graphopt.io.save import finish, save

TEXT = """<ir_version: 10, opset_import: ["": 21]>
g (float[b,64] x, bool c) => (float[b,N] y) <float[64,64] w, float[3] few = {1, 2, 3}> {
  h = MatMul (x, w)
  y = If (c) <then_branch = a () => (float[b,N] p) { p = Relu (h) }, else_branch = e () => (float[b,N] q) { q = Neg (h) }>
}"""


def model(kind: str = "float", count: int = 64) -> ir.Model:
    loaded: ir.Model = load(parse(TEXT, w=np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)))
    if kind != "float":
        array = np.arange(count * 100, dtype=np.int64).reshape(count, 100) % 7
        tensor = ir.tensor(array.astype(ir.DataType[kind].numpy()), dtype=ir.DataType[kind], name="more")
        value = ir.Value(name="more", type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        loaded.graph.register_initializer(value)
    return loaded


@pytest.mark.parametrize("kind", ["float", "INT4", "UINT8", "BFLOAT16", "FLOAT16", "INT64", "BOOL"])
@pytest.mark.parametrize("count", [64, 300])
def test_the_size_is_that_of_the_file(kind: str, count: int, tmp_path: Path) -> None:
    built = model(kind, count)
    save(built, tmp_path / "out.onnx")
    assert model_bytes(finish(built)[0]) == (tmp_path / "out.onnx").stat().st_size


@pytest.mark.parametrize("route", ["sdpa_18", "eager_ts17"])
def test_the_size_of_a_real_model(route: str, tmp_path: Path) -> None:
    path = minilm(route)
    before = ir.load(path)
    assert model_bytes(before) == len(to_bytes(before))
    loaded = load(path)
    info = save(loaded, tmp_path / "out.onnx")
    assert model_bytes(finish(loaded)[0]) == info.nbytes == size(tmp_path / "out.onnx")
    outside = save(loaded, tmp_path / "outside.onnx", external=True)
    padding = 4096 * len(loaded.graph.initializers)
    assert abs(model_bytes(load(tmp_path / "outside.onnx")) - outside.nbytes) < padding
    assert size(tmp_path / "outside.onnx") == outside.nbytes


def test_no_weight_is_read_for_the_size(tmp_path: Path) -> None:
    built = model()
    save(built, tmp_path / "out.onnx", external=True)
    again = load(tmp_path / "out.onnx")
    (tmp_path / "out.onnx.data").unlink()
    assert model_bytes(again) > 64 * 64 * 4


def test_one_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    built = model()
    whole = model_bytes(built)
    for limit, expected in ((whole, True), (whole - 1, False)):
        monkeypatch.setenv("GRAPHOPT_PROTO_LIMIT", str(limit))
        assert fits(built) is expected
    monkeypatch.setenv("GRAPHOPT_PROTO_LIMIT", "2 GB")
    with pytest.raises(GraphoptError, match="GRAPHOPT_PROTO_LIMIT must be a number of bytes, found '2 GB'"):
        proto_limit()


def test_a_file_reads_as_it_was_written(tmp_path: Path) -> None:
    for number, proto in enumerate([onnx.load(minilm("sdpa_18")), ir.to_proto(model("INT4"))]):
        path = tmp_path / f"{number}.onnx"
        path.write_bytes(proto.SerializeToString())
        assert read(path) == proto
        light = read(path, weights=False)
        assert light.graph.node == proto.graph.node
        assert path.stat().st_size > 4 * light.ByteSize()


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    content = ir.to_proto(model()).SerializeToString()
    for broken in (content[:-40], content[:9], b"\x0b" + content, b"\xff" * 20):
        path = tmp_path / "broken.onnx"
        path.write_bytes(broken)
        with pytest.raises(Exception) as caught:  # the kind is that of the library
            read(path)
        assert not isinstance(caught.value, OSError)


def test_a_message_in_parts_is_one(tmp_path: Path) -> None:
    """Protobuf merges what is repeated: a file may be written in parts."""
    proto: Any = ir.to_proto(model())
    rest = onnx.ModelProto()
    rest.graph.doc_string = "the rest"
    path = tmp_path / "parts.onnx"
    path.write_bytes(proto.SerializeToString() + rest.SerializeToString())
    proto.MergeFrom(rest)
    assert read(path) == proto
