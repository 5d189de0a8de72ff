"""Kind 6: nothing is fitted to samples that say nothing, and a scale for each row depends on no other row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from models import minilm, minilm_folder, parse  # type: ignore[import-not-found]

import graphopt
from graphopt.cli import demo_race
from graphopt.run import ort
from graphopt.run.samples import Samples

Array = np.ndarray[Any, Any]
HEAD = '<ir_version: 10, opset_import: ["": 21]>'


def weights(**shapes: tuple[int, ...]) -> dict[str, Array]:
    rng = np.random.default_rng(1)
    return {name: (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32) for name, shape in shapes.items()}


# ---- quantize{rows=true}: a text gives the same bits alone, in any batch and with any padding ---------------------------------------------

LAYER = """
    m = Cast<to=1>(mask) a1 = Unsqueeze(m, at) a2 = Sub(a1, one) bias = Mul(a2, big) x = Gather(table, ids)
    q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) kt = Transpose<perm=[0,2,1]>(k) s = MatMul(q, kt) sm = Add(s, bias)
    p = Softmax<axis=-1>(sm) c = MatMul(p, v) o = MatMul(c, wo) r = Add(x, o) n = LayerNormalization(r, gamma)
    u = MatMul(n, wu) ub = Add(u, bu) g = Gelu(ub) d = MatMul(g, wd) y = Add(n, d)"""


def layer() -> Any:
    text = f'<ir_version: 10, opset_import: ["": 21]> g (int64[b,s] ids, int64[b,s] mask) => (float[b,s,32] y) {{ {LAYER} }}'
    stored = weights(table=(50, 32), wq=(32, 32), wk=(32, 32), wv=(32, 32), wo=(32, 32), wu=(32, 64), wd=(64, 32), bu=(64,))
    return parse(text.replace("21]", "23]"), **stored, gamma=np.ones(32, np.float32), at=np.array([1]), one=np.float32(1), big=np.float32(1e4))


def alone_and_together(session: Any, name: str, texts: list[Array], width: int) -> bool:
    """Whether each text has the same bits by itself and padded in a batch."""
    batch = {key: np.zeros((len(texts), width), np.int64) for key in ("ids", "mask")}
    for k, text in enumerate(texts):
        batch["ids"][k, : len(text)], batch["mask"][k, : len(text)] = text, 1
    together = session.run(batch)[name]
    alone = [session.run({"ids": t[None], "mask": np.ones_like(t)[None]})[name][0] for t in texts]
    return all(np.array_equal(one, together[k, : len(one)]) for k, one in enumerate(alone))


def test_rows_depend_on_no_other_row() -> None:
    source = layer()
    rng = np.random.default_rng(2)
    texts = [rng.integers(0, 50, n) for n in (3, 7, 12)]
    exact = graphopt.optimize(source, "canonicalize", target="quantized{tune=off}", promise=False).session()
    made = {
        rows: graphopt.optimize(source, f"canonicalize, quantize{{rows={rows}}}", target="quantized{tune=off}", promise=False)
        for rows in ("true", "false")
    }
    ops = [n.op_type for n in made["true"].model.graph]
    assert ops.count("MatMulIntegerToFloat") == 6
    assert "DynamicQuantizeLinear" not in ops
    sessions = {rows: result.session() for rows, result in made.items()}
    for width in (12, 16):
        if alone_and_together(exact, "y", texts, width):  # the float kernels of this machine do not depend on the sizes
            assert alone_and_together(sessions["true"], "y", texts, width)
        assert not alone_and_together(sessions["false"], "y", texts, width), "one scale for the batch does depend on it"


def test_the_products_by_row_are_exact() -> None:
    """By themselves, without any float product around them: bit for bit, whatever the float kernels do."""
    source = parse(f"{HEAD} g (float[b,s,16] x) => (float[b,s,8] y) {{ p = MatMul(x, w) y = Add(p, c) }}", **weights(w=(16, 8), c=(8,)))
    made = graphopt.optimize(source, "quantize{rows=true}", target="quantized{tune=off}", promise=False).session()
    rng = np.random.default_rng(3)
    x = rng.standard_normal((3, 9, 16)).astype(np.float32) * np.array([1e-4, 1, 300], np.float32)[:, None, None]
    whole = made.run({"x": x})["y"]
    for k in range(3):
        for n in (1, 4, 9):
            assert np.array_equal(made.run({"x": x[k : k + 1, :n]})["y"][0], whole[k, :n])


@pytest.mark.slow
def test_minilm_gives_the_same_bits_in_any_batch() -> None:
    source, tokenizer = minilm("sdpa_18"), minilm_folder() / "tokenizer.json"
    fused = "canonicalize, simplify-masks, fuse-norm, fuse-activation, fuse-attention, canonicalize"
    made = graphopt.optimize(source, f"{fused}, quantize{{rows=true}}", target="quantized{tune=off}", promise=False).session()
    texts = [text[: 60 * k + 30] for k, text in enumerate(demo_race._lee()[0][:6])]
    batch = next(iter(Samples.load(texts, graphopt.load(source), tokenizer=tokenizer)))

    def same_bits(session: Any) -> bool:
        together = session.run(batch)["last_hidden_state"]
        lengths = enumerate(batch["attention_mask"].sum(1))
        alone = [session.run({key: x[k : k + 1, :n] for key, x in batch.items()})["last_hidden_state"][0] for k, n in lengths]
        return all(np.array_equal(one, together[k, : len(one)]) for k, one in enumerate(alone))

    if not same_bits(ort.session(source)):
        pytest.skip("the float kernels of this machine give other bits at other sizes, also without quantization")
    assert same_bits(made)
