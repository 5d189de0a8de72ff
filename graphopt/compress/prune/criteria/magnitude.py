"""magnitude: what a group's output weights measure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np

from graphopt.compress.prune.criterion import Question, Scores
from graphopt.compress.prune.removable import Candidate
from graphopt.core.contract import Array


class Magnitude(Scores):
    """||W_out[unit]||^2 (Han et al. 2015; for structures Li et al. 2017). Needs no samples."""

    needs_samples: ClassVar[bool] = False

    def scores(self, candidates: Sequence[Candidate], asked: Question) -> Iterable[tuple[Candidate, Array]]:
        for c in candidates:
            linears = [u.output for u in c.units if u.output is not None]
            yield c, np.sum([np.square(x.matrix().astype(np.float64)).sum(1).reshape(c.count, -1).sum(1) for x in linears], axis=0)
