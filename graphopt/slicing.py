"""Remove indices along axes of a graph, with all that this entails: heads, neurons, features, vocabulary rows.

A removal starts at some axis of some value and is closed over the graph: what a MatMul contracts goes on both sides, what an Add aligns goes
in both terms, a Reshape carries heads into features, a Split into its parts. The closure ends at stored weights, which are sliced, and at
contractions, whose result does not change its size. So the pruned graph computes what the old one would if the removed entries were zero
where they are summed. What has no rule refuses; nothing is guessed from sizes.

Terms: a *mask* is a bool array along one axis, True where an index goes. Its length is that of the axis; of an axis of unknown length
(batch * heads) it is the period with which it repeats. Rules for operators stand in `slice_rules.py`.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.core import Array
from graphopt.errors import GraphoptError
from graphopt.graph import consumers, is_constant, static_dim

Masks = dict[int, Array]  # axis -> mask


class Refusal(GraphoptError):
    """Why a removal is not possible: an operator without a rule, heads that would become ragged, an output that belongs to the user."""


@dataclasses.dataclass(frozen=True)
class Slot:
    """One operand (`output` False) or result of a node."""

    node: ir.Node
    index: int
    output: bool = False

    @property
    def value(self) -> ir.Value | None:
        if self.output:
            return self.node.outputs[self.index] if self.index < len(self.node.outputs) else None
        return self.node.inputs[self.index] if self.index < len(self.node.inputs) else None


class Slicing:
    """The removals that are planned for one unchanged graph. `remove` adds one and closes it; `apply` (slice_apply.py) carries all of them out.

    Attributes:
        removed: for each computed value what goes along its axes.
        private: the same for operands that are sliced for one reader only: stored constants, and computed values that others read whole.
        notes: what a reader of the report should know: norms over fewer features, forked weights, caches that shrink.
    """

    def __init__(self, model: ir.Model, *, resize: Collection[str] = ()) -> None:
        """`resize`: names of graph inputs and outputs that may change their size."""
        self.model = model
        self.removed: dict[ir.Value, Masks] = {}
        self.private: dict[Slot, Masks] = {}
        self.notes: dict[tuple[str, str], None] = {}
        self.resize = frozenset(resize)
        self._inside: Collection[ir.Value] | None = None
        self._asked: dict[ir.Value, dict[Slot, Masks]] = {}
        self._entered: set[ir.Value] = set()
        self._queue: deque[ir.Node] = deque()

    def remove(self, value: ir.Value, axis: int, mask: Array, *, inside: Collection[ir.Value] | None = None) -> None:
        """Remove what `mask` marks along `axis` of `value`, and everything that must go with it.

        Args:
            inside: the values that may change for all their readers; what enters from elsewhere (masks, rotary caches, position biases) is
                sliced for this reader alone where others read it too. None: every value may change.

        Raises:
            Refusal: it cannot be done; nothing is planned then that was not before.
        """
        with self._all_or_nothing():
            self._inside = inside
            self._mark(value, axis % _rank(value), mask)
            self._close()

    def mask(self, slot: Slot, axis: int) -> Array | None:
        """What goes along one axis (counted from the front) of an operand or result."""
        found = self.private.get(slot, {}).get(axis)
        value = slot.value
        return found if found is not None else None if value is None else self.removed.get(value, {}).get(axis)

    def mark(self, slot: Slot, axis: int, mask: Array | None) -> None:
        """A rule says: this goes too."""
        value = slot.value
        if value is None or mask is None or not mask.any():
            return
        if slot.output:
            self._mark(value, axis, mask)
        elif is_constant(value):
            if value.is_graph_output():
                raise Refusal(f"`{value.name}` is a stored output of the model")
            self._keep_private(slot, axis, mask)
        elif self._inside is None or value in self._inside:
            self._mark(value, axis, mask)
        else:
            known = self._asked.setdefault(value, {}).setdefault(slot, {})
            if axis not in known or not np.array_equal(known[axis], mask):
                known[axis] = mask if axis not in known else _joined(known[axis], mask, value)

    def note(self, node: ir.Node, text: str) -> None:
        self.notes[node.name or "", text] = None

    # ---- the closure ------------------------------------------------------------------------------------------------------------------

    def _mark(self, value: ir.Value, axis: int, mask: Array) -> None:
        size = static_dim(value, axis)
        if size is not None and size != len(mask):
            if size % len(mask):
                raise Refusal(f"`{value.name}` has {size} entries along axis {axis}, which {len(mask)} do not repeat in")
            mask = np.tile(mask, size // len(mask))
        if size is not None and mask.all():
            raise Refusal(f"nothing of axis {axis} of `{value.name}` would be left")
        masks = self.removed.setdefault(value, {})
        before = masks.get(axis)
        after = mask.copy() if before is None else _joined(before, mask, value)
        if before is not None and np.array_equal(before, after):
            return
        masks[axis] = after
        self._check_port(value)
        maker = value.producer()
        self._queue.extend(consumers(value))
        if maker is not None:
            self._queue.append(maker)

    def _check_port(self, value: ir.Value) -> None:
        if not (value.is_graph_output() or value.is_graph_input()) or value.name in self.resize:
            return
        what = "an output" if value.is_graph_output() else "an input"
        raise Refusal(f"`{value.name}` is {what} of the model, and would change its size")

    def _keep_private(self, slot: Slot, axis: int, mask: Array) -> None:
        masks = self.private.setdefault(slot, {})
        size = static_dim(slot.value, axis)
        if size is not None and size != len(mask):
            mask = np.tile(mask, size // len(mask))
        before = masks.get(axis)
        after = mask.copy() if before is None else before | mask
        if before is None or not np.array_equal(before, after):
            masks[axis] = after
            self._queue.append(slot.node)

    def _close(self) -> None:
        from graphopt.slice_rules import link

        visited: dict[ir.Node, None] = {}
        while True:
            while self._queue:
                node = self._queue.popleft()
                visited[node] = None
                link(node, self)
            if not self._settle():
                break
        for node in visited:  # what was ragged on the way may be even now
            link(node, self, final=True)
        if self._queue:
            raise Refusal("the removal does not come to an end")

    def _settle(self) -> bool:
        """Decide about operands from outside: changed for all if every reader asks for the same, else sliced for those who asked."""
        for value, wanted in self._asked.items():
            masks = next(iter(wanted.values()))
            if self._alike(value, wanted):
                for slot in wanted:
                    self.private.pop(slot, None)
                for axis, mask in masks.items():
                    self._mark(value, axis, mask)
                self._queue.extend(slot.node for slot in wanted if value not in self._entered)
                self._entered.add(value)
            elif value in self._entered:
                raise Refusal(f"`{value.name}` has lost entries for all its readers, and one of them is to lose more")
            if self._queue:
                return True
        for value, wanted in self._asked.items():
            if value in self._entered:
                continue
            if _stems_from_constants(value):
                raise Refusal(f"the weight behind `{value.name}` is decoded once for several readers; prune before quantizing")
            for slot, asked in wanted.items():
                for axis, mask in asked.items():
                    self._keep_private(slot, axis, mask)
        return bool(self._queue)

    def _alike(self, value: ir.Value, wanted: dict[Slot, Masks]) -> bool:
        """Every reader of an operand from outside asks for the same removal, and nobody else sees it."""
        if value.is_graph_output() or (value.is_graph_input() and value.name not in self.resize):
            return False
        masks = list(wanted.values())
        return {Slot(use.node, use.idx) for use in value.uses()} == set(wanted) and all(_equal(masks[0], m) for m in masks)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        saved = (_copy(self.removed), _copy(self.private), dict(self.notes), {v: _copy(w) for v, w in self._asked.items()}, set(self._entered))
        try:
            yield
        except Refusal:
            self.removed, self.private, self.notes, self._asked, self._entered = saved
            self._queue.clear()
            raise


# ---- masks --------------------------------------------------------------------------------------------------------------------------------


def factor(mask: Array, sizes: list[int]) -> list[Array]:
    """The removal along each piece of an axis that is split into `sizes`, outer first: an index of a piece goes if all that has it goes."""
    keep = ~mask.reshape(sizes)
    everything = range(len(sizes))
    return [~keep.any(axis=tuple(k for k in everything if k != piece)) for piece in everything]


def spread(masks: list[Array]) -> Array:
    """The removal along an axis that joins pieces, outer first: an entry goes if its index along any piece goes."""
    keep = np.ones((), bool)
    for mask in masks:
        keep = np.multiply.outer(keep, ~mask)
    return ~keep.reshape(-1)


def is_ragged(mask: Array, sizes: list[int]) -> bool:
    return not np.array_equal(spread(factor(mask, sizes)), mask)


def kept(mask: Array) -> Array:
    """The indices that stay, int64, ascending."""
    found: Array = np.flatnonzero(~mask)
    return found


def _joined(a: Array, b: Array, value: ir.Value) -> Array:
    if len(a) != len(b):
        longer = int(np.lcm(len(a), len(b)))
        if longer not in (len(a), len(b)):
            raise Refusal(f"an axis of `{value.name}` is cut in two ways that do not fit")
        a, b = np.tile(a, longer // len(a)), np.tile(b, longer // len(b))
    either: Array = a | b
    return either


def _equal(a: Masks, b: Masks) -> bool:
    return set(a) == set(b) and all(np.array_equal(a[k], b[k]) for k in a)


def _copy(masks: dict[Any, Masks]) -> dict[Any, Masks]:
    return {key: dict(value) for key, value in masks.items()}


def _rank(value: ir.Value) -> int:
    if value.shape is None:
        raise Refusal(f"the shape of `{value.name}` is unknown")
    return len(value.shape)


def _stems_from_constants(value: ir.Value, depth: int = 6) -> bool:
    """True for a stored weight behind DequantizeLinear, Transpose, Cast and the like."""
    node = value.producer()
    if node is None or depth == 0:
        return is_constant(value)
    return all(v is None or is_constant(v) or _stems_from_constants(v, depth - 1) for v in node.inputs) and bool(node.inputs)
