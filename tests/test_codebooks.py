"""quantize{mode=weight-only codes=nf4|kmeans}: codebooks in standard operators, recognized again, and stored as small as they are.

Yardstick as in test_weight_only: the worst output column over random rows.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_weight_only import BIAS, LAYOUTS, TABLE, K, N, Quantized, W, calibration, node, proto, rng, rows, stored_bytes, tied

import graphopt
from graphopt.analysis.codebook import NF4
from graphopt.analysis.linear import Embedding, Embeddings, Linears, StoredOperands
from graphopt.compress.quantize.codebooks import kmeans
from graphopt.core.contract import Context
from graphopt.core.errors import PipelineError
from graphopt.core.pipeline import PassManager, parse
from graphopt.core.registry import passes, targets
from graphopt.io.save import save
from graphopt.run.ort import session

BOUNDS = {"bits=4 codes=nf4": 0.115, "bits=4 codes=nf4 block=16": 0.105, "bits=4 codes=nf4 block=0": 0.14, "bits=4 codes=kmeans": 0.085,
          "bits=4 codes=kmeans block=32": 0.1, "bits=8 codes=kmeans": 0.0075}  # fmt: skip


@pytest.mark.parametrize("options", BOUNDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_yardstick(layout: str, options: str) -> None:
    nodes, weights, axis = LAYOUTS[layout]
    made = Quantized(proto(nodes, weights), options)
    assert made.changes == [1]
    assert 0 < made.error({"x": rows()}) <= BOUNDS[options]
    fact = next(r for r in made.remarks if r.kind == "applied").facts
    assert (fact["axis"], fact["codes"], fact["entries"]) == (axis, "nf4" if "nf4" in options else "kmeans", 256 if "bits=8" in options else 16)
    assert fact["tables"] == (N if options == "bits=4 codes=kmeans" else 1)
    assert 0 < fact["worst_error"] <= 1.1 * BOUNDS[options]
    linear = Context(made.graph).get(Linears())[0]
    assert linear.quantized
    assert linear.weight.dtype == (ir.DataType.UINT8 if "bits=8" in options else ir.DataType.UINT4)
    expected = rows() @ linear.matrix() * linear.alpha  # the decoded weight, in numpy
    got = session(made.graph, optimize=False).run({"x": rows()})["y"]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_wrong_scale_fails_the_yardstick() -> None:
    made = Quantized(proto(*LAYOUTS["MatMul"][:2]), "bits=4 codes=nf4")
    scale = next(v for v in made.graph.graph.initializers.values() if v.name and v.name.endswith("_scale"))
    assert scale.const_value is not None
    scale.const_value = ir.tensor(np.roll(scale.const_value.numpy(), 1, axis=-1), name=scale.name)
    base, got = (session(m, optimize=False).run({"x": rows()})["y"] for m in (made.source, made.graph))
    assert np.sqrt(np.square(base - got).sum(0) / np.square(base).sum(0)).max() > 3 * BOUNDS["bits=4 codes=nf4"]


def test_the_file_is_as_small_as_its_codes(tmp_path: Path) -> None:
    """UINT4 is packed at save, and what canonicalize sees it leaves alone."""
    w = rng().standard_normal((256, 128)).astype(np.float32)
    for options, size in (("codes=nf4 block=64", 256 * 64 + 4 * 128 * 4), ("codes=kmeans", 256 * 64 + 16 * 128 * 4)):
        source = proto([node("MatMul", "x w", "y")], {"w": w}, "x:B,256")
        made = graphopt.load(source)
        text = f"quantize{{mode=weight-only bits=4 {options}}}, canonicalize, simplify"
        records = PassManager(parse(text, passes())).run(made, Context(made))
        assert [r.changes for r in records] == [1, 0, 0]
        path = tmp_path / "model.onnx"
        save(made, path)
        assert size <= path.stat().st_size <= size + 1500
        stored = next(t for t in onnx.load(path).graph.initializer if t.data_type == TensorProto.UINT4)
        assert numpy_helper.to_array(stored).dtype == ml_dtypes.uint4
        again = graphopt.load(path)
        assert Context(again).get(Linears())[0].quantized
        feeds = {"x": rows(256)}
        np.testing.assert_allclose(session(again).run(feeds)["y"], session(made, optimize=False).run(feeds)["y"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", ["codes=nf4", "codes=kmeans"])
def test_a_tied_table_is_stored_once(options: str) -> None:
    made = Quantized(tied(TABLE.T.copy()), f"bits=4 {options}")
    assert made.changes == [2]
    extra = 250 * 2 * 4 + 64 if "nf4" in options else 250 * 16 * 4
    assert stored_bytes(made.graph) <= 250 * 32 + extra + 64  # the shapes of two Reshapes
    assert any(r.facts.get("tied_to") == "/h/Gather" for r in made.remarks)
    assert made.error({"ids": rng().integers(0, 250, (4, 9))}) <= 0.25
    operands = Context(made.graph).get(StoredOperands()).values()
    assert [x.quantized for x in operands] == [True, True]
    (table,) = Context(made.graph).get(Embeddings())
    assert isinstance(table, Embedding)
    assert (table.rows, table.width, table.codebook is not None) == (250, 64, True)
    again = PassManager(parse("quantize{mode=weight-only bits=8}", passes())).run(made.graph, Context(made.graph))[0]
    assert again.changes == 0
    assert any("2 weights are quantized already" in r.message for r in again.remarks)


# ---- MatMulBnb4 ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["", "block=16", "block=0"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nf4_is_multiplied_by_the_kernel(layout: str, options: str) -> None:
    made = Quantized(proto(*LAYOUTS[layout][:2]), f"bits=4 codes=nf4 {options}")
    assert made.count("MatMulBnb4", "MatMul", "Gemm", "Cast") == [1, 0, 0, 0]
    made.error({"x": rows()})  # the numbers of the decoded form
    block = 16 if "16" in options else 32  # the largest power of two in 96
    assert sum(v.const_value.nbytes for v in made.model.graph.initializers.values() if v.const_value and "pairs" in str(v.name)) == (
        K * N // 2 + K * N // block * 4
    )
    report = made.target.report(made.model)
    assert (report["integer"], len(report["float"])) == ([], 1)
    assert "inside MatMulBnb4, which multiplies floats" in report["float"][0]["reason"]


def test_a_long_row_with_one_scale() -> None:
    w = rng().standard_normal((512, 16)).astype(np.float32)
    made = Quantized(proto([node("MatMul", "x w", "y")], {"w": w}, "x:B,512"), "bits=4 codes=nf4 block=0")
    assert made.count("MatMulBnb4") == [1]
    made.error({"x": rows(512)})


def test_lookup_and_multiply_read_the_same_bytes(tmp_path: Path) -> None:
    made = Quantized(tied(TABLE.T.copy()), "bits=4 codes=nf4")
    assert made.count("MatMulBnb4", "Cast") == [1, 1]
    assert stored_bytes(made.model) <= 250 * 32 + 250 * 2 * 4 + 250
    made.error({"ids": rng().integers(0, 250, (4, 9))})
    report = made.target.report(made.model)
    assert report["tables"] == [entry["name"] for entry in report["float"]]
    made.target.save(made.model, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size <= 250 * 32 + 250 * 2 * 4 + 3500


def test_a_kernel_for_no_other_codebook() -> None:
    """Also not for a table that is nearly NF4, nor where a provider lacks the operator, nor where no operator of the runtime may be used."""
    made = Quantized(proto(*LAYOUTS["MatMul"][:2]), "bits=4 codes=nf4", "cpu{tune=off vendor=false}")
    assert made.count("MatMulBnb4", "MatMul") == [0, 1]
    table = next(v for v in made.graph.graph.initializers.values() if "codebook" in str(v.name))
    assert table.const_value is not None
    table.const_value = ir.tensor(table.const_value.numpy() * np.float32(1.001), name=table.name)
    (target,) = parse("cpu{tune=off}", targets(), "target")
    ctx = Context(made.graph, target=target)
    PassManager(list(target.lowerings())).run(made.graph, ctx)
    assert [n.op_type for n in made.graph.graph if n.domain] == []
    assert any("only for NF4" in r.message for r in ctx.remarks.since(0))


def test_batches_of_matrices() -> None:
    w = rng().standard_normal((3, 64, 16)).astype(np.float32)
    x = rng(1).standard_normal((3, 9, 64)).astype(np.float32)
    for options in ("codes=nf4", "codes=nf4 block=0", "codes=kmeans", "codes=kmeans block=16"):
        made = Quantized(proto([node("MatMul", "x w", "y")], {"w": w}, "x:3,S,64"), f"bits=4 {options}")
        assert made.changes == [1]
        assert made.error({"x": x}) <= 0.15


def test_what_a_block_does_not_divide_stays_float() -> None:
    made = Quantized(proto([node("MatMul", "x w", "y")], {"w": W[:70]}, "x:B,70"), "bits=4 codes=nf4")
    assert made.changes == [0]
    assert "its 70 input features are no multiple of block=32" in made.told()
    assert Quantized(proto([node("MatMul", "x w", "y")], {"w": W[:70]}, "x:B,70"), "bits=4 codes=kmeans").changes == [1]


def test_codebooks_that_are_no_smaller() -> None:
    """A codebook of 64 bytes for each column of 16 numbers."""
    made = Quantized(proto([node("MatMul", "x w", "y")], {"w": W[:16]}, "x:B,16"), "bits=4 codes=kmeans")
    assert made.changes == [0]
    assert "are no smaller than the weight" in made.told()


def test_clusters_are_near_the_optimum() -> None:
    """Against every partition of 12 sorted numbers into 4 runs, and against a shift of any centre."""
    w = rng(2).standard_normal((5, 12)).astype(np.float32)
    mass = rng(3).gamma(0.5, 1, 12)
    grid = kmeans(w, 4, 0, mass)
    found = (np.square(grid.decode(grid.round(w)) - w) * mass).sum(1)
    for k, row in enumerate(w.astype(np.float64)):
        order = np.argsort(row)
        x, m = row[order], mass[order]
        best = min(
            sum(float((m[a:b] * np.square(x[a:b] - np.average(x[a:b], weights=m[a:b]))).sum()) for a, b in itertools.pairwise(cuts))
            for i in range(1, 10) for j in range(i + 1, 11) for h in range(j + 1, 12) for cuts in [(0, i, j, h, 12)]
        )  # fmt: skip
        assert best <= found[k] * 1.0001
        assert found[k] <= 1.1 * best + 1e-9


def test_a_row_with_fewer_numbers_than_entries() -> None:
    grid = kmeans(np.array([[1.0, 1.0, -2.0, 0.0] * 8, [0.0] * 32], np.float32), 16, 0)
    values = np.array([[1.0, 1.0, -2.0, 0.0] * 8, [0.0] * 32], np.float32)
    np.testing.assert_allclose(grid.decode(grid.round(values)), values, atol=1e-6)
    assert (np.diff(grid.table, axis=1) >= 0).all()


def test_samples_weigh_the_clusters() -> None:
    """Inputs of very different size: the codebook of the samples serves the large ones."""
    source = proto([node("MatMul", "x w", "y")], {"w": rng().standard_normal((K, N)).astype(np.float32)})
    size = np.where(np.arange(K) % 8 == 0, 10, 0.1).astype(np.float32)
    feeds: list[dict[str, Any]] = [{"x": rng(k).standard_normal((64, K)).astype(np.float32) * size} for k in range(3)]
    plain = Quantized(source, "bits=4 codes=kmeans").error(feeds[2])
    weighed = Quantized(source, "bits=4 codes=kmeans", samples=graphopt.Samples(feeds[:2])).error(feeds[2])
    assert weighed < 0.5 * plain


@pytest.mark.parametrize("options", ["codes=nf4", "codes=kmeans", "codes=kmeans block=32"])
def test_gptq_keeps_the_output_nearer(options: str) -> None:
    source = proto(*LAYOUTS["MatMul"][:2])
    feeds = list(calibration(9))[8]
    nearest = Quantized(source, f"bits=4 {options}").error(feeds)
    solved = Quantized(source, f"bits=4 {options} method=gptq", samples=calibration())
    assert solved.error(feeds) < 0.6 * nearest


def test_the_table_of_the_paper() -> None:
    """NF4 is symmetric about nothing: eight entries below zero with it, eight above, both ends at one."""
    assert (NF4[0], NF4[7], NF4[15]) == (-1, 0, 1)
    assert (np.diff(NF4) > 0).all()
    exact = np.array([0.0, 0.07958029955625534, 1.0], np.float32)
    assert np.isin(exact, NF4).all()


@pytest.mark.parametrize("where", ["cpu{tune=off}", "quantized{tune=off}", "cpu{tune=off vendor=false}"])
def test_the_report_names_it_float(where: str) -> None:
    made = Quantized(proto(*LAYOUTS["MatMul"][:2]), "bits=4 codes=kmeans", where)
    report = made.target.report(made.model)
    assert (report["integer"], report["tables"]) == ([], [])
    assert [entry["name"] for entry in report["float"]] == ["w_uint4"]
    assert "holds and multiplies floats" in report["float"][0]["reason"]
    assert made.count("MatMul", "GatherElements") == [1, 1]


def test_gemm_with_all_its_parts() -> None:
    source = proto([helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="g", alpha=0.5, beta=2.0, transB=1)], {"w": W.T.copy(), "b": BIAS})
    for options in ("codes=nf4", "codes=kmeans"):
        assert Quantized(source, f"bits=4 {options}").error({"x": rows()}) <= 0.115


@pytest.mark.parametrize(
    ("text", "message"),
    [("mode=weight-only codes=nf4", "`bits` expects 4"), ("mode=weight-only codes=log", "expects linear or nf4 or kmeans"),
     ("codes=nf4", "`codes` expects linear in"), ("mode=weight-only bits=4 codes=nf4 symmetric=false", "`symmetric` expects True")],
)  # fmt: skip
def test_options_that_do_not_exist(text: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        parse(f"quantize{{{text}}}", passes())


# ---- what is read as a codebook, and what is not ----------------------------------------------------------------------------------------


def spelled(change: str = "") -> onnx.ModelProto:
    """An NF4 weight [64, 8] in blocks of 32, by hand; `change` makes it another thing."""
    made = [node("Cast", "codes", "index", to=TensorProto.INT64), node("Gather", "table index", "values", axis=0),
            node("Reshape", "values split", "parts"), node("Mul", "scale parts", "scaled"), node("Reshape", "scaled whole", "w")]  # fmt: skip
    weights = {"table": NF4, "split": np.array([2, 32, 8]), "whole": np.array([64, 8]), "scale": np.ones((2, 1, 8), np.float32) * 3,
               "codes": rng().integers(0, 16, (64, 8)).astype(np.uint8)}  # fmt: skip
    if change == "another split":  # the product goes along other neighbours than the Reshape back says
        weights |= {"split": np.array([32, 2, 8])}
        weights |= {"scale": np.ones((32, 1, 8), np.float32)}
    if change == "turned":
        weights |= {"whole": np.array([8, 64])}
    if change == "a scale for each element":
        weights |= {"scale": np.ones((2, 32, 8), np.float32)}
    if change == "float codes":
        made[0] = node("Cast", "codes", "index", to=TensorProto.INT32)
        weights |= {"codes": rng().integers(0, 16, (64, 8)).astype(np.float32)}
    width = 8 if change == "turned" else 64
    return proto([*made, node("MatMul", "x w", "y")], weights, f"x:B,{width}")


def test_the_spelling_of_others_is_read() -> None:
    (linear,) = Context(graphopt.load(spelled())).get(Linears())
    assert linear.codebook is not None
    assert (linear.codebook.block, linear.codebook.block_axis, linear.in_features, len(linear.path)) == (32, 0, 64, 5)
    x = rows(64)
    np.testing.assert_allclose(session(spelled(), optimize=False).run({"x": x})["y"], x @ linear.matrix(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("change", ["turned", "a scale for each element", "float codes"])
def test_near_spellings_are_no_codebook(change: str) -> None:
    model = graphopt.load(spelled(change))
    assert not any(x.quantized for x in Context(model).get(Linears()))


def test_blocks_of_two_are_read_as_they_are() -> None:
    model = graphopt.load(spelled("another split"))
    (linear,) = Context(model).get(Linears())
    assert linear.codebook is not None
    assert linear.codebook.block == 2
    (target,) = parse("cpu{tune=off}", targets(), "target")
    ctx = Context(model, target=target)
    PassManager(list(target.lowerings())).run(model, ctx)
    assert "MatMulBnb4" not in [n.op_type for n in model.graph]
    assert any("no kernel for blocks of 2" in r.message for r in ctx.remarks.since(0))
