"""Padding counts in nothing that samples are asked for: what it is, is found by running the model, not by its name."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from models import minilm, parse  # type: ignore[import-not-found]
from pruning import prune  # type: ignore[import-not-found]
from tiny import tiny  # type: ignore[import-not-found]

import graphopt
from graphopt.analysis.heads import Units
from graphopt.analysis.linear import Linears
from graphopt.calibration import observe as calibration
from graphopt.calibration.activations import LinearInputs
from graphopt.calibration.attention_maps import map_distances
from graphopt.calibration.effects import effects, recipes
from graphopt.calibration.moments import input_moments
from graphopt.calibration.padding import Kept, Padding
from graphopt.calibration.ranges import Ranges
from graphopt.compress.prune.importance import Importance
from graphopt.core.contract import Context
from graphopt.core.registry import targets
from graphopt.driver.loss import Loss
from graphopt.run.ort import session
from graphopt.run.samples import Samples

Array = np.ndarray[Any, Any]
Feed = dict[str, Array]


def padded(rng: np.random.Generator, batch: int, length: int, to: int, limit: int = 20000) -> tuple[Feed, Feed]:
    """The same texts without padding, and with padding of ids that are not one number, on the right."""
    ids = rng.integers(limit // 20, limit, (batch, to))
    mask = (np.arange(to) < length).astype(np.int64)[None].repeat(batch, 0)
    return {"input_ids": ids[:, :length], "attention_mask": mask[:, :length]}, {"input_ids": ids, "attention_mask": mask}


def batches(count: int, lengths: tuple[int, int], limit: int = 20000) -> tuple[list[Feed], list[Feed]]:
    made = [padded(np.random.default_rng(k), 4, *lengths, limit) for k in range(count)]
    return [plain for plain, _ in made], [full for _, full in made]


def moments_of(model: ir.Model, samples: list[Feed]) -> list[Array]:
    return [m for _, m in input_moments(Context(model, samples=samples), [x.x for x in Linears().compute(model, Context(model))])]


@pytest.mark.parametrize("fused", [False, True])
def test_minilm_means_the_same_with_padding_as_without(fused: bool) -> None:
    model = graphopt.load(minilm("sdpa_18"))
    if fused:
        prune(model, "canonicalize, fuse-norm, fuse-activation, simplify-masks, fuse-attention")
    plain, full = batches(4, (9, 16))
    for expected, found in zip(moments_of(model, plain), moments_of(model, full), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4 * float(np.abs(expected).max()))


@pytest.mark.parametrize("criterion", ["obs", "fisher", "taylor", "reconstruction", "attention", "entropy"])
def test_heads_and_neurons_are_worth_the_same_with_padding_as_without(criterion: str) -> None:
    """Also by losses on outputs at positions that nobody uses."""
    model = graphopt.load(tiny("bert", "sdpa", "18"))
    plain, full = batches(3, (10, 17), 99)
    mine, yours = (list(Importance(criterion, rows=10**6).compute(model, Context(model, samples=s)).values()) for s in (plain, full))
    assert len(mine) == len(yours) >= 2
    for expected, found in zip(mine, yours, strict=True):
        np.testing.assert_allclose(found.cost, expected.cost, rtol=2e-3)


def test_heads_look_as_alike_with_padding_as_without() -> None:
    model = graphopt.load(tiny("bert", "sdpa", "18"))
    nodes = {u.node: u.heads for u in Context(model).get(Units()).attention}
    plain, full = batches(2, (6, 11), 99)
    for expected, found in zip(*(map_distances(model, s, nodes).values() for s in (plain, full)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


def test_a_refit_does_not_learn_from_padding() -> None:
    model = graphopt.load(tiny("bert", "sdpa", "18"))
    plain, full = batches(3, (10, 17), 99)
    weights = []
    for samples in (plain, full):
        pruned = model.clone()
        prune(pruned, "canonicalize, prune{flops=0.3 multiple=8 importance=magnitude rows=1000000}", samples)
        weights.append([x.matrix() for x in Linears().compute(pruned, Context(pruned))])
    for expected, found in zip(*weights, strict=True):
        assert expected.shape == found.shape
        np.testing.assert_allclose(found, expected, atol=2e-3 * float(np.abs(expected).max()))


def test_the_loss_and_the_effect_of_a_change_are_those_of_the_texts() -> None:
    model = graphopt.load(tiny("bert", "sdpa", "18"))
    changed = model.clone()
    prune(changed, "canonicalize, quantize{mode=weight-only bits=4}")
    plain, full = batches(3, (10, 17), 99)
    target = targets()["cpu"].from_options({"tune": "off"})
    losses = [Loss(target, model, Samples(s), None).of(session(changed)) for s in (plain, full)]
    assert losses[0] > 1e-3
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    change = recipes(model, changed, "4 bits")
    mine, yours = (effects(model, s, {0: change})[0] for s in (plain, full))
    assert mine == pytest.approx(losses[0], rel=1e-3)
    assert yours == pytest.approx(mine, rel=1e-4)


def test_static_ranges_are_those_of_the_texts() -> None:
    model = graphopt.load(tiny("bert", "sdpa", "18"))
    plain, full = batches(3, (10, 17), 99)
    mine, yours = (Context(model, samples=s).get(Ranges()) for s in (plain, full))
    assert len(mine) >= 6
    for value, expected in mine.items():
        np.testing.assert_allclose(yours[value].seen, expected.seen, rtol=1e-4, atol=1e-6)


def test_a_layer_is_worth_the_same_with_padding_as_without() -> None:
    model = graphopt.load(tiny("bert", "sdpa", "18"))
    told = []
    for samples in batches(3, (10, 17), 99):
        _, remarks = prune(model.clone(), "canonicalize, fuse-norm, drop-layers{what=ffn}", samples)
        told.append(next(r.facts["cosine"] for r in remarks if r.kind == "missed" and "cosine" in r.facts))
    assert told[0]
    assert told[1] == pytest.approx(told[0], abs=2e-4)


@pytest.mark.parametrize("before", ["canonicalize", "canonicalize, simplify-masks, fuse-attention"])
def test_features_of_heads_are_worth_the_same_with_padding_as_without(before: str) -> None:
    """Before fusion query and value are [batch, heads, positions, dim], and the key may be transposed."""
    model = graphopt.load(tiny("bert", "sdpa", "18"))
    told = []
    for samples in batches(3, (10, 17), 99):
        _, remarks = prune(model.clone(), f"{before}, prune-head-dim{{dim=4 method=select refit=false rows=1000000}}", samples)
        told.append([r.facts for r in remarks if "part" in r.facts])
    assert len(told[0]) == len(told[1]) == 4
    for expected, found in zip(*told, strict=True):
        assert (found["part"], found["removed"]) == (expected["part"], expected["removed"])
        assert found["lost"] == pytest.approx(expected["lost"], rel=2e-3)


def test_a_comparison_is_of_the_texts() -> None:
    source = tiny("bert", "sdpa", "18")
    model = graphopt.load(source)
    prune(model, "canonicalize, quantize{mode=weight-only bits=4}")
    changed = ir.to_proto(model)
    mine, yours = (graphopt.compare(source, changed, samples=s) for s in batches(3, (10, 17), 99))
    for a, b in zip((*mine.outputs, *mine.blocks), (*yours.outputs, *yours.blocks), strict=True):
        assert a.name == b.name
        assert b.l2 == pytest.approx(a.l2, rel=1e-3)
        assert b.cosine == pytest.approx(a.cosine, abs=1e-6)


def test_what_sets_a_scale_at_run_time_counts_with_padding() -> None:
    """The statistics of an activation leave padding out, but for the range that a scale for the whole batch will have."""
    text = MIX.format(kind="int64", rule="flag = Cast<to = 9>(mask)  seen = Where(flag, zero, minus)")
    text = text.replace("y = MatMul(p, x)", "c = MatMul(p, x)  y = MatMul(c, w)").replace("<float minus", "<float[4,4] w, float minus")
    model = graphopt.load(parse(text, w=np.eye(4, dtype=np.float32)))
    x = np.random.default_rng(0).standard_normal((2, 5, 4)).astype(np.float32)
    x[:, :2] *= 9
    (seen,) = Context(model, samples=[{"x": x, "mask": np.array([[0, 0, 1, 1, 1]] * 2)}]).get(LinearInputs()).values()
    assert seen.seen == 6
    assert float((seen.top - seen.bottom).max()) >= float((seen.high - seen.low).max())
    rows = seen.rows
    np.testing.assert_array_equal((rows.max(0).clip(0), rows.min(0).clip(max=0)), (seen.high, seen.low))


def test_scores_of_heads_are_means_over_rows_of_all_batches() -> None:
    """Short batches count as much as they have rows."""
    model = graphopt.load(tiny("bert", "sdpa", "18"))
    texts = np.random.default_rng(0).integers(4, 99, (5, 8))
    feeds = [{"input_ids": part, "attention_mask": np.ones_like(part)} for part in (texts, texts[:1], texts[1:])]
    apart, together = ([r.cost for r in Importance("attention").compute(model, Context(model, samples=s)).values()] for s in (feeds[1:], feeds[:1]))
    for a, b in zip(apart, together, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_one_rule_for_arrays_and_tensors() -> None:
    """Outputs with a number for each position too, and what has no positions stays."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    mask = np.array([[True, True, False], [True, False, False]])
    kept = Kept(((mask, {"wide": "positions", "flat": "positions"}),))
    arrays = {"wide": np.arange(24.0).reshape(2, 3, 4), "flat": np.arange(6.0).reshape(2, 3), "other": np.arange(3.0), "list": [1]}
    found, tensors = kept.counted(arrays), kept.counted({k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in arrays.items()})
    assert found["flat"].tolist() == [[0.0], [1.0], [3.0]]
    assert found["other"] is arrays["other"]
    assert all(np.array_equal(np.asarray(tensors[name]), found[name]) for name in arrays)


