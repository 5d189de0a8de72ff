"""obs: what is left of the loss after the other groups make up for the removed one."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from graphopt.compress.prune.criterion import Criterion, Question, Ranking
from graphopt.compress.prune.evidence import second_moments
from graphopt.compress.prune.removable import Candidate
from graphopt.core.contract import Array

_DAMP = 1e-3  # of the mean second moment, so that dead inputs can be inverted


class Obs(Criterion):
    """tr(S W_u^T (C^-1)_uu^-1 W_u), one step at a time, where inputs C = E[x x^T] and output gradients S = E[g g^T] count as independent.

    Optimal brain surgeon (Hassibi and Stork 1993); blockwise Kurtic et al. 2023, "ZipLM"; the factors after Martens and Grosse 2015.
    """

    def rankings(self, candidates: Sequence[Candidate], asked: Question) -> Iterable[tuple[Candidate, Ranking]]:
        for c, inputs, gradients in second_moments(candidates, asked):
            yield c, _surgeon(c, inputs, gradients, asked.steps(c))


def _surgeon(c: Candidate, inputs: Array, gradients: Array, steps: Sequence[int]) -> Ranking:
    """Remove the cheapest groups of a step, let the rest make up for them, and go on."""
    assert c.units[0].output is not None
    weight = c.units[0].output.matrix().astype(np.float64)
    damped = inputs + _DAMP * max(float(np.trace(inputs)) / len(inputs), 1e-30) * np.eye(len(inputs))
    inverse, left = np.linalg.inv(damped), np.arange(c.count)
    order, cost = list[Array](), [0.0]
    for gone, then in itertools.pairwise(steps):
        picked = left[np.argsort(_costs(weight, inverse, gradients, left, c.width))[: then - gone]]
        places = (picked[:, None] * c.width + np.arange(c.width)).reshape(-1)
        block = np.linalg.inv(inverse[np.ix_(places, places)])
        cost.append(cost[-1] + float(np.sum((block @ weight[places]) * (weight[places] @ gradients))))
        gain = inverse[:, places] @ block
        weight -= gain @ weight[places]
        inverse -= gain @ inverse[places]
        left = np.setdiff1d(left, picked)
        order.append(picked)
    return Ranking(tuple(order), np.array(cost))


def _costs(weight: Array, inverse: Array, gradients: Array, left: Array, width: int) -> Array:
    if width == 1:
        costs: Array = ((weight[left] @ gradients) * weight[left]).sum(1) / np.diag(inverse)[left]
        return costs
    found = []
    for group in left:
        rows = slice(group * width, (group + 1) * width)
        found.append(float(np.sum(np.linalg.solve(inverse[rows, rows], weight[rows]) * (weight[rows] @ gradients))))
    return np.array(found)
