"""What a mask means: on which axes it depends, and whether it is padding, causal, a window, or several of these.

The operators that exporters chain for a mask (Range, Unsqueeze, comparisons, And, GatherND, Gather over a flattened mask, Where) are
evaluated symbolically. An integer tensor is a sum of its own axis indices, a boolean one a conjunction of conditions on them. What cannot be
followed is said to be unknown; nothing is assumed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.core.contract import Analysis, Context
from graphopt.graph import dims, shapes
from graphopt.graph.layout import Dim, Group, Tracer
from graphopt.graph.questions import attr, constant, producer, rank


@dataclasses.dataclass(frozen=True)
class Index:
    """Element [i0, i1, ...] is const + the sum of coefficient * i_axis."""

    terms: tuple[tuple[int, Dim], ...] = ()
    const: int = 0


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Element [i0, i1, ...] is source[i_axes[0], i_axes[1], ...]; `nonzero`: whether that is not 0."""

    source: ir.Value
    axes: tuple[int, ...]
    nonzero: bool = False


@dataclasses.dataclass(frozen=True)
class AtMost:
    """True where the index expression is <= 0."""

    index: Index


@dataclasses.dataclass(frozen=True)
class All:
    """True where every condition is. No condition: true everywhere."""

    conditions: frozenset[AtMost | Lookup] = frozenset()


Meaning = Index | Lookup | All
_SIGNED = (ir.DataType.INT32, ir.DataType.INT64)
_READABLE = 1 << 20  # elements of a stored tensor that is looked at


@dataclasses.dataclass(frozen=True)
class MaskFacts:
    """A boolean mask over scores [batch, heads, rows, keys]: the conjunction of its parts.

    `padding`: the tensors [batch, keys] whose nonzero elements may be read; `causal`: key <= row; `window` = w: key > row - w.
    """

    padding: tuple[ir.Value, ...] = ()
    causal: bool = False
    window: int | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        found = (("padding", bool(self.padding)), ("causal", self.causal), ("window", self.window is not None))
        return tuple(name for name, there in found if there)

    @property
    def axes(self) -> tuple[str, ...]:
        """On which axes the mask depends."""
        rows = self.causal or self.window is not None
        return tuple(name for name, there in (("batch", bool(self.padding)), ("row", rows), ("key", rows or bool(self.padding))) if there)