def test_what_is_asked_together_shares_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Static ranges and the rows of a bias correction; and one trial tells about padding for all."""
    model, (_, full) = graphopt.load(tiny("bert", "sdpa", "18")), batches(3, (10, 17), 99)
    prune(model, "canonicalize")
    runs, trials, plain, tried = [], [], calibration.shown, Padding._run
    monkeypatch.setattr(calibration, "shown", lambda *a, **k: runs.append(1) or plain(*a, **k))
    monkeypatch.setattr(Padding, "_run", lambda *a: trials.append(1) or tried(*a))
    prune(model, "quantize{mode=static bias-correction=true}", full)
    assert (len(runs), len(trials)) == (1, 1)


def test_holes_and_left_padding_are_padding_too() -> None:
    model = graphopt.load(tiny("bert", "sdpa", "18"))
    mask = np.ones((3, 8), np.int64)
    mask[0, 3], mask[1, :4] = 0, 0
    feed = {"input_ids": np.random.default_rng(0).integers(4, 99, (3, 8)), "attention_mask": mask}
    ((kept, kinds),) = Padding(model).kept(feed).masks
    np.testing.assert_array_equal(kept, mask != 0)
    assert list(kinds.values()) == ["positions"]
    assert Padding(model).kept({**feed, "attention_mask": np.ones_like(mask)}) == Kept()


MIX = """<ir_version: 10, opset_import: ["" : 18]>
g (float[B, S, 4] x, {kind}[B, S] mask) => (float[B, S, 4] y) <float minus = {{-1e9}}, float zero = {{0.0}}, int64[1] one = {{1}}> {{
    t = Transpose<perm = [0, 2, 1]>(x)
    scores = MatMul(x, t)
    {rule}
    row = Unsqueeze(seen, one)
    masked = Add(scores, row)
    p = Softmax<axis = -1>(masked)
    y = MatMul(p, x)
}}"""


@pytest.mark.parametrize(
    ("kind", "rule", "hides"),
    [
        ("bool", "seen = Where(mask, zero, minus)", False),
        ("bool", "seen = Where(mask, minus, zero)", True),
        ("int64", "flag = Cast<to = 9>(mask)  seen = Where(flag, minus, zero)", True),
        ("bool", "flag = Cast<to = 1>(mask)  seen = Mul(flag, zero)", None),
    ],
)
def test_what_a_mask_hides_is_seen_by_running_the_model(kind: str, rule: str, hides: bool | None) -> None:
    """True may stand for what is read, for what is not (as in torch's key_padding_mask), or for nothing."""
    model = graphopt.load(parse(MIX.format(kind=kind, rule=rule)))
    mask = np.array([[1, 1, 0, 1, 0], [0, 0, 0, 1, 0]], bool if kind == "bool" else np.int64)
    feed = {"x": np.random.default_rng(0).standard_normal((2, 5, 4)).astype(np.float32), "mask": mask}
    masks = Padding(model).kept(feed).masks
    if hides is None:
        assert masks == ()
    else:
        np.testing.assert_array_equal(masks[0][0], (mask != 0) != hides)


BLANK = """<ir_version: 10, opset_import: ["" : 18]>
g (float[B, S, 4] x, int64[B, S] mask) => (float[B, S, 4] y) <int64[1] one = {1}, int64[1] two = {2}, float[4] fill = {0, 0, FILL, 0}> {
    m = ReduceMean<keepdims = 1>(x, one)
    h = Add(x, m)
    flag = Cast<to = 1>(mask)
    row = Unsqueeze(flag, two)
    z = LAST
}"""


@pytest.mark.parametrize(
    ("last", "fill", "why"),
    [
        ("Mul(h, row)  y = Add(z, fill)", "0", "all positions are read, and what comes out is blanked"),
        ("Mul(h, row)  y = Add(z, fill)", "-1e9", "a fill is no scale for the others"),
        ("Where(there, h, fill)  w = Mul(x, row)  n = ReduceMean<keepdims = 1>(z, one)  y = Add(n, z)", "0", "contents that are replaced are read"),
    ],
)
def test_a_mask_that_only_blanks_hides_nothing(last: str, fill: str, why: str) -> None:
    text = BLANK.replace("FILL", fill).replace("LAST", last.replace("Where(there", "Where(there"))
    if "there" in last:
        text = text.replace("z = Where", "there = Cast<to = 9>(row)  z = Where")
    model = graphopt.load(parse(text))
    feed = {"x": np.random.default_rng(0).standard_normal((2, 5, 4)).astype(np.float32), "mask": np.array([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])}
    kept = Padding(model).kept(feed)
    assert all(not kinds for _, kinds in kept.masks), why


def test_rows_in_another_order_keep_their_order() -> None:
    """Positions before the batch, as torch's MultiheadAttention has them, also flattened: no row is left out that is read."""
    text = MIX.format(kind="int64", rule="flag = Cast<to = 9>(mask)  seen = Where(flag, zero, minus)")
    text = text.replace("y = MatMul(p, x)", "c = MatMul(p, x)\n    s = Transpose<perm = [1, 0, 2]>(c)\n    f = Reshape(s, flat)\n    y = Identity(c)")
    model = graphopt.load(parse(text.replace("int64[1] one", "int64[2] flat = {-1, 4}, int64[1] one")))
    names = [n.outputs[0].name for n in model.graph]
    rng = np.random.default_rng(0)
    for batch, length in ((2, 5), (5, 5)):
        mask = (np.arange(length) < rng.integers(1, length, (batch, 1))).astype(np.int64)
        feed = {"x": rng.standard_normal((batch, length, 4)).astype(np.float32), "mask": mask}
        kept = Padding(model).about([*names, "c", "s", "f"]).kept(feed)
        ((_, kinds),) = kept.masks
        assert "s" not in kinds
        assert "f" not in kinds


def test_values_of_equal_sizes_that_are_no_positions_count() -> None:
    """What a decoder makes of an encoder has as many rows by chance."""
    text = MIX.format(kind="int64", rule="flag = Cast<to = 9>(mask)  seen = Where(flag, zero, minus)")
    text = text.replace("x, int64", "x, float[B, T, 4] q, int64").replace("MatMul(x, t)", "MatMul(q, t)").replace("[B, S, 4] y", "[B, T, 4] y")
    model = graphopt.load(parse(text))
    rng = np.random.default_rng(0)
    for size in (4, 6):
        feed = {"x": rng.standard_normal((2, 6, 4)).astype(np.float32), "q": rng.standard_normal((2, size, 4)).astype(np.float32),
                "mask": np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]])}  # fmt: skip
        kept = Padding(model).kept(feed)
        assert kept.lead("y", (2, size, 4)) is None


