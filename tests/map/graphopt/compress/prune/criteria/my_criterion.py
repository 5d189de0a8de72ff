"""my-criterion: the later, the less."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from graphopt.compress.prune.criterion import Question, Scores
from graphopt.compress.prune.removable import Candidate
from graphopt.core.contract import Array


class MyCriterion(Scores):
    """The number of a unit, counted from the last."""

    def scores(self, candidates: Sequence[Candidate], asked: Question) -> Iterable[tuple[Candidate, Array]]:
        return [(c, np.arange(c.count, 0, -1)) for c in candidates]
