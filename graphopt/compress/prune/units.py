"""What all pruning of heads and neurons shares: rank, choose, remove, refit, and say so."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.heads import Heads, Unit
from graphopt.analysis.structure import unread
from graphopt.compress.budget import Menu, solve
from graphopt.compress.prune.criterion import Ranking, check_importance
from graphopt.compress.prune.importance import Importance
from graphopt.compress.prune.latency import savings as measured
from graphopt.compress.prune.latency import speedup
from graphopt.compress.prune.refit import fit_behind
from graphopt.compress.prune.removable import Candidate, Removable
from graphopt.core.contract import Context, Pass
from graphopt.core.errors import PipelineError
from graphopt.core.options import exclusive, option
from graphopt.core.strength import Dial, Dials
from graphopt.rewrite.slicing.apply import apply
from graphopt.rewrite.slicing.close import Slicing
from graphopt.rewrite.slicing.plan import Refusal


@dataclasses.dataclass(frozen=True)
class Ratio:
    """An option of the passes that remove one kind of unit."""

    ratio: float | None = option(None, above=0, below=1, what="a fraction")


@dataclasses.dataclass(frozen=True)
class Pruning(Pass):
    """What the passes share that remove heads and neurons (`kinds`); some have options of `Ratio`, `multiple` and `resize` besides."""

    flops: float | None = option(None, above=0, below=1, what="a fraction")
    latency: float | None = option(None, above=0, below=1, what="a fraction")
    importance: str = "obs"
    refit: bool = True
    loss: str = "auto"
    rows: int = option(32768, least=1)
    seed: int = 0
    exact: ClassVar[bool] = False
    samples = "needs"
    data_free = "importance=magnitude refit=false"
    kinds: ClassVar[tuple[str, ...]]
    ways = exclusive("ratio", "flops", "latency", says="how much is to go")
    dials: ClassVar[Dials] = (Dial("ratio"), Dial("flops"), Dial("latency"))

    def check(self, known: Mapping[str, type[Pass]]) -> None:
        check_importance(self.name, self.importance, known)

    def run(self, model: ir.Model, ctx: Context) -> int:
        return prune(model, ctx, self, self.ways.require(self))

    @property
    def resizable(self) -> tuple[str, ...]:
        return getattr(self, "resize", ())


def prune(model: ir.Model, ctx: Context, s: Pruning, way: str) -> int:
    """Remove units until `ratio` of them, `flops` of the model's multiplications with stored weights, or `latency` (the `way`) is saved."""
    found = ctx.get(Removable(s.resizable))
    candidates = [c for c in found.candidates if c.kind in s.kinds]
    for node, reason in found.refused:
        ctx.remarks.missed(node.name or "", f"not pruned: {reason}")
    rankings = _rankings(ctx, candidates, s)
    for c in candidates:
        if c not in rankings:
            hidden = "" if c.shown(model) else ", which stand inside a subgraph, where samples do not show them"
            ctx.remarks.missed(c.name, f"not pruned: importance={s.importance} says nothing about its {c.kind}{hidden}")
    if not rankings:
        for node, reason in unread(model, ctx) if "neurons" in s.kinds and not candidates else ():
            ctx.remarks.missed(node.name or "", f"not pruned: {reason}")
        ctx.remarks.missed("", f"found no {' or '.join(s.kinds)} that can be removed")
        return 0
    savings = measured(model, ctx, rankings, s.resizable) if way == "latency" else {c: _savings(c, ranking, way) for c, ranking in rankings.items()}
    whole = {"latency": 1.0, "ratio": sum(c.count for c in rankings), "flops": found.total}[way]
    budget = whole * getattr(s, way)
    menus = [Menu(range(len(savings[c])), -np.array(savings[c]), ranking.cost) for c, ranking in rankings.items()]
    choice = solve(menus, cost=-budget)
    if choice is None:
        most = sum(max(v) for v in savings.values()) / whole
        ctx.remarks.missed("", f"at most {most:.1%} can go, and {budget / whole:.1%} was asked for; nothing was removed")
        for c in (c for c in rankings if not max(savings[c])):
            keeps = f"its {c.units[0].count} {c.kind} stay in multiples of {getattr(s, 'multiple', 1)}" if c.kind == "neurons" else "it has one group"
            ctx.remarks.missed(c.name, f"not pruned: {keeps}")
        return 0
    steps = dict(zip(reversed(list(rankings)), reversed(choice.settings), strict=True))  # from the last block to the first
    gone = {c: c.members(rankings[c].first(k).tolist()) for c, k in steps.items() if k}
    facts = {c: {"cost": round(float(rankings[c].cost[steps[c]]), 8), "importance": s.importance} for c in gone}
    before = model.clone() if way == "latency" else model
    changes = remove(model, ctx, gone, s, facts)
    if way == "latency" and changes:
        faster = speedup(ctx, before, model)
        ctx.remarks.applied("", f"measured on {ctx.target}: {1 - 1 / faster:.1%} of the latency saved", saved=1 - 1 / faster, asked=s.latency)
    return changes


def _rankings(ctx: Context, candidates: Sequence[Candidate], s: Pruning) -> dict[Candidate, Ranking]:
    loss: Any = s.loss
    if ":" in s.loss:
        from graphopt.core.registry import load_function

        loss = load_function(s.loss, "loss")
    found: Mapping[Candidate, Ranking] = ctx.get(Importance(s.importance, loss, s.rows, getattr(s, "multiple", 1), s.seed, s.resizable))
    return {c: found[c] for c in candidates if c in found}


