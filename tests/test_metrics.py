"""Metrics by name: what the built-in ones compute, what they refuse before any work, and the two ways to bring one of your own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from test_api import LOSSY, RELU, model
from test_cli import fails, run

import graphopt
from graphopt.core.errors import GraphoptError, PipelineError, SampleError
from graphopt.core.registry import load_metric, metrics
from graphopt.run.reference import session

CLASSES = (
    """<ir_version: 8, opset_import: ["" : 17]> g (float[B,6] x) => (float[B,3] y, float[B,3] z) <float[6,3] w> { y = MatMul(x, w) z = Neg(y) }"""
)
DECODER = """<ir_version: 8, opset_import: ["" : 17]> g (int64[B,S] input_ids, int64[B,S] attention_mask) => (float[B,S,7] logits) <float[7,7] table>
    { e = Gather(table, input_ids) m = Unsqueeze(attention_mask, two) f = Cast<to = 1>(m) logits = Mul(e, f) }"""
ONE_FILE = '''"""A metric in one file."""

import dataclasses

import numpy as np

from graphopt.core.contract import NamedMetric


@dataclasses.dataclass(frozen=True)
class {name}(NamedMetric):
    """How large the output is for `at`."""

    at: float = 1.0

    def __call__(self, session):
        return float(np.abs(session.run({{"x": np.full((1, 6), self.at, np.float32)}})["y"]).sum())
'''


def with_weights(text: str, **arrays: Any) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    return proto


@pytest.fixture
def classes() -> onnx.ModelProto:
    return with_weights(CLASSES, w=np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32))


@pytest.fixture
def data(tmp_path: Path, classes: onnx.ModelProto) -> Path:
    """Two batches; the labels are right but for the first of each, and the last of each does not count."""
    (tmp_path / "dev").mkdir()
    rng, run_ = np.random.default_rng(1), session(graphopt.load(classes))
    for k in range(2):
        x = rng.standard_normal((5 + k, 6)).astype(np.float32)
        labels = run_.run({"x": x})["y"].argmax(-1)
        labels[0] = (labels[0] + 1) % 3
        labels[-1] = -100
        np.savez(tmp_path / "dev" / f"{k}.npz", x=x, labels=labels)
    return tmp_path / "dev"


def test_accuracy_counts_the_labels_that_have_the_largest_score(classes: onnx.ModelProto, data: Path) -> None:
    ran = session(graphopt.load(classes))
    assert load_metric(f"accuracy{{data={data}}}")(ran) == pytest.approx(7 / 9)
    assert load_metric(f'accuracy{{data="{data / "0.npz"}"}}')(ran) == pytest.approx(3 / 4)
    assert load_metric(f"accuracy{{data={data} output=z}}")(ran) < 5 / 9, "the smallest score is another class"


def test_next_token_is_one_over_the_perplexity(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    table = rng.standard_normal((7, 7)).astype(np.float32)
    ids = rng.integers(0, 7, (3, 5))
    mask = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]])
    np.savez(tmp_path / "text.npz", input_ids=ids, attention_mask=mask)
    ran = session(graphopt.load(with_weights(DECODER, table=table, two=np.array([2]))))
    logs = table - np.log(np.exp(table).sum(-1, keepdims=True))
    pairs = [*zip(ids[0, :-1], ids[0, 1:], strict=True), *zip(ids[1, 2:-1], ids[1, 3:], strict=True), (ids[2, 0], ids[2, 1])]
    expected = np.exp(np.mean([logs[a, b] for a, b in pairs]))
    assert load_metric(f"next-token{{data={tmp_path / 'text.npz'}}}")(ran) == pytest.approx(float(expected), rel=1e-5)


def test_data_are_looked_for_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a line\n")
    for text, part in (
        ("accuracy", "accuracy: option `data` expects a .npz file or a folder of them, found `nothing`"),
        (f"accuracy{{data={tmp_path / 'text.txt'}}}", "option `data` expects a .npz file"),
        ("accuracy{data=x.npz label=y}", "accuracy has no option `label`; did you mean `labels`?"),
    ):
        with pytest.raises(PipelineError, match=part.replace("?", r"\?")):
            load_metric(text)
    with pytest.raises(SampleError, match=r"absent\.npz does not exist"):
        load_metric("next-token{data=absent.npz}")


@pytest.mark.parametrize(
    ("text", "labels", "part"),
    [
        ("accuracy{{data={0} labels=truth}}", [0, 1], "has no array `truth`; it has x, labels"),
        ("accuracy{{data={0}}}", [[0], [1]], "expected labels [2] for scores [2, 3], found [2, 1]"),
        ("accuracy{{data={0}}}", [-1, -1], "every label in"),
        ("accuracy{{data={0} output=q}}", [0, 1], "the model has no output `q`; it has y, z"),
        ("next-token{{data={0} ids=labels}}", [0, 1], "expected logits [batch, sequence, vocabulary] for ids [2]"),
    ],
)
def test_data_that_do_not_fit(classes: onnx.ModelProto, tmp_path: Path, text: str, labels: Any, part: str) -> None:
    np.savez(tmp_path / "dev.npz", x=np.ones((2, 6), np.float32), labels=np.array(labels))

    class Lenient:
        def run(self, feeds: Any) -> Any:
            return session(graphopt.load(classes)).run({"x": feeds["x"]})

    with pytest.raises(SampleError) as raised:
        load_metric(text.format(tmp_path / "dev.npz"))(Lenient())
    assert part in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_name_judges_on_the_command_line(classes: onnx.ModelProto, data: Path, tmp_path: Path) -> None:
    onnx.save(classes, tmp_path / "in.onnx")
    (tmp_path / "lossy.py").write_text(LOSSY)
    run_ = ("optimize", tmp_path / "in.onnx", "-o", tmp_path / "out.onnx", "--no-measure", "--plugin", tmp_path / "lossy.py", "--json")
    step = ("--pipeline", "shift-weights{by=0.4}", "--max-loss", "0.5", "--metric")
    report = json.loads(run(*run_, *step, f"accuracy{{data={data}}}").stdout)
    assert (report["loss"]["how"], report["loss"]["value"]) == ("relative fall of the metric", 0.0), "a shift of all scores changes no class"


def test_a_metric_in_one_file(classes: onnx.ModelProto, tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(ONE_FILE.format(name="Loudness"))
    ran = session(graphopt.load(classes))
    assert load_metric("loudness{at=2}", (str(plugin),))(ran) == pytest.approx(2 * load_metric("loudness", (str(plugin),))(ran))
    assert metrics((str(plugin),)).owner("loudness") == str(plugin)
    with pytest.raises(GraphoptError, match="expected one metric"):
        load_metric("loudness{at=1}, loudness{at=2}", (str(plugin),))
    plugin = tmp_path / "other.py"
    plugin.write_text(ONE_FILE.format(name="Accuracy"))
    with pytest.raises(PipelineError, match=r"`accuracy` in graphopt\.metrics is claimed by"):
        load_metric("accuracy", (str(plugin),))


def test_an_unknown_metric_names_what_there_is_and_both_forms(tmp_path: Path) -> None:
    onnx.save(model(RELU), tmp_path / "in.onnx")
    run_ = ("optimize", tmp_path / "in.onnx", "-o", tmp_path / "out.onnx", "--metric")
    told = fails(tmp_path, *run_, "acuracy")
    assert told == (
        "error: there is no metric `acuracy`; did you mean `accuracy`? A metric is NAME{options} (accuracy, next-token), "
        "FILE.py:FUNCTION or MODULE:FUNCTION"
    )
    assert "found ``" in fails(tmp_path, *run_, "")
    with pytest.raises(GraphoptError, match=r"json has no function `absent`"):
        load_metric("json:absent")
