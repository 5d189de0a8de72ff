"""Fusions of norms, activations, rotary embeddings and masks give the same function, and portable spellings give it back."""

from __future__ import annotations

import functools

import fusion_domains as domains  # type: ignore[import-not-found]
import numpy as np
import pytest
import spelling_domains as spellings  # type: ignore[import-not-found]
from equivalence import TOLERANCE, Graph, proved, rewritten  # type: ignore[import-not-found]

from graphopt.driver.lowering.decompose import portable

COUNT = 50
GELU = 1e-8  # the definition of Gelu has its constants in float32


def share(found: list[object], *ops: str) -> int:
    """In how many graphs one of these operators stands at the end."""
    return sum(1 for f in found if f.ops & set(ops))  # type: ignore[attr-defined]


def test_norms() -> None:
    found = proved(domains.norm, "fuse-norm", COUNT, dtype=np.float32)
    assert share(found, "LayerNormalization") >= 4
    assert share(found, "RMSNormalization") >= 4
    assert sum(1 for f in found if not f.changes) >= 8  # and near misses stay


def test_norms_of_other_exporters() -> None:
    found = proved(spellings.folded_norm, "canonicalize, fuse-norm", COUNT, dtype=np.float32, tolerance=1e-10)
    assert COUNT - 2 > share(found, "LayerNormalization") >= COUNT // 2


def test_scales_and_shifts_behind_a_product() -> None:
    found = proved(spellings.affine, "fold-affine", COUNT)
    assert COUNT - 5 > sum(1 for f in found if f.changes) >= COUNT // 3


def test_activations() -> None:
    """Exact constants: the same function. Rounded ones: within the 6e-6 of a GELU that the pass allows itself."""
    found = proved(domains.gelu, "fuse-activation", COUNT, tolerance=GELU)
    assert COUNT - 3 > share(found, "Gelu") >= COUNT // 3
    rounded = functools.partial(domains.gelu, rounding=1e-5)
    rounded.__name__ = "rounded"  # type: ignore[attr-defined]
    assert share(proved(rounded, "fuse-activation", COUNT, tolerance=6e-6), "Gelu") >= COUNT // 3


def test_rotary() -> None:
    found = proved(domains.rotary, "fuse-rotary", COUNT, dtype=np.float32)
    assert COUNT - 3 > share(found, "RotaryEmbedding") >= COUNT // 2


def test_masks_for_every_padding() -> None:
    """All paddings of up to four tokens."""
    changed = 0
    for number in range(COUNT):
        graph = Graph(np.random.default_rng([7, number]))
        domains.mask(graph)
        feeds = [f for length, batch in ((1, 2), (3, 4), (4, 8)) for f in domains.masks_with_every_padding(batch, length)]
        changed += rewritten(graph, "simplify-masks", feeds=feeds).changes > 0
    assert COUNT - 3 > changed >= COUNT // 4


@pytest.mark.parametrize("operator", ["norm", "gelu", "rotary", "attention"])
def test_portable_spellings(operator: str) -> None:
    found = proved(getattr(domains, f"{operator}_operator"), portable(16), COUNT, tolerance=GELU if operator == "gelu" else TOLERANCE)
    left = share(found, "LayerNormalization", "RMSNormalization", "Gelu", "RotaryEmbedding", "Attention")
    assert left <= COUNT // 4
    assert sum(1 for f in found if f.changes) >= COUNT - left
