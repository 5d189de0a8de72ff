"""`inspect` reads like the card of a model: the blocks of a real one, with their sizes."""

from __future__ import annotations

import pytest
from models import foreign, minilm  # type: ignore[import-not-found]
from tiny import tiny  # type: ignore[import-not-found]

from graphopt.report.inspection import inspect


@pytest.mark.parametrize("route", ["sdpa_18", "sdpa_23", "eager_ts17"])
def test_minilm(route: str) -> None:
    found = inspect(minilm(route))
    lines = [(p.count, p.part, p.what, p.parameters) for p in found.card.parts]
    assert lines[-4:] == [
        (6, "attention", "self-attention, 12 heads of 32, mask: padding", 4 * (384 * 384 + 384)),
        (6, "FFN", "384 -> 1536 (Gelu) -> 384", 2 * 384 * 1536 + 1536 + 384),
        (6, "norms", "2 x LayerNormalization", 4 * 384),
        (1, "norm", "LayerNormalization of 384", 2 * 384),
    ]
    assert (1, "embedding", "30522 x 384", 30522 * 384) in lines
    attention = next(p for p in found.card.parts if p.part == "attention")
    length = found.card.sizes["seq"]
    assert attention.flops == 2 * 4 * length * 384 * 384 + 2 * 2 * length * length * 384
    assert found.declined == []


def test_a_gated_decoder() -> None:
    parts = inspect(tiny("llama", "sdpa", "18")).card.parts
    assert [(p.count, p.part, p.what) for p in parts if p.part in ("attention", "FFN", "head")] == [
        (2, "attention", "self-attention, 4 heads (2 for key and value) of 8, rotary, mask: padding + causal"),
        (2, "FFN", "32 -> 64 (SiLU gated) -> 32"),
        (1, "head", "MatMul 32 x 100"),
    ]


def test_what_was_not_recognized_is_named() -> None:
    found = inspect(foreign("chython-rxnmap"))
    assert [(p.count, p.what[:35]) for p in found.card.parts if p.part == "attention"] == [
        (8, "self-attention, 16 heads of 64, mas"),
        (7, "self-attention, 4 heads of 256, mas"),
    ]
    assert len(found.declined) == 1
    assert "do not feed a product with the value" in found.declined[0]["reason"]
