"""Heads and neurons of whole models: removed in every spelling, chosen by every criterion, refitted, and composed with other passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from models import minilm, parse, run  # type: ignore[import-not-found]
from pruning import masked, prune, same, shapes, units  # type: ignore[import-not-found]
from tiny import tiny  # type: ignore[import-not-found]

import graphopt
from graphopt.compress.prune.criterion import criteria
from graphopt.compress.prune.importance import Importance
from graphopt.compress.prune.removable import Removable
from graphopt.core.contract import Context
from graphopt.core.errors import PassError, PipelineError
from graphopt.core.fuel import Fuel
from graphopt.core.pipeline import PassManager
from graphopt.core.pipeline import parse as steps
from graphopt.core.registry import passes, targets
from graphopt.graph.questions import downstream, parameters
from graphopt.rewrite.slicing.apply import apply
from graphopt.rewrite.slicing.close import Slicing
from graphopt.rewrite.slicing.plan import Refusal

Array = np.ndarray[Any, Any]
FUSE = "canonicalize, fuse-norm, fuse-activation, simplify-masks, fuse-rotary, fuse-attention"
ROUTES = [
    ("bert", "sdpa", "18"), ("bert", "eager", "ts17"), ("distilbert", "sdpa", "ts17"), ("vit", "sdpa", "18"), ("gpt2", "sdpa", "18"),
    ("gpt2", "sdpa", "ts17"), ("llama", "sdpa", "23"), ("llama", "sdpa", "ts17"), ("qwen3", "eager", "18"), ("qwen3", "sdpa", "ts17"),
]  # fmt: skip


def feeds(model: ir.Model, batch: int, length: int, seed: int = 0) -> dict[str, Array]:
    """Ids, or pixels; the mask has a hole, and left padding from the second row on."""
    rng = np.random.default_rng(seed)
    if model.graph.inputs[0].name == "pixel_values":
        return {"pixel_values": rng.standard_normal((batch, 3, 32, 32)).astype(np.float32)}
    mask = np.ones((batch, length), np.int64)
    mask[0, length // 2] = 0
    mask[1:, : length // 3] = 0
    ids = rng.integers(4, 99, (batch, length))
    return {v.name: {"input_ids": ids, "attention_mask": mask}[str(v.name)] for v in model.graph.inputs}


def near(base: ir.Model, model: ir.Model) -> float:
    """Mean cosine between the outputs of two models, over rows."""
    found = []
    for seed, (batch, length) in enumerate(((2, 12), (3, 7))):
        batch_feeds = feeds(base, batch, length, 100 + seed)
        batch_feeds["attention_mask"][:] = 1
        a, b = (next(iter(run(m, batch_feeds).values())).reshape(batch * length, -1) for m in (base, model))
        found.append((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))
    return float(np.concatenate(found).mean())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("name", "attention", "route"), ROUTES)
def test_pruned_equals_masked(name: str, attention: str, route: str, fused: bool) -> None:
    model = graphopt.load(tiny(name, attention, route))
    prune(model, FUSE if fused else "canonicalize")
    found = Context(model).get(Removable())
    assert not found.refused
    assert [c.kind for c in found.candidates] == ["heads", "neurons"] * 2
    rng = np.random.default_rng(0)
    gone = {}
    for c in found.candidates:
        groups = rng.choice(c.count, max(1, c.count // 4), replace=False)
        gone[c.units[0]] = c.members(groups.tolist())
    wanted, before = masked(model, gone), parameters(model)
    plan = Slicing(model)
    for unit, members in gone.items():
        plan.remove(unit.value, unit.axis, unit.mask(members), inside=unit.inside)
    apply(plan)
    prune(model, "")  # verifies
    same(wanted, model, [feeds(model, 2, 12), feeds(model, 1, 7)])
    assert parameters(model) < before


@pytest.mark.parametrize("criterion", criteria())
def test_every_criterion_ranks_and_prunes(criterion: str) -> None:
    model = graphopt.load(tiny("bert", "sdpa", "18"))
    prune(model, FUSE)
    base = model.clone()
    samples = [feeds(model, 4, 12, seed) for seed in range(3)]
    rankings = Context(model, samples=samples).get(Importance(criterion, multiple=8))  # type: ignore[arg-type]
    assert {c.kind for c in rankings} == ({"heads"} if criterion in ("attention", "entropy") else {"heads", "neurons"})
    for c, ranking in rankings.items():
        gone = ranking.first(len(ranking.order))
        assert len(set(gone.tolist())) == len(gone) < c.count
        assert len(ranking.cost) == len(ranking.order) + 1
        assert (np.diff(ranking.cost) >= 0).all()
    _, remarks = prune(model, f"prune-heads{{ratio=0.25 importance={criterion}}}", samples)
    assert sum(len(r.facts["removed"]) for r in remarks if "removed" in r.facts) == 2
    same_shape = run(model, samples[0])["out"].shape == run(base, samples[0])["out"].shape
    assert same_shape


def test_obs_is_what_is_lost_after_the_rest_made_up_for_it() -> None:
    """Two equal neurons: alone each matters, together one of them is free; leave-one-out does not see that, obs does."""
    rng = np.random.default_rng(0)
    up = rng.standard_normal((16, 24)).astype(np.float32)
    down = rng.standard_normal((24, 16)).astype(np.float32)
    up[:, 1], down[:2] = up[:, 0], 3 * down[:2]  # neurons 0 and 1 see the same, and matter most
    text = """<ir_version: 10, opset_import: ["": 21]> g (float[B,S,16] x) => (float[B,S,16] y) {
        h = MatMul(x, up)  a = Gelu(h)  y = MatMul(a, down) }"""
    model = graphopt.load(parse(text, up=up, down=down))
    samples = [{"x": rng.standard_normal((4, 16, 16)).astype(np.float32)} for _ in range(8)]
    first = {}
    for criterion in ("obs", "reconstruction", "magnitude"):
        (ranking,) = Context(model, samples=samples).get(Importance(criterion, multiple=1)).values()  # type: ignore[arg-type]
        first[criterion] = int(ranking.order[0][0])
    assert first["obs"] in (0, 1)
    assert first["reconstruction"] not in (0, 1)
    assert first["magnitude"] not in (0, 1)
    base = model.clone()
    prune(model, "prune-ffn{ratio=0.04 multiple=1 importance=obs rows=512}", samples)
    assert shapes(model)["down"] == (23, 16)
    found, wanted = run(model, samples[0])["y"], run(base, samples[0])["y"]
    assert np.abs(found - wanted).max() <= 2e-3 * np.abs(wanted).max()  # the other took over


def test_the_search_over_layers_meets_its_budget() -> None:
    model = graphopt.load(tiny("bert", "sdpa", "18"))
    prune(model, FUSE)
    before = Context(model).get(Removable()).total
    samples = [feeds(model, 4, 12, seed) for seed in range(3)]
    prune(model, "prune{flops=0.3 multiple=8 refit=false}", samples)
    after = Context(model).get(Removable()).total
    assert 0.3 <= 1 - after / before <= 0.36
    assert all(n.count % 8 == 0 for name, n in units(model).items() if name.startswith("n"))


def test_a_latency_budget_is_measured_on_the_target() -> None:
    rng = np.random.default_rng(0)
    sizes = {"up0": (128, 2048), "down0": (2048, 128), "up1": (128, 2048), "down1": (2048, 128)}
    text = """<ir_version: 10, opset_import: ["": 21]> g (float[B,S,128] x) => (float[B,S,128] y) {
        h = MatMul(x, up0)  a = Gelu(h)  b = MatMul(a, down0)  c = MatMul(b, up1)  d = Gelu(c)  y = MatMul(d, down1) }"""
    model = graphopt.load(parse(text, **{n: rng.standard_normal(size).astype(np.float32) for n, size in sizes.items()}))
    step = steps("prune{latency=0.3 importance=magnitude refit=false}", passes())
    ctx = Context(model, target=targets()["cpu"](shapes=("8x32",)))  # type: ignore[call-arg]
    (record,) = PassManager(step).run(model, ctx)
    assert record.changes
    told = next(r for r in record.remarks if "latency saved" in r.message)
    assert told.facts["asked"] == 0.3
    assert shapes(model)["up0"][1] + shapes(model)["up1"][1] < 4096
    with pytest.raises(PassError, match="a target that runs here"):
        prune(graphopt.load(parse(text, **{n: rng.standard_normal(size).astype(np.float32) for n, size in sizes.items()})), str(step[0]))


def test_more_than_there_is_is_declined() -> None:
    model = graphopt.load(tiny("bert", "sdpa", "18"))
    base = model.clone()
    records, remarks = prune(model, "prune{flops=0.99 importance=magnitude refit=false}")
    assert records[0].changes == 0
    assert any("at most" in r.message for r in remarks)
    same(base, model, [feeds(model, 2, 6)])


@pytest.mark.parametrize("order", ["prune{flops=0.2 multiple=8}, quantize", "quantize, prune{flops=0.2 multiple=8 importance=random refit=false}"])
def test_pruning_and_quantizing_compose(order: str) -> None:
    model = graphopt.load(tiny("bert", "sdpa", "18"))
    prune(model, FUSE)
    base, samples = model.clone(), [feeds(model, 4, 12, seed) for seed in range(3)]
    records, _ = prune(model, order, samples)
    assert all(r.changes for r in records)
    assert [n.op_type for n in model.graph].count("DynamicQuantizeLinear") > 0
    assert near(base, model) > 0.8


@pytest.mark.parametrize("text", ["prune", "prune-ffn", "prune-heads"])
def test_options_that_make_no_sense_are_refused(text: str) -> None:
    for options, word in (("importance=guess", "random"), ("flops=1.5", "fraction"), ("rows=0", "1 or more")):
        with pytest.raises(PipelineError, match=word):
            steps(f"{text}{{{options}}}", passes())
    model = graphopt.load(tiny("bert", "sdpa", "18"))
    with pytest.raises(PassError, match="needs samples"):
        prune(model, f"{text}{{flops=0.1}}")


def test_a_loss_of_the_user_is_what_importance_measures(tmp_path: Any) -> None:
    """A loss that looks at the first token alone finds the last layer's other outputs worthless."""
    (tmp_path / "own.py").write_text("def first(outputs, feeds):\n    return outputs['out'][:, 0].square().sum()\n")
    model = graphopt.load(tiny("bert", "sdpa", "18"))
    prune(model, FUSE)
    _, remarks = prune(model, f'prune-heads{{ratio=0.25 importance=taylor loss="{tmp_path}/own.py:first"}}', [feeds(model, 4, 12)])
    assert sum(len(r.facts["removed"]) for r in remarks if "removed" in r.facts) == 2


