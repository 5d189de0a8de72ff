"""Reduction: the smallest graph that a pipeline still breaks in the same way, as files that show it."""

from __future__ import annotations

import itertools
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from harness import build  # type: ignore[import-not-found]
from models import minilm  # type: ignore[import-not-found]
from planted import CHAIN, PLUGIN  # type: ignore[import-not-found]
from test_cli import fails, run
from tiny import tiny  # type: ignore[import-not-found]

import graphopt
from graphopt.driver.debug import cuts
from graphopt.driver.debug.reduce import Reduction
from graphopt.driver.debug.reduced import reduced
from graphopt.driver.debug.search import Asked
from graphopt.graph.questions import all_nodes
from graphopt.graph.verify import verify
from graphopt.io.load import load


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("planted") / "planted.py"
    path.write_text(PLUGIN, encoding="utf-8")
    return path


def saved(folder: Path, text: str, **weights: Any) -> Path:
    path = folder / "model.onnx"
    onnx.save(build(text, weights), path)
    return path


def again(script: Path) -> dict[str, Any]:
    """What the written command says."""
    command = script.read_text(encoding="utf-8").splitlines()[-1]
    told: dict[str, Any] = json.loads(run(*shlex.split(command)[1:], "--json").stdout)
    return told


@pytest.mark.parametrize("name", ["wrong-sigmoid", "unloadable-sigmoid"])
def test_one_node_is_left_and_the_command_shows_it(name: str, plugin: Path, tmp_path: Path) -> None:
    source, small = saved(tmp_path, CHAIN), tmp_path / "small.onnx"
    said = run("reduce", source, "-o", small, "--plugin", plugin, "--pipeline", f"canonicalize, {name}, canonicalize").stdout
    assert f"1 of 9 nodes; `{name}` still breaks it" in said
    assert str(small.with_suffix(".sh")) in said.replace("\n", "")
    model = onnx.load(small)
    assert [node.name for node in model.graph.node] == ["n5"]
    assert model.opset_import[0].version == onnx.load(source).opset_import[0].version
    assert model.graph.input[0].type.tensor_type.shape.dim[1].dim_value == 1, "four channels are not needed"
    told = again(small.with_suffix(".sh"))
    assert (told["step"], told["stands_for"]) == (name, ["n5"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "small.onnx", "small.sh"]


BRANCHES = """(float[b,4] x, bool c) => (float[b,4] y, float[b,4] z) {
  h = Exp (x)
  y = If (c) <then_branch = t () => (float[b,4] u) { e = Neg (h) [n5] u = Sigmoid (e) }, else_branch = f () => (float[b,4] v) { v = Relu (h) }>
  z = Mul (h, w)
  float[4] w
}"""


def test_a_branch_takes_the_place_of_an_if(plugin: Path, tmp_path: Path) -> None:
    text = BRANCHES.replace("  float[4] w\n", "").replace("(float[b,4] y, float[b,4] z) {", "(float[b,4] y, float[b,4] z) <float[4] w> {")
    samples = tmp_path / "s.npz"
    np.savez(samples, x=np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4), c=np.array(True))
    found = reduced(
        saved(tmp_path, text), "canonicalize, wrong-sigmoid", Asked(), tmp_path / "small.onnx", plugins=(str(plugin),), samples=str(samples)
    )
    assert found.nodes == 1
    assert [node.op_type for node in onnx.load(tmp_path / "small.onnx").graph.node] == ["Sigmoid"]
    assert found.step == "wrong-sigmoid"


PAIRED = """
import dataclasses
import numpy as np
from graphopt.rewrite.match import Match
from graphopt.rewrite.rules import RewritePass


@dataclasses.dataclass(frozen=True)
class WrongPair(RewritePass[Match]):
    "Right for a bias below a limit; above it, a tenth is lost."

    anchors = frozenset({"Add"})

    def match(self, node, ctx):
        product, bias = node.inputs[0].producer(), node.inputs[1].const_value
        if product is None or product.op_type != "MatMul" or bias is None or np.abs(bias.numpy()).max() <= 5:
            return None
        return Match((product, node), (node.outputs[0],))

    def build(self, op, m):
        product, add = m.nodes
        bias = add.inputs[1].const_value.numpy()
        return [op.Add(op.MatMul(*product.inputs), op.const((bias * 0.9).clip(-5, 5), "bias"))]
"""


