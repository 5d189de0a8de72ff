"""entropy: how far attention is from even."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np

from graphopt.compress.prune.criterion import Question, Scores
from graphopt.compress.prune.evidence import map_scores
from graphopt.compress.prune.removable import Candidate
from graphopt.core.contract import Array


class Entropy(Scores):
    """The mean over rows of 1 - entropy of the attention weights / log(keys) (Clark et al. 2019; Behnke and Heafield 2020)."""

    kinds: ClassVar[tuple[str, ...]] = ("heads",)

    def scores(self, candidates: Sequence[Candidate], asked: Question) -> Iterable[tuple[Candidate, Array]]:
        return map_scores(candidates, asked, _even)


def _even(weights: Array) -> Array:
    entropy = -(weights * np.log(np.maximum(weights, 1e-30))).sum(-1)
    seen = np.log(np.maximum((weights > 0).sum(-1), 1))  # of the keys that a row may read
    return np.asarray(1 - entropy / np.maximum(seen, 1e-9))