CACHED = """<ir_version: 10, opset_import: ["": 23]> g (float[B,S,32] x, float[B,2,P,8] past_k, float[B,2,P,8] past_v)
    => (float[B,S,32] y, float[B,2,T,8] present_k, float[B,2,T,8] present_v) {
    q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
    a, present_k, present_v = Attention<q_num_heads=4, kv_num_heads=2>(q, k, v, "", past_k, past_v)
    y = MatMul(a, wo) }"""


def test_caches_shrink_with_their_heads_only_if_the_user_lets_them() -> None:
    rng = np.random.default_rng(0)
    sizes = {"wq": (32, 32), "wk": (32, 16), "wv": (32, 16), "wo": (32, 32)}
    weights = {name: rng.standard_normal(size).astype(np.float32) for name, size in sizes.items()}
    ports = "past_k+past_v+present_k+present_v"
    model = graphopt.load(parse(CACHED, **weights))
    records, remarks = prune(model, "prune-heads{ratio=0.5 importance=magnitude refit=false}")
    assert records[0].changes == 0
    assert any("of the model, and would change its size" in r.message for r in remarks)
    wanted = masked(model, {units(model)["h0"]: [0, 1]})
    _, remarks = prune(model, f"prune-heads{{heads=0:0+0:1 refit=false resize={ports}}}")
    assert any("feed back what the model gives" in r.message for r in remarks)
    assert [list(v.shape or ())[1] for v in model.graph.inputs[1:]] == [1, 1]
    x = rng.standard_normal((2, 3, 32)).astype(np.float32)
    past = {name: rng.standard_normal((2, 2, 5, 8)).astype(np.float32) for name in ("past_k", "past_v")}
    whole = run(wanted, {"x": x, **past})
    found = run(model, {"x": x, **{name: array[:, 1:] for name, array in past.items()}})
    np.testing.assert_allclose(found["y"], whole["y"], atol=1e-5)
    np.testing.assert_allclose(found["present_k"], whole["present_k"][:, 1:], atol=1e-6)


