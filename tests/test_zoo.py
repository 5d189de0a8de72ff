"""The benchmark over every architecture: what it shrinks, what it counts, and one file on its way through it."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("torch", reason="the zoo needs torch")
pytest.importorskip("transformers", reason="the zoo needs transformers")


@pytest.fixture(scope="module", autouse=True)
def benchmarks() -> Iterator[None]:
    """The folder of the benchmarks, where their scripts find each other."""
    folder = str(Path(__file__).parent.parent / "benchmarks")
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", Path(__file__).parent.parent / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["bert", "qwen3_next", "deepseek_v3", "clip", "whisper", "gemma3_text", "swin"])
def test_a_small_configuration(name: str) -> None:
    import _every
    import _shrink

    config = _shrink.small(_every.config_class(name), 32, {})
    for part in [config, *(c for c in vars(config).values() if hasattr(c, "sub_configs"))]:
        kinds = getattr(part, "layer_types", None) or ()
        assert getattr(part, "vocab_size", 0) <= _shrink.VOCABULARY
        assert getattr(part, "num_hidden_layers", 2) in (2, 4, len(kinds))
        assert set(kinds) == set(getattr(type(part)(), "layer_types", None) or ())
        heads, width = getattr(part, "num_attention_heads", 4), getattr(part, "hidden_size", 64)
        assert isinstance(heads, (list, tuple)) or width % heads == 0
        assert not heads or isinstance(heads, (list, tuple)) or heads % (getattr(part, "num_key_value_heads", None) or heads) == 0


def test_blocks_are_counted_where_they_reach_the_result() -> None:
    import _count
    import torch

    q = torch.randn(2, 4, 5, 8)

    def eager(x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x @ x.transpose(-1, -2) * 0.3 + 1.0, -1) @ x

    def router(x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(torch.nn.functional.linear(x, torch.ones(5, 8)), -1) @ x

    def call() -> Any:
        torch.nn.functional.scaled_dot_product_attention(q, q, q)  # reaches nothing
        return eager(torch.nn.functional.scaled_dot_product_attention(q, q, q)), router(q)

    assert _count.blocks(call)[0] == 2


@pytest.mark.parametrize("route", ["script17", pytest.param("dynamo18", marks=pytest.mark.slow)])
def test_a_type_by_its_name_alone(route: str, tmp_path: Path) -> None:
    import _every
    import _page
    import zoo

    coverage = _script("coverage")  # there is a package of this name

    key = f"bert.{route}"
    index = {key: zoo.export("bert", route, tmp_path, _every.Model), f"x.{route}": {"unbuilt": "ValueError: width 3 is odd"}}
    row = coverage.judge(key, "graphopt-untimed", tmp_path, index[key])
    assert (row["status"], row["found"], row["expected"]) == ("ok", 2, 2), json.dumps(row)
    text = _page.page(index, {key: row}, [route], coverage.whole)
    assert f"| {route} | 1 | 2 / 2 | 1 / 1 | 0 | 0 | 0 |" in text
    assert "| ValueError: width N is odd | x |" in text


def test_a_type_that_is_a_part_of_another(tmp_path: Path) -> None:
    import _every
    import zoo

    assert "part of another" in zoo.export("sam_prompt_encoder", "script17", tmp_path, _every.Model)["unbuilt"]
