"""reconstruction: what a block's own output loses without a group."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from graphopt.calibration.moments import input_moments
from graphopt.compress.prune.criterion import Question, Scores
from graphopt.compress.prune.removable import Candidate
from graphopt.core.contract import Array


class Reconstruction(Scores):
    """E||x_u W_u||^2 / E||x W||^2: leave one out, error of the block's own output (after Luo et al. 2017, "ThiNet")."""

    def scores(self, candidates: Sequence[Candidate], asked: Question) -> Iterable[tuple[Candidate, Array]]:
        values = dict.fromkeys(u.output.x for c in candidates for u in c.units if u.output is not None)
        moments = dict(input_moments(asked.ctx, list(values), rows=asked.rows))
        for c in candidates:
            seen = [moments[u.output.x] for u in c.units if u.output is not None]
            few = next((m for m in seen if isinstance(m, str)), None)
            if few is not None:
                asked.unjudged(c, few)
            else:
                yield c, _alone(c, np.sum(np.asarray(seen, np.float64), axis=0))


def _alone(c: Candidate, inputs: Array) -> Array:
    """Of each group alone, in the squared norm of the whole output."""
    assert c.units[0].output is not None
    weight = c.units[0].output.matrix().astype(np.float64)
    blocks = [slice(g * c.width, (g + 1) * c.width) for g in range(c.count)]
    alone = np.array([float(np.sum((inputs[b, b] @ weight[b]) * weight[b])) for b in blocks])
    return alone / max(float(np.sum((inputs @ weight) * weight)), 1e-30)