@pytest.mark.slow
def test_minilm_keeps_its_outputs_better_by_obs_than_by_chance() -> None:
    """The claim of the whole: at 20 % fewer multiplications without training, chosen and refitted pruning beats magnitude and chance clearly."""
    whole = graphopt.load(minilm("sdpa_18"))
    prune(whole, FUSE)
    rng = np.random.default_rng(0)
    ids = [rng.integers(1000, 20000, (8, 32)) for _ in range(8)]
    samples = [{"input_ids": a, "attention_mask": np.ones_like(a)} for a in ids]
    cosines = {}
    for options in ("importance=obs", "importance=magnitude refit=false", "importance=random refit=false"):
        model = whole.clone()
        prune(model, f"prune{{flops=0.2 rows=1792 {options}}}", samples[:7])
        a, b = (run(m, samples[7])["last_hidden_state"].mean(1) for m in (whole, model))
        cosines[options] = float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).mean())
    best, *others = cosines.values()
    assert best > 0.9, cosines
    assert 1 - best < 0.5 * (1 - max(others)), cosines


def test_out_of_fuel_nothing_is_removed_that_is_not_told() -> None:
    model = graphopt.load(tiny("bert", "sdpa", "18"))
    prune(model, FUSE)
    before = {(c.name, c.count) for c in Context(model).get(Removable()).candidates}
    step = steps("prune{flops=0.3 multiple=8 importance=magnitude refit=false}", passes())
    (record,) = PassManager(step).run(model, Context(model, fuel=Fuel(1)))
    assert record.changes == 1
    assert len(before - {(c.name, c.count) for c in Context(model).get(Removable()).candidates}) == 1


