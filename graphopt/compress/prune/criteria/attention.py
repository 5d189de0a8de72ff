"""attention: how sure heads are of where they look."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from graphopt.compress.prune.criterion import Question, Scores
from graphopt.compress.prune.evidence import map_scores
from graphopt.compress.prune.removable import Candidate
from graphopt.core.contract import Array


class Attention(Scores):
    """The mean over rows of the largest attention weight, "confidence" (Voita et al. 2019)."""

    kinds: ClassVar[tuple[str, ...]] = ("heads",)

    def scores(self, candidates: Sequence[Candidate], asked: Question) -> Iterable[tuple[Candidate, Array]]:
        return map_scores(candidates, asked, lambda weights: weights.max(-1))
