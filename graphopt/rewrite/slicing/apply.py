"""Carry out planned removals: slice stored weights, and correct what nodes say about sizes (Reshape targets, Split sizes, numbers of heads)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.core.contract import Array
from graphopt.graph.attention_node import AttentionNode, head_counts
from graphopt.graph.fold import known_integers
from graphopt.graph.interface import RESIZED
from graphopt.graph.questions import attr, constant, consumers, graphs, is_constant, static_dim
from graphopt.graph.serialize import DECLARED
from graphopt.graph.shapes import contents, declared_shape, infer_shapes
from graphopt.rewrite.dead import remove_dead
from graphopt.rewrite.insert import Inserter
from graphopt.rewrite.slicing.moves import cut_axes, recut
from graphopt.rewrite.slicing.places import rank
from graphopt.rewrite.slicing.plan import AxisMasks, Refusal, Removals, Slot, kept


def apply(s: Removals) -> None:
    """Change the graph of `s` as planned; it is in normal form afterwards, with new shapes. `s` must not be used again.

    Raises:
        Refusal: a size that nodes compute from the removed entries reaches a place where it cannot be corrected.
    """
    Applier(s).run()


class Applier:
    def __init__(self, s: Removals) -> None:
        self.s, self.model = s, s.model
        self.inserter = Inserter(s.model)
        self.op = self.inserter.builder()  # for constants
        self._sliced: dict[tuple[ir.Value, tuple[tuple[int, bytes], ...]], ir.Value] = {}

    def run(self) -> None:
        s = self.s
        touched = dict.fromkeys(n for v in s.removed for n in (v.producer(), *consumers(v)) if n is not None)
        touched.update(dict.fromkeys(slot.node for slot in s.private))
        plan = [(node, edit) for node in touched if (edit := EDITS.get(node.op_type)) is not None]
        for node in touched:
            if node.op_type == "Shape":
                self._freeze(node)
        for node, edit in plan:
            edit(self, node)
        for slot, masks in s.private.items():
            self._slice(slot, masks)
        self._resize()
        self.inserter.adopt(self.op, "", ())
        remove_dead(self.model)
        self._rename()
        for graph in graphs(self.model):
            graph.sort()
        infer_shapes(self.model)

    def _rename(self) -> None:
        """A sliced weight takes the name of the whole one, where that is gone."""
        weights = self.model.graph.initializers
        for (old, _), new in self._sliced.items():
            name, fresh = str(old.name), str(new.name)
            if name not in weights and fresh in weights:
                del weights[fresh]
                new.name = name
                weights[name] = new

    # ---- weights and operands -----------------------------------------------------------------------------------------------------------

    def _slice(self, slot: Slot, masks: AxisMasks) -> None:
        value = slot.value
        if value is None or not any(m.any() for m in masks.values()):
            return
        if not is_constant(value):
            self._gather(slot, value, masks)
            return
        key = value, tuple(sorted((axis, m.tobytes()) for axis, m in masks.items()))
        if key not in self._sliced:
            self._sliced[key] = self._stored(value, masks)
        slot.node.replace_input_with(slot.index, self._sliced[key])

    def _stored(self, value: ir.Value, masks: AxisMasks) -> ir.Value:
        assert value.const_value is not None
        tensor = self._left(value.const_value, masks, self.inserter.names.fresh(f"{value.name}_pruned"))
        new = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor)
        self.model.graph.register_initializer(new)
        others = [use for use in value.uses() if Slot(use.node, use.idx) not in self.s.private]
        if others:
            reader = next(slot.node for slot in self.s.private if slot.value is value)
            self.s.note(reader, f"`{value.name}` is shared with `{others[0].node.name}`, which keeps all of it: {tensor.nbytes} bytes more")
        return new

    @staticmethod
    def _left(tensor: ir.TensorProtocol, masks: AxisMasks, name: str) -> ir.TensorProtocol:
        array = tensor.numpy()
        for axis, mask in masks.items():
            array = np.take(array, kept(mask), axis=axis)
        return ir.Tensor(np.ascontiguousarray(array), dtype=tensor.dtype, shape=ir.Shape(array.shape), name=name)

    def _gather(self, slot: Slot, value: ir.Value, masks: AxisMasks) -> None:
        """A computed operand that others read whole: this reader takes what it needs of it."""
        common = self.s.removed.get(value, {})
        for axis, mask in masks.items():
            left = mask if axis not in common else mask[kept(common[axis])]  # along what the value has left for all its readers
            if not left.any():
                continue
            value = self._node(slot.node, "Gather", [value, self.integers(kept(left))], axis=axis)
            slot.node.replace_input_with(slot.index, value)

    def integers(self, numbers: Sequence[int] | Array) -> ir.Value:
        return self.op.const(np.asarray(numbers, np.int64), "kept")

    def _node(self, before: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> ir.Value:
        op = self.inserter.builder(before.graph)
        made = op.node(op_type, inputs, **attributes)
        self.inserter.before(before, op)
        return made  # type: ignore[no-any-return]

    def replace(self, node: ir.Node, index: int, value: ir.Value) -> None:
        node.resize_inputs(max(len(node.inputs), index + 1))
        node.replace_input_with(index, value)

    # ---- sizes --------------------------------------------------------------------------------------------------------------------------

    def _freeze(self, shape: ir.Node) -> None:
        """What is computed from the old sizes alone keeps its value (a scale 1 / sqrt(head_dim), a Reshape target that is corrected apart)."""
        todo, seen = [shape.outputs[0]], set[ir.Value]()
        while todo:
            value = todo.pop()
            if value in seen:
                continue
            seen.add(value)
            known, sizes = known_integers(value), contents(value) or ()
            if known is not None:
                if not value.is_graph_output():
                    value.replace_all_uses_with(self.op.const(known, f"{value.name}_before"))
                continue
            if value.dtype is None or not value.dtype.is_integer() or not any(isinstance(n, int) for n in sizes):
                continue  # free of numbers: nothing of it changes
            for node in consumers(value):
                index = _TARGETS.get(node.op_type)
                if index is None:
                    todo += node.outputs
                elif node.inputs[index] is value and not self.s.removed.get(node.outputs[0]):
                    self._replace_target(node, index, value, sizes)  # of another block, whose sizes were the same

    def target(self, node: ir.Node, index: int) -> None:
        """Operand `index` holds the sizes of the result: write those after the removal."""
        out, value = node.outputs[0], node.inputs[index]
        masks = self.s.removed.get(out, {})
        if value is None or not masks or out.shape is None:
            return
        wanted = {axis: len(kept(mask)) for axis, mask in masks.items() if static_dim(out, axis) is not None}
        stored = constant(value)
        if stored is not None:
            sizes = [wanted.get(k, int(n)) if n not in (-1, 1) else int(n) for k, n in enumerate(self._aligned(stored, len(out.shape)))]
            lead = len(out.shape) - stored.size
            node.replace_input_with(index, self.integers(sizes[lead:]))
            return
        self._computed_target(node, index, value, wanted, [k for k in masks if k not in wanted])

    @staticmethod
    def _aligned(stored: Array, size: int) -> list[int]:
        return [1] * (size - stored.size) + [int(n) for n in stored.reshape(-1)]

    def _computed_target(self, node: ir.Node, index: int, value: ir.Value, wanted: dict[int, int], inferred: list[int]) -> None:
        """Pieces of the old target, and numbers in between; at most one size is left to be inferred."""
        size = len(node.outputs[0].shape or ())
        known: Sequence[object] = contents(value) or [None] * size
        if len(inferred) > (1 if node.op_type == "Reshape" else 0) or static_dim(value, 0) != size:
            raise Refusal(f"{node.op_type} `{node.name}`: its target is computed, and what it must become is not known")
        self._replace_target(node, index, value, [wanted.get(k, -1) if k in wanted or k in inferred else old for k, old in enumerate(known)])

    def _replace_target(self, node: ir.Node, index: int, value: ir.Value, sizes: Sequence[object]) -> None:
        """These numbers, and pieces of the old target where there is none."""
        parts: list[ir.Value] = []
        for k, size in enumerate(sizes):
            if isinstance(size, int):
                parts.append(self.integers([size]))
            else:
                parts.append(self._node(node, "Slice", [value, *(self.integers([n]) for n in (k, k + 1, 0))]))
        node.replace_input_with(index, self._node(node, "Concat", parts, axis=0))

    def _resize(self) -> None:
        """Inputs and outputs that were allowed to shrink."""
        graph = self.model.graph
        resized: set[str] = set(graph.meta.get(RESIZED, ()))
        for value, masks in self.s.removed.items():
            if not (value.is_graph_input() or value.is_graph_output()):
                continue
            resized.add(str(value.name))
            declared = value.shape if value.is_graph_input() else declared_shape(value)
            if declared is None:
                continue
            sizes = [len(kept(masks[k])) if k in masks and isinstance(n, int) else n for k, n in enumerate(declared)]
            if value.is_graph_input():
                value.shape = ir.Shape(sizes)
                if value.const_value is not None:  # its default
                    value.const_value = self._left(value.const_value, masks, str(value.name))
            else:
                value.meta[DECLARED] = ir.Shape(sizes)
        if resized:
            graph.meta[RESIZED] = frozenset(resized)


# ---- nodes that name sizes ----------------------------------------------------------------------------------------------------------------


def _split(a: Applier, node: ir.Node) -> None:
    axis = int(attr(node, "axis", 0)) % rank(Slot(node, 0))
    parts = [(static_dim(v, axis), a.s.mask(Slot(node, k, True), axis)) for k, v in enumerate(node.outputs)]
    if all(mask is None for _, mask in parts):
        return
    sizes = [len(kept(mask)) if mask is not None else size for size, mask in parts]
    node.attributes.pop("num_outputs", None)
    a.replace(node, 1, a.integers([int(n) for n in sizes if n is not None]))


def _slice(a: Applier, node: ir.Node) -> None:
    x = Slot(node, 0)
    axes = cut_axes(node)
    if all(a.s.mask(x, k) is None for k in axes):
        return
    cuts = [recut(node, k, a.s.mask(x, k)) for k in axes]
    for index, numbers in enumerate(([c[0] for c in cuts], [c[1] for c in cuts], axes, [c[2] for c in cuts]), start=1):
        a.replace(node, index, a.integers(numbers))


def _gather(a: Applier, node: ir.Node) -> None:
    x = Slot(node, 0)
    axis = int(attr(node, "axis", 0)) % rank(x)
    mask, index = a.s.mask(x, axis), constant(node.inputs[1])
    if mask is None or index is None:
        return
    place, chosen = np.cumsum(~mask) - 1, index.reshape(-1) % len(mask)
    moved = place[chosen[~mask[chosen]]]
    a.replace(node, 1, a.op.const(moved.reshape(() if index.ndim == 0 else (-1,)).astype(index.dtype), "kept"))


def _attention(a: Applier, node: ir.Node) -> None:
    now = AttentionNode.of(node)
    assert now is not None
    if "scale" not in node.attributes:  # the scale of the heads as they were trained
        node.attributes["scale"] = ir.AttrFloat32("scale", now.scale)
    if not now.packed:
        return
    masks = (a.s.mask(Slot(node, 0), 2), now.heads), (a.s.mask(Slot(node, 1), 2), now.kv_heads)
    left = [heads if mask is None else int((~mask.reshape(heads, -1)).any(axis=1).sum()) for mask, heads in masks]
    for name, heads in head_counts(*left).items():
        node.attributes[name] = ir.AttrInt64(name, heads)


def _rotary(a: Applier, node: ir.Node) -> None:
    x, heads = Slot(node, 0), int(attr(node, "num_heads", 0))
    mask, size = a.s.mask(x, rank(x) - 1), int(attr(node, "rotary_embedding_dim", 0))
    if mask is None:
        return
    per_head = mask.reshape(heads, -1) if rank(x) == 3 and heads else mask.reshape(1, -1)
    left = ~per_head[(~per_head).any(axis=1)]
    if rank(x) == 3 and heads:
        node.attributes["num_heads"] = ir.AttrInt64("num_heads", len(left))
    if size:
        node.attributes["rotary_embedding_dim"] = ir.AttrInt64("rotary_embedding_dim", int(left[0][:size].sum()))


def _conv(a: Applier, node: ir.Node) -> None:
    mask = a.s.mask(Slot(node, 0), 1)
    if mask is not None and int(attr(node, "group", 1)) > 1:
        node.attributes["group"] = ir.AttrInt64("group", int((~mask).sum()))


_TARGETS = {"Reshape": 1, "Expand": 1, "ConstantOfShape": 0}
EDITS: dict[str, Callable[[Applier, ir.Node], None]] = {
    **{name: lambda a, node, k=index: a.target(node, k) for name, index in _TARGETS.items()},  # type: ignore[misc]
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "Attention": _attention,
    "RotaryEmbedding": _rotary,
    "Conv": _conv,
}