class Masks:
    """Reads masks of one unchanged graph."""

    def __init__(self) -> None:
        self._tracer = Tracer()
        self._known: dict[ir.Value, Meaning | None] = {}

    def facts(self, keep: ir.Value) -> MaskFacts | None:
        """The facts of a boolean mask (true = may be read) of four or fewer axes, or None where it is not understood."""
        meaning = self.meaning(keep)
        size = rank(keep)
        if not isinstance(meaning, All) or size is None or size > 4:
            return None
        padding: list[ir.Value] = []
        causal, window = False, None
        for condition in sorted(meaning.conditions, key=str):
            moved = _shifted(condition, 4 - size)
            if isinstance(moved, Lookup):
                if moved.axes != (0, 3) or not moved.nonzero:
                    return None
                padding.append(moved.source)
                continue
            terms = dict(moved.index.terms)
            if terms == {3: 1, 2: -1} and moved.index.const == 0:
                causal = True
            elif terms == {2: 1, 3: -1} and moved.index.const < 0:
                window = 1 - moved.index.const if window is None else min(window, 1 - moved.index.const)
            else:
                return None
        return MaskFacts(tuple(padding), causal, window)

    def always(self, keep: ir.Value) -> bool:
        """True if a boolean mask is proved true everywhere."""
        return self.meaning(keep) == All()

    def meaning(self, value: ir.Value) -> Meaning | None:
        """What the elements of `value` are, or None where it is not understood."""
        if value not in self._known:
            self._known[value] = None  # whatever reads itself is unknown
            self._known[value] = self._read(value)
        return self._known[value]

    def _read(self, value: ir.Value) -> Meaning | None:
        view = self._tracer.view(value)
        if view is not None and view.root is not value:
            if any(s.scale != 1.0 for s in view.steps):
                return self._operator(value)
            below = self.meaning(view.root)
            moved = None if below is None else _moved(below, list(view.axes), any(view.steps[-1].offset))
            return moved if moved is not None else self._operator(value)
        if value.is_graph_input():
            return Lookup(value, tuple(range(rank(value) or 0)))
        return _constant(value) or self._operator(value)

    def _operator(self, value: ir.Value) -> Meaning | None:
        node = producer(value)
        if node is None:
            return None
        match node.op_type:
            case "Range":
                return Index(((0, 1),)) if [_integer(v) for v in (node.inputs[0], node.inputs[2])] == [0, 1] else None
            case "ConstantOfShape":
                return _filled(node)
            case "Cast":
                return self._cast(node)
            case "Add" | "Sub" | "Mul":
                return self._arithmetic(node)
            case "And":
                sides = [self._placed(v, value) for v in node.inputs]
                return All(sides[0].conditions | sides[1].conditions) if all(isinstance(s, All) for s in sides) else None  # type: ignore[union-attr]
            case "LessOrEqual" | "Less" | "GreaterOrEqual" | "Greater":
                return self._comparison(node)
            case "GatherND":
                return self._gather_nd(node)
            case "Gather":
                return self._gather_flat(node)
            case "Expand":
                return None if node.inputs[0] is None else self._placed(node.inputs[0], value)
        return None

    def _placed(self, value: ir.Value | None, out: ir.Value) -> Meaning | None:
        """The meaning of an operand in the axes of the result it broadcasts to."""
        meaning = None if value is None else self.meaning(value)
        if meaning is None or rank(value) is None or rank(out) is None:
            return None
        return _shift(meaning, (rank(out) or 0) - (rank(value) or 0))

    def _cast(self, node: ir.Node) -> Meaning | None:
        below = None if node.inputs[0] is None else self.meaning(node.inputs[0])
        to = ir.DataType(attr(node, "to"))
        if to == ir.DataType.BOOL:
            if isinstance(below, Lookup):
                return All(frozenset({dataclasses.replace(below, nonzero=True)}))
            if isinstance(below, Index) and not below.terms and below.const:
                return All()
            return below if isinstance(below, All) else None
        if isinstance(below, Index):
            return below if to in _SIGNED else None
        return below if isinstance(below, Lookup) and _keeps_numbers(node.inputs[0], to) else None

    def _arithmetic(self, node: ir.Node) -> Meaning | None:
        a, b = (self._placed(v, node.outputs[0]) for v in node.inputs)
        if node.op_type == "Mul":
            for index, factor in ((a, node.inputs[1]), (b, node.inputs[0])):
                known = shapes.contents(factor)
                if isinstance(index, Index) and known is not None and len(known) == 1 and index.const == 0:
                    return Index(tuple((axis, dims.multiply(c, known[0])) for axis, c in index.terms))
            return None
        if not isinstance(a, Index) or not isinstance(b, Index) or node.outputs[0].dtype not in _SIGNED:
            return None
        return _combine(a, b, 1 if node.op_type == "Add" else -1)

    def _comparison(self, node: ir.Node) -> Meaning | None:
        a, b = (self._placed(v, node.outputs[0]) for v in node.inputs)
        if not isinstance(a, Index) or not isinstance(b, Index):
            return None
        low, high = (a, b) if node.op_type.startswith("Less") else (b, a)
        index = _combine(low, high, -1)
        if index is None:
            return None
        if not node.op_type.endswith("OrEqual"):
            index = dataclasses.replace(index, const=index.const + 1)
        if index.const <= 0 and all(isinstance(c, int) and c <= 0 for _, c in index.terms):
            return All()  # indices are never negative
        return All(frozenset({AtMost(index)}))

    def _gather_nd(self, node: ir.Node) -> Meaning | None:
        """data[i, j] with the index tensors stacked along the last axis."""
        data, stack = node.inputs[0], producer(node.inputs[1], "Concat")
        below = None if data is None else self.meaning(data)
        if below is None or stack is None or attr(node, "batch_dims", 0) or len(stack.inputs) != rank(data):
            return None
        picks = [None if v is None else self.meaning(v) for v in stack.inputs]
        return _picked(below, picks)

    def _gather_flat(self, node: ir.Node) -> Meaning | None:
        """data [batch, keys] read as one row, at batch * keys_count + key."""
        data = node.inputs[0]
        view = None if data is None else self._tracer.view(data)
        index = None if node.inputs[1] is None else self.meaning(node.inputs[1])
        if view is None or not isinstance(index, Index) or index.const or attr(node, "axis", 0) != 0:
            return None
        below = self.meaning(view.root)
        if below == All():
            return below
        atoms = view.axes[0]
        if below is None or any(view.axes[1:]) or [a.axis for a in atoms] != list(range(rank(view.root) or 0)):
            return None
        strides: list[Dim] = [1]
        for atom in atoms[:0:-1]:
            strides.insert(0, dims.multiply(strides[0], atom.size))
        by_stride = {str(c): axis for axis, c in index.terms}
        picks = [Index(((by_stride[str(s)], 1),)) if str(s) in by_stride else None for s in strides]
        return _picked(below, picks) if len(index.terms) == len(strides) else None


