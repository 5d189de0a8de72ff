"""mix-precision: for each stored weight the cheapest of several quantizations, so that the outputs together stay within a budget."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import onnx_ir as ir

from graphopt.analysis.heads import AttentionHeads, Heads
from graphopt.analysis.linear import StoredOperands
from graphopt.calibration.effects import effects
from graphopt.compress.mix.cost import timed
from graphopt.compress.mix.parts import Assemble, PrecisionPart, merged, parts_of
from graphopt.compress.mix.plan import Effects, Labels, PrecisionPlan, choose, joined, whole
from graphopt.compress.mix.split_heads import SplitHeads, why_together
from graphopt.compress.select import check_patterns, passed_over
from graphopt.core import registry
from graphopt.core.contract import Batches, Context, Pass
from graphopt.core.errors import PipelineError
from graphopt.core.options import option, option_error
from graphopt.core.pipeline import PassManager, parse
from graphopt.core.remarks import Remarks
from graphopt.core.strength import Dial
from graphopt.graph.questions import is_constant
from graphopt.run import Feeds
from graphopt.run.observe import shown
from graphopt.run.samples import Samples

KNOWN = {
    "int4": "quantize{mode=weight-only bits=4}",
    "int8": "quantize{mode=weight-only block=64}",
    "dynamic": "quantize",
}
_MARGIN = 0.98  # of the budget: the target computes in another order than the measurement


@dataclasses.dataclass(frozen=True)
class MixPrecision(Pass):
    """Measure what each choice does to the outputs, weight by weight, and take the smallest model within a budget.

    The effect of a choice for one weight is the relative L2 distance of the outputs with everything else as it is: one run of what stands behind it,
    for each weight, choice and batch (graphopt.calibration.effects). Effects add up as squares; the assembled model is measured, and where it
    misses the budget, or has much left of it, the predicted budget is corrected. Weights that are read several times, or tied, get one choice.

    Args:
        choices: any of `int4` (weight-only, blocks of 32), `int8` (weight-only, blocks of 64), `dynamic` (integer products), or in quotes the text
            of one lossy pass, such as "quantize{mode=weight-only bits=4 method=gptq}". That everything stays as it is, is always a choice.
        loss: the budget, a fraction of the norm of the outputs; by default the `--max-loss` of the run.
        share: so much of the budget is used; a run over the budget halves it.
        batches: of the samples, on which effects are measured; 0 for all. Where there are twice as many or more, choices that fit themselves to
            samples (GPTQ, static ranges) see only the others.
        cost: what becomes small: `bytes` of stored weights, or `time`, measured for each weight and choice on the first batch, as the target runs
            it by itself. Then a choice is only one where it is faster, so that what slows a part down is declined by measurement.
        heads: one choice for each head of an attention (for each key/value head, with the query heads that share it) instead of one for each
            projection: its columns of the query, key and value projections and its rows of the output projection. Heads are reordered so that
            those of one choice lie together, and each projection becomes one product for each choice. After fuse-attention only.
        include: only the nodes whose name (here or in the input model) fits one of these patterns (`*`, `?`, `[abc]`).
        exclude: not the nodes whose name fits one of these.

    Raises:
        PipelineError: a choice that is none of these; when it runs: no budget, or a pattern that fits no node.
        SampleError: when it runs: there are no samples.
    """

    choices: tuple[str, ...] = ("int4", "int8")
    loss: float | None = option(None, above=0, what="a fraction")
    share: float = option(1.0, above=0, most=1)
    batches: int = option(4, least=0)
    cost: Literal["bytes", "time"] = "bytes"
    heads: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    exact: ClassVar[bool] = False
    samples = "needs"
    dials = (Dial("share", mild=1 / 16),)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.choices:
            raise option_error(self.name, "choices", f"one of {', '.join(KNOWN)} at least", "none")
        if self.heads and self.cost == "time":
            raise option_error(self.name, "cost", "bytes with heads=true, as the time of a head by itself says little about all together", self.cost)

    def check(self, known: Mapping[str, type[Pass]]) -> None:
        for choice in self.choices:
            _step(choice, known)

    def run(self, model: ir.Model, ctx: Context) -> int:
        samples, budget = ctx.require_samples(), self._budget(ctx)
        check_patterns(model, (*self.include, *self.exclude), {n.op_type for n in model.graph})
        feeds = list(itertools.islice(samples, self.batches or None))
        blocks = self._blocks(model, ctx) if self.heads else {}
        work, units = model, SplitHeads({name: tuple((g,) for g in range(block.kv_heads)) for name, block in blocks.items()})
        if blocks:
            work = model.clone()
            units.run(work, Context(work))
        refused: dict[str, str] = {}
        fitting = Context(model, target=ctx.target, samples=self._others(samples), original=ctx.original, passes=ctx.passes)
        parts = parts_of(work, self._versions(work, fitting, refused), units.owner)
        self._tell_refused(work, parts, refused, ctx)
        if self.cost == "time" and feeds:
            parts = timed(work, feeds[0], parts, ctx)
        found = self._effects(work, feeds, parts, ctx)

        def assemble(labels: Labels) -> PrecisionPlan:
            if blocks:
                return joined(model, feeds, blocks, parts, labels, lambda graph: self._versions(graph, fitting, {}))
            return whole(work, feeds, parts, labels)

        labels, plan = choose(parts, found, budget, assemble)
        quiet = Context(model, fuel=ctx.fuel)
        changes = 0 if plan.split is None else plan.split.run(model, quiet)
        changes += Assemble(model, merged(plan.parts, plan.labels)).run(model, quiet)
        self._tell(ctx, parts, labels, found)
        plan.tell(ctx, sum(part.nbytes[""] for part in parts), budget, changes)
        return changes

    def _budget(self, ctx: Context) -> float:
        found = self.loss if self.loss is not None else None if ctx.budget is None else ctx.budget.max_loss
        if found is None:
            raise PipelineError("mix-precision needs a budget; add --max-loss X (or max_loss=X in Python), or the option loss=X")
        return found * self.share * _MARGIN

    def _others(self, samples: Batches) -> Batches:
        """What choices are fitted to: batches on which no effect is measured, if there are as many of them. Fits look better on their own samples."""
        return Samples(itertools.islice(samples, self.batches, None)) if self.batches and len(samples) >= 2 * self.batches else samples

    def _versions(self, model: ir.Model, ctx: Context, refused: dict[str, str]) -> dict[str, ir.Model]:
        """The whole graph in each of the choices; `refused` gets the nodes that one of them leaves alone, with the reason."""
        made = {}
        for choice in self.choices:
            copy, quiet = model.clone(), Remarks()
            own = Context(copy, target=ctx.target, samples=ctx.samples, remarks=quiet, original=ctx.original)
            PassManager([_step(choice, registry.passes() if ctx.passes is None else ctx.passes)]).run(copy, own)
            made[choice] = copy
            for remark in quiet:
                if remark.kind == "missed" and remark.node:
                    refused.setdefault(remark.node, f"{choice}: {remark.message}")
        return made

    def _effects(self, model: ir.Model, feeds: Sequence[Feeds], parts: Sequence[PrecisionPart], ctx: Context) -> dict[tuple[int, str], float]:
        """(number of a part, choice) -> effect, of what is smaller than the part as it is."""
        wanted = {}
        for number, part in enumerate(parts):
            reason = next((r for node in part.nodes if (r := passed_over(node, self.include, self.exclude)) is not None), None)
            for label, change in part.changes.items():
                if reason is not None:
                    ctx.remarks.missed(_where(part), f"stays as it is: {reason}")
                    break
                if part.cost[label] >= part.cost[""]:
                    ctx.remarks.missed(_where(part), f"{label} is no choice: {_change(part, label)}")
                    continue
                wanted[number, label] = change
        found = effects(model, feeds, wanted)
        still = {number for number, _ in found} - {number for (number, _), effect in found.items() if effect}
        unseen = _unseen(model, feeds, {number: parts[number] for number in sorted(still)})
        for number in unseen:
            ctx.remarks.missed(_where(parts[number]), "stays as it is: no sample reaches it, and so they do not tell what it is for")
        return {key: effect for key, effect in found.items() if key[0] not in unseen}

    def _blocks(self, model: ir.Model, ctx: Context) -> dict[str, Heads]:
        """By name of the Attention node, those whose heads can be told apart; the others get a remark."""
        found: dict[str, Heads] = {}
        for node, heads in ctx.get(AttentionHeads()).items():
            if node.op_type != "Attention":
                continue
            reason = heads if isinstance(heads, str) else why_together(heads)
            if reason is None and isinstance(heads, Heads) and heads.kv_heads > 1:
                found[str(node.name)] = heads
            else:
                ctx.remarks.missed(node.name or "", f"its heads stay together: {reason or 'they share one key/value head'}")
        if not found:
            ctx.remarks.missed("", "heads=true finds no attention whose heads can be told apart; put fuse-attention before")
        return found

    @staticmethod
    def _tell_refused(model: ir.Model, parts: Sequence[PrecisionPart], refused: Mapping[str, str], ctx: Context) -> None:
        """Nodes that no choice changes, or only inside a subgraph, where effects cannot be measured."""
        taken = {node for part in parts for node in part.nodes}
        for node, operand in Context(model).get(StoredOperands(casts=True)).items():
            if node.graph is not model.graph and not operand.quantized:
                ctx.remarks.missed(node.name or "", "stays as it is: it stands inside a subgraph, where its effect cannot be measured")
            elif node not in taken and node.name in refused:
                ctx.remarks.missed(node.name or "", refused[node.name or ""])

    @staticmethod
    def _tell(ctx: Context, parts: Sequence[PrecisionPart], labels: Labels, found: Effects) -> None:
        for number, (part, label) in enumerate(zip(parts, labels, strict=True)):
            measured = {other: effect for (k, other), effect in found.items() if k == number}
            if not measured:
                continue
            facts: dict[str, Any] = {"choice": label, "effects": {k: round(e, 6) for k, e in measured.items()}, "bytes": part.nbytes[label]}
            where, what = _where(part), ""
            if isinstance(part.key, tuple):
                what, facts["group"] = f"head group {part.key[1]}: ", part.key[1]
            else:
                facts["weight"] = part.weight
            if label:
                ctx.remarks.applied(where, f"{what}{label}: effect {measured[label]:.4g}, {_change(part, label)}", **facts)
            else:
                told = ", ".join(f"{other} {effect:.4g}" for other, effect in measured.items())
                ctx.remarks.missed(where, f"{what}stays as it is; effects: {told}", **facts)


def _unseen(model: ir.Model, feeds: Sequence[Feeds], parts: Mapping[int, PrecisionPart]) -> list[int]:
    """Those of the parts that no sample reaches, such as an expert that no token is sent to."""
    read = {number: {v for v in part.nodes[0].inputs if v is not None and not is_constant(v)} for number, part in parts.items()}
    values = list(dict.fromkeys(v for found in read.values() for v in found))
    reached = {v for _, arrays in shown(model, values, feeds) for v, array in arrays.items() if array.size} if values else set()
    return [number for number, found in read.items() if found and not found & reached]


def _where(part: PrecisionPart) -> str:
    """The node of the graph that a remark is about: for heads, which were taken apart in a copy, the attention."""
    return str(part.key[0]) if isinstance(part.key, tuple) else part.name


def _change(part: PrecisionPart, label: str) -> str:
    """`589824 -> 156672 bytes`."""
    return f"{part.cost['']:.9g} -> {part.cost[label]:.9g} {part.unit}"


def _step(choice: str, known: Mapping[str, type[Pass]]) -> Pass:
    """The pass that a choice stands for."""
    steps: list[Pass] = parse(KNOWN.get(choice, choice), known)
    if len(steps) != 1 or steps[0].exact or isinstance(steps[0], MixPrecision):
        raise option_error("mix-precision", "choices", f"{', '.join(KNOWN)}, or the text of one lossy pass in quotes", choice)
    return steps[0]
