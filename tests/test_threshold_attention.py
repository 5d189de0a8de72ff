"""threshold-attention: what is below the threshold is zero, the rest sums to one, and the report says how much that is and costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from models import assert_same, minilm, parse, run, text_feeds  # type: ignore[import-not-found]
from test_portable import attention, qkv  # type: ignore[import-not-found]

import graphopt
from graphopt.core.contract import Context
from graphopt.core.errors import PassError, PipelineError
from graphopt.core.pipeline import PassManager
from graphopt.core.pipeline import parse as pipeline
from graphopt.core.registry import passes
from graphopt.graph.interface import interface
from graphopt.graph.verify import verify
from graphopt.run.samples import Samples

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


# ---- behind fuse-attention ----------------------------------------------------------------------------------------------------------------

FORMS = [  # heads, heads of key and value, mask, whether the inputs have 3 axes, attributes
    (2, 2, None, True, ""),
    (4, 2, "bool[B,1,S,T]", True, "scale = 0.7"),
    (4, 1, "float[B,1,S,T]", True, "softcap = 1.5"),
    (2, 2, "bool[S,T]", False, ""),
    (4, 2, "float[B,4,S,T]", False, "is_causal = 1"),
    (4, 2, None, False, "is_causal = 1, softcap = 2.0, scale = 1.0"),
]


def operands(form: tuple[int, int, str | None, bool, str], batch: int, rows: int, keys: int) -> dict[str, Array]:
    """Masks with holes and left padding; row 0 of the last entry sees nothing."""
    heads, kv_heads, mask, packed, _ = form
    found: dict[str, Array] = {name: 2 * x for name, x in qkv(heads, kv_heads, packed, rows, keys, batch).items()}
    if mask is None:
        return found
    sizes = {"B": batch, "S": rows, "T": keys}
    shape = [sizes.get(text) or int(text) for text in mask.split("[")[1][:-1].split(",")]
    seen = np.ones(shape, np.bool_)
    seen[..., 0], seen[..., keys // 2] = False, False
    seen.reshape(-1, rows, keys)[-1, 0] = False
    bias = np.random.default_rng(5).standard_normal(shape).astype(np.float32)
    return found | {"mask": seen if mask.startswith("bool") else np.where(seen, bias, np.float32(-np.inf))}


def cut_by_hand(form: tuple[int, int, str | None, bool, str], x: dict[str, Array], threshold: float) -> Array:
    """Attention-23 as it is specified, in float64, with the cut in between."""
    heads, kv_heads, _, packed, text = form
    options = {key.strip(): float(value) for key, value in (one.split("=") for one in text.split(",") if one)}
    q, k, v = (x[name].astype(np.float64) for name in "qkv")
    if packed:
        q, k, v = (a.reshape(*a.shape[:2], n, 4).swapaxes(1, 2) for a, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    k, v = (np.repeat(a, heads // kv_heads, axis=1) for a in (k, v))
    scores = q @ k.swapaxes(-1, -2) * options.get("scale", 0.5)
    if "softcap" in options:
        scores = options["softcap"] * np.tanh(scores / options["softcap"])
    mask = x.get("mask", np.zeros((1, 1)))
    scores = scores + (np.where(mask, 0, -np.inf) if mask.dtype == np.bool_ else mask)
    if "is_causal" in options:
        scores = scores + np.where(np.tri(*scores.shape[-2:], dtype=np.bool_), 0, -np.inf)
    top = scores.max(-1, keepdims=True)
    p = np.exp(scores - np.where(np.isfinite(top), top, 0))
    p = p / np.maximum(p.sum(-1, keepdims=True), 1e-300)
    kept = np.where(p >= np.minimum(threshold, p.max(-1, keepdims=True)), p, 0)
    y = kept / np.maximum(kept.sum(-1, keepdims=True), 1e-300) @ v
    return np.asarray(y.swapaxes(1, 2).reshape(len(y), y.shape[2], -1) if packed else y)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_an_attention_operator_is_written_out_with_the_cut_in_between(form: tuple[int, int, str | None, bool, str]) -> None:
    source = attention(*form)
    tiny, first = cut(source, "threshold-attention{threshold=1e-30}")
    model, second = cut(source, "threshold-attention{threshold=0.15}, threshold-attention{threshold=0.9}")
    assert [r.changes for r in first + second] == [1, 1, 0]
    assert not [str(r) for r in second[-1].remarks if "not cut" in str(r)], "it knows its own work"
    assert "Attention" not in {n.op_type for n in model.graph}
    for sizes in ((1, 5, 5), (3, 7, 9), (2, 9, 7)):
        x = operands(form, *sizes)
        assert_same(run(source, x), run(tiny, x))
        expected = cut_by_hand(form, x, 0.15)
        assert np.allclose(run(model, x)["y"], expected, atol=1e-5)
        assert not np.allclose(expected, cut_by_hand(form, x, 0), atol=1e-2), "the threshold shows"


@pytest.mark.parametrize("text", ["threshold=0.1", "threshold=0.3 relative=true", "sparsity=0.5"])
def test_the_cut_after_fusion_is_the_cut_before_it(text: str) -> None:
    samples = [feed(2, 12, seed=k) for k in range(3)]
    before, a = cut(parse(BLOCK), f"threshold-attention{{{text}}}", samples)
    after, b = cut(parse(BLOCK), f"fuse-attention, threshold-attention{{{text}}}", samples)
    assert [r.changes for r in a + b] == [1, 1, 1]
    for sizes in ((1, 5), (3, 11)):
        assert_same(run(before, feed(*sizes)), run(after, feed(*sizes)))
    for key in ("threshold", "sparsity"):
        found = [next(r.facts[key] for r in records[-1].remarks if key in r.facts) for records in (a, b)]
        assert found[0] == pytest.approx(found[1], rel=1e-3), key


def test_padding_is_no_weight() -> None:
    """Rows of padding do not count in a sparsity."""
    text = """<ir_version: 10, opset_import: ["": 23]>
    g (float[B,S,8] x, int64[B,S] attention_mask) => (float[B,S,8] y) <int64[2] axes = {1, 2}> {
      b = Cast <to = 9> (attention_mask)
      m = Unsqueeze(b, axes)
      y = Attention <q_num_heads = 2, kv_num_heads = 2> (x, x, x, m)
    }"""
    rng = np.random.default_rng(0)
    mask = np.array([[0] * 9 + [1] * 3], np.int64)
    told = []
    for scale in (0.0, 9.0):
        x = rng.standard_normal((1, 12, 8)).astype(np.float32)
        x[:, :9] *= scale
        x[:, 9:] = np.random.default_rng(1).standard_normal((1, 3, 8))
        model = graphopt.load(parse(text))
        records = PassManager(pipeline("threshold-attention{sparsity=0.5}", passes())).run(
            model, Context(model, samples=Samples([{"x": x, "attention_mask": mask}]))
        )
        told.append(next(r.facts["threshold"] for r in records[-1].remarks if "threshold" in r.facts))
    assert told[0] == told[1]


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
    model, records = cut(parse(text), "threshold-attention, threshold-attention{threshold=0.5}")
    assert [r.changes for r in records] == [1, 0]
    assert not [str(r) for r in records[-1].remarks if "not cut" in str(r)], "it knows its own work"
    assert (run(model, x)["y"] == 0).all()


def test_what_is_not_cut_says_why() -> None:
    scores_read = (
        '<ir_version: 10, opset_import: ["": 23]> g (float[B,2,S,4] q, float[B,2,S,4] k, float[B,2,S,4] v) => (float[B,2,S,4] y, float[B,2,S,S] p) '
        '{ y, "", "", p = Attention <qk_matmul_output_mode = 3> (q, k, v) }'
    )
    narrow = parse(onnx.printer.to_text(attention(2, 2, None, True)).replace("float[", "float16["))
    for source, reason in (
        (attention(2, 2, None, True, past=True), "it keeps a cache"),
        (parse(scores_read), "its weights or scores are an output"),
        (narrow, "it computes in FLOAT16"),
    ):
        model, records = cut(source, "threshold-attention")
        assert records[-1].changes == 0
        assert any(f"not cut: {reason}" in str(r) for r in records[-1].remarks), [str(r) for r in records[-1].remarks]
        assert [n.op_type for n in model.graph] == ["Attention"]
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
    fused, records = cut(str(minilm("sdpa_18")), "canonicalize, fuse-attention, threshold-attention{threshold=0.01}")
    assert records[-1].changes == 6
    for sizes in ((1, 9), (3, 24)):
        x = text_feeds(["input_ids", "attention_mask"], *sizes)
        assert_same(run(model, x), run(fused, x))
