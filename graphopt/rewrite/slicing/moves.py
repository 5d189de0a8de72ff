"""Operators that move elements and compute nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt.core.contract import Array
from graphopt.graph.layout import Atom, Group, regroup
from graphopt.graph.questions import attr, constant, consumers, static_dim
from graphopt.graph.shapes import contents, slice_bounds
from graphopt.rewrite.slicing.places import integers, rank, same
from graphopt.rewrite.slicing.plan import Refusal, Remedy, Removals, Slot, factor, is_ragged, spread


def transpose(node: ir.Node, s: Removals, final: bool) -> None:
    x, y = Slot(node, 0), Slot(node, 0, True)
    for k, source in enumerate(attr(node, "perm") or range(rank(x))[::-1]):
        same(s, [(x, source), (y, k)])


def regrouped(node: ir.Node, s: Removals, final: bool) -> None:
    """Reshape and its kin keep the order of elements: axes are pieces (atoms) of the operand's axes, regrouped."""
    x, y = Slot(node, 0), Slot(node, 0, True)
    if all(s.mask(x, k) is None for k in range(rank(x))) and all(s.mask(y, k) is None for k in range(rank(y))):
        return
    assert x.value is not None
    assert x.value.shape is not None
    assert y.value is not None
    assert y.value.shape is not None
    whole = tuple(() if d == 1 else (Atom(k, 1, d),) for k, d in enumerate(x.value.shape))
    if final and node.op_type == "Reshape":
        check_target(node, s, 1)
    groups = regroup(whole, list(y.value.shape))
    if groups is None:
        raise Refusal(f"it is not known how {node.op_type} `{node.name}` distributes its axes")
    pieces = [_pieces(groups, k) for k in range(rank(x))]
    sides: list[tuple[Slot, int, Group]] = [(x, k, p) for k, p in enumerate(pieces)] + [(y, k, g) for k, g in enumerate(groups)]
    gone: dict[Atom, Array] = {}
    for slot, axis, group in sides:
        mask = s.mask(slot, axis)
        if mask is None:
            continue
        atoms = _inner(node, group, mask)
        sizes = [_length(a) for a in atoms]
        if final and is_ragged(mask, sizes):
            what = "" if slot.value is None else slot.value.name
            raise Refusal(f"{node.op_type} `{node.name}`: what is left of `{what}` would be ragged", Remedy.UNEVEN)
        for atom, part in zip(atoms, factor(mask, sizes), strict=True):
            gone[atom] = part if atom not in gone else gone[atom] | part
    for slot, axis, group in sides:
        marked = [a for a in group if a in gone and gone[a].any()]
        if marked:
            tail = group[group.index(marked[0]) :]
            if not all(isinstance(a.size, int) for a in tail):
                raise Refusal(f"{node.op_type} `{node.name}` joins what is to be cut with an axis of unknown size")
            s.mark(slot, axis, spread([gone[a] if a in gone else np.zeros(_length(a), np.bool_) for a in tail]))


def _length(atom: Atom) -> int:
    assert isinstance(atom.size, int)
    return atom.size


def _pieces(groups: Sequence[Group], axis: int) -> Group:
    """The atoms of one axis of the operand, outer first: they stand in this order in the result too."""
    return tuple(a for g in groups for a in g if a.axis == axis)


def _inner(node: ir.Node, group: Group, mask: Array) -> list[Atom]:
    """The innermost pieces that make up the period of a mask."""
    found: list[Atom] = []
    size = 1
    for atom in reversed(group):
        if size == len(mask):
            break
        if not isinstance(atom.size, int):
            break
        found.insert(0, atom)
        size *= atom.size
    if size != len(mask):
        raise Refusal(f"{node.op_type} `{node.name}` splits an axis where {len(mask)} entries repeat")
    return found


