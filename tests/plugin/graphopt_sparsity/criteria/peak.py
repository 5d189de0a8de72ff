"""peak: the largest output weight of a head or neuron."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from graphopt.compress.prune.criterion import Question, Scores
from graphopt.compress.prune.removable import Candidate
from graphopt.core import Array


class Peak(Scores):
    """max |W_out[unit]|."""

    def scores(self, candidates: Sequence[Candidate], asked: Question) -> Iterable[tuple[Candidate, Array]]:
        for c in candidates:
            linears = [u.output for u in c.units if u.output is not None]
            yield c, np.max([np.abs(x.matrix()).reshape(c.count, -1).max(1) for x in linears], axis=0)
