"""Fixed seeds of every kind: no crash, no hang, no other exception, no wrong number, no artifact that does not load."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fuzz.case import FINDING  # type: ignore[import-not-found]
from fuzz.make import KINDS, make  # type: ignore[import-not-found]
from fuzz.worker import Cases  # type: ignore[import-not-found]

COUNTS = {"graphs": 40, "blocks": 10, "bytes": 110, "structure": 80, "pipelines": 10}
CHUNK = 10  # seeds of one test: a failure names them all


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cases]:
    made = Cases(tmp_path_factory.mktemp("fuzz"))
    yield made
    made.stop()


@pytest.mark.parametrize(("kind", "first"), [(kind, first) for kind, count in COUNTS.items() for first in range(0, count, CHUNK)])
def test_fixed_seeds(kind: str, first: int, cases: Cases) -> None:
    verdicts = {seed: cases.judge(kind, seed, light=True) for seed in range(first, first + CHUNK)}
    found = [
        f"python benchmarks/fuzz.py --kind {kind} --seed {s} --show\n    [{v.stage}] {v.message}" for s, v in verdicts.items() if v.what == FINDING
    ]
    assert not found, "\n".join(found)


def test_every_kind_is_among_them() -> None:
    assert set(COUNTS) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_always_makes_the_same_case(kind: str) -> None:
    """And fewer of its parts make the case that minimizing asks for."""
    case = make(kind, 3, light=True)
    assert make(kind, 3, light=True) == case
    if len(case.parts) > 1:
        assert make(kind, 3, [0], light=True).parts == case.parts[:1]
