"""taylor: the first-order change of the loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from graphopt.compress.prune.criterion import Question, Scores
from graphopt.compress.prune.evidence import mask_gradients
from graphopt.compress.prune.removable import Candidate
from graphopt.core.contract import Array


class Taylor(Scores):
    """E|dL/dm| for a mask m on the unit (Michel et al. 2019; Molchanov et al. 2017)."""

    def scores(self, candidates: Sequence[Candidate], asked: Question) -> Iterable[tuple[Candidate, Array]]:
        return mask_gradients(candidates, asked, lambda gradients: gradients.abs())