def test_what_the_fault_needs_stays(tmp_path: Path) -> None:
    """Two nodes and a weight that is large somewhere; the hidden size, the other weights and all around is not needed."""
    plugin = tmp_path / "paired.py"
    plugin.write_text(PAIRED, encoding="utf-8")
    rng = np.random.default_rng(0)
    weights = {f"w{k}": rng.standard_normal((16, 16)).astype(np.float32) for k in range(4)}
    weights |= {f"b{k}": rng.standard_normal(16).astype(np.float32) for k in range(4)}
    weights["b2"][3] = 7.0
    layers = " ".join(f"m{k} = MatMul (h{k}, w{k}) a{k} = Add (m{k}, b{k}) h{k + 1} = Tanh (a{k})" for k in range(4))
    declared = ", ".join(f"float[16,16] w{k}, float[16] b{k}" for k in range(4))
    source = saved(tmp_path, f"(float[b,s,16] h0) => (float[b,s,16] h4) <{declared}> {{ {layers} }}", **weights)
    found = reduced(source, "canonicalize, wrong-pair, canonicalize", Asked(), tmp_path / "small.onnx", plugins=(str(plugin),))
    model = onnx.load(tmp_path / "small.onnx")
    assert [node.op_type for node in model.graph.node] == ["MatMul", "Add"]
    assert found.step == "wrong-pair"
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    assert sorted(arrays) == ["b2", "w2"]
    assert (arrays["w2"] == 0).all()
    assert arrays["b2"].max() == 7.0


def test_it_does_not_slip_to_another_fault(plugin: Path, tmp_path: Path) -> None:
    """A second pass is wrong in the same words at a node that stands alone: the search stays with the first."""
    source = saved(tmp_path, CHAIN)
    pipeline = "canonicalize, wrong-sigmoid{at=n6}, canonicalize, shifty"
    found = reduced(source, pipeline, Asked(), tmp_path / "small.onnx", plugins=(str(plugin),))
    assert found.step == "wrong-sigmoid{at=n6}"
    assert [node.name for node in onnx.load(tmp_path / "small.onnx").graph.node] == ["n6"]


def test_a_check_of_the_user_decides(plugin: Path, tmp_path: Path) -> None:
    checks = tmp_path / "checks.py"
    checks.write_text("import onnx\ndef good(path): return all(n.op_type != 'Nope' for n in onnx.load(path).graph.node)\n", encoding="utf-8")
    source, small = saved(tmp_path, CHAIN), tmp_path / "small.onnx"
    asked = ("--plugin", plugin, "--pipeline", "unloadable-sigmoid", "--check", f"{checks}:good")
    run("reduce", source, "-o", small, *asked)
    assert len(onnx.load(small).graph.node) == 1
    assert again(small.with_suffix(".sh"))["step"] == "unloadable-sigmoid"


def test_a_model_that_only_the_user_can_run(plugin: Path, tmp_path: Path) -> None:
    """It has an operator that no runtime here knows; the check of the user needs none."""
    checks = tmp_path / "checks.py"
    checks.write_text("import onnx\ndef good(path): return all(n.op_type != 'Nope' for n in onnx.load(path).graph.node)\n", encoding="utf-8")
    source = tmp_path / "model.onnx"
    text = CHAIN.replace("[n7] v7 = Sigmoid (v6)", "[n7] v7 = own.Thing (v6)")
    onnx.save(build(f'<ir_version: 10, opset_import: ["": 18, "own": 1]> g {text}'), source)
    asked = ("reduce", source, "-o", tmp_path / "small.onnx", "--plugin", plugin, "--pipeline", "canonicalize, unloadable-sigmoid")
    assert "say by --check what is right" in run(*asked, code=1).stderr
    run(*asked, "--check", f"{checks}:good")
    assert [node.name for node in onnx.load(tmp_path / "small.onnx").graph.node] == ["n5"]


