"""Axis provenance: where each axis of a value comes from, seen through any stack of layout operators.

An axis is a group of *atoms*; an atom is a strided piece of one axis of the root tensor (or a broadcast piece, which comes from nowhere).
Reshape splits and merges atoms, Transpose permutes groups, Slice, Split and Gather move the offset, Expand adds broadcast atoms.
So "are heads the outer and head_dim the inner part of the feature axis" is a question about atoms, and equal sizes cannot fool it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir

from graphopt.graph import dims, shapes
from graphopt.graph.questions import attr, constant, rank, scalar, static_dim

Dim = int | ir.SymbolicDim


@dataclasses.dataclass(frozen=True)
class Atom:
    """`size` elements, `stride` apart, along axis `axis` of the root; axis -1 = broadcast (stride 0)."""

    axis: int
    stride: Dim
    size: Dim


Group = tuple[Atom, ...]  # one axis of a value, outer atom first; () is an axis of size 1


@dataclasses.dataclass(frozen=True)
class Step:
    """A value on the way from the root to the traced value.

    `axes` writes its axes as atoms of the root, `offset` is the start along each axis of the root,
    and the traced value is `scale` times this one (elementwise scalar factors are seen through, too).
    """

    value: ir.Value
    axes: tuple[Group, ...]
    offset: tuple[int, ...]
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class View:
    """A traced value: the steps from the root (first) to the value itself (last)."""

    steps: tuple[Step, ...]

    @property
    def root(self) -> ir.Value:
        return self.steps[0].value

    @property
    def axes(self) -> tuple[Group, ...]:
        return self.steps[-1].axes

    def find(self, wanted: Sequence[Group]) -> tuple[Step, tuple[int, ...]] | None:
        """The step nearest the root whose axes are `wanted` in some order, and the permutation that gives that order."""
        target = [merged(g) for g in wanted]
        for step in self.steps:
            have = [merged(g) for g in step.axes]
            perm = _permutation(have, target)
            if perm is not None:
                return step, perm
        return None


class Tracer:
    """Traces values of one unchanged graph; remembers what it found."""

    def __init__(self) -> None:
        self._views: dict[ir.Value, View | None] = {}

    def view(self, value: ir.Value) -> View | None:
        """The view of `value`, or None if its rank is unknown."""
        if value not in self._views:
            self._views[value] = self._trace(value)
        return self._views[value]

    def _trace(self, value: ir.Value) -> View | None:
        if value.shape is None:
            return None
        node = value.producer()
        if node is not None and node.domain == "" and node.op_type in _HANDLERS:
            source = _source(node)
            inner = None if source is None else self.view(source)
            step = None if inner is None else _HANDLERS[node.op_type](node, value, inner.steps[-1])
            if inner is not None and step is not None:
                below = inner.steps
                if step.scale != 1.0:  # a scalar factor: everything below is still to be scaled
                    below = tuple(dataclasses.replace(s, scale=s.scale * step.scale) for s in below)
                return View((*below, dataclasses.replace(step, scale=1.0)))
        whole = tuple(() if d == 1 else (Atom(k, 1, d),) for k, d in enumerate(value.shape))
        return View((Step(value, whole, (0,) * len(whole)),))


def merged(group: Group) -> Group:
    """Neighbours that continue each other become one atom: (12 x stride 32)(32 x stride 1) is (384 x stride 1)."""
    out: list[Atom] = []
    for atom in group:
        if out and out[-1].axis == atom.axis and _continues(out[-1], atom):
            out[-1] = Atom(atom.axis, atom.stride, dims.multiply(out[-1].size, atom.size))
        else:
            out.append(atom)
    return tuple(out)


def _continues(outer: Atom, inner: Atom) -> bool:
    if outer.axis < 0:
        return True
    return outer.stride == dims.multiply(inner.stride, inner.size)


def _permutation(have: Sequence[Group], target: Sequence[Group]) -> tuple[int, ...] | None:
    if len(have) != len(target):
        return None
    perm: list[int] = []
    for group in target:
        k = next((k for k, g in enumerate(have) if g == group and k not in perm), None)
        if k is None:
            return None
        perm.append(k)
    return tuple(perm)


def regroup(axes: Sequence[Group], shape: Sequence[Dim]) -> tuple[Group, ...] | None:
    """Distribute all atoms over the axes of `shape`, splitting where a size asks for it; None where it cannot be proved."""
    atoms = [a for group in axes for a in group][::-1]  # used as a stack
    out: list[Group] = []
    for want in shape:
        group: list[Atom] = []
        left: Dim = want
        while left != 1:
            if not atoms:
                return None
            atom = atoms.pop()
            rest = dims.divide(left, atom.size)
            if rest is not None:
                group.append(atom)
                left = rest
                continue
            inner = dims.divide(atom.size, left)
            if inner is None:
                return None
            stride = dims.multiply(atom.stride, inner) if atom.axis >= 0 else 0
            group.append(Atom(atom.axis, stride, left))
            atoms.append(Atom(atom.axis, atom.stride, inner))
            left = 1
        out.append(tuple(group))
    return None if atoms else tuple(out)


def _source(node: ir.Node) -> ir.Value | None:
    """The operand that a layout operator moves; for Mul and Div the one beside a scalar constant, or None."""
    if node.op_type not in ("Mul", "Div"):
        return node.inputs[0]
    if scalar(node.inputs[1]) is not None:
        return node.inputs[0]
    return node.inputs[1] if node.op_type == "Mul" and scalar(node.inputs[0]) is not None else None


def _same(node: ir.Node, value: ir.Value, below: Step) -> Step | None:
    return dataclasses.replace(below, value=value)


def _reshape(node: ir.Node, value: ir.Value, below: Step) -> Step | None:
    assert value.shape is not None
    if any(dims.is_opaque(d) for d in value.shape):
        return None
    axes = regroup(below.axes, list(value.shape))
    return None if axes is None else dataclasses.replace(below, value=value, axes=axes)


def _transpose(node: ir.Node, value: ir.Value, below: Step) -> Step | None:
    perm = attr(node, "perm") or range(len(below.axes))[::-1]
    return dataclasses.replace(below, value=value, axes=tuple(below.axes[p] for p in perm))


def _unsqueeze(node: ir.Node, value: ir.Value, below: Step) -> Step | None:
    where = shapes.contents(node.inputs[1])
    if where is None or value.shape is None:
        return None
    new = {int(k) % len(value.shape) for k in where if isinstance(k, int)}
    rest = iter(below.axes)
    return dataclasses.replace(below, value=value, axes=tuple(() if k in new else next(rest) for k in range(len(value.shape))))


def _squeeze(node: ir.Node, value: ir.Value, below: Step) -> Step | None:
    given = node.inputs[1] if len(node.inputs) > 1 else None
    where = shapes.contents(given) if given is not None else [k for k, g in enumerate(below.axes) if not g]
    if where is None or value.shape is None:
        return None
    gone = {int(k) % len(below.axes) for k in where if isinstance(k, int)}
    axes = tuple(g for k, g in enumerate(below.axes) if k not in gone)
    return dataclasses.replace(below, value=value, axes=axes) if len(axes) == len(value.shape) else None


def _gather(node: ir.Node, value: ir.Value, below: Step) -> Step | None:
    index = constant(node.inputs[1])
    if index is None or index.size != 1 or index.dtype.kind not in "iu":
        return None
    axis = int(attr(node, "axis", 0)) % len(below.axes)
    start = int(index.reshape(()))
    size = _int_size(below.axes[axis])
    if start < 0 and size is None:
        return None
    moved = _narrow(below, axis, start % size if size else start, 1)
    if moved is None:
        return None
    keep = ((),) if index.ndim == 1 else ()
    return dataclasses.replace(moved, value=value, axes=moved.axes[:axis] + keep + moved.axes[axis + 1 :]) if index.ndim <= 1 else None


def _slice(node: ir.Node, value: ir.Value, below: Step) -> Step | None:
    starts, ends = shapes.contents(node.inputs[1]), shapes.contents(node.inputs[2])
    given = [shapes.contents(v) if v is not None else None for v in node.inputs[3:]]
    axes = given[0] if given and given[0] is not None else list(range(len(starts or ())))
    steps = given[1] if len(given) > 1 and given[1] is not None else [1] * len(axes)
    if starts is None or ends is None or any(s != 1 for s in steps):
        return None
    step = below
    for axis, start, end in zip(axes, starts, ends, strict=True):
        axis = int(axis) % len(below.axes)  # type: ignore[arg-type]
        size = _int_size(step.axes[axis])
        if not isinstance(start, int) or not isinstance(end, int) or size is None:
            return None
        first, last = (min(max(p + size if p < 0 else p, 0), size) for p in (start, end))
        narrowed = _narrow(step, axis, first, last - first)
        if narrowed is None:
            return None
        step = narrowed
    return dataclasses.replace(step, value=value)


def _split(node: ir.Node, value: ir.Value, below: Step) -> Step | None:
    axis = int(attr(node, "axis", 0)) % len(below.axes)
    sizes = [s for v in node.outputs if (s := static_dim(v, axis)) is not None]
    index = value.index()
    if index is None or len(sizes) != len(node.outputs):
        return None
    narrowed = _narrow(below, axis, sum(sizes[:index]), sizes[index])
    return None if narrowed is None else dataclasses.replace(narrowed, value=value)


def _expand(node: ir.Node, value: ir.Value, below: Step) -> Step | None:
    assert value.shape is not None
    lead = len(value.shape) - len(below.axes)
    if lead < 0:
        return None
    axes: list[Group] = []
    for k, size in enumerate(value.shape):
        group = below.axes[k - lead] if k >= lead else ()
        if group and _size(group) != size:
            return None
        axes.append(group if group or size == 1 else (Atom(-1, 0, size),))
    return dataclasses.replace(below, value=value, axes=tuple(axes))


def _scaled(node: ir.Node, value: ir.Value, below: Step) -> Step | None:
    """x * c and x / c with one scalar constant that does not add axes."""
    other = node.inputs[0] if _source(node) is node.inputs[1] else node.inputs[1]
    factor = scalar(other)
    if factor is None or (rank(other) or 0) > len(below.axes) or factor == 0:
        return None
    return dataclasses.replace(below, value=value, scale=1 / float(factor) if node.op_type == "Div" else float(factor))


def _narrow(step: Step, axis: int, start: int, size: int) -> Step | None:
    """Keep `size` elements from `start` along one axis; exact only where that axis is one piece, or split at a clean border."""
    group = merged(step.axes[axis])
    if not group:
        return step if (start, size) == (0, 1) else None
    if _size(group) == size and start == 0:
        return step
    if len(group) != 1:
        return _narrow_outer(step, axis, start, size, group)
    atom = group[0]
    if not isinstance(atom.stride, int) or not isinstance(atom.size, int) or start + size > atom.size:
        return None
    new = () if size == 1 else (Atom(atom.axis, atom.stride, size),)
    offset = list(step.offset)
    if atom.axis >= 0:
        offset[atom.axis] += start * atom.stride
    return dataclasses.replace(step, axes=(*step.axes[:axis], new, *step.axes[axis + 1 :]), offset=tuple(offset))


def _narrow_outer(step: Step, axis: int, start: int, size: int, group: Group) -> Step | None:
    """Whole rows of the inner atoms: the cut is a cut of the outer atom."""
    inner = _int_size(group[1:])
    if inner is None or start % inner or size % inner:
        return None
    outer = dataclasses.replace(step, axes=(*step.axes[:axis], group[:1], *step.axes[axis + 1 :]))
    cut = _narrow(outer, axis, start // inner, size // inner)
    return None if cut is None else dataclasses.replace(cut, axes=(*cut.axes[:axis], cut.axes[axis] + group[1:], *cut.axes[axis + 1 :]))


def _size(group: Group) -> Dim:
    total: Dim = 1
    for atom in group:
        total = dims.multiply(total, atom.size)
    return total


def _int_size(group: Group) -> int | None:
    size = _size(group)
    return size if isinstance(size, int) else None


_HANDLERS: dict[str, Callable[[Any, ir.Value, Step], Step | None]] = {
    "Identity": _same, "Reshape": _reshape, "Flatten": _reshape, "Transpose": _transpose, "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze, "Gather": _gather, "Slice": _slice, "Split": _split, "Expand": _expand, "Mul": _scaled, "Div": _scaled,
}  # fmt: skip

size_of = _size
