"""Query, key and value of an attention: where each feature of each head stands, and which column of a projection it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analysis.attention import AttentionFacts, Attentions
from graphopt.analysis.heads import Heads, Units
from graphopt.analysis.linear import Linear, Linears
from graphopt.core.contract import Analysis, Array, Context
from graphopt.graph.layout import Group, Tracer, View, merged
from graphopt.graph.questions import all_nodes, attr, consumers, rank, static_dim, used_once

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


_NORMS = ("RMSNormalization", "LayerNormalization")
_LAYOUT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Flatten")
_DEPTH = 12


@dataclasses.dataclass(frozen=True)
class HeadBlock:
    """An Attention node with its four projections. A group is one key/value head with the query heads that share it, `heads // kv_heads`.

    Attributes:
        head_dim: columns of a head in the query and key projections; `value_dim`: in the value projection.
    """

    node: ir.Node
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int

    @property
    def inputs(self) -> tuple[tuple[Linear, int], ...]:
        """Query, key and value projections, and how many columns of each belong to a group."""
        shared = self.heads // self.kv_heads
        return (self.q, shared * self.head_dim), (self.k, self.head_dim), (self.v, self.value_dim)

    @property
    def rows(self) -> int:
        """Rows of the output projection that belong to a group."""
        return self.heads // self.kv_heads * self.value_dim


@dataclasses.dataclass(frozen=True)
class HeadBlocks(Analysis[Mapping[ir.Node, "HeadBlock | str"]]):
    """Attention node -> its block, or why its heads cannot be taken apart."""

    def compute(self, model: ir.Model, ctx: Context) -> Mapping[ir.Node, HeadBlock | str]:
        made = {x.output: x for x in ctx.get(Linears())}
        readers = {x.node: x for x in made.values()}
        tracer = Tracer()
        found: dict[ir.Node, HeadBlock | str] = {}
        for node in all_nodes(model):
            if node.op_type == "Attention" and node.domain == "":
                try:
                    found[node] = _block(node, made, readers, tracer)
                except _Apart as reason:
                    found[node] = str(reason)
        return found


class _Apart(Exception):
    """Why the heads stay together."""


def _block(node: ir.Node, made: Mapping[ir.Value, Linear], readers: Mapping[ir.Node, Linear], tracer: Tracer) -> HeadBlock:
    inputs = [*node.inputs, *(None,) * 6]
    if any(v is not None for v in inputs[4:6]) or any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        raise _Apart("it has a key/value cache, or its probabilities are read")
    mask = inputs[3]
    if mask is not None and (rank(mask) is None or ((rank(mask) or 0) > 2 and static_dim(mask, -3) != 1)):
        raise _Apart(f"its mask `{mask.name}` may differ from head to head")
    packed = rank(inputs[0]) == 3
    heads = attr(node, "q_num_heads") or static_dim(inputs[0], 1)
    kv_heads = attr(node, "kv_num_heads") or static_dim(inputs[1], 1)
    if not heads or not kv_heads or heads % kv_heads:
        raise _Apart("the number of its heads is not known")
    axes = (2,) if packed else (1, 3)
    sources, widths = [], []
    for name, value, count in zip(("query", "key", "value"), inputs[:3], (heads, kv_heads, kv_heads), strict=True):
        assert value is not None
        width = static_dim(value, -1)
        if width is None:
            raise _Apart(f"the width of its {name} is not known")
        widths.append(width // count if packed else width)
        sources.append(_projection(name, value, axes, count, made, tracer))
    out = _ahead(node.outputs[0], axes, readers, tracer)
    if len({x.node for x in (*sources, out)}) < 4:
        raise _Apart("its projections are one product")
    block = HeadBlock(node, sources[0], sources[1], sources[2], out, heads, kv_heads, widths[0], widths[2])
    sizes = [(x.out_features, width * kv_heads) for x, width in block.inputs]
    if any(a != b for a, b in (*sizes, (out.in_features, block.rows * kv_heads))):
        raise _Apart("its projections have columns that belong to no head")
    return block


def _projection(name: str, value: ir.Value, axes: tuple[int, ...], heads: int, made: Mapping[ir.Value, Linear], tracer: Tracer) -> Linear:
    """The Linear behind an input of attention. `axes`: where its heads and features lie, one axis for both or one for each."""
    for _ in range(_DEPTH):
        if _reader(value) is None:
            raise _Apart(f"something else reads its {name}, `{value.name}`")
        if value in made:
            if len(axes) > 1:
                raise _Apart(f"the {name} is projected with an axis of heads")
            return _fit(name, made[value])
        node = value.producer()
        if node is None or node.domain:
            break
        if _alike(node, value, axes, heads):
            value = _first(node)
        else:
            view = tracer.view(value)
            if view is None or view.root is value:
                break
            axes, value = _at_root(name, view, axes), view.root
    raise _Apart(f"no projection with a stored weight makes its {name}")


def _at_root(name: str, view: View, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Where the heads and features of a traced value lie in its root: in one axis, or each in one of its own."""
    step, root = view.steps[-1], view.root
    if any(step.offset) or any(_reader(s.value) is None for s in view.steps[:-1]):
        raise _Apart(f"its {name} is only a part of `{root.name}`, or something else reads that")
    group: Group = merged(tuple(a for k in axes for a in step.axes[k]))
    if any(not isinstance(a.size, int) or a.axis < 0 or a.stride != 1 or a.size != static_dim(root, a.axis) for a in group) or len(group) > 2:
        raise _Apart(f"its {name} is only a part of `{root.name}`")
    return tuple(a.axis for a in group)


