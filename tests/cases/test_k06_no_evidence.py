"""Kind 6: nothing is fitted to samples that say nothing, and a scale for each row depends on no other row."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from models import minilm, minilm_folder, parse  # type: ignore[import-not-found]

import graphopt
from graphopt.calibration.padding import Padding
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


# ---- a floor on the rows that a fit needs ------------------------------------------------------------------------------------------------

EXPERTS = 3


def experts() -> Any:
    """A mixture of experts over tokens [n, 32]: each token goes to the expert that the last input names; the experts are FFNs of their own."""
    parts, sums = [], []
    for e in range(EXPERTS):
        parts.append(f"""
            n{e} = Constant<value_int={e}>() t{e} = Equal(to, n{e}) i{e} = NonZero(t{e}) w{e} = Squeeze(i{e}, at) r{e} = Gather(x, w{e})
            u{e} = MatMul(r{e}, up{e}) g{e} = Relu(u{e}) d{e} = MatMul(g{e}, down{e}) j{e} = Unsqueeze(w{e}, last)
            s{e} = ScatterND<reduction="add">({f"s{e - 1}" if e else "zero"}, j{e}, d{e})""")
        sums.append(f"s{e}")
    text = f"{HEAD} g (float[n,32] x, int64[n] to) => (float[n,32] y) {{ zero = Sub(x, x) {' '.join(parts)} y = Add(x, {sums[-1]}) }}"
    stored = {f"{k}{e}": v for e in range(EXPERTS) for k, v in _ffn(e).items()}
    return parse(text, **stored, at=np.array([0]), last=np.array([1]))


def _ffn(e: int) -> dict[str, Array]:
    rng = np.random.default_rng(10 + e)
    return {"up": rng.standard_normal((32, 64)).astype(np.float32) / 6, "down": rng.standard_normal((64, 32)).astype(np.float32) / 8}


def tokens(counts: tuple[int, ...], seed: int = 0) -> dict[str, Array]:
    """So many tokens for each expert."""
    to = np.repeat(np.arange(len(counts)), counts)
    return {"x": np.random.default_rng(seed).standard_normal((len(to), 32)).astype(np.float32), "to": to}


UNEVEN = [tokens((100, 1, 0), seed) for seed in range(1)]


def changed(pipeline: str, source: Any, samples: Any, **options: Any) -> tuple[Any, set[int], str]:
    """The result, the experts whose weights are other ones (in float, at two decimals of the step), and all remarks."""
    result = graphopt.optimize(source, pipeline, samples=samples, promise=False, target="cpu{tune=off}", **options)
    told = "\n".join(r.message for record in result.report.passes for r in record.remarks)
    moved = set()
    for e in range(EXPERTS):
        feed = tokens(tuple(40 * (k == e) for k in range(EXPERTS)), 9)
        base = ort.session(source, optimize=False).run(feed)["y"]
        if not np.allclose(ort.session(result.graph, optimize=False).run(feed)["y"], base, atol=1e-5):
            moved.add(e)
    return result, moved, told


@pytest.mark.parametrize("options", ["energy=0.9", "ratio=0.5", "rank=4", "energy=0.5 method=asvd", "ratio=0.5 sequential=true"])
def test_an_expert_that_no_sample_reaches_stays_whole(options: str) -> None:
    _, moved, told = changed(f"factorize{{{options}}}", experts(), UNEVEN)
    assert moved == {0}
    assert "the samples show 0 rows of its 32 features" in told
    assert "the samples show 1 row of its 64 features" in told
    assert "method=svd needs none" in told


def test_one_token_decides_no_rank() -> None:
    """Before: rank 1, with an error of 0."""
    source = parse(f"{HEAD} g (float[n,32] x) => (float[n,32] y) {{ y = MatMul(x, w) }}", **weights(w=(32, 32)))
    few = [{"x": np.random.default_rng(0).standard_normal((1, 32)).astype(np.float32)}]
    result = graphopt.optimize(source, "factorize{energy=0.5}", samples=few, promise=False, target="cpu{tune=off}")
    assert [n.op_type for n in result.graph.graph] == ["MatMul"]
    plain = graphopt.optimize(source, "factorize{energy=0.5 method=svd}", samples=few, promise=False, target="cpu{tune=off}")
    assert [n.op_type for n in plain.graph.graph] == ["MatMul", "MatMul"]


@pytest.mark.parametrize("options", ["method=gptq", "method=awq", "method=awq-gptq", "codes=kmeans"])
def test_what_no_sample_reaches_is_rounded_by_its_weights(options: str) -> None:
    """The same bits as without samples for the experts that none reaches; only the others are fitted."""
    source = experts()
    pipeline = f"quantize{{mode=weight-only bits=4 {options}}}"
    result, _, told = changed(pipeline, source, UNEVEN)
    assert "rounded by its weights alone" in told
    plain = graphopt.optimize(source, "quantize{mode=weight-only bits=4" + (" codes=kmeans}" if "kmeans" in options else "}"), promise=False)
    for e in range(EXPERTS):
        feed = tokens(tuple(40 * (k == e) for k in range(EXPERTS)), 9)
        same = np.array_equal(*(ort.session(x.graph, optimize=False).run(feed)["y"] for x in (result, plain)))
        assert same == (e > 0)


def test_static_ranges_need_rows() -> None:
    _, moved, told = changed("quantize{mode=static}", experts(), UNEVEN)
    assert moved == {0}
    assert "mode=dynamic needs none" in told
    _, moved, told = changed("quantize{mode=dynamic bias-correction=true}", experts(), UNEVEN)
    assert moved == {0, 1, 2}
    assert "bias not corrected: the samples show 1 row" in told


def test_smoothing_needs_rows() -> None:
    source = experts()
    large = [{**UNEVEN[0], "x": UNEVEN[0]["x"] * np.where(np.arange(32) == 3, 50, 1).astype(np.float32)}]
    result, _, told = changed("smooth{multiply=true strength=0.5}", source, large)
    assert told.count("not smoothed: the samples show") == 4
    assert [n.op_type for n in result.graph.graph].count("Mul") == 2


@pytest.mark.parametrize("importance", ["obs", "fisher", "taylor", "reconstruction"])
def test_importance_needs_rows(importance: str) -> None:
    """The unreached experts cost nothing on the samples, and went first."""
    pytest.importorskip("torch", reason="torch is not installed")
    _, moved, told = changed(f"canonicalize, prune-ffn{{ratio=0.3 importance={importance} multiple=8}}", experts(), UNEVEN)
    assert moved == {0}
    assert told.count(f"{importance} cannot judge it: the samples show") == 2
    assert "importance=magnitude refit=false needs no samples" in told


def test_a_refit_needs_rows() -> None:
    _, moved, told = changed("canonicalize, prune-ffn{ratio=0.3 importance=magnitude multiple=8}", experts(), UNEVEN)
    assert moved == {0, 1, 2}
    assert told.count("refitted: error") == 1
    assert told.count("not refitted: the samples show") == 2


def test_an_effect_of_nothing_chooses_nothing() -> None:
    """mix-precision: an expert that no sample reaches moves no output, and would get the fewest bits."""
    _, moved, told = changed("mix-precision{loss=0.5 choices=int4}", experts(), [tokens((100, 0, 0))])
    assert moved == {0}
    assert "no sample reaches it" in told


GATED = """<ir_version: 10, opset_import: ["": 21]> g (float[b,s,32] x, bool pick) => (float[b,s,32] y) {
    u = MatMul(x, up) g = Relu(u) d = MatMul(g, down) a = Add(x, d)
    y = If(pick) <then_branch = t () => (float[b,s,32] p) { p = Identity(a) }, else_branch = e () => (float[b,s,32] q) { q = Identity(x) }> }"""


@pytest.mark.parametrize("importance", ["obs", "fisher", "taylor"])
def test_a_batch_whose_branch_reads_no_block(importance: str) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    source = parse(GATED, **_ffn(0))
    rng = np.random.default_rng(0)
    batches = [{"x": rng.standard_normal((2, 9, 32)).astype(np.float32), "pick": np.array(pick)} for pick in (False, True, False, True)]
    pipeline = f"canonicalize, prune-ffn{{ratio=0.5 importance={importance} multiple=8}}"
    for order in (batches, batches[::-1]):
        result = graphopt.optimize(source, pipeline, samples=order, promise=False)
        assert result.report.output.parameters < result.report.input.parameters
    with pytest.raises(graphopt.GraphoptError, match="no float output of the model follows from them"):
        graphopt.optimize(source, pipeline, samples=batches[:1], promise=False)


def test_samples_that_are_all_padding() -> None:
    """No row counts, so that nothing is fitted; and a mask that hides where it is 1 is not mistaken for one."""
    source = layer()
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 50, (4, 9))
    nothing = [{"ids": ids, "mask": np.zeros_like(ids)}]
    result = graphopt.optimize(source, "canonicalize, factorize{ratio=0.3}", samples=nothing, promise=False, target="cpu{tune=off}")
    told = [r.message for record in result.report.passes for r in record.remarks if r.kind == "missed"]
    assert sum("the samples show 0 rows" in text for text in told) == 6
    assert not any(record.changes for record in result.report.passes if record.name.startswith("factorize"))
    turned = layer()
    for node in turned.graph.node:
        if node.op_type == "Sub" and list(node.input) == ["a1", "one"]:  # 0 - mask in place of mask - 1
            node.input[:] = ["none", "a1"]
    turned.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0], np.float32), "none"))
    kept = Padding(graphopt.load(turned)).about(["x"]).kept(nothing[0])
    assert kept.masks == ()
