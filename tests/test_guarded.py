"""A probe opens and runs a model where a crash ends no process of the user."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import pytest
from models import parse  # type: ignore[import-not-found]
from onnx import TensorProto, helper, numpy_helper

from graphopt.core.errors import TargetError
from graphopt.report.bench import bench
from graphopt.report.comparison import compare
from graphopt.run import guarded, ort
from graphopt.run.guarded import Died, probe
from graphopt.run.worker import Settings

TEXT = '<ir_version: 10, opset_import: ["": 21]> g (float[B,4] x) => (float[B,4] y) { t = Relu (x)  y = Neg (t) }'
FEED = {"x": np.linspace(-2, 2, 8, dtype=np.float32).reshape(2, 4)}


def crashing() -> onnx.ModelProto:
    """ONNX Runtime 1.32 ends its process when it loads this: float16 Transpose, then MatMul with a weight, and no Add behind it (ORT#32186)."""
    weight = numpy_helper.from_array(np.ones((8, 8), np.float16), "w")
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        helper.make_node("MatMul", ["t", "w"], ["m"]),
        helper.make_node("Transpose", ["m"], ["y"], perm=[1, 0, 2]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["b", "s", 8]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_a_probe_gives_the_outputs_of_a_session() -> None:
    for settings in (Settings(), ort.settings(2, optimize=False)):
        found = probe(parse(TEXT), FEED, settings)
        assert np.array_equal(found["y"], ort.session(parse(TEXT)).run(FEED)["y"])
    assert probe(parse(TEXT)) == {}


def test_one_worker_serves_many_probes() -> None:
    probe(parse(TEXT), FEED)
    first = guarded._current
    probe(parse(TEXT), FEED)
    assert guarded._current is first


def test_a_refusal_is_one_line_and_the_worker_lives() -> None:
    probe(parse(TEXT), FEED)
    first = guarded._current
    with pytest.raises(TargetError, match=r"onnxruntime cannot load the model: .*Nothing"):
        probe(parse(TEXT.replace("Relu", "custom.Nothing").replace('"": 21', '"": 21, "custom": 1')), FEED)
    with pytest.raises(TargetError, match="onnxruntime failed to run the model: "):
        probe(parse(TEXT), {"x": FEED["x"][:, :3]})
    assert guarded._current is first


def test_a_crash_is_one_line_and_the_next_probe_works() -> None:
    with pytest.raises(Died, match="onnxruntime cannot load the model: it ended the process by SIG"):
        probe(crashing(), {"x": np.zeros((2, 3, 8), np.float16)})
    assert np.array_equal(probe(parse(TEXT), FEED)["y"], -np.maximum(FEED["x"], 0))


def test_a_worker_that_was_killed_meanwhile_is_started_again() -> None:
    probe(parse(TEXT), FEED)
    assert guarded._current is not None
    os.kill(guarded._current.process.pid, signal.SIGKILL)
    guarded._current.process.wait()
    assert set(probe(parse(TEXT), FEED)) == {"y"}


def test_what_does_not_come_back_is_ended() -> None:
    """A Loop without an end."""
    endless = parse(
        """<ir_version: 10, opset_import: ["": 21]> g (float[1] x) => (float[1] y) {
        go = Constant <value: tensor = bool {1}> ()
        y = Loop <body: graph = b (int64 n, bool c, float[1] v) => (bool d, float[1] w) { d = Identity (c)  w = Neg (v) }> (, go, x) }"""
    )
    with pytest.raises(Died, match="failed to run the model: it did not come back within 1 s"):
        probe(endless, {"x": np.zeros(1, np.float32)}, limit=1.0)
    assert set(probe(parse(TEXT), FEED)) == {"y"}


def test_values_that_are_no_tensors_come_back() -> None:
    text = '<ir_version: 10, opset_import: ["": 21]> g (float[B,4] x) => (seq(float[B,4]) y, string[1] s) {{ y = SequenceConstruct (x, x)  {} }}'
    found = probe(parse(text.format('s = Constant <value: tensor = string[1] {"word"}> ()')), FEED)
    assert [part.shape for part in found["y"]] == [(2, 4), (2, 4)]
    assert found["s"].tolist() == ["word"]


def test_a_model_above_the_limit_of_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx_ir as ir

    model = ir.from_proto(parse(TEXT.replace("Neg (t)", "Add (t, c)").replace("y) {", "y) <float[4] c = {1, 2, 3, 4}> {")))
    monkeypatch.setenv("GRAPHOPT_PROTO_LIMIT", "100")
    assert probe(model, FEED)["y"].shape == (2, 4)


def test_a_script_without_a_main_guard_and_with_closed_streams(tmp_path: Path) -> None:
    """The worker takes no input of the script, prints nothing, and is gone when the script ends."""
    model, script = tmp_path / "m.onnx", tmp_path / "script.py"
    onnx.save(crashing(), model)
    script.write_text(
        textwrap.dedent("""
        import sys
        from graphopt.core.errors import TargetError
        from graphopt.run import guarded
        try:
            guarded.probe(sys.argv[1])
        except TargetError as error:
            print("died" in type(error).__name__.lower(), sys.stdin.read())
        guarded.probe(open(sys.argv[1], "rb").read()[:0] or sys.argv[2])
        print(guarded._current.process.pid)
        """)
    )
    good = tmp_path / "good.onnx"
    onnx.save(parse(TEXT), good)
    done = subprocess.run(
        [sys.executable, str(script), str(model), str(good)], input="mine", capture_output=True, text=True, check=True, cwd=tmp_path, timeout=60
    )
    said, pid = done.stdout.split("\n")[:2]
    assert said == "True mine"
    assert done.stderr == ""
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_bench_and_compare_survive_a_file_that_kills_the_runtime(tmp_path: Path) -> None:
    model, other = tmp_path / "m.onnx", tmp_path / "n.onnx"
    onnx.save(crashing(), model)
    onnx.save(crashing(), other)
    for run in (lambda: bench([model, other]), lambda: compare(model, other)):
        with pytest.raises(Died, match="cannot load the model: it ended the process by SIG"):
            run()
