"""quantize{mode=static}: ranges from samples, integers in every multiply, and memory that does not grow with the samples."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import minilm, run  # type: ignore[import-not-found]
from onnx import helper
from test_quantize import columns, error, node, ops, proto, reasons, rows, value  # type: ignore[import-not-found]
from typer.testing import CliRunner

import graphopt
from graphopt.analysis.pieces import IntegerMatmul
from graphopt.calibration.ranges import ValueHistogram, Ranges
from graphopt.cli.root import app
from graphopt.core.contract import Context, Target
from graphopt.core.errors import PassError, PipelineError
from graphopt.core.pipeline import PassManager, parse
from graphopt.core.registry import passes
from graphopt.core.remarks import Remark
from graphopt.driver.job import parse_target
from graphopt.graph.interface import interface
from graphopt.graph.verify import verify
from graphopt.run.ort import session
from graphopt.run.samples import Samples

Array = np.ndarray[Any, Any]
METHODS = ("minmax", "percentile", "mse", "entropy")
COSINE = {"minmax": 0.98, "percentile": 0.98, "mse": 0.97, "entropy": 0.85}  # entropy cuts off the few channels that LayerNorm makes large
CLOSE = 3e-6  # of the largest output: the same integers, scaled in another order


def quantize(source: onnx.ModelProto, samples: Any, options: str = "") -> tuple[ir.Model, list[Remark]]:
    model = graphopt.load(source)
    public = interface(model)
    (record,) = PassManager(parse(f"quantize{{mode=static {options}}}", passes())).run(model, Context(model, samples=Samples.load(samples, model)))
    verify(model, interface=public)
    return model, record.remarks


def lowered(graph: ir.Model, text: str) -> tuple[ir.Model, Target]:
    target, model = parse_target(text), graph.clone()
    PassManager(list(target.lowerings())).run(model, Context(model, target=target))
    return model, target


def ids(rng: np.random.Generator, batch: int, length: int) -> dict[str, Array]:
    mask = np.ones((batch, length), np.int64)
    mask[0, length // 2 :] = 0
    return {"input_ids": rng.integers(1000, 20000, (batch, length)), "attention_mask": mask}


# ---- a real model ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_minilm_computes_in_integers_and_stays_close(method: str) -> None:
    """Calibrated on other token ids than those that judge it. Batches are of many sizes."""
    rng = np.random.default_rng(1)
    source, samples = minilm("sdpa_18"), [ids(rng, 2 + k % 3, 8 + 5 * k) for k in range(8)]
    text = f"simplify-masks, fuse-norm, fuse-activation, fuse-attention, canonicalize, quantize{{mode=static calibrate={method}}}"
    result = graphopt.optimize(source, text, target="quantized{tune=off}", samples=samples, promise=False)
    report = result.report.as_dict()["target"]
    assert (len(report["integer"]), report["float"]) == (36, [])
    feed = ids(rng, 4, 40)
    base, got = session(source, optimize=False).run(feed), result.session().run(feed)
    for name, expected in base.items():
        a, b = expected.reshape(len(expected), -1), got[name].reshape(len(expected), -1)
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert cosine.min() >= COSINE[method], (name, cosine)


# ---- numbers and structure -----------------------------------------------------------------------------------------------------------------


def layer(op: str = "MatMul") -> onnx.ModelProto:
    weights = {"w": columns(), "b": np.linspace(-1, 1, 16, dtype=np.float32)}
    if op == "MatMul":
        return proto([node("MatMul", "x w", "t"), node("Add", "t b", "y")], weights)
    return proto([node("Gemm", "x w b", "y", transB=1, alpha=0.5, beta=2.0)], {**weights, "w": columns().T.copy()})


@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
@pytest.mark.parametrize("where", ["quantized{tune=off}", "quantized{tune=off vendor=false}", "cpu{tune=off}"])
def test_yardstick_and_the_lowered_numbers(op: str, where: str) -> None:
    source = layer(op)
    graph, remarks = quantize(source, {"x": rows()})
    base, exact = run(source, {"x": rows()})["y"], run(graph, {"x": rows()})["y"]
    assert error(base, exact).max() <= 0.0125
    assert ops(graph, "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear") == [1, 2, 0]
    applied = next(r for r in remarks if r.kind == "applied")
    low, high = applied.facts["covers"]
    assert applied.facts["seen"] == [rows().min(), rows().max()]
    assert abs(low - rows().min()) <= (high - low) / 255 >= abs(high - rows().max())
    model, target = lowered(graph, where)
    assert sum(ops(model, "MatMulIntegerToFloat", "MatMulInteger")) == 1
    assert ops(model, "DequantizeLinear", "DynamicQuantizeLinear", "DynamicQuantizeMatMul") == [0, 0, 0]
    assert len(target.report(model)["integer"]) == 1
    for optimize in (False, True):
        got = session(model, optimize=optimize).run({"x": rows()})["y"]
        np.testing.assert_allclose(got, exact, rtol=0, atol=CLOSE * (1 + np.abs(exact).max()))


def test_static_pieces_are_found_and_have_two_spellings() -> None:
    """A multiply that is left to the runtime counts as integer too: it fuses what stands between DequantizeLinear nodes."""
    nodes = [node("MatMul", "x w", "t"), node("Add", "t b", "y")]
    source = proto(nodes, {"w": columns(), "b": np.linspace(-1, 1, 16, dtype=np.float32)}, "x:B,S,64")
    graph, _ = quantize(source, {"x": rows().reshape(8, 32, 64)})
    (piece,) = Context(graph).get(IntegerMatmul())
    assert [n.op_type for n in piece.nodes].count("QuantizeLinear") == 1
    target = parse_target("quantized{tune=off}")
    made = {}
    for spelling in target.spellings():
        if isinstance(spelling.kind, IntegerMatmul):
            model = graph.clone()
            PassManager(list(spelling.passes)).run(model, Context(model, target=target))
            made[spelling.name] = ops(model, "MatMul", "MatMulIntegerToFloat", "Add")
            assert len(target.report(model)["integer"]) == 1
    assert made == {"auto": [0, 1, 0], "quantize-each": [0, 1, 0], "quantize-once": [0, 1, 0], "runtime": [1, 0, 1]}


def test_values_beyond_the_calibrated_range_are_clipped() -> None:
    source = proto([node("MatMul", "x w", "y")], {"w": np.eye(64, dtype=np.float32)})
    graph, _ = quantize(source, {"x": np.linspace(-1, 3, 128, dtype=np.float32).reshape(2, 64)})
    got = run(graph, {"x": np.tile(np.float32([9, -9, 1, 0]), 16)[None]})["y"][0, :4]
    np.testing.assert_allclose(got, [3, -1, 1, 0], atol=4 / 255)
    assert got[3] == 0, "zero is one of the levels"


def test_one_activation_is_quantized_once_and_scores_stay_float() -> None:
    w = {k: columns(64, 64) for k in ("wq", "wk", "wv", "wo")}
    nodes = [*(node("MatMul", f"x w{k}", k) for k in "qkv"), node("Transpose", "k", "kt", perm=[0, 2, 1]), node("MatMul", "q kt", "s")]
    nodes += [node("Softmax", "s", "p"), node("MatMul", "p v", "c"), node("MatMul", "c wo", "y")]
    x = np.random.default_rng(0).standard_normal((2, 5, 64)).astype(np.float32)
    graph, remarks = quantize(proto(nodes, w, "x:B,S,64"), {"x": x})
    assert ops(graph, "QuantizeLinear", "DequantizeLinear", "MatMul") == [2, 6, 6]
    assert reasons(remarks).count("both operands are computed at run time") == 2
    model, _ = lowered(graph, "quantized{tune=off}")
    assert ops(model, "QuantizeLinear", "MatMulIntegerToFloat", "MatMul") == [2, 4, 2]


def test_a_bias_that_no_32_bits_would_hold_stays_float() -> None:
    """C09: at the scale of the products, 5 would be 1.28e10."""
    weights = {"w": np.full((4, 2), 1e-7, np.float32), "b": np.array([5, -4.5], np.float32)}
    weights["w"][0, 0] = 1.3e-7
    weights = {**weights, "w": np.tile(weights["w"], (16, 1))}
    source = proto([node("Gemm", "x w b", "y")], weights)
    graph, _ = quantize(source, {"x": np.linspace(0, 127.5, 128, dtype=np.float32).reshape(2, 64)})
    for model in (graph, lowered(graph, "quantized{tune=off}")[0], lowered(graph, "openvino")[0]):
        got = session(model).run({"x": np.full((1, 64), 100, np.float32)})["y"]
        np.testing.assert_allclose(got, [[5, -4.5]], atol=0.05)


def test_what_cannot_be_observed_stays_float_and_says_why() -> None:
    def branch(name: str, weight: str) -> onnx.GraphProto:
        return helper.make_graph([node("Relu", "x", f"{name}h"), node("MatMul", f"{name}h {weight}", name)], name, [], [value(name)])

    weights = {"w": columns(64, 64), "v": columns(64, 64), "u": columns(64, 64)}
    both = helper.make_node("If", ["cond"], ["i"], name="if", then_branch=branch("a", "w"), else_branch=branch("c", "v"))
    source = proto([both, node("MatMul", "i u", "y")], weights, "x:B,64 cond")
    feed = {"x": rows(), "cond": np.array(True)}
    graph, remarks = quantize(source, feed)
    assert ops(graph, "QuantizeLinear") == [1]
    assert reasons(remarks).count("is computed inside a subgraph, where calibration cannot see it; mode=dynamic quantizes it at run time") == 2
    both_modes = graphopt.load(source)
    ctx = Context(both_modes, samples=Samples.load(feed, both_modes))
    PassManager(parse("quantize{mode=static}, quantize{mode=dynamic}", passes())).run(both_modes, ctx)
    assert ops(both_modes, "QuantizeLinear", "DynamicQuantizeLinear") == [1, 2]


def test_what_calibration_never_saw_or_saw_infinite_stays_float() -> None:
    _, remarks = quantize(layer(), {"x": rows()[:0]})
    assert "its input `x` was empty on every sample" in reasons(remarks)
    bad = rows()
    bad[3, 5] = np.inf
    _, remarks = quantize(layer(), {"x": bad})
    assert "its input `x` holds numbers on the samples that are not finite" in reasons(remarks)


def test_openvino_gets_the_standard_form() -> None:
    graph, _ = quantize(layer(), {"x": rows()})
    model, target = lowered(graph, "openvino")
    assert ops(model, "QuantizeLinear", "DequantizeLinear", "MatMul") == [1, 2, 1]
    assert {n.domain for n in model.graph} == {""}
    assert not target.report(model)["falls_back"]


def test_options() -> None:
    for text, expected in {"calibrate=max": "minmax or percentile or mse or entropy", "percentile=5": "more than 50 and at most 100"}.items():
        with pytest.raises(PipelineError, match=expected):
            parse(f"quantize{{mode=static {text}}}", passes())
    (made,) = parse("quantize{mode=static calibrate=percentile percentile=99.9}", passes())
    assert str(made) == "quantize{mode=static calibrate=percentile percentile=99.9}"
    assert str(made.weaker()) == "quantize{calibrate=percentile percentile=99.9}"
    model = graphopt.load(layer())
    with pytest.raises(PassError, match="quantize needs samples of the model's inputs; add --samples DATA"):
        PassManager(parse("quantize{mode=static}", passes())).run(model, Context(model))


# ---- calibration ---------------------------------------------------------------------------------------------------------------------------


def ranges(batches: Sequence[Mapping[str, Array]], method: str) -> tuple[float, float]:
    model = graphopt.load(proto([node("MatMul", "x w", "y")], {"w": np.ones((4, 4), np.float32)}, "x:B,S,4"))
    ctx = Context(model, samples=Samples.load(list(batches), model))
    (found,) = ctx.get(Ranges(method, 99.9)).values()
    return found.low, found.high


@pytest.mark.parametrize("method", METHODS)
def test_ragged_batches_give_the_ranges_of_all_values_at_once(method: str) -> None:
    """I02"""
    rng = np.random.default_rng(5)
    batches = [(rng.standard_normal((b, s, 4)) * 3.0**k).astype(np.float32) for k, (b, s) in enumerate([(1, 5), (1, 9), (3, 7), (2, 1)])]
    whole = np.concatenate([x.reshape(-1) for x in batches]).reshape(1, -1, 4)
    expected = ranges([{"x": whole}], method)
    for order in (batches, batches[::-1]):
        assert ranges([{"x": x} for x in order], method) == expected
    if method == "minmax":
        assert expected == (whole.min(), whole.max())


def squared_error(x: Array, low: float, high: float) -> float:
    scale = (high - low) / 255
    return float(np.square(np.clip(np.rint(x / scale), np.rint(low / scale), np.rint(high / scale)) * scale - x).mean())


def test_what_each_method_makes_of_an_outlier() -> None:
    x = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    x[0], x[1] = 60, -20
    seen = ValueHistogram()
    for part in np.split(x, 50):
        seen.add(part)
    found = {method: seen.range(method, 99.9) for method in METHODS}
    assert (found["minmax"].low, found["minmax"].high) == (-20, 60)
    tails = np.quantile(x, [0.0005, 0.9995])
    np.testing.assert_allclose([found["percentile"].low, found["percentile"].high], tails, atol=2 * seen.width)
    errors = {m: squared_error(x, r.low, r.high) for m, r in found.items()}
    assert errors["mse"] == min(errors.values())
    assert errors["mse"] < errors["minmax"] * 0.9
    assert 4 <= found["entropy"].high < 30, "the gap between the values and the outlier is cut off"
    best = min(squared_error(x, -20 * a, 60 * b) for a in np.geomspace(0.125, 1, 24) for b in np.geomspace(0.125, 1, 24))
    assert errors["mse"] <= best * 1.05


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("x", [[0.0], [0, 0, 5e-39], [2.0, 3.0], [-4.0], [1e30, -1e-30]])
def test_odd_values_give_a_grid(x: list[float], method: str) -> None:
    array = np.resize(np.array(x, np.float32), (3, 64))
    source = proto([node("MatMul", "x w", "y")], {"w": np.eye(64, dtype=np.float32)})
    graph, _ = quantize(source, {"x": array}, f"calibrate={method}")
    got = run(graph, {"x": array})["y"]
    np.testing.assert_allclose(got, array, atol=np.abs(array).max() / 250 + 1e-37)


MEMORY = """
import resource, sys, weakref
import numpy as np, onnx
import graphopt
from graphopt.core.pipeline import PassManager, parse
from graphopt.core import Context
from graphopt.core.registry import passes
from graphopt.run.samples import Samples

