"""Sessions: what they take, what they give, and that every failure is one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.core.errors import GraphoptError, SaveError, TargetError
from graphopt.graph.serialize import to_proto, write
from graphopt.run import ort, reference

TEXT = """<ir_version: 10, opset_import: ["": 23]>
g (float[b,4] x, float[4] bias) => (float[b,4] y, int64[2] shape) <float[4,4] w, float[4] bias = {1, 1, 1, 1}> {
  h = MatMul(x, w)
  y = Add(h, bias)
  shape = Shape(x)
}"""
WEIGHT = np.arange(16, dtype=np.float32).reshape(4, 4)
X = np.ones((3, 4), np.float32)


def model() -> ir.Model:
    """One overridable input (`bias`)."""
    return ir.from_onnx_text(TEXT, initializers=[ir.tensor(WEIGHT, name="w")])


@pytest.mark.parametrize("load", [lambda m: ort.session(m, optimize=False), reference.session], ids=["ort", "reference"])
@pytest.mark.parametrize("kind", ["model", "proto", "bytes", "path", "text path"])
def test_every_kind_of_source(load: object, kind: str, tmp_path: Path) -> None:
    proto = ir.to_proto(model())
    path = tmp_path / "m.onnx"
    onnx.save(proto, path)
    source = {"model": model(), "proto": proto, "bytes": proto.SerializeToString(), "path": path, "text path": str(path)}[kind]
    session = load(source)  # type: ignore[operator]
    outputs = session.run({"x": X})
    assert list(outputs) == ["y", "shape"]
    np.testing.assert_array_equal(outputs["y"], X @ WEIGHT + 1)
    np.testing.assert_array_equal(outputs["shape"], [3, 4])
    assert [(p.name, p.dtype, p.shape) for p in session.inputs] == [("x", np.dtype("float32"), ("b", 4))]
    assert [p.name for p in session.outputs] == ["y", "shape"]
    np.testing.assert_array_equal(session.run({"x": X, "bias": np.zeros(4, np.float32)})["y"], X @ WEIGHT)


@pytest.mark.parametrize("load", [ort.session, reference.session], ids=["ort", "reference"])
def test_weights_in_external_files(load: object, tmp_path: Path) -> None:
    ir.save(model(), tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    loaded = ir.load(tmp_path / "m.onnx")
    assert any(isinstance(v.const_value, ir.ExternalTensor) for v in loaded.graph.initializers.values())
    np.testing.assert_array_equal(load(loaded).run({"x": X})["y"], X @ WEIGHT + 1)  # type: ignore[operator]
    np.testing.assert_array_equal(load(tmp_path / "m.onnx").run({"x": X})["y"], X @ WEIGHT + 1)  # type: ignore[operator]
    assert isinstance(loaded.graph.initializers["w"].const_value, ir.ExternalTensor), "the model is not changed"


def test_above_the_protobuf_limit_goes_through_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRAPHOPT_PROTO_LIMIT", "16")
    with pytest.raises(SaveError, match="one protobuf message at most 16"):
        to_proto(model())
    with pytest.raises(TargetError, match="one protobuf message at most 16"):
        reference.session(model())
    session = ort.session(model())
    np.testing.assert_array_equal(session.run({"x": X})["y"], X @ WEIGHT + 1)
    write(model(), tmp_path / "big.onnx")
    np.testing.assert_array_equal(ort.session(tmp_path / "big.onnx").run({"x": X})["y"], X @ WEIGHT + 1)


def test_the_caller_s_model_is_not_changed() -> None:
    proto = ir.to_proto(model())
    before = proto.SerializeToString(deterministic=True)
    ort.session(proto).run({"x": X})
    reference.session(proto).run({"x": X})
    assert proto.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("load", [ort.session, reference.session], ids=["ort", "reference"])
@pytest.mark.parametrize(
    ("feeds", "expected"),
    [
        ({}, "input x missing; the model needs x"),
        ({"x": X, "z": X}, "the model has no input z"),
        ({"x": np.ones((3, 5), np.float32)}, "failed to run the model"),
    ],
)
def test_a_bad_feed_is_one_line(load: object, feeds: dict[str, np.ndarray], expected: str) -> None:
    with pytest.raises(TargetError, match=expected) as caught:
        load(model()).run(feeds)  # type: ignore[operator]
    assert "\n" not in str(caught.value)


def test_a_model_that_does_not_load_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    for source in (tmp_path / "bad.onnx", tmp_path / "absent.onnx", b"no model", tmp_path):
        with pytest.raises(GraphoptError) as caught:
            ort.session(source)
        assert "\n" not in str(caught.value)
    with pytest.raises(TargetError, match="has no NoSuchProvider; it has"):
        ort.session(model(), providers=("NoSuchProvider",))


def test_optimize_false_is_the_lowest_level() -> None:
    from onnxruntime import GraphOptimizationLevel as Level

    levels = [ort.session(model(), optimize=on)._inference.get_session_options().graph_optimization_level for on in (False, True)]
    assert levels == [Level.ORT_DISABLE_ALL, Level.ORT_ENABLE_ALL]
