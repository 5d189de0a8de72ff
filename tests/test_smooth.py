"""smooth: the same numbers in float, better ones in int8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from models import minilm, minilm_folder, parse, run, text_feeds  # type: ignore[import-not-found]

import graphopt
from graphopt.cli import demo_race
from graphopt.core.contract import Context
from graphopt.core.errors import GraphoptError, PipelineError
from graphopt.core.pipeline import PassManager
from graphopt.core.pipeline import parse as pipeline
from graphopt.core.registry import passes
from graphopt.graph.verify import verify
from graphopt.run import ort
from graphopt.run.race import Picky
from graphopt.run.samples import Samples

Array = np.ndarray[Any, Any]
BLOCK = """<ir_version: 10, opset_import: ["": 23]>
g (float[B,S,32] x) => (float[B,S,32] y) <float[32] g, float[32,32] wq, float[32,64] wg, float[32,64] wu, float[64] bu, float[64,32] wd> {
  n = RMSNormalization<axis = -1>(x, g)
  q = MatMul(n, wq)
  gate = MatMul(n, wg)
  open = Sigmoid(gate)
  u = MatMul(n, wu)
  up = Add(u, bu)
  h = Mul(open, up)
  d = MatMul(h, wd)
  y = Add(d, q)
}"""


def block() -> Any:
    """A decoder block whose norm and up projection have a planted channel that is much larger than the others."""
    rng = np.random.default_rng(2)
    w = {name: rng.standard_normal(shape).astype(np.float32) / 6 for name, shape in
         {"wq": (32, 32), "wg": (32, 64), "wu": (32, 64), "wd": (64, 32)}.items()}  # fmt: skip
    scale, bias = np.ones(32, np.float32), rng.standard_normal(64).astype(np.float32)
    scale[5], w["wq"][5], w["wg"][5], w["wu"][5] = 100, w["wq"][5] / 100, w["wg"][5] / 100, w["wu"][5] / 100
    w["wu"][:, 9] *= 100
    bias[9] *= 100
    w["wd"][9] /= 100
    return parse(BLOCK, g=scale, bu=bias, **w)


def feeds(count: int = 3) -> list[dict[str, Array]]:
    rng = np.random.default_rng(4)
    return [{"x": rng.standard_normal((2, 5 + k, 32)).astype(np.float32)} for k in range(count)]


def compiled(source: Any, text: str, samples: Any = None) -> tuple[Any, Any]:
    model = graphopt.load(source)
    ctx = Context(model, samples=None if samples is None else Samples(samples))
    records = PassManager(pipeline(text, passes())).run(model, ctx)
    verify(model)
    return model, records


def error(base: Array, other: Array) -> float:
    return float(np.linalg.norm(base - other) / np.linalg.norm(base))


@pytest.mark.parametrize("strength", ["search", "0.5"])
def test_the_same_numbers_in_float_and_better_ones_in_int8(strength: str) -> None:
    source, (feed, *samples) = block(), feeds()
    base = run(source, feed)["y"]
    smoothed, records = compiled(source, f"smooth{{strength={strength}}}", samples)
    assert records[0].changes == 2, "the norm, and the gate"
    assert error(base, run(smoothed, feed)["y"]) < 1e-6
    plain, _ = compiled(source, "quantize")
    both, _ = compiled(source, f"smooth{{strength={strength}}}, quantize", samples)
    before, after = (error(base, run(m, feed)["y"]) for m in (plain, both))
    assert before > 0.1
    assert after < before / 5


def test_search_leaves_alone_what_is_even() -> None:
    rng = np.random.default_rng(3)
    source = parse(BLOCK, g=np.ones(32, np.float32), bu=np.zeros(64, np.float32), wq=rng.standard_normal((32, 32)).astype(np.float32),
                   wg=rng.standard_normal((32, 64)).astype(np.float32) / 6, wu=rng.standard_normal((32, 64)).astype(np.float32) / 6,
                   wd=rng.standard_normal((64, 32)).astype(np.float32))  # fmt: skip
    model, records = compiled(source, "smooth", feeds())
    assert any("no strength lowers the output error" in r.message for r in records[0].remarks)
    assert all(r.facts["after"] < r.facts["before"] for r in records[0].remarks if r.kind == "applied")
    assert np.array_equal(run(source, feeds()[0])["y"], run(model, feeds()[0])["y"]), "powers of two do not round"


def test_a_norm_with_another_reader_is_left_alone() -> None:
    text = BLOCK.replace("y = Add(d, q)", "e = Add(d, q)\n  y = Add(e, n)")
    source = block()
    source = parse(text, **{t.name: onnx.numpy_helper.to_array(t) for t in source.graph.initializer})
    _, records = compiled(source, "smooth", feeds())
    assert records[0].changes == 1
    assert any("read by more than" in r.message for r in records[0].remarks)


def test_a_post_norm_encoder_keeps_its_numbers() -> None:
    """MiniLM: the residual sum reads every norm, so nothing may be folded; what is not smoothed has its reason."""
    path = minilm("sdpa_23")
    feed = text_feeds(["input_ids", "attention_mask"], 2, 12)
    model, records = compiled(path, "canonicalize, simplify, smooth", [feed])
    assert error(run(str(path), feed)["last_hidden_state"], run(model, feed)["last_hidden_state"]) < 1e-5
    assert len([r for r in records[-1].remarks if r.kind == "missed"]) >= 18


def test_a_post_norm_encoder_is_smoothed_by_multiplications() -> None:
    """MiniLM: the same numbers in float, and less error in int8, by ranges at run time and by those of the samples."""
    exact = "canonicalize, simplify, fuse-norm, fuse-activation, simplify-masks, fuse-attention"
    path, rng = minilm("sdpa_18"), np.random.default_rng(1)
    feed, *samples = [{"input_ids": (a := rng.integers(1000, 20000, (3, n))), "attention_mask": np.ones_like(a)} for n in (40, 9, 24, 33, 50, 17)]
    base = run(str(path), feed)["last_hidden_state"]
    smoothed, records = compiled(path, f"{exact}, smooth{{multiply=true}}", samples)
    assert records[-1].changes >= 12
    fused, _ = compiled(path, exact)
    assert np.array_equal(run(fused, feed)["last_hidden_state"], run(smoothed, feed)["last_hidden_state"]), "powers of two do not round"
    off = {}
    for step in ("", "smooth{multiply=true}, "):
        for way in ("", "mode=static"):
            model, _ = compiled(path, f"{exact}, {step}quantize{{{way}}}", samples)
            off[step, way] = error(base, run(model, feed)["last_hidden_state"])
    assert off["smooth{multiply=true}, ", "mode=static"] < 0.8 * off["", "mode=static"], off
    assert off["smooth{multiply=true}, ", ""] < 0.8 * off["", ""], off


def test_a_multiplication_is_put_only_where_it_gains_something() -> None:
    text = BLOCK.replace("y = Add(d, q)", "e = Add(d, q)\n  y = Add(e, n)")
    source = block()
    source = parse(text, **{t.name: onnx.numpy_helper.to_array(t) for t in source.graph.initializer})
    _, without = compiled(source, "smooth", feeds())
    assert any("`multiply=true` puts a multiplication there" in r.message for r in without[0].remarks)
    feed = feeds()[0]
    model, _ = compiled(source, "smooth{multiply=true}", feeds())
    assert [n.op_type for n in model.graph].count("Mul") == 2, "the gate, and in front of q, gate and up together"
    assert error(run(source, feed)["y"], run(model, feed)["y"]) < 1e-6
    even = parse(text, g=np.ones(32, np.float32), bu=np.zeros(64, np.float32), **{
        name: np.random.default_rng(3).standard_normal(shape).astype(np.float32) for name, shape in
        {"wq": (32, 32), "wg": (32, 64), "wu": (32, 64), "wd": (64, 32)}.items()})  # fmt: skip
    model, _ = compiled(even, "smooth{multiply=true}", feeds())
    assert [n.op_type for n in model.graph].count("Mul") == 1, "the gate"


def test_a_multiplication_that_gains_nothing_is_not_put_there_by_a_given_strength() -> None:
    text = BLOCK.replace("y = Add(d, q)", "e = Add(d, q)\n  y = Add(e, n)")
    rng = np.random.default_rng(3)
    even = parse(text, g=np.ones(32, np.float32), bu=np.zeros(64, np.float32), **{
        name: rng.standard_normal(shape).astype(np.float32) for name, shape in
        {"wq": (32, 32), "wg": (32, 64), "wu": (32, 64), "wd": (64, 32)}.items()})  # fmt: skip
    model, _ = compiled(even, "smooth{multiply=true strength=0.0}", feeds())
    assert [n.op_type for n in model.graph].count("Mul") == 1, "the gate"


def test_errors() -> None:
    with pytest.raises(GraphoptError, match="add --samples"):
        compiled(block(), "smooth")
    for wrong in ("2", "much"):
        with pytest.raises(PipelineError, match="from 0 to 1"):
            pipeline(f"smooth{{strength={wrong}}}", passes())


# ---- the documented quality ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lee() -> tuple[Any, list[Any], list[str], Array]:
    """MiniLM fused, samples of 100 background texts, and the 50 Lee documents with their embeddings in float32; as in docs/benchmarks.md."""
    pytest.importorskip("gensim", reason="gensim is not installed")
    source = minilm("sdpa_18")
    texts, _ = demo_race._lee()
    background = Path(demo_race._folder_of("gensim"), "test", "test_data", "lee_background.cor")
    lines = background.read_text(encoding="utf-8", errors="replace").strip().splitlines()[40:140]
    samples = list(Samples.load(lines, graphopt.load(source), tokenizer=minilm_folder() / "tokenizer.json"))
    return source, samples, texts, _embedded(ort.session(source), texts)


def _embedded(session: Any, texts: list[str]) -> Array:
    return demo_race.embed(Picky(session), minilm_folder() / "tokenizer.json", texts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "cosine"),
    [
        ("smooth{multiply=true}, quantize", 0.9970),
        ("smooth{multiply=true}, quantize{mode=static bias-correction=true}", 0.9982),
        ("smooth{rows=true multiply=true}, quantize{rows=true}", 0.9985),
        ("quantize{rows=true}", 0.9975),
    ],
)
def test_sentences_stay_as_close_as_documented(lee: tuple[Any, list[Any], list[str], Array], text: str, cosine: float) -> None:
    """Rows of padding set a scale that is made at run time: smoothing that does not count them gives 0.9896, and 0.9939."""
    source, samples, texts, base = lee
    fused = "canonicalize, simplify-masks, fuse-norm, fuse-activation, fuse-attention, canonicalize"
    made = graphopt.optimize(source, f"{fused}, {text}", target="quantized{tune=off}", samples=samples, promise=False).session()
    assert float((base * _embedded(made, texts)).sum(-1).mean()) == pytest.approx(cosine, abs=5e-4)
