"""Cases J, and F01, F02, F03 and F08 through the whole pipeline: what a user sees, and what must never happen to a model."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from test_api import BLOCK, DECLINED, RELU, model
from tiny import tiny  # type: ignore[import-not-found]
from typer.testing import CliRunner, Result

import graphopt
from graphopt.cli.root import app

HEAD = '<ir_version: 8, opset_import: ["" : 17]> '
FLIP = '''
import dataclasses
import numpy as np
import onnx_ir as ir
from graphopt import Pass


@dataclasses.dataclass(frozen=True)
class FlipWeight(Pass):
    """Fault injection: the sign of one element of the largest weight changes."""

    def run(self, model, ctx):
        value = max(model.graph.initializers.values(), key=lambda v: v.const_value.size)
        array = value.const_value.numpy().copy()
        array.reshape(-1)[-1] *= -1
        value.const_value = ir.tensor(array, name=value.name)
        return 1
'''
UNDO = '''
import dataclasses
from typing import ClassVar
from graphopt import Match, RewritePass


@dataclasses.dataclass(frozen=True)
class PingPong(RewritePass[Match]):
    """A -> B and B -> A."""

    anchors: ClassVar[frozenset[str]] = frozenset({"Relu", "Abs"})

    def match(self, node, ctx):
        return Match(nodes=(node,), outputs=(node.outputs[0],))

    def build(self, op, m):
        return [(op.Abs if m.nodes[0].op_type == "Relu" else op.Relu)(m.nodes[0].inputs[0])]
'''


def cli(*arguments: str | Path, code: int = 0) -> Result:
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == code, done.stdout + done.stderr
    return done


def saved(folder: Path, text: str) -> Path:
    onnx.save(model(text), folder / "in.onnx")
    return folder / "in.onnx"


# ---- J01 ------------------------------------------------------------------------------------------------------------------------------


def test_j01_nothing_to_do_is_said_and_the_file_is_the_input(tmp_path: Path) -> None:
    source, out = saved(tmp_path, RELU), tmp_path / "out.onnx"
    for level in ("-O0", "-O1", "-O2"):
        assert "0 changes" in cli("optimize", source, "-o", out, level, "--no-measure").stdout
        assert out.read_bytes() == source.read_bytes()


def test_j01_every_declined_candidate_has_a_reason(tmp_path: Path) -> None:
    source, out = saved(tmp_path, DECLINED), tmp_path / "out.onnx"
    shown = cli("optimize", source, "-o", out, "--pipeline", "fuse-norm", "--no-measure").stdout
    assert "0 changes" in shown
    assert "missed fuse-norm at `" in shown
    assert "keepdims=0" in shown


def test_j01_quantize_without_anything_to_quantize(tmp_path: Path) -> None:
    source, out = saved(tmp_path, RELU), tmp_path / "out.onnx"
    assert "nothing to quantize" in cli("optimize", source, "-o", out, "--pipeline", "quantize", "--no-measure").stdout
    error = cli("optimize", source, "-o", tmp_path / "no.onnx", "--pipeline", "quantize", "--require", "quantize", code=1).stderr
    assert error.startswith("error: quantize is required and changed nothing: nothing to quantize")
    assert not (tmp_path / "no.onnx").exists()


# ---- J04 ------------------------------------------------------------------------------------------------------------------------------


def test_j04_rewrites_that_undo_each_other_stop_and_say_so(tmp_path: Path) -> None:
    plugin = tmp_path / "pingpong.py"
    plugin.write_text(UNDO)
    report = graphopt.optimize(model(RELU), "ping-pong", plugins=[str(plugin)]).report
    assert any("still changes the graph after" in remark.message for remark in report.remarks("warning"))


def chain(op: str, count: int) -> onnx.ModelProto:
    """x -> op -> op -> ... -> Relu; PREVIOUS in `op` is the value before."""
    lines = [f"v{k + 1} = {op.replace('PREVIOUS', f'v{k}')}" for k in range(count)]
    head = HEAD + "g (float[n, 8] x) => (float[n, 8] y) <float[8, 8] w, float[8] b> {"
    return model("\n".join([head, "v0 = Identity(x)", *lines, f"y = Relu(v{count}) }}"]))


@pytest.mark.timed
@pytest.mark.parametrize(
    ("op", "count", "left"), [("Add(PREVIOUS, b)", 2000, None), ("Identity(PREVIOUS)", 1000, 1), ("MatMul(PREVIOUS, w)", 400, 401)]
)
def test_j04_time_is_about_linear(op: str, count: int, left: int | None) -> None:
    proto = chain(op, count)
    start = time.perf_counter()
    result = graphopt.optimize(proto)
    seconds = time.perf_counter() - start
    assert seconds < 5
    if left is not None:
        assert sum(1 for _ in result.graph.graph) == left


# ---- J05 ------------------------------------------------------------------------------------------------------------------------------


def test_j05_an_unknown_operator_ends_the_shapes_and_not_the_run() -> None:
    text = BLOCK.replace('"" : 17]', '"" : 17, "my" : 1]').replace("out = MatMul(gelu, down)", "foo = my.Foo(gelu)\n  out = MatMul(foo, down)")
    result = graphopt.optimize(model(text), verify_each=True)
    ops = [node.op_type for node in result.model.graph]
    assert {"LayerNormalization", "Gelu", "Foo"} <= set(ops)
    warned = [remark for remark in result.report.remarks("warning") if "Foo" in remark.message]
    assert len(warned) == 1
    assert "shapes end here" in warned[0].message


def test_j05_a_shape_that_the_file_states_wrongly_is_named() -> None:
    proto = model(BLOCK)
    proto.graph.value_info.append(onnx.helper.make_tensor_value_info("h", onnx.TensorProto.FLOAT, [4, 32]))
    result = graphopt.optimize(proto)
    assert "Gelu" in [node.op_type for node in result.model.graph]
    assert any(remark.node == "h" and "[4,32]" in remark.message for remark in result.report.remarks("warning"))


# ---- J08 ------------------------------------------------------------------------------------------------------------------------------


def test_j08_a_pass_that_changes_the_numbers_is_caught(tmp_path: Path) -> None:
    plugin, source, out = tmp_path / "flip.py", saved(tmp_path, BLOCK), tmp_path / "out.onnx"
    plugin.write_text(FLIP)
    run = ("optimize", source, "-o", out, "--plugin", plugin, "--pipeline", "canonicalize, flip-weight, fuse-norm", "--no-measure")
    error = cli(*run, "--check-numerics", code=1).stderr
    assert "pass 2 `flip-weight`" in error
    assert "output `y` at [" in error
    assert not out.exists()
    cli(*run, "--no-gate")  # without check and gate nobody knows: the pass says that it is exact
    assert "`flip-weight` breaks it" in cli(*run, "--remarks", "missed").stdout.replace("\n", " ")


def test_j08_a_language_model_is_fed_ids_that_it_has(tmp_path: Path) -> None:
    source = tiny("bert", "sdpa", "ts17")
    cli("optimize", source, "-o", tmp_path / "out.onnx", "--check-numerics", "--verify-each", "--no-measure")


# ---- F, through the whole pipeline ----------------------------------------------------------------------------------------------------


def test_f01_f02_the_interface_survives_every_level(tmp_path: Path) -> None:
    """An input that nobody reads stays in its place, and a weight with a default stays one that a caller may replace."""
    text = BLOCK.replace("(float[batch, seq, 8] x)", "(int64[k] unused, float[batch, seq, 8] x, float[8] beta)").replace(", float[8] beta>", ">")
    proto = model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.full(8, 0.5, np.float32), "beta"))
    for level in (0, 1, 2):
        out = tmp_path / f"{level}.onnx"
        graphopt.optimize(proto, level=level).save(out)
        found = onnx.load(out)
        assert [value.name for value in found.graph.input] == ["unused", "x", "beta"]
        assert "beta" in [tensor.name for tensor in found.graph.initializer]
        assert [d.dim_param or d.dim_value for d in found.graph.input[1].type.tensor_type.shape.dim] == ["batch", "seq", 8]


def test_f03_what_the_author_wrote_survives(tmp_path: Path) -> None:
    proto = model(BLOCK)
    proto.producer_name, proto.model_version, proto.doc_string = "somebody", 7, "a note"
    proto.metadata_props.add(key="license", value="mine")
    graphopt.optimize(proto).save(tmp_path / "out.onnx")
    found = onnx.load(tmp_path / "out.onnx")
    assert (found.producer_name, found.model_version, found.doc_string) == ("somebody", 7, "a note")
    assert {entry.key: entry.value for entry in found.metadata_props}["license"] == "mine"


@pytest.mark.parametrize(("level", "target"), [(1, "cpu{tune=off}"), (2, "cpu{tune=off}"), (2, "quantized{tune=off}")])
@pytest.mark.parametrize("route", ["ts17", "18"])
def test_f08_a_second_run_over_a_tiny_bert_changes_nothing(tmp_path: Path, route: str, level: int, target: str) -> None:
    first, second = tmp_path / "first.onnx", tmp_path / "second.onnx"
    result = graphopt.optimize(tiny("bert", "sdpa", route), level=level, target=target, promise=False)
    result.save(first)
    again = graphopt.optimize(first, level=level, target=target, promise=False)
    again.save(second)
    assert result.report.changes > 0
    assert [record.name for record in again.report.passes if record.changes] == []
    assert second.read_bytes() == first.read_bytes()
    in_memory = graphopt.optimize(ir.load(first), level=level, target=target, promise=False)
    assert in_memory.report.changes == 0
