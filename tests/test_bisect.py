"""Bisection: a planted fault is found down to the pass, the change and the node."""

from __future__ import annotations

import dataclasses
import json
import sys
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from harness import build  # type: ignore[import-not-found]
from planted import CHAIN, PLUGIN  # type: ignore[import-not-found]
from test_cli import fails, run

from graphopt.core.errors import GraphoptError, TargetError
from graphopt.driver.bisect import Check, bisect, kind
from graphopt.driver.debug.checks import _serve
from graphopt.driver.job import Job
from graphopt.graph.questions import all_nodes
from graphopt.run import ort
from graphopt.run.distance import compare_outputs


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
    fine, broken = (dataclasses.replace(planted, fuel=n, gate=False).run().graph for n in (fuel - 1, fuel))
    assert check(fine) is None
    assert check(broken) is not None
    without = dataclasses.replace(planted, skip=frozenset({fuel}), gate=False).run()
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
    if check(planted.once().outcome.model or planted.model) is not None:  # the next run is the one that does nothing
        planted.once()
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


# ---- the command ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    path = tmp_path / "chain.onnx"
    onnx.save(build(CHAIN), path)
    return path


WRONG = ("--pipeline", "canonicalize, wrong-sigmoid, canonicalize")


def test_the_command_names_the_change(chain: Path, plugin: Path) -> None:
    said = run("bisect", chain, "--plugin", plugin, *WRONG).stdout
    for text in ("change 6 of 8 in step 2", "`wrong-sigmoid`", "before: fine", "expected", "n5", "with --fuel 5 the model is fine", "Sigmoid(%v4)"):
        assert text in said, text
    told = json.loads(run("bisect", chain, "--plugin", plugin, *WRONG, "--json").stdout)
    assert (told["position"], told["change"], told["fuel"], told["stands_for"]) == (2, 6, 6, ["n5"])
    assert not list(chain.parent.parent.rglob("debug/*.json")), "what was known is forgotten at the end"


CHECKS = """
import os
from pathlib import Path

import onnx


def good(path: Path) -> bool:
    return all(node.op_type != "Nope" for node in onnx.load(path).graph.node)


def strict(path):
    assert good(path), f"{path}: an operator that is not there"
    return True


def dies(path):
    if not good(path):
        os._exit(3)
    return True


def unclear(path):
    return "fine"
"""


@pytest.mark.parametrize("name", ["good", "strict", "dies"])
def test_a_function_of_the_user_decides(name: str, chain: Path, plugin: Path) -> None:
    checks = chain.with_name("checks.py")
    checks.write_text(CHECKS, encoding="utf-8")
    pipeline = "canonicalize, unloadable-sigmoid, canonicalize"
    told = json.loads(run("bisect", chain, "--plugin", plugin, "--pipeline", pipeline, "--check", f"{checks}:{name}", "--json").stdout)
    assert (told["step"], told["change"]) == ("unloadable-sigmoid", 6)
    assert {"good": "gave False", "strict": "AssertionError", "dies": "ended its process"}[name] in told["after"]


def test_a_command_of_the_user_decides(chain: Path, plugin: Path) -> None:
    pipeline = "canonicalize, unloadable-sigmoid, canonicalize"
    command = f"{sys.executable} -c \"import sys; sys.exit(b'Nope' in open({{}}, 'rb').read() and 'a Nope')\""
    command = command.replace("{}", "sys.argv[1]") + " {}"
    told = json.loads(run("bisect", chain, "--plugin", plugin, "--pipeline", pipeline, "--check-command", command, "--json").stdout)
    assert (told["change"], told["after"]) == (6, "exit code 1: a Nope")


def test_what_cannot_be_asked_is_one_line(chain: Path, plugin: Path, tmp_path: Path) -> None:
    checks = chain.with_name("checks.py")
    checks.write_text(CHECKS, encoding="utf-8")
    asked = ("bisect", chain, "--plugin", plugin, *WRONG)
    assert "must give True" in fails(tmp_path, *asked, "--check", f"{checks}:unclear")
    assert "no function `none`" in fails(tmp_path, *asked, "--check", f"{checks}:none")
    assert "not both" in fails(tmp_path, *asked, "--check", f"{checks}:good", "--check-command", "true {}")
    assert "needs {}" in fails(tmp_path, *asked, "--check-command", "true")
    assert "cannot be run" in fails(tmp_path, *asked, "--check-command", "no-such-program-here {}")
    assert "nothing wrong after the last step" in fails(tmp_path, "bisect", chain)
    assert "the input itself wrong" in fails(tmp_path, *asked, "--check-command", "false {}")
    assert run(*asked, "-O", "1", code=2)


def test_random_outputs_and_lossy_passes_are_told(plugin: Path, tmp_path: Path) -> None:
    path, text = (
        tmp_path / "random.onnx",
        CHAIN.replace("=> (float[b,4] y)", "=> (float[b,4] y, float[2,2] r)").replace("{ ", "{ r = RandomNormal <shape = [2, 2]> () ", 1),
    )
    onnx.save(build(text, opset=17), path)
    told = json.loads(run("bisect", path, "--plugin", plugin, *WRONG, "--json").stdout)
    assert told["step"] == "wrong-sigmoid"
    assert "random were not checked: r" in told["note"]
    lossy = "canonicalize, unloadable-sigmoid, to-half"
    told = json.loads(run("bisect", path, "--plugin", plugin, "--pipeline", lossy, "--json").stdout)
    assert told["change"] == 6
    assert "--check looks at more" in told["note"]


def test_an_interrupted_search_goes_on(chain: Path, plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.driver.debug.checks import Numbers

    asked, limit = list[int](), [4]
    whole = Numbers.__call__

    def counted(self: Numbers, model: ir.Model) -> str | None:
        if len(asked) == limit[0]:
            raise KeyboardInterrupt
        asked.append(1)
        return whole(self, model)

    monkeypatch.setattr(Numbers, "__call__", counted)
    assert "interrupted" in run("bisect", chain, "--plugin", plugin, *WRONG, code=130).stderr
    limit[0] = 1000
    assert "change 6 of 8" in run("bisect", chain, "--plugin", plugin, *WRONG).stdout
    total = len(asked)
    asked.clear()
    run("bisect", chain, "--plugin", plugin, *WRONG)
    assert len(asked) == total, "the four that were known were not asked again, and nothing is known after the end"


def test_the_process_of_a_check_ends_quietly_with_who_asks(tmp_path: Path) -> None:
    """As where the command was killed while the function ran."""
    (tmp_path / "late.py").write_text("import time\n\n\ndef good(path):\n    time.sleep(0.2)\n    return True\n")
    spawn = get_context("spawn")
    mine, its = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(its, f"{tmp_path / 'late.py'}:good"), daemon=True)
    process.start()
    its.close()
    mine.send("model.onnx")
    mine.close()
    process.join(30)
    assert process.exitcode == 0
