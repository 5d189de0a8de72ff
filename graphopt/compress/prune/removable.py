"""Which units of a model can be removed, in which steps, and what each step saves: units tried one by one by the closure of slicing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence

import onnx_ir as ir

from graphopt.analysis.heads import Heads, Unit, Units
from graphopt.analysis.linear import Linears
from graphopt.core.contract import Analysis, Context
from graphopt.rewrite.slicing.close import Slicing
from graphopt.rewrite.slicing.plan import Refusal, Remedy
from graphopt.run.observe import observable


@dataclasses.dataclass(frozen=True, eq=False)
class Candidate:
    """Units that are removed together: one, or several that share their weights.

    Attributes:
        kind: `heads` or `neurons`.
        units: the blocks; the same heads (or neurons) go from each.
        group: so many neighbours go together (query heads that share a key head, unless it is the only one).
        saves: multiplications with stored weights, for each row of activations, that removing one group saves in all units.
    """

    kind: str
    units: tuple[Unit, ...]
    group: int
    saves: int

    @property
    def count(self) -> int:
        """Groups that there are."""
        return self.units[0].count // self.group

    @property
    def width(self) -> int:
        """Input features of the output projection for one group."""
        return self.units[0].width * self.group

    @property
    def name(self) -> str:
        return self.units[0].node.name or ""

    def shown(self, model: ir.Model) -> bool:
        """Whether samples show what its output projections read and give: not inside a subgraph."""
        values = [v for u in self.units for v in (u.value, *(() if u.output is None else (u.output.x, u.output.node.outputs[0])))]
        return all(observable(model, v) for v in values)

    def members(self, groups: Sequence[int]) -> list[int]:
        """The heads or neurons of these groups."""
        return [g * self.group + k for g in groups for k in range(self.group)]


@dataclasses.dataclass(frozen=True)
class Removables:
    candidates: tuple[Candidate, ...]
    refused: tuple[tuple[ir.Node, str], ...]
    total: int  # multiplications with stored weights in the whole model, for each row


@dataclasses.dataclass(frozen=True)
class Removable(Analysis[Removables]):
    """The heads of attentions (`heads`) and the neurons of feed-forward blocks (`neurons`) that can go.

    Args:
        resize: names of inputs and outputs that may change their size with them (key and value caches).
    """

    resize: tuple[str, ...] = ()

    def compute(self, model: ir.Model, ctx: Context) -> Removables:
        blocks, linears = ctx.get(Units()), ctx.get(Linears(casts=True))
        refused = list(blocks.refused)
        shared: dict[object, list[Unit]] = {}
        everything: list[Unit] = [*blocks.attention, *blocks.ffn]
        for unit in everything:
            weight = unit.output.weight if unit.output is not None else unit.node
            shared.setdefault((type(unit), weight), []).append(unit)
        found = []
        for units in shared.values():
            outcome = self._try(model, units, {x.weight for x in linears})
            if isinstance(outcome, Candidate):
                found.append(outcome)
            else:
                refused += [(unit.node, outcome) for unit in units]
        order = {node: k for k, node in enumerate(model.graph)}
        found.sort(key=lambda c: order.get(c.units[0].node, len(order)))
        return Removables(tuple(found), tuple(refused), sum(x.weight.const_value.size for x in linears if x.weight.const_value is not None))

    def _try(self, model: ir.Model, units: Sequence[Unit], weights: Collection[ir.Value]) -> Candidate | str:
        """Remove the first group, and grow the group while that leaves heads of different sizes."""
        first, reason = units[0], ""
        least = 1 if isinstance(first, Heads) and first.kv_heads == 1 else first.group  # the queries of an only key head go alone
        for group in (g for g in range(least, first.count) if first.count % g == 0 and g % least == 0):
            s = Slicing(model, resize=self.resize)
            try:
                for unit in units:
                    s.remove(unit.value, unit.axis, unit.mask(range(group)), inside=unit.inside)
            except Refusal as refusal:
                reason = reason or str(refusal)
                if refusal.remedy is Remedy.UNEVEN:
                    continue
                break
            return Candidate("heads" if isinstance(first, Heads) else "neurons", tuple(units), group, _saved(s, weights))
        return reason or f"there is one group of {first.count}, and nothing would be left"


def _saved(s: Slicing, weights: Collection[ir.Value]) -> int:
    """Elements of multiplied weights that go."""
    total = 0
    for slot, masks in s.private.items():
        value = slot.value
        if value is not None and value in weights and value.const_value is not None:
            left = math.prod(1 - float(mask.mean()) for mask in masks.values())
            total += round(value.const_value.size * (1 - left))
    return total
