"""Heads and neurons whose output weights become zero: as many as a budget asks for, those that matter least."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt import Context, Pass
from graphopt.compress.budget import Menu, solve
from graphopt.compress.prune.criterion import check_importance
from graphopt.compress.prune.importance import Importance
from graphopt.compress.weights import Editor, unfit
from graphopt.core.options import option
from graphopt.core.strength import Dial


@dataclasses.dataclass(frozen=True)
class ZeroUnits(Pass):
    """This fraction of the weights of output projections becomes zero, by whole heads and neurons; every tensor keeps its size."""

    ratio: float = option(0.25, above=0, below=1, what="a fraction")
    importance: str = "reconstruction"
    exact: ClassVar[bool] = False
    dials = (Dial("ratio"),)

    def check(self, known: Mapping[str, type[Pass]]) -> None:
        check_importance(self.name, self.importance, known)

    def run(self, model: ir.Model, ctx: Context) -> int:
        found = ctx.get(Importance(self.importance, multiple=1))
        rankings = {c: r for c, r in found.items() if all(unfit(u.output) is None for u in c.units)}
        sizes = {c: np.cumsum([0, *(len(step) * c.width * c.units[0].output.out_features for step in r.order)]) for c, r in rankings.items()}
        total = sum(c.units[0].output.matrix().size for c in rankings)
        choice = solve([Menu(range(len(r.cost)), -sizes[c], r.cost) for c, r in rankings.items()], cost=-self.ratio * total)
        if choice is None:
            ctx.remarks.missed("", f"less than {self.ratio:.0%} can become zero")
            return 0
        editor, changes = Editor(model), 0
        for (c, ranking), steps in zip(rankings.items(), choice.settings, strict=True):
            if not steps or not ctx.fuel.burn():
                continue
            rows = np.add.outer(ranking.first(steps) * c.width, np.arange(c.width)).ravel()
            for unit in c.units:
                editor.rows(unit.output, rows, np.zeros(()))
            ctx.remarks.applied(c.name, f"{len(rows)} of {c.units[0].output.in_features} inputs are zero", zeros=len(rows))
            changes += 1
        editor.flush()
        return changes
