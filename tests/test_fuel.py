"""Every change asks for fuel before it is made, in every pass; and every node that a pass makes says which nodes of the input it stands for."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from harness import build  # type: ignore[import-not-found]
from models import parse  # type: ignore[import-not-found]
from tiny import tiny  # type: ignore[import-not-found]

import graphopt
from graphopt.core import registry
from graphopt.core.contract import Budget, Context
from graphopt.core.fuel import Fuel
from graphopt.core.pipeline import PassManager
from graphopt.core.pipeline import parse as steps
from graphopt.core.remarks import Remarks
from graphopt.graph.interface import interface
from graphopt.graph.questions import all_nodes, origins
from graphopt.graph.text import graph_text
from graphopt.graph.verify import verify
from graphopt.run import ort
from graphopt.run.samples import Samples

FUSE = "canonicalize, fuse-norm, fuse-activation, fuse-attention, canonicalize"
# pass -> (the kind of model, what runs before it, the pass with options by which it changes something)
CASES = {
    "canonicalize": ("bert", "", "canonicalize"),
    "drop-layers": ("bert", FUSE, "drop-layers{count=1}"),
    "factorize": ("bert", FUSE, "factorize{ratio=0.6}"),
    "fold-affine": ("scaled", "", "fold-affine"),
    "fuse-activation": ("bert", "canonicalize", "fuse-activation"),
    "fuse-attention": ("bert", "canonicalize", "fuse-attention"),
    "fuse-norm": ("llama", "canonicalize", "fuse-norm"),
    "fuse-rotary": ("llama", "canonicalize", "fuse-rotary"),
    "merge-heads": ("bert", FUSE, "merge-heads{ratio=0.3}"),
    "merge-projections": ("bert", FUSE, "merge-projections"),
    "mix-precision": ("bert", FUSE, "mix-precision{loss=0.5}"),
    "prune": ("bert", FUSE, "prune{flops=0.2}"),
    "prune-ffn": ("bert", FUSE, "prune-ffn{ratio=0.25}"),
    "prune-head-dim": ("bert", FUSE, "prune-head-dim{dim=4}"),
    "prune-heads": ("bert", FUSE, "prune-heads{ratio=0.3}"),
    "prune-hidden": ("bert", FUSE, "prune-hidden{width=16 resize=out}"),
    "prune-vocabulary": ("bert", FUSE, "prune-vocabulary"),
    "quantize": ("bert", FUSE, "quantize{mode=static}"),
    "quantize-probabilities": ("bert", "canonicalize", "quantize-probabilities"),
    "simplify": ("bert", "", "simplify"),
    "simplify-masks": ("llama", "canonicalize", "simplify-masks"),
    "smooth": ("bert", FUSE, "smooth{multiply=true strength=0.5}"),
    "strip-metadata": ("bert", "", "strip-metadata{prefix=test}"),
    "threshold-attention": ("bert", FUSE, "threshold-attention"),
    "to-half": ("bert", FUSE, "to-half"),
}

SCALED = """(float[B,8] x) => (float[B,8] y) <float[8,8] w, float[8,8] u, float[8] a, float[8] b> {
  h = MatMul(x, w)
  i = Mul(h, a)
  j = Add(i, b)
  k = Relu(j)
  l = MatMul(k, u)
  m = Mul(l, b)
  y = Add(m, a)
}"""

RESIZES = {"prune-hidden"}  # has `resize` in its options above


def feeds() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [{"input_ids": rng.integers(0, 40, (2, 7)), "attention_mask": np.ones((2, 7), np.int64)} for _ in range(2)]


@functools.cache
def prepared(kind: str, before: str) -> tuple[ir.Model, frozenset[str]]:
    """The model that a pass gets, and the names of the nodes of the input."""
    model = graphopt.load(build(SCALED) if kind == "scaled" else tiny(kind, "eager", "ts17"))
    names = frozenset(str(node.name) for node in all_nodes(model))
    for node in all_nodes(model):
        node.metadata_props["test"] = "here"
    PassManager(steps(before, registry.passes())).run(model, Context(model))
    return model, names


def go(text: str, model: ir.Model, fuel: Fuel) -> tuple[int, str, Remarks]:
    remarks = Remarks()
    ctx = Context(model, samples=Samples(feeds()), remarks=remarks, fuel=fuel, original=model.clone(), budget=Budget(0.5))
    changes = sum(record.changes for record in PassManager(steps(text, registry.passes())).run(model, ctx))
    return changes, state(model), remarks


def state(model: ir.Model) -> str:
    tensors = (f"{name} {id(v.const_value)}" for name, v in model.graph.initializers.items())
    return graph_text(model, weights=False) + "\n".join(tensors)


def test_no_pass_is_left_out() -> None:
    assert sorted(CASES) == sorted(registry.passes()), "a new pass needs a line in CASES"


@pytest.mark.parametrize("name", CASES)
def test_without_fuel_nothing_changes(name: str) -> None:
    kind, before, text = CASES[name]
    model, names = prepared(kind, before)
    dry = model.clone()
    untouched = state(dry)
    assert go(text, dry, Fuel(0))[:2] == (0, untouched)
    whole, fuel = model.clone(), Fuel()
    changes, changed, _ = go(text, whole, fuel)
    assert changes > 0, "an example in which the pass changes something"
    assert fuel.burned > 0
    assert changed != untouched or name == "strip-metadata"
    if name != "simplify":  # another program makes its nodes
        lost = [node.name for node in all_nodes(whole) if not origins(node) <= names]
        assert not lost, "these stand for no node of the input"


@pytest.mark.parametrize("name", CASES)
def test_one_change_is_left_out_alone(name: str) -> None:
    kind, before, text = CASES[name]
    model, _ = prepared(kind, before)
    public, whole, fuel = interface(model), model.clone(), Fuel()
    changed = go(text, whole, fuel)[1]
    total = fuel.burned
    for number in sorted({1, (total + 1) // 2}):
        left, fuel = model.clone(), Fuel(skip={number})
        fewer, state_left, _ = go(text, left, fuel)
        verify(left, interface=public if name not in RESIZES else None)
        assert state_left != changed or name == "strip-metadata", "the change happened"
        assert fewer >= number - 1, "those before it are untouched"
        assert fuel.burned > number or number == total, "those behind it are still made"
        if number > 1:
            assert fewer > 0


def test_what_was_left_out_stays_so_in_later_rounds_and_passes() -> None:
    model, _ = prepared("bert", "canonicalize")
    left = model.clone()
    changes, _, _ = go("fuse-attention, canonicalize, fuse-attention", left, Fuel(skip={1}))
    assert changes
    assert sum(node.op_type == "Attention" for node in all_nodes(left)) == 1


def test_to_half_stops_where_the_fuel_ends() -> None:
    model, _ = prepared("bert", FUSE)
    half = model.clone()
    changes, _, remarks = go("to-half", half, Fuel(3))
    assert changes == 3
    assert any("the fuel is used up" in r.message for r in remarks)
    numbers = [ort.session(m).run(feeds()[0])["out"] for m in (model, half)]
    np.testing.assert_allclose(*numbers, atol=2e-2)


def test_what_is_refused_burns_nothing() -> None:
    """The hidden state is an output of the model: without resize= it must stay as wide as it is."""
    model, _ = prepared("bert", FUSE)
    for text in ("prune-hidden{width=16}", "prune-head-dim{dim=4 resize=nothing}"):
        fuel = Fuel()
        changes, _, remarks = go(text, model.clone(), fuel)
        assert changes == fuel.burned, text
    assert any(r.kind == "missed" for r in remarks) or changes


@pytest.mark.parametrize("name", ["smooth", "to-half", "prune-vocabulary", "prune-heads"])
def test_names_of_the_input_exclude_behind_what_inserts(name: str) -> None:
    kind, before, text = CASES[name]
    model, names = prepared(kind, before)
    work = model.clone()
    go(text, work, Fuel())
    excluded = sorted(n for node in all_nodes(model) if node.op_type in ("MatMul", "Gemm") for n in origins(node))
    assert excluded
    assert set(excluded) <= names
    patterns = "+".join(f'"{n}"' for n in excluded)
    plain, left = work.clone(), work.clone()
    mode = "quantize{mode=weight-only bits=4 block=16}"
    assert go(mode, plain, Fuel())[0] > 0 or name == "to-half"
    go(f"quantize{{mode=weight-only bits=4 block=16 exclude={patterns}}}", left, Fuel())
    assert not [n.name for n in all_nodes(left) if n.op_type in ("MatMul", "Gemm") and n.inputs[1].producer() is not None
                and n.inputs[1].producer().op_type == "DequantizeLinear"]  # fmt: skip


def test_repairs_say_what_they_stand_for() -> None:
    """What the front door inserts carries the name of the node that it mends."""
    text = """<ir_version: 10, opset_import: ["": 23]>
g (float[b,4,s,8] x, float[1,s,4] c, float[1,s,4] t) => (float[b,4,s,8] y) { [turn] y = RotaryEmbedding (x, c, t) }"""
    model = graphopt.load(parse(text))
    made = [node for node in all_nodes(model) if node.name != "turn"]
    assert len(made) > 2
    assert all(origins(node) == {"turn"} for node in made)
