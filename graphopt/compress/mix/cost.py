"""How long each part of a graph takes in each of its settings, as the target runs it: measured, once for parts of one shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence

import onnx_ir as ir

from graphopt.analysis.linear import StoredOperands
from graphopt.compress.mix.parts import Part
from graphopt.core.contract import Array, Context, Session
from graphopt.core.errors import PipelineError
from graphopt.core.pipeline import PassManager
from graphopt.io import load as frontend
from graphopt.run import Feeds, ort
from graphopt.run.clock import latency, steady_clock
from graphopt.run.observe import exposed
from graphopt.run.segments import Change, Recipe, alone

_NOISE = 0.97  # of the time as it is; what is not clearly faster is no choice
_ROUNDS, _BLOCK = 5, 4


def timed(model: ir.Model, feed: Feeds, parts: Sequence[Part], ctx: Context) -> list[Part]:
    """The parts with the microseconds of one run on `feed` as their cost. Each is timed by itself, so what several share (an input that is rounded
    once for all) counts for each.

    Raises:
        PipelineError: the target does not run here.
    """
    machine = None if ctx.target is None else ctx.target.machine()
    if machine is None:
        raise PipelineError("mix-precision: cost=time needs a target that runs on this machine; use cost=bytes")
    plain = [_as_it_is(model, part) for part in parts]
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
            sessions = {label: _session(model, change, state, ctx) for label, change in changes.items()}
            wanted = {name: state[name] for change in changes.values() for r in change.values() for name in r.reads}
            found = latency(sessions, {"": wanted}, rounds=_ROUNDS, block=_BLOCK, clock=steady_clock(machine.own_threads))
            known[key] = {label: seconds[0] for label, seconds in found.seconds.items()}
        limit = known[key][""]
        cost = {label: round(1e6 * (s if not label or s < _NOISE * limit else max(s, limit)), 1) for label, s in known[key].items()}
        result.append(dataclasses.replace(part, cost=cost, unit="us"))
    return result


class _Fed:
    """A session that takes what it needs of the feeds."""

    def __init__(self, session: Session, names: Sequence[str]) -> None:
        self._session, self._names = session, names

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        return self._session.run({name: feeds[name] for name in self._names})


def _session(model: ir.Model, change: Change, state: Mapping[str, Array], ctx: Context) -> Session:
    assert ctx.target is not None
    small = frontend.load(alone(model, change, state))
    PassManager(ctx.target.lowerings()).run(small, Context(small, target=ctx.target))
    return _Fed(ctx.target.session(small), [str(v.name) for v in small.graph.inputs])


def _as_it_is(model: ir.Model, part: Part) -> Change:
    operands = Context(model).get(StoredOperands(casts=True))
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