def test_a_step_without_fuel_is_searched_in_the_whole_model(plugin: Path, tmp_path: Path) -> None:
    found = reduced(saved(tmp_path, CHAIN), "canonicalize, shifty", Asked(), tmp_path / "small.onnx", plugins=(str(plugin),))
    assert (found.step, found.nodes) == ("shifty", 1)


def test_a_pass_that_raises(plugin: Path, tmp_path: Path) -> None:
    found = reduced(saved(tmp_path, CHAIN), "canonicalize, raises", Asked(), tmp_path / "small.onnx", plugins=(str(plugin),))
    assert (found.step, found.nodes) == ("raises", 3)


def test_what_cannot_be_reduced_leaves_nothing(plugin: Path, tmp_path: Path) -> None:
    source, small = saved(tmp_path, CHAIN), tmp_path / "small.onnx"
    assert "nothing wrong after the last step" in fails(tmp_path, "reduce", source, "-o", small)
    assert "belongs to the input" in fails(tmp_path, "reduce", source, "-o", source)
    assert "there is no folder" in fails(tmp_path, "reduce", source, "-o", tmp_path / "none" / "small.onnx")


def test_ctrl_c_leaves_the_best_so_far_and_the_next_run_goes_on(plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, small, whole = saved(tmp_path, CHAIN), tmp_path / "small.onnx", Reduction.refused
    count, limit = itertools.count(1), [2]

    def stops(self: Reduction, job: Any) -> str | None:
        if next(count) == limit[0]:
            raise KeyboardInterrupt
        return whole(self, job)

    monkeypatch.setattr(Reduction, "refused", stops)
    asked = ("reduce", source, "-o", small, "--plugin", plugin, "--pipeline", "canonicalize, wrong-sigmoid")
    said = run(*asked, code=130).stderr
    assert said.startswith("interrupted: the best so far, of 1 node, is in ")
    assert len(onnx.load(small).graph.node) == 1
    limit[0] = 0
    again_tried = json.loads(run(*asked, "--json").stdout)["tried"]
    assert again_tried < json.loads(run(*asked, "--json").stdout)["tried"]


def test_every_part_of_a_model_is_a_legal_model() -> None:
    model = graphopt.load(tiny("bert", "eager", "ts17"))
    rng, names = np.random.default_rng(0), cuts.names(model)
    for share in (0.02, 0.2, 0.5, 0.9):
        kept = {name for name in names if rng.random() < share}
        part = cuts.part(model, kept)
        assert part is not None
        assert {str(node.name) for node in part.graph} <= kept
        verify(load(part))
    assert cuts.part(model, set(names)) is None


@pytest.mark.slow
@pytest.mark.parametrize("unloadable", [False, True])
def test_a_fault_among_thirty_passes_on_a_real_model(unloadable: bool, plugin: Path, tmp_path: Path) -> None:
    room = "canonicalize, fuse-norm, fuse-activation, fuse-attention, fuse-rotary, simplify-masks, merge-projections, strip-metadata, canonicalize, fuse-norm"
    passes = room.split(", ") * 3
    passes[14] = "wrong-norm{at=node_layer_norm_7" + (" unloadable=true}" if unloadable else "}")
    small = tmp_path / "small.onnx"
    found = reduced(minilm("sdpa_18"), ", ".join(passes), Asked(), small, plugins=(str(plugin),))
    assert found.step == passes[14]
    told = again(small.with_suffix(".sh"))
    assert (told["position"], told["stands_for"]) == (15, ["node_layer_norm_7"])
    assert len(list(all_nodes(graphopt.load(small)))) <= 10
    assert small.stat().st_size < 10_000
