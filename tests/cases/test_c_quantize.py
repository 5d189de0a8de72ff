"""Given cases of part (c) that tests/test_quantize.py and tests/test_target_quantized.py do not hold already (those hold C04, C07, C12, C15, C16,
C18, C19, C21, C23, C25)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import parse, run  # type: ignore[import-not-found]
from onnx import TensorProto, helper

import graphopt
from graphopt.core.contract import Context, Target
from graphopt.core.pipeline import PassManager
from graphopt.core.pipeline import parse as steps
from graphopt.core.registry import passes, targets
from graphopt.graph.questions import constant

Array = np.ndarray[Any, Any]
OPSET = '<ir_version: 10, opset_import: ["": 21]>'
TIED = f"{OPSET} g (int64[B,S] ids) => (float[B,S,512] y) {{ h = Gather(w, ids)  y = MatMul(h, wt) }}"
WITH_VNNI = "CPUs that add 8-bit products in 32 bits: AVX-VNNI, AVX512-VNNI, AMX, ARM dot product"
IDS = {"ids": np.arange(512).reshape(4, 128)}


def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def columns(k: int = 64, n: int = 16) -> Array:
    return (rng().standard_normal((k, n)) * np.logspace(-3, 1, n)).astype(np.float32)


def rows() -> Array:
    return np.random.default_rng(3).standard_normal((256, 64)).astype(np.float32)


def floats(model: ir.Model) -> list[tuple[int, ...]]:
    """Shapes of the stored float matrices."""
    values = (v for v in model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT and v.shape is not None)
    return sorted(tuple(v.shape.numpy()) for v in values if v.shape is not None and len(v.shape) == 2)


def quantized(source: onnx.ModelProto, text: str = "quantize") -> tuple[ir.Model, list[Any]]:
    model = graphopt.load(source)
    records = PassManager(steps(text, passes())).run(model, Context(model))
    return model, [remark for record in records for remark in record.remarks]


def errors(base: Array, got: Array) -> Array:
    """By output column."""
    found: Array = np.linalg.norm(base - got, axis=0) / np.linalg.norm(base, axis=0)
    return found


# ---- C01, C03: what is tied, and what only looks like it ---------------------------------------------------------------------------------


def test_c01_a_tied_table_is_one_array_of_codes(tmp_path: Path) -> None:
    table = rng().standard_normal((512, 64)).astype(np.float32)
    source = parse(TIED, w=table, wt=table.T.copy())
    onnx.save(source, tmp_path / "tied.onnx")
    assert (tmp_path / "tied.onnx").stat().st_size > 262_000
    for where in ("quantized{tune=off}", "quantized{tune=off vnni=false}"):
        out = tmp_path / "out.onnx"
        result = graphopt.optimize(tmp_path / "tied.onnx", level=2, target=where, promise=False)
        result.save(out)
        assert out.stat().st_size <= 36_000
        assert result.report.target["safe_on"] == ("any CPU" if "vnni" in where else WITH_VNNI)
        base, got = run(source, IDS)["y"], run(onnx.load(out), IDS)["y"]
        assert np.linalg.norm(base - got) <= 0.03 * np.linalg.norm(base)


@pytest.mark.parametrize("pipeline", ["", "canonicalize", "canonicalize, quantize"])
def test_c03_one_element_that_differs_keeps_both(pipeline: str) -> None:
    table = rng().standard_normal((512, 64)).astype(np.float32)
    other = table.T.copy()
    other[7, 300] += 1e-3
    source = parse(TIED, w=table, wt=other)
    model, _ = quantized(source, pipeline)
    big = [v for v in model.graph.initializers.values() if v.const_value is not None and v.const_value.size == 512 * 64]
    assert len(big) == 2
    if "quantize" not in pipeline:
        base, got = run(source, IDS)["y"], run(model, IDS)["y"]
        assert np.abs(base - got).max() < 1e-4
        tied = run(parse(TIED, w=table, wt=table.T.copy()), IDS)["y"]
        assert np.abs(base - tied).max() > 5e-4, "the element is seen in the output"


def test_c03_equal_shapes_and_first_rows_are_not_equal() -> None:
    w1, w2 = (np.random.default_rng(k).standard_normal((64, 64)).astype(np.float32) for k in (0, 1))
    w2[0] = w1[0]
    text = f"{OPSET} g (float[B,64] x) => (float[B,64] y) {{ h = MatMul(x, w1)  y = MatMul(h, w2) }}"
    source = parse(text, w1=w1, w2=w2)
    model, _ = quantized(source, "canonicalize")
    assert len(floats(model)) == 2
    assert np.allclose(run(source, {"x": rows()})["y"], run(model, {"x": rows()})["y"], atol=1e-3)
    model, _ = quantized(source)
    base, got = run(source, {"x": rows()})["y"], run(model, {"x": rows()})["y"]
    assert np.linalg.norm(base - got) <= 0.03 * np.linalg.norm(base)


# ---- C05: the axis of a transposed Gemm, with a declared shape of the weight -----------------------------------------------------------


@pytest.mark.parametrize("trans", [0, 1])
def test_c05_a_declared_shape_of_the_weight_does_not_clash(trans: int) -> None:
    w = columns()
    stored = w.T.copy() if trans else w
    text = f"{OPSET} g (float[B,64] x) => (float[B,16] y) {{ y = Gemm<transB = {trans}>(x, w, b) }}"
    source = parse(text, w=stored, b=np.zeros(16, np.float32))
    source.graph.value_info.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, stored.shape))
    model, _ = quantized(source)
    (decode,) = [n for n in model.graph if n.op_type == "DequantizeLinear" and n.inputs[0] is not None and n.inputs[0].is_initializer()]
    assert decode.attributes["axis"].as_int() == 1 - trans
    assert errors(run(source, {"x": rows()})["y"], run(model, {"x": rows()})["y"]).max() <= 0.03
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


# ---- C11: sums of two products in 16 bits -------------------------------------------------------------------------------------------------


def near_the_top() -> tuple[onnx.ModelProto, dict[str, Array]]:
    """Activations that become uint8 200..255, weights that become int8 90..127 at 8 bits."""
    w = rng().uniform(90 / 127, 1.0, (64, 16)).astype(np.float32)
    w[0] = 1.0
    source = parse(f"{OPSET} g (float[B,64] x) => (float[B,16] y) {{ y = MatMul(x, w) }}", w=w)
    x = rng().uniform(200 / 255, 1.0, (8, 64)).astype(np.float32)
    x[:, 0] = 1.0
    return source, {"x": x}


def clipped(x: Array, codes: Array) -> tuple[Array, Array]:
    """x in uint8 [B, K] times codes in int8 [K, N]: as vpmaddubsw adds them (pairs, clipped to 16 bits), and exactly."""
    a = np.clip(np.rint(x / (x.max() / 255)), 0, 255).astype(np.int64)
    products = a[:, :, None] * codes.astype(np.int64)[None]
    pairs = products[:, 0::2] + products[:, 1::2]
    return np.clip(pairs, -(2**15), 2**15 - 1).sum(1), pairs.sum(1)


def lowered(source: onnx.ModelProto, where: Target, text: str) -> tuple[ir.Model, list[Any]]:
    model, _ = quantized(source, text)
    records = PassManager(list(where.lowerings())).run(model, Context(model, target=where))
    return model, [r for record in records for r in record.remarks if r.kind == "warning"]


@pytest.mark.parametrize("symmetric", ["true", "false"])
def test_c11_without_vnni_no_sum_clips(symmetric: str) -> None:
    source, feeds = near_the_top()
    where = targets()["quantized"](vnni=False)
    assert where.pipeline(2).endswith("quantize{mode=dynamic reduce-range=true}")
    model, warnings = lowered(source, where, f"quantize{{reduce-range=true symmetric={symmetric}}}")
    assert warnings == []
    (name,) = where.report(model)["integer"]
    codes = np.asarray(constant(model.graph.initializers[name]))
    assert codes.dtype == np.int8
    assert 60 <= np.abs(codes.astype(int)).max() <= 64, "all of the range that is safe is used"
    emulated, exact = clipped(feeds["x"], codes)
    np.testing.assert_array_equal(emulated, exact)
    assert where.report(model)["safe_on"] == "any CPU"
    base, got = run(source, feeds)["y"], run(model, feeds)["y"]
    assert np.linalg.norm(base - got) <= 0.01 * np.linalg.norm(base)


def test_c11_eight_bits_would_clip_and_the_report_says_where_they_are_safe() -> None:
    source, feeds = near_the_top()
    where = targets()["quantized"]()
    model, warnings = lowered(source, where, "quantize")
    assert warnings == []
    (name,) = where.report(model)["integer"]
    emulated, exact = clipped(feeds["x"], np.asarray(constant(model.graph.initializers[name])))
    assert np.linalg.norm(emulated - exact) > 0.2 * np.linalg.norm(exact), "the emulation shows what would happen"
    assert "VNNI" in where.report(model)["safe_on"]


def test_c11_weights_of_eight_bits_are_not_multiplied_as_integers_without_vnni() -> None:
    source, feeds = near_the_top()
    where = targets()["quantized"](vnni=False)
    model, (warning,) = lowered(source, where, "quantize")
    assert "`w_int8` has codes beyond 64" in warning.message
    assert "reduce-range=true" in warning.message
    report = where.report(model)
    assert report["integer"] == []
    assert "safe_on" not in report
    assert not any(n.op_type.startswith("DynamicQuantize") for n in model.graph)
    base, got = run(source, feeds)["y"], run(model, feeds)["y"]
    assert np.linalg.norm(base - got) <= 0.01 * np.linalg.norm(base)


def test_c11_what_vnni_false_asks_for_is_not_undone_for_its_loss() -> None:
    """The other passes of a pipeline without samples are exact, and this one is no reason to ask for samples."""
    source, feeds = near_the_top()
    stored, _ = quantized(source)
    for given in ({}, {"samples": [feeds]}):
        got = graphopt.optimize(ir.to_proto(stored), "", target="quantized{tune=off vnni=false}", max_loss=1e-9, **given)
        assert {p.name.partition("{")[0]: p.changes for p in got.report.passes}["guard-range"] == 1


def test_c11_stored_ranges_of_activations_are_guarded_too() -> None:
    w = np.full((64, 16), 100, np.int8)
    coded = "w = DequantizeLinear<axis = 1>(q, s)  y = MatMul(d, w)"
    given = {"q": w, "s": np.full(16, 0.01, np.float32), "t": np.array(1 / 255, np.float32), "z": np.array(0, np.uint8)}
    stored = parse(f"{OPSET} g (float[B,64] x) => (float[B,16] y) {{ c = QuantizeLinear(x, t, z)  d = DequantizeLinear(c, t, z)  {coded} }}", **given)
    where = targets()["quantized"](vnni=False)
    model, (warning,) = lowered(stored, where, "canonicalize")
    assert "codes beyond 64" in warning.message
    assert where.report(model)["integer"] == []
    x = {"x": rng().uniform(0, 1, (8, 64)).astype(np.float32)}
    assert np.allclose(run(stored, x)["y"], run(model, x)["y"], rtol=0.01)
    public = parse(f"{OPSET} g (uint8[B,64] c) => (float[B,16] y) {{ d = DequantizeLinear(c, t, z)  {coded} }}", **given)
    model, _ = quantized(public, "canonicalize")
    records = PassManager(list(where.lowerings())).run(model, Context(model, target=where))
    assert any("its activation comes as codes" in r.message for record in records for r in record.remarks if r.kind == "missed")
    assert "VNNI" in where.report(model)["safe_on"]


def test_c11_codes_of_somebody_else_stay_float_with_the_reason() -> None:
    codes = np.full((64, 16), 100, np.int8)
    text = f"{OPSET} g (float[B,64] x) => (float[B,16] y) {{ w = DequantizeLinear<axis = 1>(q, s)  y = MatMul(x, w) }}"
    for value, integer in ((100, False), (64, True)):
        codes[:] = value
        model, remarks = quantized(parse(text, q=codes, s=np.ones(16, np.float32)), "quantize{reduce-range=true}")
        assert any(n.op_type == "DynamicQuantizeLinear" for n in model.graph) is integer
        assert any("leave [-64, 64]" in r.message for r in remarks if r.kind == "missed") is not integer


def test_c11_a_table_is_reduced_only_where_it_is_multiplied() -> None:
    table = rng().standard_normal((512, 64)).astype(np.float32)
    alone = parse(f"{OPSET} g (int64[B,S] ids) => (float[B,S,64] y) {{ y = Gather(w, ids) }}", w=table)
    for source, top in ((alone, 127), (parse(TIED, w=table, wt=table.T.copy()), 64)):
        model, _ = quantized(source, "quantize{reduce-range=true}")
        (codes,) = [v for v in model.graph.initializers.values() if v.dtype == ir.DataType.INT8]
        assert np.abs(np.asarray(constant(codes)).astype(int)).max() == top


# ---- C13: a weight behind a node gives the numbers of a plain one --------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["Identity", "Transpose", "Cast", "Reshape", "Constant"])
def test_c13_same_numbers_as_the_plain_form(way: str, tmp_path: Path) -> None:
    w = np.float16(rng().standard_normal((64, 256))).astype(np.float32)
    given: dict[str, tuple[str, dict[str, Array]]] = {
        "Identity": ("w2 = Identity(w)", {"w": w}),
        "Transpose": ("w2 = Transpose<perm = [1, 0]>(w)", {"w": w.T.copy()}),
        "Cast": ("w2 = Cast<to = 1>(w)", {"w": w.astype(np.float16)}),
        "Reshape": ("w2 = Reshape(w, shape)", {"w": w.reshape(-1), "shape": np.array([64, 256])}),
        "Constant": ("", {}),
    }
    line, weights = given[way]
    source = parse(f"{OPSET} g (float[B,64] x) => (float[B,256] y) {{ {line}  y = MatMul(x, w2) }}", **weights)
    if way == "Constant":
        source.graph.node.insert(0, helper.make_node("Constant", [], ["w2"], value=onnx.numpy_helper.from_array(w)))
    plain = parse(f"{OPSET} g (float[B,64] x) => (float[B,256] y) {{ y = MatMul(x, w) }}", w=w)
    onnx.save(source, tmp_path / "in.onnx")
    graphopt.optimize(tmp_path / "in.onnx", level=2, target="quantized{tune=off}", promise=False).save(tmp_path / "out.onnx")
    sizes = [(tmp_path / name).stat().st_size for name in ("in.onnx", "out.onnx")]
    assert sizes[1] <= (0.6 if way == "Cast" else 0.3) * sizes[0]  # float16 is halved only
    reference, _ = quantized(plain)
    got = run(onnx.load(tmp_path / "out.onnx"), {"x": rows()})["y"]
    np.testing.assert_allclose(got, run(reference, {"x": rows()})["y"], atol=1e-4)
