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
from graphopt.analysis.importance import Importance
from graphopt.analysis.linear import Linears
from graphopt.analysis.maps import map_distances
from graphopt.analysis.moments import input_moments
from graphopt.analysis.padding import Padding, positions, rows_of
from graphopt.analysis.sensitivity import effects, recipes
from graphopt.analysis.units import Units
from graphopt.core import Context
from graphopt.loss import Loss
from graphopt.registry import targets
from graphopt.run.ort import session
from graphopt.samples import Samples

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
    return [m for _, m in input_moments(model, samples, [x.x for x in Linears().compute(model, Context(model))])]


@pytest.mark.parametrize("fused", [False, True])
def test_minilm_means_the_same_with_padding_as_without(fused: bool) -> None:
    model = graphopt.load(minilm("sdpa_18"))
    if fused:
        prune(model, "canonicalize, fuse-norm, fuse-activation, simplify-masks, fuse-attention")
    plain, full = batches(2, (9, 16))
    for expected, found in zip(moments_of(model, plain), moments_of(model, full), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4 * float(np.abs(expected).max()))


@pytest.mark.parametrize("criterion", ["obs", "fisher", "taylor", "reconstruction", "attention"])
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
    nodes = [u.node for u in Context(model).get(Units()).attention]
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


def test_holes_and_left_padding_are_padding_too() -> None:
    model = graphopt.load(tiny("bert", "sdpa", "18"))
    mask = np.ones((3, 8), np.int64)
    mask[0, 3], mask[1, :4] = 0, 0
    feed = {"input_ids": np.random.default_rng(0).integers(4, 99, (3, 8)), "attention_mask": mask}
    (kept,) = Padding(model).kept(feed)
    np.testing.assert_array_equal(kept, mask != 0)
    assert Padding(model).kept({**feed, "attention_mask": np.ones_like(mask)}) == ()


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
    kept = Padding(model).kept(feed)
    if hides is None:
        assert kept == ()
    else:
        np.testing.assert_array_equal(kept[0], (mask != 0) != hides)


def test_rows_are_left_out_only_where_they_are_positions() -> None:
    mask = np.array([[True, False, True]])
    array = np.arange(6, dtype=np.float32).reshape(1, 3, 2)
    np.testing.assert_array_equal(rows_of(array, [mask]), array[0][[0, 2]])
    np.testing.assert_array_equal(rows_of(array[0], [mask]), array[0][[0, 2]])  # flattened
    np.testing.assert_array_equal(rows_of(array[:, :2], [mask]), array[0, :2])  # other positions
    assert positions(array.shape, [mask, ~mask]) is None  # two masks that fit and differ: which one is not known
