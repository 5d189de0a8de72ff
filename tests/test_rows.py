"""quantize{rows=...}: one large token must not coarsen the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from models import assert_same, minilm, parse, run, text_feeds  # type: ignore[import-not-found]

import graphopt
from graphopt.core.contract import Context
from graphopt.core.errors import GraphoptError
from graphopt.core.pipeline import PassManager
from graphopt.core.pipeline import parse as pipeline
from graphopt.core.registry import passes
from graphopt.core.remarks import Remarks
from graphopt.run.ort import session
from graphopt.run.samples import Samples

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(5)
W = RNG.standard_normal((64, 32)).astype(np.float32)
MATMUL = '<ir_version: 10, opset_import: ["": 23]> g (float[B,S,64] x) => (float[B,S,32] y) <float[64,32] w> { y = MatMul(x, w) }'
GEMM = """<ir_version: 10, opset_import: ["": 23]>
g (float[S,64] x) => (float[S,32] y) <float[32,64] w, float[32] b> { y = Gemm<transB = 1, alpha = 0.5, beta = 3.0>(x, w, b) }"""


def quantized(source: Any, options: str, samples: Any = None) -> Any:
    model = graphopt.load(source)
    ctx = Context(model, samples=None if samples is None else Samples(samples), remarks=Remarks())
    PassManager(pipeline(f"quantize{{{options}}}", passes())).run(model, ctx)
    return model


def tokens(outlier: float = 1.0) -> Array:
    x = np.random.default_rng(1).standard_normal((2, 9, 64)).astype(np.float32)
    x[0, 0] *= outlier
    return x


def row_errors(base: Array, other: Array) -> Array:
    return np.asarray(np.linalg.norm(base - other, axis=-1) / np.linalg.norm(base, axis=-1))


def test_one_large_token_ruins_only_plain_dynamic() -> None:
    source = parse(MATMUL, w=W)
    feed = {"x": tokens(outlier=300)}
    base = run(source, feed)["y"]
    assert np.median(row_errors(base, run(quantized(source, ""), feed)["y"])) > 0.3
    assert row_errors(base, run(quantized(source, "rows=true"), feed)["y"]).max() < 0.02


def test_a_gemm_keeps_alpha_beta_and_bias() -> None:
    source = parse(GEMM, w=W.T.copy(), b=np.linspace(-50, 50, 32, dtype=np.float32))
    feed = {"x": tokens(outlier=300).reshape(-1, 64)}
    base = run(source, feed)["y"]
    assert row_errors(base, run(quantized(source, "rows=true"), feed)["y"]).max() < 0.02


def test_rows_of_zeros_and_an_empty_sequence() -> None:
    source = parse(MATMUL, w=W)
    model = quantized(source, "rows=true")
    x = tokens()
    x[1] = 0
    got = run(model, {"x": x})["y"]
    assert np.isfinite(got).all()
    assert not got[1].any()
    assert not run(model, {"x": np.zeros_like(x)})["y"].any()


def test_auto_decides_by_the_samples() -> None:
    source = parse(MATMUL, w=W)
    count = [sum(n.op_type == "ReduceMax" for n in quantized(source, "rows=auto", [{"x": tokens(size)}]).graph) for size in (1, 300)]
    assert count == [0, 1]
    with pytest.raises(GraphoptError, match="add --samples"):
        quantized(source, "rows=auto")


def test_the_lowering_multiplies_integers() -> None:
    source = parse(MATMUL, w=W)
    result = graphopt.optimize(source, "quantize{rows=true}", target="quantized{tune=off}", promise=False)
    assert not any(n.op_type == "MatMul" for n in result.model.graph)
    feed = {"x": tokens(outlier=300)}
    assert_same(run(quantized(source, "rows=true"), feed), session(result.model).run(feed), 1e-4)


def test_minilm_stays_nearer_to_the_original() -> None:
    """The real model: its rows differ, so plain dynamic rounds more coarsely."""
    path = minilm("sdpa_23")
    feed = text_feeds(["input_ids", "attention_mask"], 2, 24)
    base = run(str(path), feed)["last_hidden_state"]
    plain, rows = (run(quantized(path, o), feed)["last_hidden_state"] for o in ("", "rows=true"))
    assert np.linalg.norm(base - rows) < 0.9 * np.linalg.norm(base - plain)
