"""docs/writing-a-target.md is true: its target is registered as a plugin, lowers, saves and runs."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from models import assert_same, parse, run  # type: ignore[import-not-found]

import graphopt
from graphopt.core.errors import TargetError

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "writing-a-target.md").read_text(encoding="utf-8")


def test_the_target_of_the_page(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n# reference\.py\n(.*?)```", PAGE, flags=re.S)
    plugin = tmp_path / "reference.py"
    plugin.write_text(code, encoding="utf-8")
    text = """<ir_version: 10, opset_import: ["": 20]>
g (float[B,8] x) => (float[B,8] y) { h = Gelu (x)\n t = Identity (h)\n y = Neg (t) }"""
    source = parse(text)
    result = graphopt.optimize(source, target="reference{opset=20}", plugins=[str(plugin)])
    assert result.report.as_dict()["target"]["name"] == "reference{opset=20}"
    result.save(tmp_path / "out.onnx")
    assert onnx.load(tmp_path / "out.onnx").opset_import[0].version == 20
    feeds = {"x": np.linspace(-3, 3, 16, dtype=np.float32).reshape(2, 8)}
    assert_same(run(source, feeds), result.session().run(feeds))


def test_the_provider_of_the_page(tmp_path: Path) -> None:
    """A plugin stands on the public base: what falls back is told by its own table, and its limits hold."""
    (code,) = re.findall(r"```python\n# nnapi\.py\n(.*?)```", PAGE, flags=re.S)
    assert not re.search(r"graphopt\S*\._|import _|graphopt\.targets", code), "a plugin needs no private module"
    plugin = tmp_path / "nnapi.py"
    plugin.write_text(code, encoding="utf-8")
    text = """<ir_version: 10, opset_import: ["": 23, "com.microsoft": 1]>
g (float[B,2,8] x, float[8] s) => (float[B,2,8] y) { h = RMSNormalization (x, s)\n y = Mish (h) }"""
    source = parse(text)
    result = graphopt.optimize(source, target="nnapi{vendor=false}", plugins=[str(plugin)])
    told = result.report.as_dict()["target"]["report"] if "report" in result.report.as_dict()["target"] else result.report.as_dict()["target"]
    assert [(f["op"], f["reason"]) for f in told["falls_back"] if f["op"] == "Mish"] == [("Mish", "no kernel for Mish")]
    assert told["known_from"] == "the documentation of the provider"
    feeds = {"x": np.linspace(-3, 3, 32, dtype=np.float32).reshape(2, 2, 8), "s": np.ones(8, np.float32)}
    assert "RMSNormalization" not in {n.op_type for n in result.model.graph}
    assert_same(run(source, feeds), run(result.model, feeds))
    with pytest.raises(TargetError, match=r"nnapi.* cannot run here: .* no NnapiExecutionProvider; pip install the Android package"):
        result.session()
    own = parse(text.replace("Mish (h)", "com.microsoft.Trilu (h)"))
    with pytest.raises(TargetError, match="Trilu, and came with the input; leave out vendor=false"):
        graphopt.optimize(own, target="nnapi{vendor=false}", plugins=[str(plugin)]).save(tmp_path / "own.onnx")


def test_the_page_names_no_private_module() -> None:
    assert not re.findall(r"`(?:targets|passes|graphopt)/\w*/?_\w+\.py|graphopt[.\w]*\._", PAGE)
    for name in re.findall(r"`(graphopt(?:\.\w+)+)`", PAGE):
        module, _, last = name.rpartition(".")
        found = importlib.import_module(module)
        assert hasattr(found, last) or importlib.import_module(name), name
