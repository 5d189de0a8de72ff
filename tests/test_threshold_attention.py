"""threshold-attention: what is below the threshold is zero, the rest sums to one, and the report says how much that is and costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from models import minilm, parse, run, text_feeds  # type: ignore[import-not-found]

import graphopt
from graphopt.core import Context
from graphopt.errors import PassError, PipelineError
from graphopt.pipeline import PassManager
from graphopt.pipeline import parse as pipeline
from graphopt.registry import passes
from graphopt.samples import Samples
from graphopt.verify import interface, verify

Array = np.ndarray[Any, Any]
BLOCK = """<ir_version: 10, opset_import: ["": 23]>
g (float[B,2,S,4] q, float[B,2,S,4] k, float[B,2,S,4] v, float[B,1,1,S] mask) => (float[B,2,S,4] y) {
  kt = Transpose <perm = [0,1,3,2]> (k)
  s = MatMul(q, kt)
  m = Add(s, mask)
  p = Softmax <axis = -1> (m)
  y = MatMul(p, v)
}"""


def feed(batch: int, length: int, seed: int = 1) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    found = {name: 2 * rng.standard_normal((batch, 2, length, 4)).astype(np.float32) for name in ("q", "k", "v")}
    found["q"][:, 1] *= 0.2  # the second head looks everywhere
    mask = np.zeros((batch, 1, 1, length), np.float32)
    mask[..., 0] = -1e30
    return {**found, "mask": mask}


def weights(x: dict[str, Array]) -> Array:
    scores = x["q"].astype(np.float64) @ np.swapaxes(x["k"], -1, -2) + x["mask"]
    p = np.exp(scores - scores.max(-1, keepdims=True))
    found: Array = p / p.sum(-1, keepdims=True)
    return found


def cut(source: Any, text: str, samples: Any = None) -> tuple[Any, Any]:
    model = graphopt.load(source)
    public = interface(model)
    records = PassManager(pipeline(text, passes())).run(model, Context(model, samples=None if samples is None else Samples(samples)))
    verify(model, interface=public)
    return model, records


@pytest.mark.parametrize("sizes", [(1, 5), (3, 11)])
@pytest.mark.parametrize(("text", "relative"), [("threshold=0.1", False), ("threshold=0.2 relative=true", True), ("threshold=0.9", False)])
def test_the_numbers_are_those_of_the_cut_softmax(text: str, relative: bool, sizes: tuple[int, int]) -> None:
    x = feed(*sizes)
    p, limit = weights(x), float(text.split()[0].split("=")[1])
    top = p.max(-1, keepdims=True)
    kept = np.where(p >= (limit * top if relative else np.minimum(limit, top)), p, 0)
    expected = kept / kept.sum(-1, keepdims=True) @ x["v"]
    model, records = cut(parse(BLOCK), f"threshold-attention{{{text}}}")
    assert records[-1].changes == 1
    assert np.allclose(run(model, x)["y"], expected, atol=1e-4)
    assert not np.allclose(expected, p @ x["v"], atol=1e-3), "the threshold shows"


def test_a_second_run_and_fusion_leave_it_alone() -> None:
    model, records = cut(parse(BLOCK), "threshold-attention{threshold=0.1}, threshold-attention{threshold=0.1}, fuse-attention")
    assert [r.changes for r in records] == [1, 0, 0]
    assert "Attention" not in {n.op_type for n in model.graph}


def test_each_head_gets_its_own_threshold_for_a_sparsity() -> None:
    samples = [feed(2, 12, seed=k) for k in range(4)]
    for relative in ("false", "true"):
        _, records = cut(parse(BLOCK), f"threshold-attention{{sparsity=0.5 relative={relative}}}", samples)
        told = next(r.facts for r in records[-1].remarks if "sparsity" in r.facts)
        for head in range(2):
            p = np.concatenate([weights(s)[:, head].reshape(-1, 12) for s in samples])
            p = p / p.max(-1, keepdims=True) if relative == "true" else p
            share = (p[p > 0] < told["threshold"][head]).mean()
            assert 0.42 < share <= 0.505, (relative, head)
        assert told["sparsity"] == pytest.approx(0.48, abs=0.05)


def test_what_it_costs_is_measured() -> None:
    samples = [feed(2, 9, seed=k) for k in range(3)]
    model, records = cut(parse(BLOCK), "threshold-attention{threshold=0.05}", samples)
    told = next(r for r in records[-1].remarks if "loss" in r.facts)
    base, found = (np.concatenate([run(m, s)["y"].ravel() for s in samples]) for m in (parse(BLOCK), model))
    assert told.facts["loss"] == pytest.approx(float(np.linalg.norm(base - found) / np.linalg.norm(base)), rel=1e-3)
    share = np.mean([(w[w > 0] < 0.05).mean() for w in map(weights, samples)])
    assert next(r.facts["sparsity"] for r in records[-1].remarks if "sparsity" in r.facts) == pytest.approx(share, abs=0.03)
    assert "of the weights become zero" in told.message


def test_rows_without_any_weight_stay_zero() -> None:
    text = BLOCK.replace("y = MatMul(p, v)", "n = IsNaN(p)  z = Where(n, zero, p)  y = MatMul(z, v)").replace(") {", ") <float zero = {0}> {", 1)
    x = feed(1, 4)
    x["mask"][:] = -np.inf
    model, records = cut(parse(text), "threshold-attention")
    assert records[-1].changes == 1
    assert (run(model, x)["y"] == 0).all()


def test_what_is_not_cut_says_why() -> None:
    _, records = cut(parse(BLOCK), "fuse-attention, threshold-attention")
    assert any("put threshold-attention before fuse-attention" in str(r) for r in records[-1].remarks)
    with pytest.raises(PassError, match="add --samples"):
        cut(parse(BLOCK), "threshold-attention{sparsity=0.5}")
    for wrong, message in (("threshold=2", "between 0 and 1"), ("threshold=0.1 sparsity=0.5", "to stand alone")):
        with pytest.raises(PipelineError, match=message):
            pipeline(f"threshold-attention{{{wrong}}}", passes())


def test_weaker_settings_cut_less_and_end() -> None:
    for text in ("", "{sparsity=0.5}"):
        step: Any = pipeline(f"threshold-attention{text}", passes())[0]
        for _ in range(16):
            milder = step.weaker()
            if milder is None:
                break
            assert (milder.threshold or 0) <= (step.threshold or 1)
            assert (milder.sparsity or 0) <= (step.sparsity or 0)
            step = milder
        assert milder is None


def test_every_attention_of_minilm() -> None:
    feeds = text_feeds(["input_ids", "attention_mask"], 2, 24)
    base = run(str(minilm("sdpa_18")), feeds)["last_hidden_state"]
    model, records = cut(str(minilm("sdpa_18")), "canonicalize, threshold-attention{threshold=0.01}", [feeds])
    assert records[-1].changes == 6
    found = run(model, feeds)["last_hidden_state"]
    assert 0 < float(np.linalg.norm(found - base) / np.linalg.norm(base)) < 0.3
