"""Query, key and value of an attention: where each feature of each head stands, and which column of a projection it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping

import numpy as np
import onnx_ir as ir

from graphopt.analysis.attention import AttentionFacts, Attentions
from graphopt.analysis.layout import Group, Tracer, View
from graphopt.analysis.linear import Linear, Linears
from graphopt.analysis.units import Heads, Units
from graphopt.core import Analysis, Array, Context
from graphopt.graph import consumers, static_dim

_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Flatten", "Split", "Slice", "Gather", "Expand", "RotaryEmbedding")


@dataclasses.dataclass(frozen=True, eq=False)
class HeadOperand:
    """One operand of the products of an attention, `value`.

    Attributes:
        dim_axis: runs over the features of a head; over heads * dim where `flat`.
        head_axis: runs over heads; None where they are flat, or merged with the batch.
        heads: that are told apart in `value` (repeated key heads count).
        linear: the projection that makes it, with nothing but layout and scalar factors in between; None otherwise.
        columns: int64 [heads of the projection, dim]: the output feature of `linear` for each; empty without it.
        reason: why there is no `linear`.
        rotary: the embedding that turns what `linear` makes; its features are then pairs.
    """

    value: ir.Value
    dim_axis: int
    head_axis: int | None
    heads: int
    dim: int
    flat: bool
    linear: Linear | None
    columns: Array
    reason: str
    rotary: ir.Node | None = None

    def mask(self, gone: Iterable[int]) -> Array:
        """The removal of these features from every head, along `dim_axis`."""
        dims = np.zeros(self.dim, bool)
        dims[list(gone)] = True
        return np.tile(dims, self.heads) if self.flat else dims

    def by_head(self, array: Array) -> Array:
        """A batch of `value` as [rows, heads, dim]; one head where they are merged with the batch."""
        if self.flat:
            return array.reshape(-1, self.heads, self.dim)
        if self.head_axis is None:
            return np.moveaxis(array, self.dim_axis, -1).reshape(-1, 1, self.dim)
        return np.moveaxis(array, (self.head_axis, self.dim_axis), (-2, -1)).reshape(-1, self.heads, self.dim)


@dataclasses.dataclass(frozen=True)
class HeadOperands(Analysis[Mapping[Heads, tuple[HeadOperand, HeadOperand, HeadOperand]]]):
    """Query, key and value for the attentions in `Units` whose heads can be told apart."""

    def compute(self, model: ir.Model, ctx: Context) -> Mapping[Heads, tuple[HeadOperand, HeadOperand, HeadOperand]]:
        tracer, facts = Tracer(), ctx.get(Attentions())
        made = {x.output: x for x in ctx.get(Linears())}
        found = {}
        for unit in ctx.get(Units()).attention:
            read = _operator(unit, tracer, made) if unit.node.op_type == "Attention" else _primitive(unit, facts.get(unit.node), made)
            if read is not None:
                found[unit] = read
        return found


Read = tuple[HeadOperand, HeadOperand, HeadOperand] | None


def _operator(unit: Heads, tracer: Tracer, made: Mapping[ir.Value, Linear]) -> Read:
    flat = unit.node.attributes.get("q_num_heads") is not None
    operands = []
    for value, dim in zip(unit.node.inputs[:3], (unit.head_dim, unit.head_dim, unit.value_dim), strict=True):
        assert value is not None
        width = static_dim(value, 2 if flat else 1)
        if width is None:
            return None
        heads = width // dim if flat else width
        rotary = value.producer()
        rotary = rotary if rotary is not None and rotary.op_type == "RotaryEmbedding" else None
        source = value if rotary is None else rotary.inputs[0]
        view = None if source is None else tracer.view(source)
        groups = () if view is None else view.axes[2] if flat else (*view.axes[1], *view.axes[3])
        linear, columns, reason = _columns(view, groups, dim, made, {unit.node})
        operands.append(HeadOperand(value, 2 if flat else 3, None if flat else 1, heads, dim, flat, linear, columns, reason, rotary))
    return operands[0], operands[1], operands[2]


def _primitive(unit: Heads, facts: AttentionFacts | str | None, made: Mapping[ir.Value, Linear]) -> Read:
    if not isinstance(facts, AttentionFacts):
        return None
    operands = []
    for o, dim, back in zip((facts.q, facts.k, facts.v), (unit.head_dim, unit.head_dim, unit.value_dim), (1, 2, 1), strict=True):
        value = o.view.steps[-1].value
        size = len(value.shape or ())
        apart = size == 4 and static_dim(value, 1) is not None
        linear, columns, reason = _columns(o.view, (*o.heads, *o.dim), dim, made, {unit.node, *facts.nodes})
        heads = (static_dim(value, 1) or 1) if apart else 1
        operands.append(HeadOperand(value, size - back, 1 if apart else None, heads, dim, False, linear, columns, reason))
    return operands[0], operands[1], operands[2]


def _columns(
    view: View | None, group: Group, dim: int, made: Mapping[ir.Value, Linear], own: Collection[ir.Node]
) -> tuple[Linear | None, Array, str]:
    nothing = np.zeros((0, dim), np.int64)
    linear = None if view is None else made.get(view.root)
    if view is None or linear is None:
        maker = None if view is None else view.root.producer()
        return None, nothing, "its origin is not known" if maker is None else f"{maker.op_type} `{maker.name}` stands between projection and product"
    axis, index = len(view.root.shape or ()) - 1, np.zeros(1, np.int64)
    for atom in (a for a in group if a.axis >= 0):
        if atom.axis != axis or not isinstance(atom.size, int) or not isinstance(atom.stride, int):
            return None, nothing, f"its heads are no pieces of the features of `{linear.node.name}`"
        index = (index[:, None] + atom.stride * np.arange(atom.size)).reshape(-1)
    other = _other_reader(view.root, own)
    if other is not None:
        return None, nothing, f"`{view.root.name}` is also read by {other.op_type} `{other.name}`"
    return linear, (index + view.steps[-1].offset[axis]).reshape(-1, dim), ""


def _other_reader(root: ir.Value, own: Collection[ir.Node]) -> ir.Node | None:
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
            if node.op_type not in _MOVES and not _is_scaled(node, value):
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
