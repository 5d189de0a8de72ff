"""The projections behind the operands of an attention and ahead of its result, and which of their features belong to which head."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analysis.linear import Linear
from graphopt.core.contract import Array
from graphopt.graph.layout import Group, Tracer, View, merged
from graphopt.graph.questions import attr, consumers, rank, static_dim

Made = Mapping[ir.Value, Linear]
LAYOUT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Flatten", "Cast", "Dropout")
_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Flatten", "Split", "Slice", "Gather", "Expand", "RotaryEmbedding")
_NORMS = ("RMSNormalization", "LayerNormalization")
_FAR = 200  # values between an attention and a projection, at most


def made_by(linears: tuple[Linear, ...]) -> Made:
    """What each projection makes, before its bias and after it."""
    return {value: x for x in linears for value in (x.output, x.node.outputs[0])}


def behind(operands: Iterable[ir.Value | None], made: Made) -> tuple[Linear, ...]:
    """The projections that operands of an attention are computed from, with no other in between; what an operator reads first comes first."""
    found: dict[Linear, None] = {}
    todo, seen = [v for v in operands if v is not None], set[ir.Value]()
    while todo and len(seen) < _FAR:
        value = todo.pop()
        if value in seen:
            continue
        seen.add(value)
        linear = made.get(value)
        if linear is not None and linear.in_features > 1:
            found[linear] = None
            continue
        node = value.producer()
        todo += [v for v in reversed(node.inputs if node is not None else ()) if v is not None]
    return tuple(found)


def ahead(value: ir.Value, made: Made, through: Sequence[str] = LAYOUT, alone: bool = True) -> Linear | None:
    """The projection that reads the result of an attention behind operators `through`; `alone`: nothing else does, but for its shape."""
    for _ in range(_FAR):
        if alone and only_reader(value) is None:
            return None
        for node in consumers(value):
            linear = made.get(node.outputs[0])
            if linear is not None and linear.node is node:
                return linear if linear.x is value else None
            if node.op_type in through and not node.domain:
                value = node.outputs[0]
                break
        else:
            return None
    return None


def only_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads a value, once, but for its shape."""
    uses = [use.node for use in value.uses() if use.node.op_type != "Shape"]
    return uses[0] if len(uses) == 1 and not value.is_graph_output() else None


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a part of a value comes from: the atoms `group` of the axes of `root`, `offset` from their start.

    `path`: the values from there on up to the root; `alike`: the operators in between that are no layout, and do the same to every part.
    """

    root: ir.Value
    group: Group
    offset: tuple[int, ...]
    path: tuple[ir.Value, ...]
    alike: tuple[ir.Node, ...]


def origin(view: View, group: Group, tracer: Tracer, ends: Container[ir.Value], alike: Callable[[ir.Node, tuple[int, ...]], bool]) -> Origin:
    """Follow `group`, axes of a traced value, to one of `ends`, or as far as it goes.

    Args:
        alike: (node, axes of its result that the group is) -> whether the part of its first input along these axes becomes that of its result.
    """
    path, passed = list[ir.Value](), list[ir.Node]()
    while True:
        path += [step.value for step in reversed(view.steps)]
        node, axes = view.root.producer(), _whole_axes(view, group)
        if view.root in ends or node is None or node.domain or node.inputs[0] is None or axes is None or not alike(node, axes):
            break
        below = tracer.view(node.inputs[0])
        if below is None:
            break
        passed.append(node)
        view, group = below, tuple(a for k in axes for a in below.axes[k])
    return Origin(view.root, group, view.steps[-1].offset, tuple(path), tuple(passed))


def _whole_axes(view: View, group: Group) -> tuple[int, ...] | None:
    """The axes of the root that a group runs along, if it takes all of each; repeated pieces count once."""
    atoms = merged(tuple(a for a in group if a.axis >= 0))
    if any(view.steps[-1].offset) or any(a.stride != 1 or a.size != static_dim(view.root, a.axis) for a in atoms):
        return None
    return tuple(a.axis for a in atoms)


@dataclasses.dataclass(frozen=True, eq=False)
class Feed:
    """One operand of the products of an attention, `value`.

    Attributes:
        dim_axis: runs over the features of a head; over heads * dim where `flat`.
        head_axis: runs over heads; None where they are flat, or merged with the batch.
        heads: that are told apart in `value` (repeated key heads count).
        dim: features of a head.
        view: how it comes about, and `group`: where its heads and their features lie there.
    """

    value: ir.Value
    dim_axis: int
    head_axis: int | None
    heads: int
    dim: int
    flat: bool
    view: View | None
    group: Group


@dataclasses.dataclass(frozen=True, eq=False)
class HeadOperand(Feed):
    """And the projection that makes it.

    Attributes:
        source: that projection, if nothing but layout, scalar factors, `rotary` and `norm` stands in between; None otherwise.
        columns: int64 [heads of the projection, dim]: the output feature of `source` for each; empty without it.
        reason: why there is no `linear`.
        path: the values from `value` back to what the projection makes.
        rotary: the embedding that turns what `source` makes; its features are then pairs.
        norm: a norm over the features of each head.
    """

    source: Linear | None
    columns: Array
    reason: str
    path: tuple[ir.Value, ...]
    rotary: ir.Node | None
    norm: ir.Node | None

    @property
    def linear(self) -> Linear | None:
        """The projection, if features of a head may be turned: no norm stands in between."""
        return self.source if self.norm is None else None

    def mask(self, gone: Iterable[int]) -> Array:
        """The removal of these features from every head, along `dim_axis`."""
        dims = removal(gone, self.dim)
        return np.tile(dims, self.heads) if self.flat else dims

    def by_head(self, array: Array) -> Array:
        """A batch of `value` as [rows, heads, dim]; one head where they are merged with the batch."""
        if self.flat:
            return array.reshape(-1, self.heads, self.dim)
        if self.head_axis is None:
            return np.moveaxis(array, self.dim_axis, -1).reshape(-1, 1, self.dim)
        return np.moveaxis(array, (self.head_axis, self.dim_axis), (-2, -1)).reshape(-1, self.heads, self.dim)


Operands = tuple[HeadOperand, HeadOperand, HeadOperand]


def read_operand(f: Feed, own: Collection[ir.Node], made: Made, tracer: Tracer) -> HeadOperand:
    """Find the projection that makes an operand.

    Args:
        own: the nodes of the attention.
        made: what each projection makes after its bias.
    """
    if f.view is None:
        return HeadOperand(**vars(f), source=None, columns=_none(f.dim), reason="its origin is not known", path=(), rotary=None, norm=None)
    found = origin(f.view, f.group, tracer, made, lambda node, axes: _is_alike(node, axes, f.dim))
    source, columns, reason = _columns(found, f.dim, own, made)
    rotary, norm = (next((n for n in found.alike if n.op_type in kinds), None) for kinds in (("RotaryEmbedding",), _NORMS))
    reason = reason if norm is None else _between(norm)
    return HeadOperand(**vars(f), source=source, columns=columns, reason=reason, path=found.path, rotary=rotary, norm=norm)


def _none(dim: int) -> Array:
    return np.zeros((0, dim), np.int64)


def _columns(found: Origin, dim: int, own: Collection[ir.Node], made: Made) -> tuple[Linear | None, Array, str]:
    linear, maker = made.get(found.root), found.root.producer()
    if linear is None:
        return None, _none(dim), "its origin is not known" if maker is None else _between(maker)
    axis, index = (rank(found.root) or 0) - 1, np.zeros(1, np.int64)
    for atom in (a for a in found.group if a.axis >= 0):
        if atom.axis != axis or not isinstance(atom.size, int) or not isinstance(atom.stride, int):
            return None, _none(dim), f"its heads are no pieces of the features of `{linear.node.name}`"
        index = (index[:, None] + atom.stride * np.arange(atom.size)).reshape(-1)
    other = _other_reader(found.root, own, found.alike)
    if other is not None:
        return None, _none(dim), f"`{found.root.name}` is also read by {other.op_type} `{other.name}`"
    return linear, (index + found.offset[axis]).reshape(-1, dim), ""


def _between(node: ir.Node) -> str:
    return f"{node.op_type} `{node.name}` stands between projection and product"


def _is_alike(node: ir.Node, axes: tuple[int, ...], dim: int) -> bool:
    """Whether a node does the same to every head: a rotary embedding, or a norm over the features of each. Heads and features run along `axes`."""
    out = node.outputs[0]
    last = (rank(out) or 0) - 1
    if node.op_type == "RotaryEmbedding":
        return last == 3 or (axes == (2,) and attr(node, "num_heads", 0) * dim == static_dim(out, 2))
    return node.op_type in _NORMS and attr(node, "axis", -1) in (-1, last) and axes[-1:] == (last,) and static_dim(out, last) == dim


def _other_reader(root: ir.Value, own: Collection[ir.Node], alike: Collection[ir.Node]) -> ir.Node | None:
    """A node behind layout that reads what a projection makes and is no part of this attention."""
    todo, seen = [root], set[ir.Value]()
    while todo:
        value = todo.pop()
        if value in seen:
            continue
        seen.add(value)
        for node in consumers(value):
            if node in own or node.op_type == "Shape":
                continue
            if node.op_type not in _MOVES and node not in alike and not _is_scaled(node, value):
                return node
            todo += node.outputs
    return None


def _is_scaled(node: ir.Node, value: ir.Value) -> bool:
    """`value` times or divided by one number."""
    others = [v for v in node.inputs if v is not value]
    return (
        node.op_type in ("Mul", "Div")
        and len(others) == 1
        and others[0] is not None
        and others[0].shape is not None
        and all(d == 1 for d in others[0].shape)
    )


def removal(gone: Iterable[int], units: int) -> Array:
    mask = np.zeros(units, bool)
    mask[list(gone)] = True
    return mask
