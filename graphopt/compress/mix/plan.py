"""Which setting each part of a graph gets, and what the whole then loses, measured."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analysis.heads import Heads
from graphopt.calibration.effects import effects
from graphopt.compress.budget import Allocation, Menu, settle
from graphopt.compress.mix.parts import PrecisionPart, merged, parts_of
from graphopt.compress.mix.split_heads import HeadGroups, SplitHeads, shares
from graphopt.core.contract import Context
from graphopt.run import Feeds

Effects = Mapping[tuple[int, str], float]  # (number of a part, label) -> its effect alone
Labels = tuple[str, ...]  # one for each part
Versions = Callable[[ir.Model], Mapping[str, ir.Model]]


@dataclasses.dataclass(frozen=True)
class PrecisionPlan:
    """A label for each part ("": as it is), the measured loss of all together, and the predicted one; `split`: what is done to the graph before."""

    parts: Sequence[PrecisionPart]
    labels: Labels
    loss: float
    predicted: float = 0.0
    split: SplitHeads | None = None

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes[label] for part, label in zip(self.parts, self.labels, strict=True))

    def tell(self, ctx: Context, before: int, budget: float, changes: int) -> None:
        """The last remark of the pass."""
        what = ", ".join(f"{count} {label or 'as they are'}" for label, count in Counter(self.labels).items()) or "nothing to quantize"
        facts = {"loss": self.loss, "predicted": self.predicted, "budget": budget, "before": before, "after": self.nbytes}
        text = f"{what}; {before} -> {self.nbytes} bytes, loss {self.loss:.4g} of {budget:.4g} (predicted {self.predicted:.4g})"
        (ctx.remarks.applied if changes else ctx.remarks.missed)("", text, **facts)


def choose(
    parts: Sequence[PrecisionPart], found: Effects, budget: float, assemble: Callable[[Labels], PrecisionPlan]
) -> tuple[Labels, PrecisionPlan]:
    """The labels of the least cost whose plan loses no more than the budget, and that plan."""
    menus = []
    for number, part in enumerate(parts):
        own = ["", *(label for k, label in found if k == number)]
        errors = [0.0, *(found[number, label] for label in own[1:])]
        menus.append(Menu(own, np.array([part.cost[label] for label in own]), np.square(errors)))
    plans: dict[Labels, PrecisionPlan] = {}

    def measured(choice: Allocation[str]) -> float:
        plans[choice.settings] = dataclasses.replace(assemble(choice.settings), predicted=math.sqrt(choice.loss))
        return plans[choice.settings].loss

    labels = settle(menus, budget, measured)[0].settings
    return labels, plans.get(labels) or assemble(labels)


def whole(model: ir.Model, feeds: Sequence[Feeds], parts: Sequence[PrecisionPart], labels: Labels) -> PrecisionPlan:
    """A plan for the parts as they are."""
    return PrecisionPlan(parts, labels, effects(model, feeds, {0: merged(parts, labels)})[0])


def joined(
    model: ir.Model, feeds: Sequence[Feeds], blocks: Mapping[str, Heads], apart: Sequence[PrecisionPart], chosen: Labels, versions: Versions
) -> PrecisionPlan:
    """A plan for the groups of heads one by one, with the groups of one label put together; the label with the most bytes comes first.

    Args:
        model: before any split; `blocks` are its, by the name of the Attention node.
        apart: keys of parts are (name of the Attention node, group), or names of values of `model`.
        versions: the whole graph in each of the choices.
    """
    given = {part.key: label for part, label in zip(apart, chosen, strict=True)}
    size = {(part.key, label): n for part in apart for label, n in part.nbytes.items()}
    pieces: dict[str, HeadGroups] = {}
    for name, block in blocks.items():
        own = {group: given.get((name, group), "") for group in range(block.kv_heads)}
        order = sorted(dict.fromkeys(own.values()), key=lambda label: -max(size.get(((name, group), label), 0) for group in own))
        if len(order) == 1:
            given.update(dict.fromkeys((str(x.node.outputs[0].name) for x, _ in shares(block)), order[0]))
            continue
        pieces[name] = tuple(tuple(group for group, label in own.items() if label == wanted) for wanted in order)
        given.update({("piece", name, k): label for k, label in enumerate(order)})
    split, copy = SplitHeads(pieces), model.clone()
    split.run(copy, Context(copy))
    parts = parts_of(copy, versions(copy), lambda weight: None if (own := split.owner(weight)) is None else ("piece", *own))
    labels = tuple(label if (label := given.get(part.key, "")) in part.changes else "" for part in parts)
    return dataclasses.replace(whole(copy, feeds, parts, labels), split=split if pieces else None)
