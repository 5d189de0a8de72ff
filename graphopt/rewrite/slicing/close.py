"""The closure of a removal over the graph."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir

from graphopt.core.contract import Array
from graphopt.graph.questions import downstream, is_constant
from graphopt.rewrite.slicing.plan import AxisMasks, Refusal, Removals, Slot, equal, rank_of
from graphopt.rewrite.slicing.rules import link
from graphopt.rewrite.slicing.zeros import zeros


class Slicing(Removals):
    """`remove` plans a removal and closes it over the graph; `apply.apply` carries all of them out."""

    def remove(self, value: ir.Value, axis: int, mask: Array, *, inside: Collection[ir.Value] | None = None) -> None:
        """Remove what `mask` marks along `axis` of `value`, and everything that must go with it.

        Args:
            inside: the values that may change for all their readers; what enters from elsewhere (masks, rotary caches, position biases) is
                sliced for this reader alone where others read it too. None: every value may change.

        Raises:
            Refusal: it cannot be done; nothing is planned then that was not before.
        """
        apart, first = set(self._apart), None
        while True:
            self._fresh.clear()
            try:
                with self.together():
                    self._inside, self._zeroed, self._zeros = inside, downstream([value]), zeros(value)
                    self._mark(value, axis % rank_of(value), mask)
                    self._close()
            except Refusal as refusal:
                first = first or refusal
                if not self._fresh:
                    self._apart = apart
                    raise first from None
                self._apart |= self._fresh  # an operand that could not change for all its readers may be sliced for each of them
            else:
                return

    def remove_stored(self, slot: Slot, axis: int, mask: Array) -> None:
        """The same for a stored constant that `slot` reads."""
        with self.together():
            self._inside, self._zeroed = None, ()
            self.mark(slot, axis, mask)
            self._close()

    def _close(self) -> None:
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
                if value not in self._entered:
                    self._queue.extend(slot.node for slot in wanted)
                    self._fresh.add(value)
                    self._entered.add(value)
            if self._queue:
                return True
        for value, wanted in self._asked.items():
            if self._alike(value, wanted):
                continue
            if _stems_from_constants(value):
                raise Refusal(f"the weight behind `{value.name}` is decoded once for several readers; prune before quantizing")
            for slot, asked in wanted.items():
                for axis, mask in asked.items():
                    self._keep_private(slot, axis, mask)
        return bool(self._queue)

    def _alike(self, value: ir.Value, wanted: dict[Slot, AxisMasks]) -> bool:
        """Every reader of an operand from outside asks for the same removal, and nobody else sees it."""
        if value in self._apart or value.is_graph_output() or (value.is_graph_input() and value.name not in self.resize):
            return False
        masks = list(wanted.values())
        return {Slot(use.node, use.idx) for use in value.uses()} == set(wanted) and all(equal(masks[0], m) for m in masks)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Removals inside this block are all planned, or, where one raises, none of them."""
        summed, apart = dict(self._summed), set(self._apart)
        saved = (_copy(self.removed), _copy(self.private), dict(self.notes), {v: _copy(w) for v, w in self._asked.items()}, set(self._entered))
        try:
            yield
        except BaseException:
            self.removed, self.private, self.notes, self._asked, self._entered = saved
            self._summed, self._apart = summed, apart
            self._queue.clear()
            raise


def _copy(masks: dict[Any, AxisMasks]) -> dict[Any, AxisMasks]:
    return {key: dict(value) for key, value in masks.items()}


def _stems_from_constants(value: ir.Value, depth: int = 6) -> bool:
    """True for a stored weight behind DequantizeLinear, Transpose, Cast and the like."""
    node = value.producer()
    if node is None or depth == 0:
        return is_constant(value)
    return all(v is None or is_constant(v) or _stems_from_constants(v, depth - 1) for v in node.inputs) and bool(node.inputs)