def _ahead(value: ir.Value, axes: tuple[int, ...], readers: Mapping[ir.Node, Linear], tracer: Tracer) -> Linear:
    """The output projection, whose input is the result of attention with heads and features in one last axis."""
    start = value
    for _ in range(_DEPTH):
        node = _reader(value)
        if node is None:
            raise _Apart(f"something else reads its result, `{value.name}`")
        if node in readers and readers[node].x is value:
            view = tracer.view(value)
            step = None if view is None or view.root is not start else view.steps[-1]
            wanted = merged(tuple(a for k in axes for a in tracer.view(start).steps[-1].axes[k]))  # type: ignore[union-attr]
            if step is None or merged(step.axes[-1]) != wanted:
                raise _Apart("its result is not laid out head by head where it is projected")
            return _fit("output", readers[node])
        if node.domain or node.op_type not in _LAYOUT:
            break
        value = node.outputs[0]
    raise _Apart("no projection with a stored weight reads its result")


def _fit(name: str, linear: Linear) -> Linear:
    if linear.node.op_type != "MatMul" or linear.quantized or linear.batch or not used_once(linear.weight):
        raise _Apart(f"its {name} projection is not a MatMul with a float matrix of its own")
    bias: Sequence[int] = () if linear.bias is None or linear.bias.const_value is None else tuple(linear.bias.const_value.shape.numpy())
    if linear.bias is not None and not bias:
        raise _Apart(f"the bias of its {name} projection is one number")
    return linear


def _reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads a value, but for its shape."""
    readers = [node for node in consumers(value) if node.op_type != "Shape"]
    return readers[0] if len(readers) == 1 and not value.is_graph_output() and sum(v is value for v in readers[0].inputs) == 1 else None


def _alike(node: ir.Node, value: ir.Value, axes: tuple[int, ...], heads: int) -> bool:
    """Whether a node does the same to every head: a rotary embedding, or a norm over the features of each head."""
    if node.op_type == "RotaryEmbedding":
        return len(axes) > 1 or attr(node, "num_heads") == heads
    last = len(value.shape or ()) - 1
    return node.op_type in _NORMS and len(axes) > 1 and axes[1] == last and attr(node, "axis", -1) in (-1, last)


def _first(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value
