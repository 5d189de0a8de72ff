"""quantize-probabilities: the numbers are those of a rounded softmax, on a real model and on a small one; what cannot be done says why."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from models import minilm, parse, run, text_feeds  # type: ignore[import-not-found]

import graphopt
from graphopt.core.errors import PipelineError

BLOCK = """<ir_version: 10, opset_import: ["": 23]>
g (float[B,2,S,4] q, float[B,2,S,4] k, float[B,2,S,4] v) => (float[B,2,S,4] y) {
  kt = Transpose <perm = [0,1,3,2]> (k)
  s = MatMul(q, kt)
  p = Softmax <axis = -1> (s)
  y = MatMul(p, v)
}"""


def rounded(p: np.ndarray, codes: str, bits: int) -> np.ndarray:
    if codes == "linear":
        return np.rint(p * (2**bits - 1)) / (2**bits - 1)
    with np.errstate(divide="ignore"):
        k = np.rint(np.minimum(-np.log2(p), 2**bits - 1))
    return np.where(k == 2**bits - 1, 0, 0.5**k)


@pytest.mark.parametrize(("codes", "bits"), [("linear", 8), ("linear", 4), ("log", 4), ("log", 3)])
@pytest.mark.parametrize("sizes", [(1, 5), (3, 9)])
def test_the_numbers_are_those_of_rounded_probabilities(codes: str, bits: int, sizes: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((sizes[0], 2, sizes[1], 4)).astype(np.float32) * 2 for _ in range(3))
    scores = (q.astype(np.float64) @ np.swapaxes(k, -1, -2)).astype(np.float64)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    expected = rounded(p / p.sum(-1, keepdims=True), codes, bits) @ v
    result = graphopt.optimize(parse(BLOCK), f"quantize-probabilities{{codes={codes} bits={bits}}}", target="cpu{tune=off}", promise=False)
    found = run(result.model, {"q": q, "k": k, "v": v})["y"]
    wrong = ~np.isclose(found, expected, atol=1e-4, rtol=1e-4).all(-1)
    assert wrong.mean() <= 0.02, "only a probability in the middle between two codes may fall on the other side"
    assert not np.allclose(expected, (p / p.sum(-1, keepdims=True)) @ v, atol=1e-4), "the rounding shows"


@pytest.mark.parametrize("route", ["sdpa_18", "eager_ts17"])
def test_every_attention_of_minilm_and_what_it_costs(route: str) -> None:
    feeds = text_feeds(["input_ids", "attention_mask"], 2, 24)
    base = run(str(minilm(route)), feeds)["last_hidden_state"]
    cosines: dict[str, float] = {}
    for options in ("bits=8", "codes=log bits=4", "bits=4"):
        result = graphopt.optimize(minilm(route), f"canonicalize, quantize-probabilities{{{options}}}", target="cpu{tune=off}", promise=False)
        changes = [r.changes for r in result.report.passes if r.name.startswith("quantize-prob")]
        assert changes == [6]
        found = run(result.model, feeds)["last_hidden_state"]
        cosines[options] = float(((found * base).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(base, axis=-1)).mean())
    assert cosines["bits=8"] > 0.9999
    assert cosines["codes=log bits=4"] > 0.98
    assert cosines["codes=log bits=4"] > cosines["bits=4"], "powers of two keep the many small probabilities that a linear grid drops"


@pytest.mark.parametrize("options", ["bits=5", "codes=log bits=8"])
def test_widths_that_do_not_exist(options: str) -> None:
    with pytest.raises(PipelineError, match="bits"):
        graphopt.optimize(parse(BLOCK), f"quantize-probabilities{{{options}}}", promise=False)


def test_a_fused_attention_is_declined_with_a_hint_and_twice_is_once() -> None:
    said: Any = graphopt.optimize(parse(BLOCK), "fuse-attention, quantize-probabilities", target="cpu{tune=off}", promise=False).report
    assert any("before fuse-attention" in r.message for p in said.passes for r in p.remarks if r.kind == "missed")
    twice = graphopt.optimize(parse(BLOCK), "quantize-probabilities, quantize-probabilities", target="cpu{tune=off}", promise=False).report
    assert [p.changes for p in twice.passes if p.name.startswith("quantize-prob")] == [1, 0]
