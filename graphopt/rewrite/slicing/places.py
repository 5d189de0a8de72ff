"""What rules say most: that axes at several slots of a node are one and the same thing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt.core.contract import Array
from graphopt.graph.questions import static_dim
from graphopt.rewrite.slicing.plan import Refusal, Removals, Slot


def slots(node: ir.Node) -> list[Slot]:
    every = (Slot(node, k, output) for output, values in ((False, node.inputs), (True, node.outputs)) for k in range(len(values)))
    return [slot for slot in every if slot.there]


def rank(slot: Slot) -> int:
    value = slot.value
    if value is None or value.shape is None:
        raise Refusal(f"{slot.node.op_type} `{slot.node.name}`: the shape of `{'?' if value is None else value.name}` is unknown")
    return len(value.shape)


def same(s: Removals, places: Sequence[tuple[Slot, int]]) -> None:
    """These axes are one: what goes along one goes along all. Axes of size 1 broadcast, and stay."""
    wide = [(slot, axis) for slot, axis in places if static_dim(slot.value, axis) != 1]
    for slot, axis in wide:
        mask = s.mask(slot, axis)
        for other, other_axis in wide:
            if mask is not None and other != slot:
                s.mark(other, other_axis, mask)


def forbid(node: ir.Node, s: Removals, slot: Slot, axes: Sequence[int], why: str) -> None:
    for axis in axes:
        if s.mask(slot, axis) is not None:
            raise Refusal(f"{node.op_type} `{node.name}` {why}")


def integers(known: Sequence[object] | None) -> list[int] | None:
    """Sizes or axes that are all known as numbers."""
    return [n for n in known if isinstance(n, int)] if known is not None and all(isinstance(n, int) for n in known) else None


def aligned(s: Removals, parts: Sequence[Slot]) -> None:
    """Axes aligned from the last one, as broadcasting does."""
    ranks = {slot: rank(slot) for slot in parts}
    for back in range(1, max(ranks.values(), default=0) + 1):
        same(s, [(slot, r - back) for slot, r in ranks.items() if r >= back])


def union(masks: Sequence[Array | None], size: int | None = None) -> Array:
    found = [m for m in masks if m is not None and m.any()]
    if found:
        either: Array = np.any(found, axis=0)
        return either
    return np.zeros(size or 0, np.bool_)
