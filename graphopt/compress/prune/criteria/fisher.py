"""fisher: the diagonal of the Fisher information of masks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from graphopt.compress.prune.criterion import Question, Scores
from graphopt.compress.prune.evidence import mask_gradients
from graphopt.compress.prune.removable import Candidate
from graphopt.core.contract import Array


class Fisher(Scores):
    """E(dL/dm)^2 for a mask m on the unit (Kwon et al. 2022)."""

    def scores(self, candidates: Sequence[Candidate], asked: Question) -> Iterable[tuple[Candidate, Array]]:
        return mask_gradients(candidates, asked, lambda gradients: gradients.square())
