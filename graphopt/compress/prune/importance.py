"""What heads and neurons are worth: an order in which to remove them, and what each step costs.

Every criterion works without labels: the loss is a random projection of the model's own outputs, or (`sampled`) the log-likelihood of tokens
drawn from them; a loss of the user takes their place where one is given.

    random         the baseline
    magnitude      ||W_out[unit]||^2 (Han et al. 2015; for structures Li et al. 2017)
    attention      heads: mean over rows of the largest attention weight, "confidence" (Voita et al. 2019)
    entropy        heads: log(keys) - entropy of the attention weights, relative to log(keys) (Clark et al. 2019; Behnke and Heafield 2020)
    reconstruction E||x_u W_u||^2 / E||x W||^2: leave one out, error of the block's own output (after Luo et al. 2017, "ThiNet")
    taylor         E|dL/dm| for a mask m on the unit (Michel et al. 2019; Molchanov et al. 2017)
    fisher         E(dL/dm)^2 (Kwon et al. 2022)
    obs            what is left of the loss after the other units make up for the removed one, where inputs C = E[x x^T] and output gradients
                   S = E[g g^T] count as independent: tr(S W_u^T (C^-1)_uu^-1 W_u), one step at a time (optimal brain surgeon, Hassibi and
                   Stork 1993; blockwise Kurtic et al. 2023, "ZipLM"; the factors after Martens and Grosse 2015)
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from graphopt.compress.prune.evidence import Evidence, Loss, gather
from graphopt.compress.prune.removable import Candidate, Removable
from graphopt.core.contract import Analysis, Array, Context
from graphopt.core.errors import GraphoptError, SampleError

CRITERIA = ("obs", "fisher", "taylor", "reconstruction", "magnitude", "attention", "entropy", "random")
_HEADS_ONLY = ("attention", "entropy")
_DAMP = 1e-3  # of the mean second moment, so that dead inputs can be inverted
_STEPS = 48  # of a block with many neurons


@dataclasses.dataclass(frozen=True)
class Ranking:
    """`order[k]`: the groups (int64) that go in step k; `cost[k]`: what all steps up to k cost together, in one unit for the whole model."""

    order: tuple[Array, ...]
    cost: Array

    def first(self, steps: int) -> Array:
        """The groups that go in the first steps."""
        return np.concatenate([np.zeros(0, np.int64), *self.order[:steps]])


@dataclasses.dataclass(frozen=True)
class Importance(Analysis[Mapping[Candidate, Ranking]]):
    """A ranking for every candidate that the criterion can judge.

    Args:
        criterion: one of CRITERIA.
        loss: `projection`, `sampled` (the last axis of the first output are logits), `auto` (sampled where the outputs are as many as the rows
            of an embedding), or a function of the outputs and the feeds, torch tensors by name, that returns one number.
        rows: so many rows of activations (tokens) of the samples are used, at least one batch.
        multiple: neurons go in steps of so many.
        seed: of random numbers.

    Raises:
        GraphoptError: the criterion needs gradients, and torch is not installed.
        SampleError: it needs samples, and there are none.
    """

    criterion: str = "obs"
    loss: str | Loss = "auto"
    rows: int = 32768
    multiple: int = 32
    seed: int = 0
    resize: tuple[str, ...] = ()

    def compute(self, model: ir.Model, ctx: Context) -> Mapping[Candidate, Ranking]:
        if self.criterion not in CRITERIA:
            raise GraphoptError(f"importance is one of {', '.join(CRITERIA)}, found `{self.criterion}`")
        candidates = [c for c in ctx.get(Removable(self.resize)).candidates if self._judges(c)]
        if not candidates:
            return {}
        rng = np.random.default_rng(self.seed)
        if self.criterion == "random":
            return {c: self.ranked(c, rng.random(c.count)) for c in candidates}
        if self.criterion == "magnitude":
            return {c: self.ranked(c, np.sum([_magnitude(c, k) for k in range(len(c.units))], axis=0)) for c in candidates}
        found: dict[Candidate, Ranking] = {}
        for candidate, evidence in gather(ctx, candidates, self.criterion, self.loss, self.rows, self.seed):
            found[candidate] = self._read(candidate, evidence)
        if not found:
            raise SampleError("importance needs samples, and there were 0: the source is empty, or a generator that was used before")
        return found

    def _judges(self, c: Candidate) -> bool:
        return (c.kind == "heads" or self.criterion not in _HEADS_ONLY) and all(u.output is not None for u in c.units)

    def _read(self, c: Candidate, e: Evidence) -> Ranking:
        if self.criterion == "obs":
            return self._surgeon(c, e)
        return self.ranked(c, _reconstruction(c, e) if self.criterion == "reconstruction" else e.masks)

    def ranked(self, c: Candidate, scores: Array) -> Ranking:
        """Units one by one (neurons in steps) from the least score up; costs add."""
        order = np.argsort(scores, kind="stable")
        steps = self._steps(c)
        cost = np.concatenate([[0.0], np.cumsum(scores[order].astype(np.float64))])
        return Ranking(tuple(order[a:b] for a, b in itertools.pairwise(steps)), cost[steps])

    def _steps(self, c: Candidate) -> list[int]:
        """How many groups are gone after each step; what stays is a multiple of `multiple` neurons, and never nothing."""
        if c.kind == "heads":
            return list(range(c.count))
        step = max(self.multiple, -(-c.count // _STEPS // self.multiple) * self.multiple)
        stays = range((c.count - 1) // step * step, 0, -step)
        return [0, *(c.count - n for n in stays if n < c.count)]

    def _surgeon(self, c: Candidate, e: Evidence) -> Ranking:
        """Remove the cheapest groups of a step, let the rest make up for them, and go on."""
        weight = c.units[0].output.matrix().astype(np.float64)  # type: ignore[union-attr]
        damped = e.inputs + _DAMP * max(float(np.trace(e.inputs)) / len(e.inputs), 1e-30) * np.eye(len(e.inputs))
        inverse, left = np.linalg.inv(damped), np.arange(c.count)
        steps, order, cost = self._steps(c), list[Array](), [0.0]
        for gone, then in itertools.pairwise(steps):
            picked = left[np.argsort(_costs(weight, inverse, e.gradients, left, c.width))[: then - gone]]
            places = (picked[:, None] * c.width + np.arange(c.width)).reshape(-1)
            block = np.linalg.inv(inverse[np.ix_(places, places)])
            cost.append(cost[-1] + float(np.sum((block @ weight[places]) * (weight[places] @ e.gradients))))
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


def _magnitude(c: Candidate, k: int) -> Array:
    linear = c.units[k].output
    assert linear is not None
    squares: Array = np.square(linear.matrix().astype(np.float64)).sum(1).reshape(c.count, -1).sum(1)
    return squares


def _reconstruction(c: Candidate, e: Evidence) -> Array:
    """Of each group alone, in the squared norm of the whole output."""
    assert c.units[0].output is not None
    weight = c.units[0].output.matrix().astype(np.float64)
    blocks = [slice(g * c.width, (g + 1) * c.width) for g in range(c.count)]
    alone = np.array([float(np.sum((e.inputs[b, b] @ weight[b]) * weight[b])) for b in blocks])
    return alone / max(float(np.sum((e.inputs @ weight) * weight)), 1e-30)
