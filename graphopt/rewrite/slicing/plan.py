"""What is planned to be removed from a graph: masks along axes of values, and of operands that change for one reader only.

A *mask* is a bool array along one axis, True where an index goes. Its length is that of the axis; of an axis of unknown length (batch * heads)
it is the period with which it repeats.
"""

from __future__ import annotations

import dataclasses
import enum
from collections import deque
from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.core.contract import Array
from graphopt.core.errors import GraphoptError
from graphopt.graph.questions import consumers, is_constant, static_dim

AxisMasks = dict[int, Array]  # axis -> mask


class Remedy(enum.Enum):
    """What a caller can do about a refusal."""

    FINAL = "nothing"
    UNEVEN = "remove more: heads or groups that are left would differ in size"
    PORT = "ask the user: an input or output of the model would change its size"


class Refusal(GraphoptError):
    """Why a removal is not possible: an operator without a rule, heads that would become ragged, an output that belongs to the user."""

    def __init__(self, text: str, remedy: Remedy = Remedy.FINAL) -> None:
        super().__init__(text)
        self.remedy = remedy


@dataclasses.dataclass(frozen=True)
class Slot:
    """One operand (`output` False) or result of a node."""

    node: ir.Node
    index: int
    output: bool = False

    @property
    def value(self) -> ir.Value | None:
        values = self.node.outputs if self.output else self.node.inputs
        return values[self.index] if self.index < len(values) else None

    @property
    def there(self) -> bool:
        """An optional operand or result is there."""
        return self.value is not None and bool(self.value.name)


class Removals:
    """The removals that are planned for one unchanged graph, and how rules read and mark them.

    Attributes:
        removed: for each computed value what goes along its axes.
        private: the same for operands that are sliced for one reader only: stored constants, and computed values that others read whole.
        notes: what a reader of the report should know: norms over fewer features, forked weights, caches that shrink.
    """

    def __init__(self, model: ir.Model, *, resize: Collection[str] = ()) -> None:
        """`resize`: names of graph inputs and outputs that may change their size."""
        self.model = model
        self.removed: dict[ir.Value, AxisMasks] = {}
        self.private: dict[Slot, AxisMasks] = {}
        self.notes: dict[tuple[str, str], None] = {}
        self.resize = frozenset(resize)
        self._inside: Collection[ir.Value] | None = None
        self._asked: dict[ir.Value, dict[Slot, AxisMasks]] = {}
        self._entered: set[ir.Value] = set()  # operands from outside that change for all their readers,
        self._fresh: set[ir.Value] = set()  # those of them that the removal at hand was the first to change,
        self._apart: set[ir.Value] = set()  # and those that cannot, and are sliced for each reader
        self._zeroed: Collection[ir.Value] = ()  # what follows from the value at which a removal starts
        self._zeros: Collection[ir.Value] = ()  # what of that is zero where that value is
        self._summed: dict[ir.Node, tuple[bytes | None, ...]] = {}
        self.remapped: set[ir.Node] = set()  # lookups whose ids are translated to what is left of the table
        self.regrouped: set[ir.Node] = set()  # attentions whose key and value heads go without their query heads
        self._queue: deque[ir.Node] = deque()

    def mask(self, slot: Slot, axis: int) -> Array | None:
        """What goes along one axis (counted from the front) of an operand or result: for all readers, and for this one alone."""
        own, value = self.private.get(slot, {}).get(axis), slot.value
        common = None if value is None else self.removed.get(value, {}).get(axis)
        if own is None or common is None:
            return common if own is None else own
        assert value is not None
        return _joined(own, common, value)

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
        elif (mask := self._beyond(slot, axis, mask)) is None:
            return
        elif self._inside is None or value in self._inside:
            self._mark(value, axis, mask)
        else:
            known = self._asked.setdefault(value, {}).setdefault(slot, {})
            if axis not in known or not np.array_equal(known[axis], mask):
                known[axis] = mask if axis not in known else _joined(known[axis], mask, value)

    def _beyond(self, slot: Slot, axis: int, mask: Array) -> Array | None:
        """What of `mask` this operand has not lost yet. What it lost alone must not be asked of the value, whose other readers keep it."""
        lost = self.mask(slot, axis)
        if lost is None:
            return mask
        assert slot.value is not None
        more: Array = _joined(mask, lost, slot.value) & ~np.resize(lost, max(len(mask), len(lost)))
        return more if more.any() else None

    def contract(self, node: ir.Node, places: Sequence[tuple[Slot, int]]) -> None:
        """A rule says: the results of `node` are sums over these axes. That is right where one factor counts as zero there.

        It does behind the place where the removal started. In front of it entries go because nobody is left to read them; a sum reads them.
        """
        gone = tuple(None if (mask := self.mask(slot, axis)) is None else mask.tobytes() for slot, axis in places)
        if self._inside is None or self._summed.get(node) == gone or not any(gone):
            return
        if not any(slot.value in self._zeroed for slot, _ in places):
            name = next(slot.value.name for slot, _ in places if slot.value is not None and not is_constant(slot.value))
            raise Refusal(f"{node.op_type} `{node.name}` needs all of `{name}`, which is not only read here")
        if not any(slot.value in self._zeros for slot, _ in places):
            self.note(node, "sums removed entries that are not zero: what came to them on the way goes with them")
        self._summed[node] = gone

    def note(self, node: ir.Node, text: str) -> None:
        self.notes[node.name or "", text] = None

    def _mark(self, value: ir.Value, axis: int, mask: Array) -> None:
        size = static_dim(value, axis)
        if size is not None and size != len(mask):
            if size % len(mask):
                raise Refusal(f"`{value.name}` has {size} entries along axis {axis}, which {len(mask)} do not repeat in")
            mask = np.tile(mask, size // len(mask))
        masks = self.removed.setdefault(value, {})
        before = masks.get(axis)
        after = mask.copy() if before is None else _joined(before, mask, value)
        if size is not None and after.all():
            raise Refusal(f"nothing of axis {axis} of `{value.name}` would be left")
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
        raise Refusal(f"`{value.name}` is {what} of the model, and would change its size", Remedy.PORT)

    def _keep_private(self, slot: Slot, axis: int, mask: Array) -> None:
        masks = self.private.setdefault(slot, {})
        size = static_dim(slot.value, axis)
        if size is not None and size != len(mask):
            mask = np.tile(mask, size // len(mask))
        if size != len(mask):
            name = "?" if slot.value is None else slot.value.name
            raise Refusal(f"`{name}` has an axis of unknown length, from which nothing can be picked for `{slot.node.name}` alone")
        before = masks.get(axis)
        after = mask.copy() if before is None else before | mask
        if before is None or not np.array_equal(before, after):
            masks[axis] = after
            self._queue.append(slot.node)


# ---- masks --------------------------------------------------------------------------------------------------------------------------------


def factor(mask: Array, sizes: list[int]) -> list[Array]:
    """The removal along each piece of an axis that is split into `sizes`, outer first: an index of a piece goes if all that has it goes."""
    keep = ~mask.reshape(sizes)
    everything = range(len(sizes))
    return [~np.any(keep, axis=tuple(k for k in everything if k != piece)) for piece in everything]


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


def equal(a: AxisMasks, b: AxisMasks) -> bool:
    return set(a) == set(b) and all(np.array_equal(a[k], b[k]) for k in a)


def rank_of(value: ir.Value) -> int:
    if value.shape is None:
        raise Refusal(f"the shape of `{value.name}` is unknown")
    return len(value.shape)
