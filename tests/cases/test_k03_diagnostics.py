"""Kind 3: a diagnostic ends the run, or is untrue. The probe of integer multiplies asks the runtime about what is shipped."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from models import parse, run, to_proto  # type: ignore[import-not-found]

import graphopt
from graphopt.core.errors import TargetError
from graphopt.run import guarded

Array = np.ndarray[Any, Any]
# Two layers of a QAT file; in the order of the text: what stands between the decoded activation and the product, and what reads the last one.
LAYERS = {
    "between codes": ("", "y = Relu(x2)"),
    "moved before": ("  r{n} = Reshape(d{n}, shape)", "y = Relu(x2)"),
    "moved behind": ("", "l = Reshape(x2, shape)  y = Relu(l)"),
    "float behind": ("", "y = Add(m1, x2)"),
}


def qat(signed: bool, opset: int, layers: str, zero: int = 3) -> onnx.ModelProto:
    before, end = LAYERS[layers]
    kind, z = ("int8", zero) if signed else ("uint8", zero + 128)
    body = ""
    for n in range(2):
        read = f"r{n}" if before else f"d{n}"
        body += f"""q{n} = QuantizeLinear(x{n}, s, z)  d{n} = DequantizeLinear(q{n}, s, z) {before.format(n=n)}  v{n} = DequantizeLinear(w{n}, ws, wz)
  m{n} = MatMul({read}, v{n})  o{n} = QuantizeLinear(m{n}, s, z)  x{n + 1} = DequantizeLinear(o{n}, s, z)\n"""
    text = f"""<ir_version: 10, opset_import: ["": {opset}]> g (float[b,16] x0) => (float[p,16] y)
<float s = {{0.03}}, {kind} z = {{{z}}}, float ws = {{0.01}}, int8 wz = {{0}}, int64[2] shape = {{-1,16}}> {{ {body} {end} }}"""
    draw = np.random.default_rng(5)
    return parse(text, **{f"w{n}": draw.integers(-127, 128, (16, 16)).astype(np.int8) for n in range(2)})


def feeds() -> list[dict[str, Array]]:
    return [{"x0": np.random.default_rng(rows).standard_normal((rows, 16)).astype(np.float32)} for rows in (2, 5)]


def at_load(model: onnx.ModelProto) -> list[str]:
    """The integer multiplies that the runtime makes of a file."""
    import tempfile
    from pathlib import Path

    from graphopt.run.worker import Settings

    with tempfile.TemporaryDirectory() as folder:
        guarded.probe(model, None, Settings(level="extended", saved_to=str(Path(folder, "m.onnx"))))
        nodes = onnx.load(Path(folder, "m.onnx")).graph.node
    return [n.op_type for n in nodes if n.op_type in ("QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger", "QGemm")]


FILES = [(signed, opset, layers, "cpu") for signed, opset in ((True, 13), (True, 20), (True, 21), (False, 17)) for layers in LAYERS]
FILES += [(True, 17, layers, "quantized") for layers in LAYERS] + [(False, 13, "between codes", "quantized")]


@pytest.mark.parametrize(("signed", "opset", "layers", "target"), FILES)
def test_k3_1_and_2_the_report_of_a_qat_file_is_true(signed: bool, opset: int, layers: str, target: str) -> None:
    source = qat(signed, opset, layers)
    result = graphopt.optimize(source, target=f"{target}{{tune=off}}")
    report = result.report.as_dict()["target"]
    assert sorted(report["integer"] + [told["name"] for told in report["float"]]) == ["w0", "w1"]
    assert len(report["integer"]) == len(at_load(to_proto(result.model))), report
    assert not [r for r in result.report.remarks("warning") if r.pass_name == "report"]
    for feed in feeds():
        base = run(source, feed)["y"]
        for found in (run(to_proto(result.model), feed), guarded.probe(to_proto(result.model), feed)):
            assert np.abs(found["y"] - base).max() <= 0.07  # a code or two of 0.03 are rounded otherwise
            assert np.mean(np.abs(found["y"] - base) > 1e-5) <= 0.05


def test_k3_1_a_probe_that_fails_is_a_remark() -> None:
    """The input has an operator that the runtime lacks: it is optimized, and the report says what is not known."""
    source = qat(True, 17, "between codes")
    text = onnx.helper.make_node("Thing", ["x2"], ["y"], domain="nobody")
    source.graph.node[-1].CopyFrom(text)
    source.opset_import.append(onnx.helper.make_opsetid("nobody", 1))
    result = graphopt.optimize(source, "canonicalize", target="cpu{tune=off}")
    (warning,) = [r for r in result.report.remarks("warning") if r.pass_name == "report"]
    assert "which weights it multiplies as integers is not known: onnxruntime cannot load the model" in warning.message
    assert all(told["reason"].startswith("not known; ") for told in result.report.as_dict()["target"]["float"])
    assert result.report.gate.passed is not False


def test_k3_1_a_probe_that_kills_the_runtime_is_a_remark(monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*given: object, **options: object) -> None:
        raise guarded.Died("onnxruntime cannot load the model: it ended the process by SIGSEGV (nothing more was said)")

    monkeypatch.setattr(guarded, "probe", dies)
    result = graphopt.optimize(qat(True, 17, "between codes"), "canonicalize", target="cpu{tune=off}", gate=False)
    assert any("is not known" in r.message and "SIGSEGV" in r.message for r in result.report.remarks("warning"))


@pytest.mark.parametrize("pipeline", ["prune-heads{ratio=0.25}", "quantize{mode=static}", "quantize{mode=dynamic}"])
def test_k3_what_looks_at_values_asks_nothing_that_the_runtime_refuses(pipeline: str) -> None:
    """Inside, a graph has a newer opset than its file, at which the runtime would refuse signed codes that move."""
    result = graphopt.optimize(qat(True, 17, "moved before"), pipeline, target="cpu{tune=off}", samples=feeds())
    assert result.report.loss.value is not None, result.report.loss.reason


def test_k3_the_words_never_say_float_where_it_is_not() -> None:
    result = graphopt.optimize(qat(True, 17, "between codes"), target="quantized{tune=off}")
    assert not [r for r in result.report.remarks() if "multiplied as float" in r.message]


def test_k3_a_convolution_between_codes_counts() -> None:
    text = """<ir_version: 10, opset_import: ["": 17]> g (float[b,4,n] x) => (float[b,8,k] y)
<float s = {0.03}, uint8 z = {128}, float ws = {0.01}, int8 wz = {0}> {
  q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  v = DequantizeLinear(w, ws, wz)  c = Conv(d, v)  o = QuantizeLinear(c, s, z)  y = DequantizeLinear(o, s, z) }"""
    source = parse(text, w=np.random.default_rng(1).integers(-127, 128, (8, 4, 3)).astype(np.int8))
    assert graphopt.optimize(source, target="cpu{tune=off}").report.as_dict()["target"]["integer"] == ["w"]


def test_the_one_line_where_the_runtime_says_no() -> None:
    with pytest.raises(TargetError, match="cannot load"):
        guarded.probe(b"no model")