def test_a_batch_that_says_nothing_decides_nothing() -> None:
    model = graphopt.load(tiny("bert", "sdpa", "18"))
    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 0]])
    same = {"input_ids": np.full((2, 4), 7), "attention_mask": mask}
    padding = Padding(model)
    assert padding.kept(same) == Kept()
    assert len(padding.kept({**same, "input_ids": np.arange(8).reshape(2, 4) + 9}).masks) == 1
    assert padding.kept({"input_ids": same["input_ids"]}) == Kept()


def test_outputs_with_a_number_for_each_position_and_of_a_size_of_their_own() -> None:
    text = MIX.format(kind="int64", rule="flag = Cast<to = 9>(mask)  seen = Where(flag, zero, minus)").replace(
        "(float[B, S, 4] y)", "(float[B, S] y, float[N] d)"
    )
    text = text.replace(
        "y = MatMul(p, x)",
        "c = MatMul(p, x)\n  y = ReduceSum<keepdims = 0>(c, two)\n  at = NonZero(y)\n  at2 = Transpose(at)\n  d = GatherND(y, at2)",
    )
    model = graphopt.load(
        parse(text.replace("int64[1] one", "int64[1] two = {2}, int64[1] one").replace("], int64[B, S] mask", "], int64[B, S] mask"))
    )
    feed = {"x": np.random.default_rng(0).standard_normal((2, 5, 4)).astype(np.float32), "mask": np.array([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])}
    Padding(model).kept(feed)  # `d` may have another size for other contents, and must not break anything
    target = targets()["cpu"].from_options({"tune": "off"})
    assert Loss(target, model, Samples([feed]), None).of(session(model)) == 0