def test_a_wide_ffn_is_no_output_layer() -> None:
    rng = np.random.default_rng(0)
    text = """<ir_version: 10, opset_import: ["": 21]> g (int64[B,S] ids) => (float[B,S,16] y) {
        x = Gather(table, ids)  h = MatMul(x, up)  a = Gelu(h)  y = MatMul(a, down) }"""
    sizes = {"table": (64, 16), "up": (16, 64), "down": (64, 16)}
    model = graphopt.load(parse(text, **{n: rng.standard_normal(size).astype(np.float32) for n, size in sizes.items()}))
    base, ids = model.clone(), rng.integers(0, 20, (2, 50))
    prune(model, "prune-vocabulary", [{"ids": ids}])
    assert shapes(model) == {"table": (len(np.unique(ids)), 16), "up": (16, 64), "down": (64, 16)}
    np.testing.assert_array_equal(run(base, {"ids": ids})["y"], run(model, {"ids": ids})["y"])


@pytest.mark.parametrize(
    "between",
    [
        "c = CumSum(a, two)",
        "s = ReduceSum<keepdims=1>(h, two)  t = Mul(a, s)  c = Add(t, a)",
        "n = Shape(h)  f = Cast<to=1>(n)  w = Gather<axis=0>(f, zero)  c = Mul(a, w)",
    ],
)
def test_what_reads_all_neurons_forbids_to_remove_some(between: str) -> None:
    rng = np.random.default_rng(0)
    text = f"""<ir_version: 10, opset_import: ["": 21]> g (float[B,S,16] x) => (float[B,S,16] y) {{
        h = MatMul(x, up)  a = Gelu(h)  {between}  y = MatMul(c, down) }}"""
    numbers = {"two": np.array(2, np.int64) if "CumSum" in between else np.array([2], np.int64), "zero": np.array(2, np.int64)}
    model = graphopt.load(
        parse(text, up=rng.standard_normal((16, 64)).astype(np.float32), down=rng.standard_normal((64, 16)).astype(np.float32), **numbers)
    )
    value = next(n for n in model.graph if n.op_type == "MatMul" and n.inputs[1].name == "down").inputs[0]  # type: ignore[union-attr]
    assert value is not None
    mask = np.arange(64) < 8
    inside = downstream([next(iter(model.graph)).outputs[0]])
    plan = Slicing(model)
    with pytest.raises(Refusal):
        plan.remove(value, -1, mask, inside=inside)
    assert not plan.removed
    assert not plan.private


