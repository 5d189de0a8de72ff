"""mix-precision: for each stored weight the cheapest of several quantizations, so that the outputs together stay within a budget."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import onnx_ir as ir

from graphopt import registry
from graphopt.analysis.sensitivity import effects
from graphopt.core import Context, Pass
from graphopt.errors import PipelineError
from graphopt.knapsack import Assignment, Option, predicted, settle
from graphopt.pipeline import PassManager, parse
from graphopt.remarks import Remarks
from graphopt.run import Feeds

from ._eligible import check_patterns, passed_over
from ._mixture import Assemble, Part, merged, parts_of

KNOWN = {
    "int4": "quantize{mode=weight-only bits=4}",
    "int8": "quantize{mode=weight-only block=64}",
    "dynamic": "quantize",
}
_MARGIN = 0.98  # of the budget: the target computes in another order than the measurement
_LEAST_SHARE = 1 / 16


@dataclasses.dataclass(frozen=True)
class MixPrecision(Pass):
    """Measure what each choice does to the outputs, weight by weight, and take the smallest model within a budget.

    The effect of a choice for one weight is the relative L2 distance of the outputs with everything else as it is: one run of what stands behind it,
    for each weight, choice and batch (graphopt.analysis.sensitivity). Effects add up as squares; the assembled model is measured, and where it
    misses the budget, or has much left of it, the predicted budget is corrected. Weights that are read several times, or tied, get one choice.

    Args:
        choices: any of `int4` (weight-only, blocks of 32), `int8` (weight-only, blocks of 64), `dynamic` (integer products), or in quotes the text
            of one lossy pass, such as "quantize{mode=weight-only bits=4 method=gptq}". That everything stays as it is, is always a choice.
        loss: the budget, a fraction of the norm of the outputs; by default the `--max-loss` of the run.
        share: so much of the budget is used; a run over the budget halves it.
        batches: of the samples, on which effects are measured; 0 for all.
        include: only the nodes whose name (here or in the input model) fits one of these patterns (`*`, `?`, `[abc]`).
        exclude: not the nodes whose name fits one of these.

    Raises:
        PipelineError: a choice that is none of these; when it runs: no budget, or a pattern that fits no node.
        SampleError: when it runs: there are no samples.
    """

    choices: tuple[str, ...] = ("int4", "int8")
    loss: float | None = None
    share: float = 1.0
    batches: int = 4
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.choices:
            _refuse("choices", f"one of {', '.join(KNOWN)} at least", "none")
        for choice in self.choices:
            _step(choice)
        if self.loss is not None and not self.loss > 0:
            _refuse("loss", "a fraction above 0", self.loss)
        if not 0 < self.share <= 1:
            _refuse("share", "a number above 0 and at most 1", self.share)
        if self.batches < 0:
            _refuse("batches", "a number of batches, or 0 for all", self.batches)

    def weaker(self) -> Self | None:
        return dataclasses.replace(self, share=self.share / 2) if self.share / 2 >= _LEAST_SHARE else None

    def run(self, model: ir.Model, ctx: Context) -> int:
        samples, budget = ctx.require_samples(), self._budget(ctx)
        check_patterns(model, (*self.include, *self.exclude), {n.op_type for n in model.graph})
        feeds = list(itertools.islice(samples, self.batches or None))
        parts = parts_of(model, self._versions(model, ctx))
        found = self._effects(model, feeds, parts, ctx)
        labels, options = _options(parts, found)

        def change(chosen: Assignment) -> Mapping[str, object]:
            return merged(parts, [own[k] for own, k in zip(labels, chosen, strict=True)])

        chosen, loss = settle(options, budget, lambda chosen: effects(model, feeds, {"all": change(chosen)})["all"])  # type: ignore[dict-item]
        done = [own[k] for own, k in zip(labels, chosen, strict=True)]
        changes = Assemble(model, merged(parts, done)).run(model, Context(model, fuel=ctx.fuel))
        self._tell(ctx, parts, done, found)
        sizes = [sum(part.nbytes[label] for part, label in zip(parts, own, strict=True)) for own in ([""] * len(parts), done)]
        facts = {"loss": loss, "predicted": predicted(options, chosen), "budget": budget, "before": sizes[0], "after": sizes[1]}
        what = ", ".join(f"{count} {label or 'as they are'}" for label, count in Counter(done).items()) or "nothing to quantize"
        text = f"{what}; {sizes[0]} -> {sizes[1]} bytes, loss {loss:.4g} of {budget:.4g} (predicted {facts['predicted']:.4g})"
        (ctx.remarks.applied if changes else ctx.remarks.missed)("", text, **facts)
        return changes

    def _budget(self, ctx: Context) -> float:
        found = self.loss if self.loss is not None else None if ctx.budget is None else ctx.budget.max_loss
        if found is None:
            raise PipelineError("mix-precision needs a budget; add --max-loss X (or max_loss=X in Python), or the option loss=X")
        return found * self.share * _MARGIN

    def _versions(self, model: ir.Model, ctx: Context) -> dict[str, ir.Model]:
        """The whole graph in each of the choices."""
        made = {}
        for choice in self.choices:
            copy, quiet = model.clone(), Remarks()
            own = Context(copy, target=ctx.target, samples=ctx.samples, remarks=quiet, original=ctx.original)
            PassManager([_step(choice)]).run(copy, own)
            made[choice] = copy
        return made

    def _effects(self, model: ir.Model, feeds: Sequence[Feeds], parts: Sequence[Part], ctx: Context) -> dict[tuple[int, str], float]:
        """(number of a part, choice) -> effect, of what is smaller than the part as it is."""
        wanted = {}
        for number, part in enumerate(parts):
            reason = next((r for node in part.nodes if (r := passed_over(node, self.include, self.exclude)) is not None), None)
            for label, change in part.changes.items():
                if reason is not None:
                    ctx.remarks.missed(part.name, f"stays as it is: {reason}")
                    break
                if part.nbytes[label] >= part.nbytes[""]:
                    ctx.remarks.missed(part.name, f"{label} is no choice: it needs {part.nbytes[label]} bytes instead of {part.nbytes['']}")
                    continue
                wanted[number, label] = change
        return effects(model, feeds, wanted)

    def _tell(self, ctx: Context, parts: Sequence[Part], done: Sequence[str], found: Mapping[tuple[int, str], float]) -> None:
        for number, (part, label) in enumerate(zip(parts, done, strict=True)):
            measured = {other: effect for (k, other), effect in found.items() if k == number}
            if not measured:
                continue
            facts = {"choice": label, "weight": part.weight, "effects": {k: round(e, 6) for k, e in measured.items()}, "bytes": part.nbytes[label]}
            if label:
                ctx.remarks.applied(part.name, f"{label}: effect {measured[label]:.4g}, {part.nbytes['']} -> {part.nbytes[label]} bytes", **facts)
            else:
                told = ", ".join(f"{other} {effect:.4g}" for other, effect in measured.items())
                ctx.remarks.missed(part.name, f"stays as it is; effects: {told}", **facts)


def _options(parts: Sequence[Part], found: Mapping[tuple[int, str], float]) -> tuple[list[list[str]], list[list[Option]]]:
    """For each part its labels, and what each costs."""
    labels = [["", *(label for k, label in found if k == number)] for number in range(len(parts))]
    options = [
        [Option(part.nbytes[label], found[number, label] if label else 0.0) for label in own]
        for number, (part, own) in enumerate(zip(parts, labels, strict=True))
    ]
    return labels, options


def _step(choice: str) -> Pass:
    """The pass that a choice stands for."""
    steps: list[Pass] = parse(KNOWN.get(choice, choice), registry.passes())
    if len(steps) != 1 or steps[0].exact or isinstance(steps[0], MixPrecision):
        _refuse("choices", f"{', '.join(KNOWN)}, or the text of one lossy pass in quotes", choice)
    return steps[0]


def _refuse(key: str, expected: str, found: object) -> None:
    error = PipelineError(f"mix-precision: option `{key}` expects {expected}, found `{found}`")
    error.bad_key = key  # type: ignore[attr-defined]
    raise error
