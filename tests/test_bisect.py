"""Bisection: a planted fault is found down to the pass, the change and the node."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from harness import build  # type: ignore[import-not-found]

from graphopt.core.errors import GraphoptError, TargetError
from graphopt.driver.bisect import Check, bisect, kind
from graphopt.driver.job import Job
from graphopt.graph.questions import all_nodes
from graphopt.run import ort
from graphopt.run.distance import compare_outputs

CHAIN = "(float[b,4] x) => (float[b,4] y) { " + " ".join(f"[n{k}] v{k} = Sigmoid ({'x' if k == 0 else f'v{k - 1}'})" for k in range(8))
CHAIN += " [n8] y = Tanh (v7) }"

PLUGIN = '''
import dataclasses
from collections.abc import Sequence
import numpy as np
import onnx_ir as ir
from graphopt.core.contract import Context, Pass
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.match import Match
from graphopt.rewrite.rules import RewritePass


class Spelled(RewritePass[Match]):
    anchors = frozenset({"Sigmoid"})

    def match(self, node, ctx):
        return Match((node,), (node.outputs[0],))

    def build(self, op: Builder, m: Match) -> Sequence[ir.Value]:
        x = m.nodes[0].inputs[0]
        wrong = m.nodes[0].name == self.at
        return [self.bad(op, x) if wrong else op.Reciprocal(op.Add(op.Exp(op.Neg(x)), op.const(np.float32(1.0), "one")))]


@dataclasses.dataclass(frozen=True)
class WrongSigmoid(Spelled):
    """Another spelling, and at one node a wrong one."""

    at: str = "n5"

    def bad(self, op, x):
        return op.Reciprocal(op.Add(op.Exp(op.Neg(x)), op.const(np.float32(3.0), "one")))


@dataclasses.dataclass(frozen=True)
class UnloadableSigmoid(Spelled):
    """The same, and at one node an operator that no runtime has."""

    at: str = "n5"

    def bad(self, op, x):
        return op.Nope(x, _domain="planted")


@dataclasses.dataclass(frozen=True)
class Shifty(Pass):
    """Wrong in every second run of one process, and burns no fuel."""

    always: bool = True

    def run(self, model: ir.Model, ctx: Context) -> int:
        Shifty.runs += 1
        if not self.always and Shifty.runs % 2 == 0:
            return 0
        for node in model.graph:
            if node.op_type == "Tanh":
                node.op_type = "Sigmoid"
                return 1
        return 0


Shifty.runs = 0


@dataclasses.dataclass(frozen=True)
class Raises(Pass):
    """Raises at its third change."""

    def run(self, model: ir.Model, ctx: Context) -> int:
        changes = 0
        for node in model.graph:
            if node.op_type == "Sigmoid" and ctx.fuel.burn():
                changes += 1
                node.metadata_props["seen"] = "1"
                if changes == 3:
                    raise ValueError("three is too many")
        return changes
'''


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("planted") / "planted.py"
    path.write_text(PLUGIN, encoding="utf-8")
    return path


def job(pipeline: str, plugin: Path, text: str = CHAIN, **options: Any) -> Job:
    return Job.make(build(text), pipeline, plugins=(str(plugin),), **options)


FEEDS = {"x": np.linspace(-2, 2, 12, dtype=np.float32).reshape(3, 4)}


def numbers(of: Job) -> Check:
    """Whether a graph still loads and gives the numbers of the input."""
    expected = ort.session(of.model, optimize=False).run(FEEDS)

    def check(model: ir.Model) -> str | None:
        try:
            found = ort.session(model, optimize=False).run(FEEDS)
        except TargetError as error:
            return str(error)
        difference = compare_outputs(expected, found)
        return None if difference is None else str(difference)

    return check


AROUND = ", ".join(["canonicalize", "fuse-norm", "fuse-activation", "fuse-attention"] * 3)


@pytest.mark.parametrize("name", ["wrong-sigmoid", "unloadable-sigmoid"])
def test_a_planted_change_is_found(name: str, plugin: Path) -> None:
    planted = job(f"{AROUND}, {name}, {AROUND}", plugin)
    found = bisect(planted, numbers(planted))
    assert (found.step, found.position) == (name, 13)
    assert (found.change, found.changes) == (6, 8)
    assert found.gone == ("`n5`: %v5 = Sigmoid(%v4)",) or "`n5`" in found.gone[0]
    assert any("Nope" in text or "Add" in text for text in found.made)
    assert found.before is None
    assert found.after
    assert [r.node for r in found.remarks] == ["v5"]
    assert name in str(found)
    assert "`n5`" in str(found)
    assert not found.note


def test_the_numbers_that_it_gives_reproduce_it(plugin: Path) -> None:
    planted = job(f"canonicalize, strip-metadata, wrong-sigmoid, {AROUND}", plugin, promise=False)
    check = numbers(planted)
    fuel = bisect(planted, check).fuel
    assert fuel is not None
    fine, broken = (dataclasses.replace(planted, fuel=n).run().graph for n in (fuel - 1, fuel))
    assert check(fine) is None
    assert check(broken) is not None
    without = dataclasses.replace(planted, skip=frozenset({fuel})).run()
    assert check(without.graph) is None
    assert [str(n.name) for n in all_nodes(without.graph) if n.op_type == "Sigmoid"] == ["n5"]


def test_the_second_fault_is_found_once_the_first_is_left_out(plugin: Path) -> None:
    planted = job("wrong-sigmoid{at=n2}, wrong-sigmoid{at=n2}, canonicalize, wrong-sigmoid", plugin)
    first = bisect(planted, numbers(planted))
    assert (first.position, first.change) == (1, 3)
    assert first.fuel is not None
    again = dataclasses.replace(planted, skip=frozenset({first.fuel}))
    assert numbers(planted)(again.run().graph) is None, "the same change stays out in the passes behind"


def test_a_step_that_burns_no_fuel_is_blamed_whole(plugin: Path) -> None:
    planted = job("canonicalize, shifty, canonicalize", plugin)
    found = bisect(planted, numbers(planted))
    assert (found.step, found.change) == ("shifty", None)
    assert "fuel" in found.note
    assert found.altered


def test_a_step_that_is_not_deterministic_is_named_so(plugin: Path) -> None:
    planted = job("canonicalize, shifty{always=false}, canonicalize", plugin)
    check = numbers(planted)
    if check(planted.run().graph) is not None:  # the next run is the one that does nothing
        planted.run()
    found = bisect(planted, check)
    assert found.step == "shifty{always=false}"
    assert "not deterministic" in found.note


def test_a_pass_that_raises(plugin: Path) -> None:
    planted = job("canonicalize, raises, canonicalize", plugin)
    found = bisect(planted, lambda model: None)
    assert (found.step, found.change) == ("raises", 3)
    assert "three is too many" in found.after


def test_what_is_not_to_be_found_is_one_line(plugin: Path) -> None:
    planted = job("canonicalize, wrong-sigmoid", plugin)
    with pytest.raises(GraphoptError, match="nothing wrong after the last step"):
        bisect(planted, lambda model: None)
    with pytest.raises(GraphoptError, match="the input itself wrong, before any pass: bad"):
        bisect(planted, lambda model: "bad")


def test_another_failure_on_the_way_is_not_blamed(plugin: Path) -> None:
    """The graph in the middle fails, too, but in another way: the search goes on to what fails as the whole run does."""
    planted = job(f"{AROUND}, wrong-sigmoid, {AROUND}", plugin)
    check, seen = numbers(planted), list[int]()

    def picky(model: ir.Model) -> str | None:
        said = check(model)
        seen.append(1)
        if said is None and len(seen) > 2:
            return "the moon stands wrong"
        return said

    found = bisect(planted, picky)
    assert found.step == "wrong-sigmoid"


def test_kinds() -> None:
    a = "output `out` at [1, 2] is 0.31, expected -1e-05: off by 1.2e+05, allowed 3e-5"
    assert kind(a) == kind("output `y` is nan, expected 3.0: off by inf, allowed 0.1")
    refused = 'onnxruntime cannot load the model: In Node, ("a/b", Foo) Error Node (a/b) has input size 1 not in range'
    assert kind(refused) == kind(refused.replace("a/b", "layer.3/q").replace("1", "7"))
    assert kind(refused) != kind(refused.replace("Foo", "Bar"))
    assert kind(a) != kind(refused)
    assert kind(None) == ()
