"""How long each part of a graph takes in each of its settings, as the target runs it: measured, once for parts of one shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence

import onnx_ir as ir

from graphopt.analysis.linear import Embedding, Linear, StoredOperands
from graphopt.compress.mix.parts import PrecisionPart
from graphopt.core.contract import Array, Context, Session, Target
from graphopt.core.errors import PipelineError
from graphopt.core.pipeline import lower
from graphopt.io import load as frontend
from graphopt.run import Feeds, Port, guarded, ort, race
from graphopt.run.clock import NOISE
from graphopt.run.observe import exposed
from graphopt.run.segments import Change, Recipe, alone


def timed(model: ir.Model, feed: Feeds, parts: Sequence[PrecisionPart], ctx: Context) -> list[PrecisionPart]:
    """The parts with the microseconds of one run on `feed` as their cost. Each is timed by itself, so what several share (an input that is rounded
    once for all) counts for each.

    Raises:
        PipelineError: the target does not run here.
    """
    target = ctx.target
    if target is None or not target.runs_here():
        raise PipelineError("mix-precision: cost=time needs a target that runs on this machine; use cost=bytes")
    operands = Context(model).get(StoredOperands(casts=True))
    plain = [_as_it_is(operands, part) for part in parts]
    reads = {
        name for part, own in zip(parts, plain, strict=True) for change in (own, *part.changes.values()) for r in change.values() for name in r.reads
    }
    state = _values(model, feed, reads)
    known: dict[Hashable, dict[str, float]] = {}
    result = []
    for part, own in zip(parts, plain, strict=True):
        changes = {"": own, **part.changes}
        key = tuple((label, _signature(change, state)) for label, change in changes.items())
        if key not in known:
            sessions = {label: _session(model, change, state, target) for label, change in changes.items()}
            wanted = {name: state[name] for change in changes.values() for r in change.values() for name in r.reads}
            found = race.race(sessions, {"": wanted}, clock=race.clock_of(target), effort=race.CHOICE)
            known[key] = {label: seconds[0] for label, seconds in found.seconds.items()}
        limit = known[key][""]  # what is not faster beyond the noise is no choice
        cost = {label: round(1e6 * (s if not label or s * NOISE < limit else max(s, limit)), 1) for label, s in known[key].items()}
        result.append(dataclasses.replace(part, cost=cost, unit="us"))
    return result


def _session(model: ir.Model, change: Change, state: Mapping[str, Array], target: Target) -> Session:
    small = lower(frontend.load(alone(model, change, state)), target)
    inputs = [Port(str(v.name), None, ()) for v in small.graph.inputs]
    return race.Picky(guarded.opened(target, small, {port.name: state[port.name] for port in inputs}), inputs)


def _as_it_is(operands: Mapping[ir.Node, Linear | Embedding], part: PrecisionPart) -> Change:
    found = {}
    for node in part.nodes:
        path = operands[node].path if node in operands else ()
        found[str(node.outputs[0].name)] = Recipe((*path, node), "")
    return found


def _values(model: ir.Model, feed: Feeds, names: set[str]) -> dict[str, Array]:
    made = {str(v.name) for node in model.graph for v in node.outputs} & names
    inner = ort.session(exposed(model, sorted(made))).run(feed) if made else {}
    return {**{name: array for name, array in feed.items() if name in names}, **inner}


def _signature(change: Change, state: Mapping[str, Array]) -> Hashable:
    """Equal signatures = equal work."""
    return tuple(
        (
            tuple(node.op_type for node in recipe.nodes),
            tuple((v.const_value.dtype, tuple(v.const_value.shape)) for v in recipe.constants if v.const_value is not None),
            tuple((state[name].dtype.str, state[name].shape) for name in recipe.reads),
        )
        for recipe in change.values()
    )
