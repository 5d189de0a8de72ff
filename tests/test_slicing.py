"""Removals that share operands: one axis cut for all its readers and once more for one of them, and operands that belong to the caller."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from models import assert_same, parse, run  # type: ignore[import-not-found]
from pruning import masked, units  # type: ignore[import-not-found]

import graphopt
from graphopt.graph.questions import downstream
from graphopt.graph.verify import verify
from graphopt.rewrite.slicing.apply import apply
from graphopt.rewrite.slicing.close import Slicing
from graphopt.rewrite.slicing.plan import Refusal

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(0)


def weights(*shape: int) -> Array:
    return (0.3 * RNG.standard_normal(shape)).astype(np.float32)


def value(model: ir.Model, name: str) -> ir.Value:
    return next(v for node in model.graph for v in node.outputs if v.name == name)


def mask(size: int, gone: Sequence[int]) -> Array:
    found = np.zeros(size, bool)
    found[list(gone)] = True
    return found


GATED = """<ir_version: 10, opset_import: ["": 23]> g (float[B,S,8] x) => (float[B,S,8] y) {
 v = MatMul(x, gate) h = MatMul(x, up) a = Mul(h, v) r = Relu(a) p = MatMul(r, down) q = MatMul(v, other) y = Add(p, q) }"""
STORED = {"gate": weights(8, 16), "up": weights(8, 16), "down": weights(16, 8), "other": weights(16, 8)}


@pytest.mark.parametrize("private_first", [True, False])
@pytest.mark.parametrize("common", [[10, 12], [1, 10], [0, 1, 10]])
def test_one_reader_loses_more_than_the_others(private_first: bool, common: list[int]) -> None:
    """`v` is cut for its reader in the block alone (0 and 1), and for all its readers."""
    own, model = [0, 1], graphopt.load(parse(GATED, **STORED))
    plan, inside = Slicing(model), downstream([value(model, "h")])
    removals = [(value(model, "r"), own, inside), (value(model, "v"), common, None)]
    for start, gone, changes in removals if private_first else removals[::-1]:
        plan.remove(start, 2, mask(16, gone), inside=changes)
    apply(plan)
    verify(model)
    both, x = sorted({*own, *common}), weights(2, 3, 8)
    v, h = x @ STORED["gate"], x @ STORED["up"]
    a, q = np.delete(np.maximum(h * v, 0), both, 2), np.delete(v, common, 2)
    wanted = a @ np.delete(STORED["down"], both, 0) + q @ np.delete(STORED["other"], common, 0)
    assert_same({"y": wanted}, run(model, {"x": x}))
    kept = {name: model.graph.initializers[name].shape for name in ("up", "other")}
    assert kept == {"up": (8, 16 - len(both)), "other": (16 - len(common), 8)}


BIASED = """<ir_version: 10, opset_import: ["": 23]> g (float[B,S,32] x) => (float[B,S,32] y) {
 sizes = Shape(x) length = Slice(sizes, one, two) near = Slice(table, zero, length, zero) turned = Transpose<perm=[1,0]>(near)
 row = Unsqueeze(turned, one) bias = Unsqueeze(row, zero)
 q1 = MatMul(x, wq1) k1 = MatMul(x, wk1) v1 = MatMul(x, wv1) a1 = Attention<q_num_heads=4, kv_num_heads=4>(q1, k1, v1, bias)
 p1 = MatMul(a1, wo1) m = Add(x, p1)
 q2 = MatMul(m, wq2) k2 = MatMul(m, wk2) v2 = MatMul(m, wv2) a2 = Attention<q_num_heads=4, kv_num_heads=4>(q2, k2, v2, bias)
 p2 = MatMul(a2, wo2) y = Add(m, p2) }"""


@pytest.mark.parametrize("steps", [[{"h0": [1], "h1": [1]}], [{"h0": [1], "h1": [0, 2]}], [{"h0": [1]}, {"h1": [1]}, {"h0": [2]}, {"h1": [2]}]])
def test_layers_share_a_position_bias_and_lose_the_same_heads(steps: list[dict[str, list[int]]]) -> None:
    stored = {f"{name}{k}": weights(32, 32) for name in ("wq", "wk", "wv", "wo") for k in (1, 2)}
    numbers = {"zero": np.array([0]), "one": np.array([1]), "two": np.array([2]), "table": weights(10, 4)}
    model = graphopt.load(parse(BIASED, **stored, **numbers))
    found, plan, gone = units(model), Slicing(model), dict[str, list[int]]()
    for step in steps:
        for name, heads in step.items():
            unit = found[name]
            plan.remove(unit.value, unit.axis, unit.mask(heads), inside=unit.inside)
            gone[name] = [*gone.get(name, []), *heads]
    wanted = masked(model, {found[name]: heads for name, heads in gone.items()})
    apply(plan)
    verify(model)
    for length in (3, 7):
        feed = {"x": weights(2, length, 32)}
        assert_same(run(wanted, feed), run(model, feed))


BETWEEN = {
    "c = Identity(a)": True, "g = Sigmoid(z)  c = Mul(a, g)": True, "c = Relu(a)": True, "g = Sigmoid(a)  c = Mul(g, a)": True, "c = Add(a, a)": True,
    "r = Reshape(a, sizes)  c = Reshape(r, flat)": True,
    "c = Add(a, z)": False, "c = Sub(z, a)": False, "c = Add(a, bias)": False, "c = Sigmoid(a)": False, "c = Max(a, z)": False,
}  # fmt: skip


@pytest.mark.parametrize("between", BETWEEN)
def test_what_is_not_zero_where_a_head_goes_is_warned_of(between: str) -> None:
    """Heads are zeros behind their attention, and the warning stands exactly where they are none when they are summed."""
    names = [f"w{n}" for n in "qkvzo"]
    text = f"""<ir_version: 10, opset_import: ["": 23]> g (float[B,S,32] x) => (float[B,S,32] y) {{
        q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)  z = MatMul(x, wz)  n = Identity(z)
        a = Attention<q_num_heads=4, kv_num_heads=4>(q, k, v)  {between}  y = MatMul(c, wo) }}"""
    numbers = {"sizes": np.array([0, 0, 4, 8]), "flat": np.array([0, 0, 32]), "bias": weights(32)}
    stored = {**{n: weights(32, 32) for n in names}, **numbers}
    model = graphopt.load(parse(text, **{n: a for n, a in stored.items() if n in text}))
    unit, plan = units(model)["h0"], Slicing(model)
    plan.remove(unit.value, unit.axis, unit.mask([1]), inside=unit.inside)
    told = [text for _, text in plan.notes if "not zero" in text]
    wanted = masked(model, {unit: [1]})
    apply(plan)
    verify(model)
    feed = {"x": weights(2, 5, 32)}
    (a,), (b,) = run(wanted, feed).values(), run(model, feed).values()
    assert (float(np.abs(a - b).max()) < 1e-5) == BETWEEN[between]
    assert (not told) == BETWEEN[between]


def test_two_removals_that_leave_nothing_are_refused() -> None:
    model = graphopt.load(parse(GATED, **STORED))
    plan, inside = Slicing(model), downstream([value(model, "h")])
    plan.remove(value(model, "r"), 2, mask(16, range(8)), inside=inside)
    with pytest.raises(Refusal, match="nothing of axis 2 of `r` would be left"):
        plan.remove(value(model, "r"), 2, mask(16, range(8, 16)), inside=inside)
    apply(plan)  # the first removal still stands, and it alone
    verify(model)
    assert model.graph.initializers["down"].shape == (8, 8)


DEFAULT = """<ir_version: 10, opset_import: ["": 23]> g (float[B,S,8] x, float[16] bias) => (float[B,S,8] y) {
 h = MatMul(x, up) b = Add(h, bias) r = Relu(b) y = MatMul(r, down) }"""


def defaulted() -> tuple[ir.Model, dict[str, Array]]:
    stored = {"up": weights(8, 16), "down": weights(16, 8), "bias": weights(16)}
    model = graphopt.load(parse(DEFAULT, **stored))
    assert value(model, "b").producer().inputs[1].is_graph_input()  # type: ignore[union-attr]
    return model, stored


def test_a_default_that_the_caller_may_replace_keeps_its_size() -> None:
    model, stored = defaulted()
    with pytest.raises(Refusal, match="`bias` is an input of the model, and would change its size"):
        Slicing(model).remove(value(model, "r"), 2, mask(16, [1, 3]))
    plan = Slicing(model)
    plan.remove(value(model, "r"), 2, mask(16, [1, 3]), inside=downstream([value(model, "h")]))
    apply(plan)
    verify(model)
    x, own = weights(2, 3, 8), weights(16)
    for bias, feed in ((stored["bias"], {"x": x}), (own, {"x": x, "bias": own})):
        r = np.maximum(x @ stored["up"] + bias, 0)
        assert_same({"y": np.delete(r, [1, 3], 2) @ np.delete(stored["down"], [1, 3], 0)}, run(model, feed))


def test_a_default_shrinks_where_the_user_lets_its_input_change() -> None:
    model, stored = defaulted()
    plan = Slicing(model, resize=["bias"])
    plan.remove(value(model, "r"), 2, mask(16, [1, 3]), inside=downstream([value(model, "h")]))
    apply(plan)
    verify(model)
    x, own = weights(2, 3, 8), weights(14)
    up, down = np.delete(stored["up"], [1, 3], 1), np.delete(stored["down"], [1, 3], 0)
    for bias, feed in ((np.delete(stored["bias"], [1, 3]), {"x": x}), (own, {"x": x, "bias": own})):
        assert_same({"y": np.maximum(x @ up + bias, 0) @ down}, run(model, feed))