@pytest.mark.parametrize("importance", ["obs", "taylor", "entropy", "reconstruction", "magnitude"])
@pytest.mark.parametrize("others", [False, True])
def test_a_block_inside_a_subgraph_does_not_stop_the_others(importance: str, others: bool) -> None:
    rng = np.random.default_rng(0)

    def attention(x: str, n: str, result: str) -> str:
        product = f"e{n} = Attention<q_num_heads=2, kv_num_heads=2>(a{n}, b{n}, d{n})  {result} = MatMul(e{n}, o{n})"
        return f"a{n} = MatMul({x}, q{n})  b{n} = MatMul({x}, k{n})  d{n} = MatMul({x}, v{n})  {product}"

    h = "h" if others else "x"
    text = f"""<ir_version: 10, opset_import: ["": 23]> g (float[B,S,4] x, bool c) => (float[B,S,4] y) {{
        {attention("x", "2", "f2") + "  h = Add(x, f2)" if others else ""}
        y = If(c) <then_branch = t () => (float[B,S,4] r) {{ {attention(h, "1", "r")} }},
                   else_branch = z () => (float[B,S,4] f) {{ f = Neg({h}) }}> }}"""
    names = [f"{side}{n}" for n in ("12" if others else "1") for side in "qkvo"]
    model = graphopt.load(parse(text, **{name: rng.standard_normal((4, 4)).astype(np.float32) for name in names}))
    samples = [{"x": rng.standard_normal((2, 5, 4)).astype(np.float32), "c": np.array(c)} for c in (True, False)]
    _, remarks = prune(model, f"prune-heads{{ratio=0.5 importance={importance}}}", samples)
    told = [r.message for r in remarks if r.message.startswith("not pruned") and r.node]
    removed = [r.message for r in remarks if r.message.endswith("of 2 removed")]
    if importance == "magnitude":  # which needs no samples
        assert (len(told), len(removed)) == (0, 1 + others)
        return
    assert told == [
        f"not pruned: importance={importance} says nothing about its heads, which stand inside a subgraph, where samples do not show them"
    ]
    assert len(removed) == others


def test_a_layer_that_asks_another_for_its_sizes_keeps_its_own() -> None:
    model = graphopt.load(tiny("llama", "sdpa", "ts17"))
    prune(model, "canonicalize")
    (unit,) = (u for name, u in units(model).items() if name == "h0")
    base = masked(model, {unit: [0, 1]})
    prune(model, "prune-heads{heads=0:0+0:1 refit=false}")
    same(base, model, [feeds(base, 2, 12), feeds(base, 3, 7)])
