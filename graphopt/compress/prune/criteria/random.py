"""random: the baseline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np

from graphopt.compress.prune.criterion import Question, Scores
from graphopt.compress.prune.removable import Candidate
from graphopt.core.contract import Array


class Random(Scores):
    """Random numbers."""

    needs_samples: ClassVar[bool] = False

    def scores(self, candidates: Sequence[Candidate], asked: Question) -> Iterable[tuple[Candidate, Array]]:
        rng = np.random.default_rng(asked.seed)
        return [(c, rng.random(c.count)) for c in candidates]