def concat(node: ir.Node, s: Removals, final: bool) -> None:
    y = Slot(node, 0, True)
    axis = int(attr(node, "axis", 0)) % rank(y)
    _parts(node, s, y, [Slot(node, k) for k in range(len(node.inputs))], axis)


def split(node: ir.Node, s: Removals, final: bool) -> None:
    x = Slot(node, 0)
    axis = int(attr(node, "axis", 0)) % rank(x)
    _parts(node, s, x, [Slot(node, k, True) for k in range(len(node.outputs))], axis)


def _parts(node: ir.Node, s: Removals, whole: Slot, parts: Sequence[Slot], axis: int) -> None:
    """`whole` is the `parts` one after another along `axis`."""
    for k in range(rank(whole)):
        if k != axis:
            same(s, [(slot, k) for slot in (whole, *parts)])
    if all(s.mask(slot, axis) is None for slot in (whole, *parts)):
        return
    sizes = [static_dim(p.value, axis) for p in parts]
    if None in sizes:
        raise Refusal(f"{node.op_type} `{node.name}` joins parts of unknown size")
    borders = np.cumsum([0, *(n for n in sizes if n is not None)])
    everything = np.zeros(borders[-1], bool)
    given = s.mask(whole, axis)
    if given is not None:
        everything |= given
    for part, start, end in zip(parts, borders, borders[1:], strict=False):
        own = s.mask(part, axis)
        if own is not None:
            everything[start:end] |= own
    s.mark(whole, axis, everything)
    for part, start, end in zip(parts, borders, borders[1:], strict=False):
        s.mark(part, axis, everything[start:end])


def selection(node: ir.Node, axis: int, size: int | None) -> Array | None:
    """The indices that a Slice with known bounds takes along `axis` of `size` entries; None where it does not cut."""
    axes = cut_axes(node)
    if axis not in axes:
        return None
    start, end, step = (None if known is None else known[axes.index(axis)] for known in slice_bounds(node)[1:])
    if size is None or not isinstance(start, int) or not isinstance(end, int) or not isinstance(step, int):
        raise Refusal(f"Slice `{node.name}` cuts at a place that is computed")
    if step < 0 and end < -size:
        return np.arange(size)[start::step]
    return np.arange(size)[start:end:step]


def cut_axes(node: ir.Node) -> list[int]:
    """The axes that a Slice names, counted from the front."""
    given = integers(slice_bounds(node).axes)
    if given is None or static_dim(node.inputs[1], 0) is None:
        raise Refusal(f"Slice `{node.name}` names axes that are computed")
    return [k % rank(Slot(node, 0)) for k in given]


def cut(node: ir.Node, s: Removals, final: bool) -> None:
    x, y = Slot(node, 0), Slot(node, 0, True)
    for k in range(rank(x)):
        if s.mask(x, k) is None and s.mask(y, k) is None:
            continue
        size = static_dim(x.value, k)
        chosen = selection(node, k, size)
        if chosen is None:
            same(s, [(x, k), (y, k)])
        elif size is not None:
            _chosen(s, (x, k), (y, k), chosen, size)
            if final:
                recut(node, k, s.mask(x, k))


def recut(node: ir.Node, axis: int, mask: Array | None) -> tuple[int, int, int]:
    """start, end, step of a Slice along `axis` after the removal.

    Raises:
        Refusal: what it took is no longer evenly spaced, or its bounds are computed.
    """
    bounds = [known for given in slice_bounds(node)[1:] if (known := integers(given)) is not None]
    if len(bounds) < 3:
        raise Refusal(f"Slice `{node.name}` also cuts at a place that is computed")
    if mask is None:
        start, end, step = (known[cut_axes(node).index(axis)] for known in bounds)
        return start, end, step
    chosen = selection(node, axis, len(mask))
    assert chosen is not None
    left = (np.cumsum(~mask) - 1)[chosen[~mask[chosen]]]
    steps = set(np.diff(left).tolist()) or {1}
    if not len(left) or len(steps) > 1 or min(steps) <= 0:
        raise Refusal(f"Slice `{node.name}` would take entries that are not evenly spaced")
    step = steps.pop()
    return int(left[0]), int(left[-1]) + 1, int(step)


