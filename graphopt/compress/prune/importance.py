"""The importance of heads and neurons: an order in which to remove them, and what each step costs, by one of `criteria/`.

Every criterion works without labels: the loss is a random projection of the model's own outputs, or (`sampled`) the log-likelihood of tokens
drawn from them; a loss of the user takes their place where one is given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx_ir as ir

from graphopt.compress.prune.criterion import Criterion, LossFunction, Question, Ranking, check_importance, criteria
from graphopt.compress.prune.removable import Candidate, Removable
from graphopt.core.contract import Analysis, Context
from graphopt.core.errors import SampleError


@dataclasses.dataclass(frozen=True)
class Importance(Analysis[Mapping[Candidate, Ranking]]):
    """A ranking for every candidate that the criterion can judge.

    Args:
        criterion: the name of one; `criteria()` lists them.
        loss: `projection`, `sampled` (the last axis of the first output are logits), `auto` (sampled where the outputs are as many as the rows
            of an embedding), or a function of the outputs and the feeds, torch tensors by name, that returns one number.
        rows: so many rows of activations (tokens) of the samples are used, at least one batch.
        multiple: neurons go in steps of so many.
        seed: of random numbers.

    Raises:
        PipelineError: there is no such criterion.
        GraphoptError: the criterion needs gradients, and torch is not installed.
        SampleError: it needs samples, and there are none.
    """

    criterion: str = "obs"
    loss: str | LossFunction = "auto"
    rows: int = 32768
    multiple: int = 32
    seed: int = 0
    resize: tuple[str, ...] = ()

    def compute(self, model: ir.Model, ctx: Context) -> Mapping[Candidate, Ranking]:
        check_importance("importance", self.criterion, ctx.passes)
        judge: Criterion = criteria(ctx.passes)[self.criterion]()
        fitting = [c for c in ctx.get(Removable(self.resize)).candidates if c.kind in judge.kinds and all(u.output is not None for u in c.units)]
        fitting = [c for c in fitting if not judge.needs_samples or c.shown(model)]
        if not fitting:
            return {}
        asked = Question(ctx, self.criterion, self.loss, self.rows, self.multiple, self.seed)
        told = len(ctx.remarks)
        found = dict(judge.rankings(fitting, asked))
        if not found and len(ctx.remarks) == told:
            raise SampleError("importance needs samples, and there were 0: the source is empty, or a generator that was used before")
        return found
