"""docs/writing-a-target.md is true: its target is registered as a plugin, lowers, saves and runs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
from models import assert_same, parse, run  # type: ignore[import-not-found]

import graphopt

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


def test_the_files_of_the_page_exist() -> None:
    root = Path(__file__).resolve().parent.parent
    named = set(re.findall(r"`(targets/\w+\.py)", PAGE))
    assert named
    assert [name for name in named if not (root / name).is_file()] == []