count, method = int(sys.argv[1]), sys.argv[2]
rng = np.random.default_rng(0)
sizes = [256, 256, 256, 256, 256, 4096]
names = ["x", "a", "b", "c", "d", "y"]
nodes = [onnx.helper.make_node("MatMul", [i, "w" + o], [o], name=o) for i, o in zip(names, names[1:])]
weights = [onnx.numpy_helper.from_array(rng.standard_normal((k, n)).astype(np.float32) / 16, "w" + o) for k, n, o in zip(sizes, sizes[1:], names[1:])]
ports = [[onnx.helper.make_tensor_value_info(n, 1, ["B", size])] for n, size in (("x", 256), ("y", 4096))]
model = graphopt.load(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", *ports, weights), opset_imports=[onnx.helper.make_opsetid("", 21)]))
alive, most = 0, 0

class Tracked(np.ndarray):
    pass

def gone():
    global alive
    alive -= 1

def batches():
    global alive, most
    for _ in range(count):
        x = rng.standard_normal((64, 256)).astype(np.float32).view(Tracked)
        weakref.finalize(x, gone)
        alive += 1
        most = max(most, alive)
        yield {"x": x}
        del x

samples = Samples.load(batches(), model)
assert len(samples) == count and most <= 2, most
PassManager(parse(f"quantize{{mode=static calibrate={method}}}", passes())).run(model, Context(model, samples=samples))
assert [n.op_type for n in model.graph].count("QuantizeLinear") == 5
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
def test_memory_does_not_grow_with_the_samples(method: str) -> None:
    """I01: peak memory of 128 batches beside 8, from a generator that is read one batch at a time."""
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes there
    peaks = []
    for count in (8, 128):
        done = subprocess.run([sys.executable, "-c", MEMORY, str(count), method], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) * scale)
    assert peaks[1] - peaks[0] <= 20e6, peaks


def test_bad_samples_are_one_line_and_leave_no_file(tmp_path: Path) -> None:
    """I05, from the command line."""
    source, out, given = tmp_path / "in.onnx", tmp_path / "out.onnx", tmp_path / "given.npz"
    onnx.save(layer(), source)
    for arrays, expected in (
        (None, "needs samples of the model's inputs; add --samples DATA"),
        ({}, "input `x` missing; the model needs x"),
        ({"x": rows(), "mask": rows()}, "the model has no input `mask`; it needs x"),
        ({"x": rows().astype(np.int64)}, "input `x` must be float32, found int64"),
    ):
        more = []
        if arrays is not None:
            np.savez(given, **arrays)
            more = ["--samples", str(given)]
        done = CliRunner().invoke(app, ["optimize", str(source), "-o", str(out), "--pipeline", "quantize{mode=static}", "--no-measure", *more])
        assert done.exit_code == 1
        assert expected in " ".join(done.output.split())
        assert not out.exists()