def _savings(c: Candidate, ranking: Ranking, way: str) -> list[float]:
    """What the first steps of a ranking save: units, or multiplications."""
    gone = itertools.accumulate(map(len, ranking.order), initial=0)
    return [float(n if way == "ratio" else n * c.saves) for n in gone]


def remove(model: ir.Model, ctx: Context, gone: Mapping[Candidate, Sequence[int]], s: Pruning, facts: Mapping[Candidate, Mapping[str, Any]]) -> int:
    """Remove these heads and neurons, refit what reads them, and remark on each block."""
    if s.refit and gone:
        ctx.require_samples()  # before anything changes
    before = model.clone() if s.refit else model
    plan, done, outputs = Slicing(model, resize=s.resizable), list[tuple[Candidate, Sequence[int]]](), list[str]()
    for c, members in gone.items():
        try:
            planned(plan, ctx, c.units, members)
        except Refusal as refusal:
            ctx.remarks.missed(c.name, f"not pruned: {refusal}")
            continue
        done.append((c, members))
        outputs += [str(u.output.node.name) for u in c.units if u.output is not None]
    if not done:
        return 0
    _tell(ctx, done, facts)
    carry_out(plan, ctx, caches=True)
    if s.refit:
        fit_behind(model, before, outputs, ctx, s.rows)
    return len(done)


def planned(plan: Slicing, ctx: Context, units: Sequence[Unit], members: Sequence[int]) -> None:
    """Plan the removal of these heads or neurons from all `units`, or from none.

    Raises:
        Refusal: it cannot be done, or must not for want of fuel; nothing is planned.
    """
    with plan.together():
        for unit in units:
            plan.remove(unit.value, unit.axis, unit.mask(members), inside=unit.inside)
        if not ctx.fuel.burn():
            raise Refusal(ctx.fuel.why)


def carry_out(plan: Slicing, ctx: Context, *, caches: bool = False) -> None:
    """Apply what is planned, and warn of what that changes beyond zeros, also of inputs and outputs where they are `caches` of heads."""
    ported = sorted({str(v.name) for v in plan.removed if caches and (v.is_graph_input() or v.is_graph_output())})
    apply(plan)
    for where, text in plan.notes:
        ctx.remarks.warning(where, text)
    if ported:
        ctx.remarks.warning("", f"{', '.join(f'`{n}`' for n in ported)} changed in size with the heads; feed back what the model gives")


def _tell(ctx: Context, done: Sequence[tuple[Candidate, Sequence[int]]], facts: Mapping[Candidate, Mapping[str, Any]]) -> None:
    for c, members in done:
        for unit in c.units:
            listed = sorted(members)
            shared = {"shared_with": [u.index for u in c.units if u is not unit]} if len(c.units) > 1 else {}
            told: dict[str, Any] = {"layer": unit.index, "removed": listed if isinstance(unit, Heads) else len(listed), "of": unit.count}
            what = f"heads {'+'.join(map(str, listed))}" if isinstance(unit, Heads) else f"{len(listed)} neurons"
            ctx.remarks.applied(unit.node.name or "", f"layer {unit.index}: {what} of {unit.count} removed", **told, **shared, **facts.get(c, {}))


def explicit(model: ir.Model, ctx: Context, listed: Mapping[int, Sequence[int]], s: Pruning) -> int:
    """Remove the units that the user names, {block: members}; groups that must stay whole are completed, and weights shared with blocks that are
    not named are forked.

    Raises:
        PipelineError: there is no such block or member.
    """
    found, (kind,) = ctx.get(Removable(s.resizable)), s.kinds
    place = {unit.index: (c, unit) for c in found.candidates if c.kind == kind for unit in c.units}
    gone: dict[Candidate, list[int]] = {}
    for index, members in listed.items():
        if index not in place:
            raise _unknown(found.refused, index, place, kind)
        c, unit = place[index]
        wrong = [m for m in members if not 0 <= m < unit.count]
        if wrong:
            raise PipelineError(f"layer {index} has {unit.count} {kind}, 0 to {unit.count - 1}; found {wrong[0]}")
        whole = sorted(set(members)) if _evenly(c, unit, members) else c.members(sorted({m // c.group for m in members}))
        if len(whole) > len(set(members)):
            asked = "+".join(map(str, sorted(members)))
            ctx.remarks.warning(c.name, f"{kind} go in groups of {c.group}: {'+'.join(map(str, whole))} instead of {asked}")
        gone[dataclasses.replace(c, units=(unit,))] = whole
    return remove(model, ctx, gone, s, {})


def _evenly(c: Candidate, unit: Unit, members: Sequence[int]) -> bool:
    """As many queries of every key head, and not all of any: the key heads stay."""
    if not isinstance(unit, Heads) or c.group != unit.group:
        return False
    counts = np.bincount(np.array(sorted(set(members))) // unit.group, minlength=unit.kv_heads)
    return len(set(counts.tolist())) == 1 and counts[0] < unit.group


def _unknown(refused: Sequence[tuple[ir.Node, str]], index: int, known: Mapping[int, object], kind: str) -> PipelineError:
    why = f"; not possible elsewhere: {refused[0][0].name}: {refused[0][1]}" if refused else ""
    return PipelineError(f"no {kind} can be removed from a layer {index}; layers are {', '.join(map(str, sorted(known))) or 'none'}{why}")
