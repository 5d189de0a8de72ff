"""Small models to start from: the graphs of the text cases, those of tests/replay_models.py, the onnx package's own, tiny exports."""

from __future__ import annotations

import functools
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import replay_models  # type: ignore[import-not-found]
from harness import build, read_cases  # type: ignore[import-not-found]
from models import _cache  # type: ignore[import-not-found]
from tiny import tiny  # type: ignore[import-not-found]

TESTS = Path(__file__).parent.parent
EXPORTS = (
    "bert sdpa 18", "bert eager ts17", "gpt2 sdpa 18", "gpt2 sdpa ts17", "llama sdpa 18", "vit sdpa ts17", "distilbert sdpa ts17", "qwen3 sdpa ts17",
)  # fmt: skip
_WRITTEN = ("BRANCHES", "EXPERTS", "MLP", "CACHED", "TIED")
HEAVY = 1 << 19  # bytes: a mutated model that is larger than this takes too long


@functools.cache
def texts() -> Mapping[str, bytes]:
    """The graphs of tests/passes and tests/lowerings, with random weights."""
    found = {}
    for path in sorted(path for folder in ("passes", "lowerings") for path in (TESTS / folder).glob("*.test")):
        for case in read_cases(path):
            if case.expect != "error":
                found[case.name] = build(case.before, ir_version=case.ir_version, opset=case.opset).SerializeToString()
    return found


@functools.cache
def written() -> Mapping[str, bytes]:
    """The hand-written models of tests/replay_models.py."""
    return {name.lower(): replay_models._text(getattr(replay_models, name)).SerializeToString() for name in _WRITTEN}


@functools.cache
def backend() -> Mapping[str, bytes]:
    """One model for each case of the onnx package's backend tests: every operator, in most of its forms."""
    path = _cache() / "fuzz_backend.pickle"
    if not path.exists():
        from onnx.backend.test.case.node import collect_testcases

        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            models = {case.name: case.model.SerializeToString() for case in collect_testcases(None) if case.model is not None}
        path.write_bytes(pickle.dumps({name: model for name, model in models.items() if len(model) < HEAVY}))
    found: dict[str, bytes] = pickle.loads(path.read_bytes())
    return found


@functools.cache
def exports() -> Mapping[str, bytes]:
    """Tiny exports of known architectures."""
    return {name: tiny(*name.split()).read_bytes() for name in EXPORTS}
