"""What removing heads and neurons saves in time, measured on the target; blocks of one shape are measured together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.compress.prune.criterion import Ranking
from graphopt.compress.prune.removable import Candidate, Removable
from graphopt.core.contract import Array, Context, Target
from graphopt.core.errors import TargetError
from graphopt.core.pipeline import lower
from graphopt.rewrite.slicing.apply import apply
from graphopt.rewrite.slicing.close import Slicing
from graphopt.run import guarded, race

_POINTS = (0.25, 0.5, 0.75)  # of the steps of a block; between them time is a straight line


def savings(model: ir.Model, ctx: Context, rankings: Mapping[Candidate, Ranking], resize: Sequence[str]) -> dict[Candidate, list[float]]:
    """The fraction of the whole model's latency that the first k steps of each candidate save; they add, nearly.

    Raises:
        TargetError: the target cannot run here.
    """
    target = _runnable(ctx.target)
    kinds: dict[object, list[Candidate]] = {}
    for c in rankings:
        kinds.setdefault((c.kind, c.count, c.group, c.width, c.saves), []).append(c)
    models = {"whole": model}
    for k, alike in enumerate(kinds.values()):
        for point in _POINTS:
            models[f"{k} {point}"] = _without(model, {c: rankings[c].first(_steps(rankings[c], point)) for c in alike}, resize)
    ratios = _race(target, models)
    found: dict[Candidate, list[float]] = {}
    for k, alike in enumerate(kinds.values()):
        for c in alike:
            steps = [0, *(_steps(rankings[c], point) for point in _POINTS)]
            saved = np.maximum.accumulate([0.0, *((1 - ratios[f"{k} {point}"]) / len(alike) for point in _POINTS)])
            found[c] = _line(steps, saved, len(rankings[c].order))
    return found


def speedup(ctx: Context, before: ir.Model, after: ir.Model) -> float:
    """Time of one graph over that of another, as the target runs them; geometric mean over its shapes."""
    return 1 / _race(_runnable(ctx.target), {"whole": before, "other": after})["other"]


def _runnable(target: Target | None) -> Target:
    if target is None or not target.runs_here():
        raise TargetError("a latency budget needs a target that runs here; give one that does, or flops=... instead of latency=...")
    return target


def _steps(ranking: Ranking, point: float) -> int:
    return round(point * len(ranking.order))


def _line(steps: Sequence[int], saved: Array, count: int) -> list[float]:
    """Between the measured steps straight, behind the last one as steep as in front of it."""
    slope = (saved[-1] - saved[-2]) / max(steps[-1] - steps[-2], 1)
    return [float(np.interp(k, steps, saved)) + max(k - steps[-1], 0) * float(slope) for k in range(count + 1)]


def _without(model: ir.Model, gone: Mapping[Candidate, Array], resize: Sequence[str]) -> ir.Model:
    """A clone without these groups; its candidates stand in the order of those of the model."""
    copy = model.clone()
    twins = {(c.kind, c.units[0].index): c for c in Removable(tuple(resize)).compute(copy, Context(copy)).candidates}
    plan = Slicing(copy, resize=resize)
    for c, groups in gone.items():
        for unit in twins[c.kind, c.units[0].index].units if len(groups) else ():
            plan.remove(unit.value, unit.axis, unit.mask(c.members(groups.tolist())), inside=unit.inside)
    apply(plan)
    return copy


def _race(target: Target, models: Mapping[str, ir.Model]) -> dict[str, float]:
    """Time of each model over that of `whole`: medians of one interleaved run, geometric mean over the target's shapes."""
    feeds = race.feeds_for([models["whole"]], race.shapes_of(target))
    first = next(iter(feeds.values()))
    sessions = {name: guarded.opened(target, lower(model, target, tune=False), first) for name, model in models.items()}
    timed = race.race(sessions, feeds, clock=race.clock_of(target), effort=race.CHOICE)
    return {name: 1 / timed.speedup(name) for name in sessions}
