"""Repairs at the front door: each with a remark, and only where it is exact."""

from __future__ import annotations

import numpy as np
from models import assert_same, parse, run  # type: ignore[import-not-found]

import graphopt
from graphopt.graph import nbytes
from graphopt.remarks import Remarks

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
