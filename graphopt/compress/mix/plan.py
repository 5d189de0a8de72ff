"""Which setting each part of a graph gets, and what the whole then loses, measured."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from graphopt.analysis.head_columns import HeadBlock
from graphopt.calibration.effects import effects
from graphopt.compress.budget import Assignment, Option, predicted, settle
from graphopt.compress.mix.parts import Part, merged, parts_of
from graphopt.compress.mix.split_heads import Groups, SplitHeads
from graphopt.core.contract import Context
from graphopt.run import Feeds

Effects = Mapping[tuple[int, str], float]  # (number of a part, label) -> its effect alone
Versions = Callable[[ir.Model], Mapping[str, ir.Model]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A label for each part ("": as it is), the measured loss of all together, and the predicted one; `split`: what is done to the graph before."""

    parts: Sequence[Part]
    labels: Sequence[str]
    loss: float
    predicted: float
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


def choose(model: ir.Model, feeds: Sequence[Feeds], parts: Sequence[Part], found: Effects, budget: float) -> Plan:
    """The smallest within the budget."""
    labels = [["", *(label for k, label in found if k == number)] for number in range(len(parts))]
    options = [
        [Option(part.cost[label], found[number, label] if label else 0.0) for label in own]
        for number, (part, own) in enumerate(zip(parts, labels, strict=True))
    ]

    def named(chosen: Assignment) -> list[str]:
        return [own[k] for own, k in zip(labels, chosen, strict=True)]

    chosen, loss = settle(options, budget, lambda chosen: effects(model, feeds, {0: merged(parts, named(chosen))})[0])
    return Plan(parts, named(chosen), loss, predicted(options, chosen))


def joined(model: ir.Model, feeds: Sequence[Feeds], blocks: Mapping[str, HeadBlock], apart: Plan, versions: Versions) -> Plan:
    """A plan for the groups of heads one by one, with the groups of one label put together; the label with the most bytes comes first.

    Args:
        model: before any split; `blocks` are its, by the name of the Attention node.
        apart: keys of parts are (name of the Attention node, group), or names of values of `model`.
        versions: the whole graph in each of the choices.
    """
    given = {part.key: label for part, label in zip(apart.parts, apart.labels, strict=True)}
    size = {(part.key, label): n for part in apart.parts for label, n in part.nbytes.items()}
    pieces: dict[str, Groups] = {}
    for name, block in blocks.items():
        own = {group: given.get((name, group), "") for group in range(block.kv_heads)}
        order = sorted(dict.fromkeys(own.values()), key=lambda label: -max(size.get(((name, group), label), 0) for group in own))
        if len(order) == 1:
            given.update(dict.fromkeys((str(x.node.outputs[0].name) for x in (block.q, block.k, block.v, block.o)), order[0]))
            continue
        pieces[name] = tuple(tuple(group for group, label in own.items() if label == wanted) for wanted in order)
        given.update({("piece", name, k): label for k, label in enumerate(order)})
    split, copy = SplitHeads(pieces), model.clone()
    split.run(copy, Context(copy))
    parts = parts_of(copy, versions(copy), lambda weight: None if (own := split.owner(weight)) is None else ("piece", *own))
    labels = [label if (label := given.get(part.key, "")) in part.changes else "" for part in parts]
    return Plan(parts, labels, effects(copy, feeds, {0: merged(parts, labels)})[0], apart.predicted, split if pieces else None)
