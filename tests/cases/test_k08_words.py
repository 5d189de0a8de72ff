"""Kind 8: what is said of a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from test_api import BLOCK, DECLINED, LOSSY, model
from typer.testing import CliRunner, Result

import graphopt
from graphopt.cli.root import app
from graphopt.core.errors import PassError
from graphopt.core.pipeline import PassRecord
from graphopt.core.remarks import Remark
from graphopt.driver import promise
from graphopt.driver.result import told
from graphopt.report.inspection import inspect
from graphopt.run import ort
from graphopt.run.clock import Timings

HEAD = '<ir_version: 8, opset_import: ["" : 17]> '


def cli(*arguments: str | Path, code: int = 0) -> Result:
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == code, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done


def saved(folder: Path, text: str) -> Path:
    onnx.save(model(text), folder / "in.onnx")
    return folder / "in.onnx"


# ---- remarks --------------------------------------------------------------------------------------------------------------------------


def optimize(source: Path, *arguments: str | Path, code: int = 0) -> Result:
    return cli("optimize", source, "-o", source.with_name("out.onnx"), "--no-measure", *arguments, code=code)


def test_remarks_as_a_table(tmp_path: Path) -> None:
    shown = optimize(saved(tmp_path, DECLINED), "--pipeline", "fuse-norm", "--remarks=missed", "--remarks-format", "table").stdout
    rows = [line.split() for line in shown.splitlines()]
    assert ["kind", "pass", "node", "message"] in rows
    assert any(row[:2] == ["missed", "fuse-norm"] for row in rows)


def test_remarks_as_json_lines_stand_alone(tmp_path: Path) -> None:
    source = saved(tmp_path, BLOCK)
    done = optimize(source, "--remarks=applied", "--remarks-format=jsonl")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["kind"] for row in rows} == {"applied"}
    assert {"pass", "kind", "node", "message", "facts"} == set(rows[0])
    assert {"fuse-norm", "fuse-activation"} <= {row["pass"] for row in rows}
    assert len(optimize(source, "--remarks-format=jsonl").stdout.splitlines()) >= len(rows), "all of them, where no kind is given"
    assert "not both" in optimize(source, "--remarks-format=jsonl", "--json", code=2).stderr
    assert optimize(source, "--pipeline", "fuse-rotary", "--remarks-format=jsonl", "--remarks=applied").stdout == ""


def test_a_remark_is_said_once(tmp_path: Path) -> None:
    """Two runs of a pass, and the list that was asked for: each reason stands once."""
    shown = optimize(saved(tmp_path, DECLINED), "--pipeline", "fuse-norm, canonicalize, fuse-norm", "--remarks=missed").stdout
    told = [line for line in shown.splitlines() if "fuse-norm at `" in line]
    assert told
    assert len(told) == len(set(told))
    assert sum("keepdims=0" in line for line in shown.splitlines()) == len(told)


# ---- what is taken back ---------------------------------------------------------------------------------------------------------------


def test_nothing_is_applied_of_a_pass_that_was_taken_back() -> None:
    record = PassRecord("fuse-norm", 1, 0.1, [Remark("applied", "fuse-norm", "n", "fused"), Remark("missed", "fuse-norm", "m", "odd")])
    undone = promise._undone(record, "taken back: slow", {})
    assert (undone.changes, [(x.kind, x.message) for x in undone.remarks]) == (0, [("missed", "odd"), ("missed", "taken back: slow")])


def test_nothing_is_applied_of_a_pass_over_the_budget(tmp_path: Path) -> None:
    plugin = tmp_path / "lossy.py"
    plugin.write_text(LOSSY)
    feed = {"x": np.random.default_rng(0).normal(size=(1, 3, 8)).astype(np.float32)}
    run = {"samples": [feed], "max_loss": 1e-5, "plugins": [str(plugin)], "target": "cpu{tune=off}"}
    report = graphopt.optimize(model(BLOCK), "shift-weights{by=0.4 stubborn=true}", **run).report  # type: ignore[arg-type]
    assert [x.message for x in report.remarks("applied")] == []
    assert [(r.name, r.changes) for r in report.passes if r.name.startswith("shift")] == [("shift-weights{by=0.4 stubborn=true}", 0)]
    run["max_loss"] = 0.05
    report = graphopt.optimize(model(BLOCK), "shift-weights{by=0.4}", **run).report  # type: ignore[arg-type]
    (record,) = [r for r in report.passes if r.changes and r.name.startswith("shift")]
    assert record.asked == "shift-weights{by=0.4}"
    assert record.as_dict()["asked"] == record.asked
    report.write(tmp_path / "r.md")
    page = (tmp_path / "r.md").read_text()
    assert f"| pipeline | {record.asked} |" in page
    assert page.count(f"{record.name} (asked for: {record.asked})") == 2, "in the head and in the table"


# ---- speeds ---------------------------------------------------------------------------------------------------------------------------


def rounds(*pairs: tuple[float, float]) -> Timings:
    return Timings({"1x16": {"input": tuple(a for a, _ in pairs), "output": tuple(b for _, b in pairs)}})


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (((2.0, 1.0), (2.0, 1.0)), None),
        (((1.0, 1.0), (1.0, 1.3), (1.0, 1.2)), "within the noise"),
        (((1.0, 1.3), (1.0, 1.2)), "slower than the input beyond the noise of the timing, 0.80x at worst"),
    ],
)
def test_a_speed_below_one_is_explained(pairs: tuple[tuple[float, float], ...], said: str | None) -> None:
    measured, _ = told(rounds(*pairs))
    assert (measured.note is None) if said is None else (measured.note is not None and said in measured.note)


def test_a_model_of_other_sizes_is_told_what_to_give(tmp_path: Path) -> None:
    """A window of 64 does not fit into 16 rows."""
    text = HEAD + "g (float[batch, 1, rows] x) => (float[batch, 1, n] y) <float[1, 1, 200] w> { y = Conv(x, w) }"
    source = saved(tmp_path, text)
    report = json.loads(cli("optimize", source, "-o", tmp_path / "out.onnx", "--json").stdout)
    assert report["speed_up"]["value"] is None
    for part in ("1x16, 1x128, 8x64", "--samples", "--shapes"):
        assert part in report["speed_up"]["reason"]
    assert json.loads(cli("optimize", source, "-o", tmp_path / "out.onnx", "--shapes", "1x256", "--json").stdout)["speed_up"]["value"]


# ---- the table of passes --------------------------------------------------------------------------------------------------------------


def test_passes_that_did_nothing_are_counted(tmp_path: Path) -> None:
    shown = optimize(saved(tmp_path, BLOCK), "--pipeline", "fuse-norm, fuse-rotary, fuse-attention", "--target", "cpu{tune=off}").stdout
    rows = [line.split() for line in shown.splitlines()]
    assert any(row[:2] == ["fuse-norm", "1"] for row in rows)
    assert not any(row[:1] == ["fuse-rotary"] for row in rows)
    assert "other passes changed nothing (" in shown


# ---- pruning --------------------------------------------------------------------------------------------------------------------------

FFN = HEAD + "g (float[n, 8] x) => (float[n, 8] y) <float[8, {width}] up, float[{width}, 8] down{more}> {{ h = MatMul(x, up) a = Relu(h) {inner} }}"
STATS = ", float[64] s, float[64] b, float[64] m, float[64] v"
CONV = (
    HEAD + "g (float[n, 8, s] x) => (float[n, 8, s] y) <float[64, 8, 1] up, float[8, 64, 1] down> { h = Conv(x, up) a = Relu(h) y = Conv(a, down) }"
)


@pytest.mark.parametrize(
    ("text", "where", "reason"),
    [
        (CONV, "Relu", "Conv `Conv` before it is neither elementwise nor a MatMul or Gemm with a stored weight"),
        (
            FFN.format(width=64, more=STATS, inner="c = BatchNormalization(a, s, b, m, v) y = MatMul(c, down)"), "Relu",
            "BatchNormalization `BatchNormalization` behind it is neither elementwise",
        ),
        (FFN.format(width=32, more="", inner="y = MatMul(a, down)"), "MatMul_1", "its 32 neurons stay in multiples of 32"),
    ],
)  # fmt: skip
def test_neurons_that_cannot_go_name_the_node_and_the_reason(text: str, where: str, reason: str) -> None:
    report = graphopt.optimize(model(text), "canonicalize, prune-ffn{ratio=0.5 importance=magnitude refit=false}", target="cpu{tune=off}").report
    told = [x for x in report.remarks("missed") if x.pass_name == "prune-ffn" and x.node]
    assert [x.node for x in told] == [where]
    assert reason in told[0].message
    assert reason in report.remarks("warning")[-1].message


def test_what_torch_lacks_behind_the_last_block_keeps_no_block_from_being_pruned() -> None:
    """A random operator at the end has no gradient; the importance is that of what it reads, and the block in front of it is pruned."""
    pytest.importorskip("torch", reason="torch is not installed")
    rng = np.random.default_rng(0)
    samples = [{"x": rng.normal(size=(16, 8)).astype(np.float32)} for _ in range(3)]
    text = FFN.format(width=64, more="", inner="z = MatMul(a, down) q = Bernoulli(z) y = Relu(q)")
    run = {"samples": samples, "target": "cpu{tune=off}"}
    report = graphopt.optimize(model(text), "canonicalize, prune-ffn{ratio=0.5}", **run).report  # type: ignore[arg-type]
    assert "layer 0: 32 neurons of 64 removed" in [x.message for x in report.remarks("applied")]
    assert any("torch has no Bernoulli: importance is judged by what it reads" in x.message for x in report.remarks("missed"))
    plain = graphopt.optimize(model(FFN.format(width=64, more="", inner="y = MatMul(a, down)")), "canonicalize, prune-ffn{ratio=0.5}", **run)  # type: ignore[arg-type]
    costs = [x.facts["cost"] for r in (report, plain.report) for x in r.remarks("applied") if "cost" in x.facts]
    assert costs[0] == costs[1], "the same block, judged by the same output"
    first = (
        FFN.format(width=64, more="", inner="z = MatMul(a, down) y = Identity(z)")
        .replace("MatMul(x, up)", "MatMul(r, up)")
        .replace("{ h", "{ r = Bernoulli(x) h")
    )
    with pytest.raises(PassError, match="the torch executor has no `Bernoulli`"):
        graphopt.optimize(model(first), "canonicalize, prune-ffn{ratio=0.5}", **run)  # type: ignore[arg-type]


# ---- what is quantized already --------------------------------------------------------------------------------------------------------

QDQ = HEAD + (
    "g (float[n, 8] x) => (float[n, 8] y) <float[8, 8] w, float three = {{3.0}}, float s = {{0.05}}, uint8 z = {{128}}> "
    "{{ d = Div(x, three) c = Mul(d, s) e = Relu(d) q = {op} y = MatMul(f, w) }}"
)


@pytest.mark.parametrize(
    ("op", "kept"),
    [
        ("QuantizeLinear(e, s, z) f = DequantizeLinear(q, s, z)", True),
        ("Round(e) f = Mul(q, s)", True),
        ("Sigmoid(e) f = Identity(q)", False),
    ],
)
def test_a_quotient_in_front_of_a_rounding_stays_as_it_is(op: str, kept: bool) -> None:
    proto = model(QDQ.format(op=op))
    result = graphopt.optimize(proto, "canonicalize", target="cpu{tune=off}")
    assert ("Div" in [node.op_type for node in result.graph.graph]) == kept
    feed = {"x": np.arange(-4000, 4000, dtype=np.float32).reshape(-1, 8) * np.float32(0.015)}  # many halves of a code
    before, after = (ort.session(x, optimize=False).run(feed)["y"] for x in (proto, result.model))
    assert np.array_equal(before, after) or not kept


def test_exact_passes_over_a_quantized_model_say_what_exact_means() -> None:
    text = QDQ.format(op="Sub(e, s) r = QuantizeLinear(q, s, z) f = DequantizeLinear(r, s, z)")
    told = [x.message for x in graphopt.optimize(model(text), "canonicalize", target="cpu{tune=off}").report.remarks("warning")]
    assert told == ["the input rounds to codes in 1 place; exact passes move floats by their last digits, which may turn single codes"]
    assert not graphopt.optimize(model(BLOCK), "canonicalize", target="cpu{tune=off}").report.remarks("warning")


def test_inspect_reads_through_quantization() -> None:
    """A static model shows the blocks, with the parameters, of the float model that it was made from; so does what stands behind the layers."""
    text = HEAD + (
        "g (float[n, s, 8] x) => (float[n, s, 4] y) <float[8, 64] up, float[64] bias, float[64, 8] down, float[8, 4] head> "
        "{ h0 = MatMul(x, up) h = Add(h0, bias) a = Relu(h) d = MatMul(a, down) e = Add(d, x) y = MatMul(e, head) }"
    )
    samples = [{"x": np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)}]
    parts = {}
    for pipeline in ("canonicalize", "quantize", "quantize{mode=static}", "quantize{mode=weight-only}"):
        graph = graphopt.optimize(model(text), pipeline, target="cpu{tune=off}", samples=samples).graph
        parts[pipeline] = [(p.part, p.what, p.parameters) for p in inspect(graph).card.parts]
    assert parts["canonicalize"] == [("FFN", "8 -> 64 (Relu) -> 8", 8 * 64 + 64 + 64 * 8), ("head", "MatMul 8 x 4", 32)]
    scaled = text.replace("<float[8, 64] up,", "<int8[8, 64] codes, float[1, 64] scale,").replace(
        "h0 = MatMul(x, up)", "c = Cast<to = 1>(codes) up = Mul(c, scale) h0 = MatMul(x, up)"
    )
    proto = onnx.parser.parse_model(scaled)
    rng = np.random.default_rng(1)
    for info in proto.graph.value_info:
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        values = rng.integers(-9, 9, shape).astype(onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type))
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, info.name))
    parts["stored by somebody else"] = [(p.part, p.what, p.parameters) for p in inspect(proto).card.parts]
    assert all(found == parts["canonicalize"] for found in parts.values()), parts
