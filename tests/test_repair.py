"""Repairs at the front door: each with a remark, and only where it is exact."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from models import assert_same, parse, run  # type: ignore[import-not-found]

import graphopt
from graphopt.core.remarks import Remarks
from graphopt.graph.questions import nbytes

TIED = """
   <ir_version: 8, opset_import: ["" : 17]>
   g (int64[B, S] ids) => (float[B, S, 1024] logits) {
      x = Gather(table, ids)
      h = Relu(x)
      logits = MatMul(h, head)
   }
"""


def tied(change: float = 0.0) -> tuple[object, dict[str, np.ndarray]]:
    table = np.random.default_rng(0).standard_normal((1024, 320), dtype=np.float32)
    head = np.ascontiguousarray(table.T)
    head[3, 5] += change
    return parse(TIED, table=table, head=head), {"ids": np.array([[1, 5, 1023], [0, 2, 9]])}


def test_c01_the_given_size_is_kept_once_too() -> None:
    table = np.random.default_rng(0).standard_normal((512, 64), dtype=np.float32)
    proto = parse(TIED.replace("1024", "512"), table=table, head=np.ascontiguousarray(table.T))
    feeds = {"ids": np.array([[1, 5, 511], [0, 2, 9]])}
    optimized = graphopt.optimize(proto, level=1, promise=False)
    assert nbytes(optimized.model) <= 512 * 64 * 4 + 100
    assert len(ir.to_proto(optimized.model).SerializeToString()) <= 132_000
    assert_same(run(proto, feeds), run(optimized.model, feeds))


def test_c01_a_tied_table_that_an_exporter_stored_twice_is_kept_once() -> None:
    proto, feeds = tied()
    remarks = Remarks()
    model = graphopt.load(proto, remarks=remarks)
    assert nbytes(model) < 1024 * 320 * 4 + 1000
    assert any("stored again as `head`" in r.message for r in remarks if r.kind == "warning")
    assert_same(run(proto, feeds), run(model, feeds))
    optimized = graphopt.optimize(proto, level=1)
    assert_same(run(proto, feeds), run(optimized.model, feeds))
    assert nbytes(optimized.model) < 1024 * 320 * 4 + 1000, "no later step stores it twice again"


def test_c03_tables_that_differ_in_one_element_stay_apart() -> None:
    proto, feeds = tied(change=1e-3)
    remarks = Remarks()
    model = graphopt.load(proto, remarks=remarks)
    assert nbytes(model) == 2 * 1024 * 320 * 4
    assert not list(remarks)
    assert_same(run(proto, feeds), run(model, feeds))


ATTENTION = """
   <ir_version: 10, opset_import: ["" : 23]>
   g (float[B, S, 8] x, float[B, 1, %s, S] mask) => (float[B, S, 8] y) {
      y = Attention <q_num_heads = 2, kv_num_heads = 2> (x, x, x, mask)
   }
"""


def test_a_mask_at_the_lowest_float_averages_as_onnx_defines_it() -> None:
    """The runtime gives zero for such rows, which is right for -inf only; the reference is the yardstick here."""
    proto, remarks = parse(ATTENTION % "S"), Remarks()
    model = graphopt.load(proto, remarks=remarks)
    assert any("lowest finite number" in r.message for r in remarks)
    rng = np.random.default_rng(0)
    for fill in (np.finfo(np.float32).min, -np.inf):
        feeds = {"x": rng.standard_normal((2, 4, 8), dtype=np.float32), "mask": np.zeros((2, 1, 4, 4), np.float32)}
        feeds["mask"][0, 0, 1] = fill
        expected = run(proto, feeds)["y"].copy()
        if np.isfinite(fill):
            assert not expected[0, 1].any(), "the runtime's own answer"
            expected[0, 1] = feeds["x"][0].mean(axis=0)
        assert_same({"y": expected}, run(model, feeds))


def test_a_mask_without_an_axis_for_the_query_rows_is_written_out() -> None:
    proto, remarks = parse(ATTENTION % "1"), Remarks()
    model = graphopt.load(proto, remarks=remarks)
    assert any("no axis for the query rows" in r.message for r in remarks)
    rng = np.random.default_rng(0)
    feeds = {"x": rng.standard_normal((2, 4, 8), dtype=np.float32), "mask": np.where(rng.random((2, 1, 1, 4)) < 0.3, -1e4, 0).astype(np.float32)}
    every = {**feeds, "mask": np.repeat(feeds["mask"], 4, axis=2)}
    assert_same(run(parse(ATTENTION % "S"), every), run(model, feeds))


def test_axes_that_are_counted_from_the_end_are_written_out() -> None:
    """torch's TorchScript exporter copies the axes of `permute`: no runtime loads that."""
    text = """
       <ir_version: 8, opset_import: ["" : 17]>
       g (float[B, 3, 4] x) => (float[B, 4, 3] y) { t = Transpose <perm = [0, -1, 1]> (x)  y = Relu(t) }
    """
    remarks, x = Remarks(), np.random.default_rng(0).standard_normal((2, 3, 4), dtype=np.float32)
    model = graphopt.load(parse(text), remarks=remarks)
    assert any("perm [0, -1, 1] counts from the end" in r.message and r.facts["repaired"] for r in remarks)
    np.testing.assert_array_equal(run(model, {"x": x})["y"], np.maximum(x.transpose(0, 2, 1), 0))