def _keeps_numbers(value: ir.Value | None, to: ir.DataType) -> bool:
    """True if a Cast of integers or booleans to the integer type `to` changes no number."""
    if value is None or value.dtype is None or to not in _SIGNED:
        return False
    return value.dtype == ir.DataType.BOOL or (value.dtype.is_integer() and (value.dtype == to or value.dtype.itemsize < to.itemsize))


def _integer(value: ir.Value | None) -> int | None:
    known = shapes.contents(value)
    return known[0] if known is not None and len(known) == 1 and isinstance(known[0], int) else None


def _constant(value: ir.Value) -> Meaning | None:
    """A stored tensor that is the same everywhere, or counts along one axis."""
    array = constant(value) if value.const_value is not None and value.const_value.size <= _READABLE else None
    if array is None or array.size == 0 or array.dtype.kind not in "iub":
        return None
    if array.dtype == np.bool_:
        return All() if array.all() else None
    first = int(array.reshape(-1)[0])
    if np.all(array == first):
        return Index((), first)
    (axis, *more) = [k for k, size in enumerate(array.shape) if size > 1]
    counts = not more and np.array_equal(array.reshape(-1), np.arange(first, first + array.size))
    return Index(((axis, 1),), first) if counts else None


def _filled(node: ir.Node) -> Meaning | None:
    """ConstantOfShape."""
    tensor = attr(node, "value")
    fill = 0 if tensor is None else tensor.numpy().reshape(-1)[0]
    if isinstance(fill, np.bool_):
        return All() if fill else None
    return Index((), int(fill)) if tensor is None or tensor.dtype.is_integer() else None


def _combine(a: Index, b: Index, sign: int) -> Index | None:
    terms: dict[int, Dim] = dict(a.terms)
    for axis, c in b.terms:
        old = terms.get(axis, 0)
        if not isinstance(old, int) or not isinstance(c, int):
            if old != 0 or sign < 0:
                return None
            terms[axis] = c
            continue
        terms[axis] = old + sign * c
    return Index(tuple(sorted((k, c) for k, c in terms.items() if c != 0)), a.const + sign * b.const)


def _picked(below: Meaning, picks: Sequence[Meaning | None]) -> Meaning | None:
    """`below` read at index tensors, each of which is one axis index as it is."""
    if below == All():
        return below
    axes: list[int] = []
    for pick in picks:
        if not isinstance(pick, Index) or pick.const or len(pick.terms) != 1 or pick.terms[0][1] != 1:
            return None
        axes.append(pick.terms[0][0])
    return _renamed(below, dict(enumerate(axes)))


def _moved(below: Meaning, axes: Sequence[Group], shifted: bool) -> Meaning | None:
    """The meaning of a view: each of its axes is a whole axis of the root, or new."""
    where: dict[int, int] = {}
    for k, group in enumerate(axes):
        atoms = [a for a in group if a.axis >= 0]
        if len(atoms) > 1 or (atoms and atoms[0].stride != 1) or shifted:
            return None
        if atoms:
            where[atoms[0].axis] = k
    return _renamed(below, where)


def _renamed(meaning: Meaning, where: Mapping[int, int]) -> Meaning | None:
    if isinstance(meaning, Index):
        if any(axis not in where for axis, _ in meaning.terms):
            return None
        return Index(tuple(sorted((where[axis], c) for axis, c in meaning.terms)), meaning.const)
    if isinstance(meaning, Lookup):
        return None if any(a not in where for a in meaning.axes) else dataclasses.replace(meaning, axes=tuple(where[a] for a in meaning.axes))
    parts = [_renamed_condition(c, where) for c in meaning.conditions]
    return None if any(p is None for p in parts) else All(frozenset(p for p in parts if p is not None))


def _renamed_condition(condition: AtMost | Lookup, where: Mapping[int, int]) -> AtMost | Lookup | None:
    found = _renamed(condition.index if isinstance(condition, AtMost) else condition, where)
    if isinstance(found, Index):
        return AtMost(found)
    return found if isinstance(found, Lookup) else None


def _shift(meaning: Meaning, by: int) -> Meaning | None:
    return _renamed(meaning, {k: k + by for k in range(16)})


def _shifted(condition: AtMost | Lookup, by: int) -> AtMost | Lookup:
    moved = _renamed_condition(condition, {k: k + by for k in range(16)})
    assert moved is not None
    return moved


@dataclasses.dataclass(frozen=True)
class MaskReader(Analysis[Masks]):
    """The mask reader of the current graph; it remembers what it read."""

    def compute(self, model: ir.Model, ctx: Context) -> Masks:
        return Masks()
