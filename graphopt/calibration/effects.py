"""What each change of a graph costs by itself: its effect on the final outputs, on samples, with everything else as it is.

One run of what stands behind the change, for each change and each batch: the values in front of it are those of the unchanged graph.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from graphopt.calibration.padding import Padding
from graphopt.core.errors import SampleError
from graphopt.graph.questions import is_constant, is_graph
from graphopt.run import Feeds
from graphopt.run.distance import Squares
from graphopt.run.segments import Change, Recipe, Segments

K = TypeVar("K", bound=Hashable)


def recipes(graph: ir.Model, other: ir.Model, label: str) -> dict[str, Recipe]:
    """Where `other` makes a value of the main graph of `graph` in another way, value by value.

    `other` is a changed clone of `graph`: values that stand for the same place have the same name, as the rewrite driver keeps it, and constants
    that were not changed are the same. Each recipe starts at values that `graph` has, so that recipes can be put in place one by one.

    Args:
        label: names `other` in `Recipe.label`.
    """
    known = {str(v.name): v for node in graph.graph for v in node.outputs if v.name}
    there = {str(v.name): v for node in other.graph for v in node.outputs if v.name}
    stops = {*known, *(str(v.name) for v in graph.graph.inputs)}
    found: dict[str, Recipe] = {}
    for name, value in known.items():
        old, new = value.producer(), there[name].producer() if name in there else None
        if old is None or new is None or _same(old, new):
            continue
        nodes = _slice(new, stops)
        if nodes is not None:
            found[name] = Recipe(nodes, label)
    return found


def effects(model: ir.Model, samples: Iterable[Feeds], changes: Mapping[K, Change]) -> dict[K, float]:
    """For each change alone ||outputs - original outputs|| / ||original outputs|| over all samples, of the output where it is largest.

    Positions of padding do not count.
    One batch is in memory at a time, with the values that cross one cut; the sessions hold the weights once, and once more what the changes
    bring. Outputs that cannot be compared (another shape, numbers that are not finite) count as infinitely far.

    Args:
        model: runs on ONNX Runtime (standard operators); it is not changed.
        changes: made by `recipes`; several values of one change are changed together.

    Raises:
        SampleError: there was no sample.
        TargetError: the graph does not run.
    """
    needs: dict[str, set[str]] = {}
    for change in changes.values():
        for name, recipe in change.items():
            needs.setdefault(name, set()).update(recipe.reads)
    runner = Segments(model, needs, needs)
    by_piece: dict[int, list[K]] = {}
    for key, change in changes.items():
        if change:
            by_piece.setdefault(min(map(runner.piece_of, change)), []).append(key)
    sums = {key: Squares() for key in changes}
    count, padding = 0, Padding(model)
    for feed in samples:
        count += 1
        kept = padding.kept(feed)
        base = kept.counted(runner.finish(0, runner.begin(feed)))
        state, here = runner.begin(feed), 0
        for piece in sorted(by_piece):
            while here < piece:
                state, here = runner.step(here, state), here + 1
            for key in by_piece[piece]:
                sums[key].add(base, kept.counted(runner.finish(piece, state, changes[key], key)))
    if not count:
        raise SampleError("the effects of changes need samples, and there were 0: the source is empty, or a generator that was used before")
    return {key: found.relative for key, found in sums.items()}


def _same(old: ir.Node, new: ir.Node) -> bool:
    if (old.domain, old.op_type, len(old.inputs)) != (new.domain, new.op_type, len(new.inputs)):
        return False
    if {k: str(a.value) for k, a in old.attributes.items() if not is_graph(a)} != {
        k: str(a.value) for k, a in new.attributes.items() if not is_graph(a)
    }:
        return False
    return all(_same_value(a, b) for a, b in zip(old.inputs, new.inputs, strict=True))


def _same_value(a: ir.Value | None, b: ir.Value | None) -> bool:
    if a is None or b is None:
        return a is b
    if not is_constant(a) or not is_constant(b):
        return a.name == b.name and is_constant(a) == is_constant(b)
    assert a.const_value is not None
    assert b.const_value is not None
    if a.const_value is b.const_value:
        return True
    alike = (a.const_value.dtype, a.const_value.shape) == (b.const_value.dtype, b.const_value.shape)
    return alike and bool(np.array_equal(a.const_value.numpy(), b.const_value.numpy()))


def _slice(last: ir.Node, stops: set[str]) -> tuple[ir.Node, ...] | None:
    """`last` and what it is computed from, back to values of the names `stops`; None where that enters a subgraph, or needs something else."""
    order: dict[ir.Node, None] = {}
    todo: list[tuple[ir.Node, bool]] = [(last, False)]
    while todo:
        node, ready = todo.pop()
        if ready:
            order[node] = None
            continue
        if node in order:
            continue
        if any(is_graph(a) for a in node.attributes.values()):
            return None
        todo.append((node, True))
        for value in node.inputs:
            if value is None or is_constant(value) or value.name in stops:
                continue
            source = value.producer()
            if source is None:
                return None
            todo.append((source, False))
    return tuple(order)
