"""Axis provenance: where each axis of a value comes from, seen through any stack of layout operators.

An axis is a group of *atoms*; an atom is a strided piece of one axis of the root tensor (or a broadcast piece, which comes from nowhere).
Reshape splits and merges atoms, Transpose permutes groups, Slice, Split and Gather move the offset, Expand adds broadcast atoms.
So "are heads the outer and head_dim the inner part of the feature axis" is a question about atoms, and equal sizes cannot fool it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import onnx_ir as ir

from graphopt.graph import dims, shapes
from graphopt.graph.dims import Dim
from graphopt.graph.questions import attr, constant, rank, scalar, static_dim


@dataclasses.dataclass(frozen=True)
class Atom:
    """`size` elements, `stride` apart, along axis `axis` of the root; axis -1 = broadcast (stride 0)."""

    axis: int
    stride: Dim
    size: Dim


Group = tuple[Atom, ...]  # one axis of a value, outer atom first; () is an axis of size 1


@dataclasses.dataclass(frozen=True)
class ViewStep:
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

    steps: tuple[ViewStep, ...]

    @property
    def root(self) -> ir.Value:
        return self.steps[0].value

    @property
    def axes(self) -> tuple[Group, ...]:
        return self.steps[-1].axes

    def find(self, wanted: Sequence[Group]) -> tuple[ViewStep, tuple[int, ...]] | None:
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
                return View((*below, dataclasses.replace(step, value=value, scale=1.0)))
        whole = tuple(() if d == 1 else (Atom(k, 1, d),) for k, d in enumerate(value.shape))
        return View((ViewStep(value, whole, (0,) * len(whole)),))


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


def _laid(below: ViewStep, axes: Sequence[Group] | None) -> ViewStep | None:
    return None if axes is None else dataclasses.replace(below, axes=tuple(axes))


def _reshape(node: ir.Node, out: ir.Value, below: ViewStep) -> ViewStep | None:
    shape = list(out.shape or ())
    return None if any(map(dims.is_opaque, shape)) else _laid(below, regroup(below.axes, shape))


def _transpose(node: ir.Node, out: ir.Value, below: ViewStep) -> ViewStep | None:
    return _laid(below, [below.axes[p] for p in attr(node, "perm") or range(len(below.axes))[::-1]])


def _unsqueeze(node: ir.Node, out: ir.Value, below: ViewStep) -> ViewStep | None:
    where = shapes.contents(node.inputs[1])
    size = len(out.shape or ())
    new = {int(k) % size for k in where or () if isinstance(k, int)}
    rest = iter(below.axes)
    return None if where is None else _laid(below, [() if k in new else next(rest) for k in range(size)])


def _squeeze(node: ir.Node, out: ir.Value, below: ViewStep) -> ViewStep | None:
    given = node.inputs[1] if len(node.inputs) > 1 else None
    where = shapes.contents(given) if given is not None else [k for k, g in enumerate(below.axes) if not g]
    gone = {int(k) % len(below.axes) for k in where or () if isinstance(k, int)}
    axes = [g for k, g in enumerate(below.axes) if k not in gone]
    return _laid(below, axes) if where is not None and len(axes) == len(out.shape or ()) else None


def _gather(node: ir.Node, out: ir.Value, below: ViewStep) -> ViewStep | None:
    index = constant(node.inputs[1])
    if index is None or index.size != 1 or index.ndim > 1 or index.dtype.kind not in "iu":
        return None
    axis = int(attr(node, "axis", 0)) % len(below.axes)
    start = int(index.reshape(()))
    size = _int_size(below.axes[axis])
    if start < 0 and size is None:
        return None
    moved = _narrow(below, axis, start % size if size else start, 1)
    keep = ((),) if index.ndim == 1 else ()
    return moved and _laid(moved, moved.axes[:axis] + keep + moved.axes[axis + 1 :])


def _slice(node: ir.Node, out: ir.Value, below: ViewStep) -> ViewStep | None:
    axes, starts, ends, steps = shapes.slice_bounds(node)
    if axes is None or starts is None or ends is None or steps is None or any(s != 1 for s in steps):
        return None
    step: ViewStep | None = below
    for axis, start, end in zip(axes, starts, ends, strict=True):
        axis = int(axis) % len(below.axes)  # type: ignore[arg-type]
        size = None if step is None else _int_size(step.axes[axis])
        if step is None or not isinstance(start, int) or not isinstance(end, int) or size is None:
            return None
        first, last = (min(max(p + size if p < 0 else p, 0), size) for p in (start, end))
        step = _narrow(step, axis, first, last - first)
    return step


def _expand(node: ir.Node, out: ir.Value, below: ViewStep) -> ViewStep | None:
    shape = list(out.shape or ())
    lead = len(shape) - len(below.axes)
    if lead < 0:
        return None
    axes: list[Group] = []
    for k, size in enumerate(shape):
        group = below.axes[k - lead] if k >= lead else ()
        if group and size_of(group) != size:
            return None
        axes.append(group if group or size == 1 else (Atom(-1, 0, size),))
    return _laid(below, axes)


def _scaled(node: ir.Node, out: ir.Value, below: ViewStep) -> ViewStep | None:
    """x * c and x / c with one scalar constant that does not add axes."""
    other = node.inputs[0] if _source(node) is node.inputs[1] else node.inputs[1]
    factor = scalar(other)
    if factor is None or (rank(other) or 0) > len(below.axes) or factor == 0:
        return None
    return dataclasses.replace(below, scale=1 / float(factor) if node.op_type == "Div" else float(factor))


def _split(node: ir.Node, out: ir.Value, below: ViewStep) -> ViewStep | None:
    axis = int(attr(node, "axis", 0)) % len(below.axes)
    sizes = [s for v in node.outputs if (s := static_dim(v, axis)) is not None]
    index = node.outputs.index(out)
    return _narrow(below, axis, sum(sizes[:index]), sizes[index]) if len(sizes) == len(node.outputs) else None


def _narrow(step: ViewStep, axis: int, start: int, size: int) -> ViewStep | None:
    """Keep `size` elements from `start` along one axis; exact only where that axis is one piece, or split at a clean border."""
    group = merged(step.axes[axis])
    if not group:
        return step if (start, size) == (0, 1) else None
    if size_of(group) == size and start == 0:
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


def _narrow_outer(step: ViewStep, axis: int, start: int, size: int, group: Group) -> ViewStep | None:
    """Whole rows of the inner atoms: the cut is a cut of the outer atom."""
    inner = _int_size(group[1:])
    if inner is None or start % inner or size % inner:
        return None
    outer = dataclasses.replace(step, axes=(*step.axes[:axis], group[:1], *step.axes[axis + 1 :]))
    cut = _narrow(outer, axis, start // inner, size // inner)
    return None if cut is None else dataclasses.replace(cut, axes=(*cut.axes[:axis], cut.axes[axis] + group[1:], *cut.axes[axis + 1 :]))


def size_of(group: Group) -> Dim:
    """How many elements an axis has."""
    return functools.reduce(dims.multiply, (1, *(atom.size for atom in group)))


def _int_size(group: Group) -> int | None:
    size = size_of(group)
    return size if isinstance(size, int) else None


_HANDLERS: dict[str, Callable[[ir.Node, ir.Value, ViewStep], ViewStep | None]] = {
    "Identity": lambda node, out, below: below, "Reshape": _reshape, "Flatten": _reshape, "Transpose": _transpose, "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze, "Gather": _gather, "Slice": _slice, "Split": _split, "Expand": _expand, "Mul": _scaled, "Div": _scaled,
}  # fmt: skip