def check_target(node: ir.Node, s: Removals, index: int) -> None:
    """Raises Refusal where operand `index`, the sizes of the result, cannot be corrected (see `graphopt.rewrite.slicing.apply`)."""
    out, value = Slot(node, 0, True), Slot(node, index).value
    axes = [k for k in range(rank(out)) if s.mask(out, k) is not None]
    if not axes or value is None or constant(value) is not None:
        return
    unknown = [k for k in axes if static_dim(out.value, k) is None]
    if len(unknown) > (1 if node.op_type == "Reshape" else 0) or static_dim(value, 0) != rank(out):
        raise Refusal(f"{node.op_type} `{node.name}`: its target is computed, and what it must become is not known")


def check_frozen(node: ir.Node, s: Removals) -> None:
    """Raises Refusal where a size that changes is computed with in a way that nobody follows.

    Sizes that are known numbers are frozen: their readers go on to see the old ones. Of a size that is no known number nothing can be frozen.
    """
    x = Slot(node, 0)
    first, last = int(attr(node, "start", 0)), int(attr(node, "end", rank(x)))
    seen = range(rank(x))[first:last]
    if any(s.mask(x, k) is not None and static_dim(x.value, k) is None for k in seen):
        raise Refusal(f"Shape `{node.name}` tells a size that changes, and that is no known number")
    if all(s.mask(x, k) is None for k in seen):
        return
    todo = [node.outputs[0]]
    while todo:
        value = todo.pop()
        known = contents(value)
        if known is not None and (all(isinstance(n, int) for n in known) or not any(isinstance(n, int) for n in known)):
            continue  # frozen as a whole, or free of numbers
        if known is None or value.is_graph_output():
            raise Refusal(f"`{value.name}` is computed from a size that changes, in a way that cannot be followed")
        todo += [out for reader in consumers(value) if reader.op_type not in ("Reshape", "Expand", "ConstantOfShape") for out in reader.outputs]


def _chosen(s: Removals, source: tuple[Slot, int], result: tuple[Slot, int], chosen: Array, size: int) -> None:
    """`result` holds the entries `chosen` of `source`."""
    whole = np.zeros(size, bool)
    for mask, where in ((s.mask(*source), np.arange(size)), (s.mask(*result), chosen)):
        if mask is not None:
            np.logical_or.at(whole, where, mask)  # an entry may be taken twice
    s.mark(*source, whole)
    s.mark(*result, whole[chosen])


def gather(node: ir.Node, s: Removals, final: bool) -> None:
    x, ids, y = Slot(node, 0), Slot(node, 1), Slot(node, 0, True)
    axis = int(attr(node, "axis", 0)) % rank(x)
    extra = rank(ids)
    for k in range(rank(x)):
        if k != axis:
            same(s, [(x, k), (y, k if k < axis else k + extra - 1)])
    index = constant(node.inputs[1])
    if index is None and s.mask(x, axis) is not None and node not in s.remapped:
        raise Refusal(f"Gather `{node.name}` looks up entries that may go")
    if index is not None and extra > 1 and s.mask(x, axis) is not None:
        raise Refusal(f"Gather `{node.name}` looks up a table of entries that may go")
    if index is None or extra > 1:
        for k in range(extra):
            same(s, [(ids, k), (y, axis + k)])
        return
    size = static_dim(x.value, axis)
    if size is None:
        return
    chosen = index.reshape(-1) % size
    if extra == 1:
        _chosen(s, (x, axis), (y, axis), chosen, size)
    elif s.mask(x, axis) is not None and (mask := s.mask(x, axis)) is not None and mask[chosen].any():
        raise Refusal(f"Gather `{node.name}` takes an entry that is to go")
