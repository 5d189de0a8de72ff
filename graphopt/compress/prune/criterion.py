"""What heads and neurons are worth: the contract of a criterion, and what it answers with.

A criterion is one class in one file: here a module of `criteria/`, outside a module of a package that an entry point `graphopt.criteria` names,
or a file that `--plugin` brings. `prune{importance=my-name}` takes the class `MyName`.
"""

from __future__ import annotations

import dataclasses
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from graphopt.compress.prune.removable import Candidate
from graphopt.core.contract import Array, Context
from graphopt.core.options import Configurable, option_error
from graphopt.core.registry import Registry
from graphopt.run import Feeds
from graphopt.run.observe import Limited

LossFunction = Callable[[Mapping[str, Any], Mapping[str, Any]], Any]  # (outputs, feeds), torch tensors by name -> one number

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
class Question:
    """What a criterion is asked.

    Attributes:
        ctx: the graph (`ctx.model`), its analyses, and the user's samples.
        criterion: its name, for errors.
        loss, rows, multiple, seed: see `Importance`.
    """

    ctx: Context
    criterion: str
    loss: str | LossFunction
    rows: int
    multiple: int
    seed: int

    def samples(self) -> Iterable[Feeds]:
        """Batches until so many rows were seen.

        Raises:
            SampleError: there are none.
        """
        return Limited(self.ctx.require_samples(), self.rows)

    def unjudged(self, c: Candidate, reason: str) -> None:
        """Say that a candidate stays, as nothing is known of it."""
        hint = "importance=magnitude refit=false needs no samples"
        self.ctx.remarks.missed(c.name, f"stays as it is, as {self.criterion} cannot judge it: {reason}; {hint}")

    def steps(self, c: Candidate) -> list[int]:
        """How many groups are gone after each step; what stays is a multiple of `multiple` neurons, and never nothing."""
        if c.kind == "heads":
            return list(range(c.count))
        step = max(self.multiple, -(-c.count // _STEPS // self.multiple) * self.multiple)
        stays = range((c.count - 1) // step * step, 0, -step)
        return [0, *(c.count - n for n in stays if n < c.count)]


class Criterion(Configurable, ABC):
    """Ranks the groups of heads and neurons that can go.

    Attributes:
        kinds: those that it can judge.
        needs_samples: it looks at values on samples; it is not asked about blocks inside a subgraph, where samples do not show them.
    """

    kinds: ClassVar[tuple[str, ...]] = ("heads", "neurons")
    needs_samples: ClassVar[bool] = True

    @abstractmethod
    def rankings(self, candidates: Sequence[Candidate], asked: Question) -> Iterable[tuple[Candidate, Ranking]]:
        """The order in which the groups of each candidate go, and what that costs; a candidate of which nothing is known is left out."""


class Scores(Criterion):
    """A criterion that gives each group a number; what several cost is their sum."""

    @abstractmethod
    def scores(self, candidates: Sequence[Candidate], asked: Question) -> Iterable[tuple[Candidate, Array]]:
        """For each candidate [groups]: what removing one costs, in one unit for the whole model."""

    def rankings(self, candidates: Sequence[Candidate], asked: Question) -> Iterable[tuple[Candidate, Ranking]]:
        """One by one (neurons in steps) from the least score up."""
        for c, scores in self.scores(candidates, asked):
            order, steps = np.argsort(scores, kind="stable"), asked.steps(c)
            cost = np.concatenate([[0.0], np.cumsum(scores[order].astype(np.float64))])
            yield c, Ranking(tuple(order[a:b] for a, b in itertools.pairwise(steps)), cost[steps])


def criteria(known: Mapping[str, type[Any]] | None = None) -> Registry:
    """All criteria by name, also of the plugins that `known`, the passes of a run, come from."""
    plugins = known.plugins if isinstance(known, Registry) else ()
    return Registry("graphopt.criteria", lambda: Criterion, plugins, builtin="graphopt.compress.prune.criteria")


def check_importance(name: str, importance: str, known: Mapping[str, type[Any]] | None) -> None:
    """Raises PipelineError if the pass `name` asks for a criterion that there is not."""
    found = criteria(known)
    if importance not in found:
        raise option_error(name, "importance", f"one of {', '.join(found)}", importance)
