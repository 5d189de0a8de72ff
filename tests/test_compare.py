"""graphopt compare: the numbers between two models, and the block where the error enters."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from models import minilm, parse, text_feeds  # type: ignore[import-not-found]
from tiny import tiny  # type: ignore[import-not-found]
from typer.testing import CliRunner

import graphopt
from graphopt.cli.root import app
from graphopt.core.errors import GraphoptError
from graphopt.run.distance import Running

ORDER = ["embeddings", *(f"layer {k} {part}" for k in range(6) for part in ("attention", "ffn"))]
PLAIN = """<ir_version: 10, opset_import: ["": 20]>
g (float[B,4] x) => (float[B,8] y) <float[4,8] w> { y = MatMul(x, w) }"""


def feeds() -> list[dict[str, np.ndarray]]:
    return [text_feeds(["input_ids", "attention_mask"], batch, length) for batch, length in ((2, 12), (1, 7))]


@pytest.fixture(scope="module")
def export() -> Path:
    return minilm("sdpa_18")


def disturbed(path: Path, shape: tuple[int, int], layer: int, by: float = 0.02) -> onnx.ModelProto:
    """The model with noise on one weight: that of the MatMul number `layer` among those of this shape."""
    model = onnx.load(path)
    weights = {t.name: t for t in model.graph.initializer}
    fitting = [n.input[1] for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in weights]
    tensor = weights[[name for name in fitting if tuple(weights[name].dims) == shape][layer]]
    array = onnx.numpy_helper.to_array(tensor)
    noise = np.random.default_rng(0).standard_normal(array.shape) * by * array.std()
    tensor.CopyFrom(onnx.numpy_helper.from_array((array + noise).astype(np.float32), tensor.name))
    return model


def weight(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((4, 8)).astype(np.float32)


# ---- real models ------------------------------------------------------------------------------------------------------------------------


def test_exact_passes_add_rounding_only(export: Path, tmp_path: Path) -> None:
    graphopt.optimize(export, level=1, target="cpu{tune=off}", promise=False).save(tmp_path / "fused.onnx")
    found = graphopt.compare(export, tmp_path / "fused.onnx", samples=feeds())
    assert [block.name for block in found.blocks] == ORDER, "every block is there, in order"
    assert min(block.snr for block in found.blocks) > 100
    assert min(block.own for block in found.blocks) > 100
    assert found.outputs[0].snr > 100
    assert found.outputs[0].cosine > 0.999999
    assert found.enters is None
    assert "rounding" in found.verdict


@pytest.mark.parametrize(("shape", "layer", "count", "name"), [((1536, 384), 3, 1, "layer 3 ffn"), ((384, 384), 3, 4, "layer 3 attention")])
def test_a_disturbed_weight_is_found(export: Path, shape: tuple[int, int], layer: int, count: int, name: str) -> None:
    """`count` weights of this shape stand in each layer; the last one of layer 3 is disturbed."""
    found = graphopt.compare(export, disturbed(export, shape, layer * count + count - 1), samples=feeds())
    assert found.enters is not None
    assert found.enters.name == name
    assert name in found.verdict
    own = {block.name: block.own for block in found.blocks}
    assert own.pop(name) < 60
    assert min(own.values()) > 100, "no other block is blamed for the error that reaches it"
    behind = ORDER.index(name)
    assert all(block.snr == math.inf for block in found.blocks[:behind])
    assert all(block.snr < 60 for block in found.blocks[behind:])


def test_int8(export: Path, tmp_path: Path) -> None:
    graphopt.optimize(export, level=2, target="quantized{tune=off}", promise=False).save(tmp_path / "int8.onnx")
    found = graphopt.compare(export, tmp_path / "int8.onnx", samples=feeds())
    assert [block.name for block in found.blocks] == ORDER
    assert all(5 < block.own < 60 for block in found.blocks), "each block adds errors of 8 bits"
    assert found.enters is not None
    output = found.outputs[0]
    assert 5 < output.snr < 40
    assert len(output.channels) == 5
    assert output.snr == pytest.approx(-20 * math.log10(output.l2))
    assert min(block.own - block.snr for block in found.blocks) > -0.5, "alone, a block is not further off than with the errors from before"


def test_names_that_are_not_shared(export: Path) -> None:
    found = graphopt.compare(export, minilm("sdpa_ts17"), samples=feeds())
    assert found.blocks == ()
    assert "no value inside has the same name" in found.verdict
    assert found.outputs[0].snr > 100


def test_values_of_the_same_name_that_are_others_are_left_out(export: Path) -> None:
    """As two exporters number their values: the graphs are equal, but two names are exchanged."""
    model = onnx.load(export)
    for node in model.graph.node:
        for names in (node.input, node.output):
            for k, name in enumerate(names):
                names[k] = {"layer_norm_1": "layer_norm_2", "layer_norm_2": "layer_norm_1"}.get(name, name)
    del model.graph.value_info[:]
    found = graphopt.compare(export, model, samples=feeds())
    assert "2 values of the same name hold other numbers" in found.note
    assert found.enters is None
    assert {"layer_norm_1", "layer_norm_2"}.isdisjoint(block.value for block in found.blocks)
    assert len(found.blocks) == len(ORDER) - 2


@pytest.mark.parametrize("route", ["18", "ts17"])
def test_a_decoder(route: str, tmp_path: Path) -> None:
    """Blocks end in the residual stream and the norm behind it; the head is a block of its own."""
    path = tiny("llama", "sdpa", route)
    names = ["embeddings", "layer 0 attention", "layer 0 ffn", "layer 1 attention", "layer 1 ffn", "head"]
    graphopt.optimize(path, pipeline="to-half", target="cpu{tune=off}", promise=False).save(tmp_path / "half.onnx")
    for other, low, high in ((path, math.inf, math.inf), (tmp_path / "half.onnx", 50, 90)):
        found = graphopt.compare(path, other)
        assert [block.name for block in found.blocks] == names
        assert found.note == ""
        assert all(low <= block.snr <= high for block in found.blocks if block.name != "head"), [b.snr for b in found.blocks]
    assert graphopt.compare(path, path).verdict == "no block of 6 adds anything (equal in every bit)"


# ---- the numbers ------------------------------------------------------------------------------------------------------------------------


def test_the_numbers_of_an_output() -> None:
    other = weight()
    other[:, 5] *= 1.1
    x = [{"x": np.random.default_rng(k).standard_normal((k + 1, 4)).astype(np.float32)} for k in range(3)]
    found = graphopt.compare(parse(PLAIN, w=weight()), parse(PLAIN, w=other), samples=x)
    a, b = (np.concatenate([feed["x"].astype(np.float64) @ w for feed in x]) for w in (weight(), other))
    (output,) = found.outputs
    assert output.snr == pytest.approx(10 * math.log10((a**2).sum() / ((a - b) ** 2).sum()), rel=1e-4)
    assert output.l2 == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-4)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert output.cosine == pytest.approx(cosines.mean())
    assert output.cosine_min == pytest.approx(cosines.min())
    assert output.max_abs == pytest.approx(np.abs(a - b).max(), rel=1e-4)
    (channel, share), *_ = output.channels
    assert channel == 5
    assert share == pytest.approx(0.1, rel=1e-3)
    assert found.blocks == ()
    assert "neither model shows layers" in found.note


def test_streamed_numbers_of_unusual_values() -> None:
    nan, text, fill = Running(), Running(), Running()
    nan.add(np.ones((2, 3)), np.full((2, 3), np.nan))
    assert nan.snr == -math.inf
    text.add(np.array(["a", "b"], object), np.array(["a", "c"], object))
    assert text.snr == pytest.approx(10 * math.log10(2))
    fill.add(np.array([[-np.inf, 1.0]]), np.array([[-np.inf, 1.0]]))
    assert fill.snr == math.inf
    assert fill.worst_channels(3) == []
    fill.add(np.ones((1, 5)), np.zeros((1, 5)))
    assert fill.worst_channels(3) == [], "channels that change their number are not compared"
    empty = Running()
    empty.add(np.zeros((0, 4)), np.zeros((0, 4)))
    assert (empty.snr, empty.cosine) == (math.inf, 1.0)


# ---- the command ------------------------------------------------------------------------------------------------------------------------


def test_the_command_prints_and_writes(export: Path, tmp_path: Path) -> None:
    onnx.save(disturbed(export, (1536, 384), 3), tmp_path / "b.onnx")
    arguments = ["compare", str(export), str(tmp_path / "b.onnx")]
    done = CliRunner().invoke(app, [*arguments, "--report", str(tmp_path / "r.html")])
    assert done.exit_code == 0, done.stderr
    assert "the error enters most in layer 3 ffn" in done.stdout
    assert "made up" in done.stdout
    page = (tmp_path / "r.html").read_text()
    assert page.count("<rect") == page.count("<circle") == len(ORDER)
    assert re.search(r"<script|src=|href=|url\(", page) is None, "the page needs nothing else"
    plot = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + len("</svg>")])
    width = float(plot.attrib["width"])
    assert all(0 < float(mark.attrib["cx"]) < width for mark in plot.iter("{http://www.w3.org/2000/svg}circle"))
    rings = [float(mark.attrib["cx"]) for mark in plot.iter("{http://www.w3.org/2000/svg}circle")]
    assert ORDER[rings.index(min(rings))] == "layer 3 ffn", "the worst block is the leftmost ring"
    done = CliRunner().invoke(app, [*arguments, "--json", "--report", str(tmp_path / "r.json")])
    told = json.loads(done.stdout)
    assert told == json.loads((tmp_path / "r.json").read_text())
    assert told["enters"] == "layer 3 ffn"
    assert told["blocks"][0]["snr"] == "inf"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("y = MatMul(x, w)", "y = MatMul(x, w)", ""),
        ("B,4] x", "B,5] x", r"of their inputs, A has `x: float\[B,4\]` and B has `x: float\[B,5\]`"),
        ("=> (float[B,8] y)", "=> (float[B,8] z)", "A has the outputs y, B has z"),
    ],
)
def test_other_interfaces_are_one_error(old: str, new: str, message: str, tmp_path: Path) -> None:
    text = PLAIN.replace(old, new).replace("y = ", "z = " if " z)" in new else "y = ")
    other = np.ones((5, 8), np.float32) if "5]" in new else weight()
    onnx.save(parse(PLAIN, w=weight()), tmp_path / "a.onnx")
    onnx.save(parse(text, w=other), tmp_path / "b.onnx")
    done = CliRunner().invoke(app, ["compare", str(tmp_path / "a.onnx"), str(tmp_path / "b.onnx")])
    assert done.exit_code == (1 if message else 0), done.stderr
    if message:
        assert re.search(message, done.stderr)
        assert done.stderr.count("\n") == 1
        with pytest.raises(GraphoptError, match=message):
            graphopt.compare(tmp_path / "a.onnx", tmp_path / "b.onnx")


def test_a_report_of_another_kind_is_refused_before_any_work(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["compare", "a.onnx", "b.onnx", "--report", str(tmp_path / "r.txt")])
    assert done.exit_code == 1
    assert "FILE.json or FILE.html" in done.stderr
