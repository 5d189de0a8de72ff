"""Canonical spelling of layout: no copies that move nothing, and targets as constants wherever the shapes prove them.

In a Reshape target, 0 copies an equal (symbolic) dimension at the same place. -1 is used only beside dimensions that are not zero: a
runtime cannot infer a dimension beside one that turns out to be zero.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.graph.fold import is_random
from graphopt.graph.questions import attr, constant, is_constant, is_read, producer, rank, same_dim, same_shape, static_dim, used_once
from graphopt.graph.shapes import slice_bounds
from graphopt.rewrite.builder import Builder

from ._algebra import Rewritten, stand_in

_END = np.iinfo(np.int64).max  # "to the end" in a Slice
_RESHAPERS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten")  # ops that keep the order of the elements


def identity(node: ir.Node, op: Builder) -> Rewritten:
    """Identity, Cast to the same type, Expand or Tile to the same shape, Concat and Split of one, Dropout at inference."""
    x = node.inputs[0]
    return stand_in(node, x, op) if x is not None and _does_nothing(node, x) else None


def _does_nothing(node: ir.Node, x: ir.Value) -> bool:
    out = node.outputs[0]
    match node.op_type:
        case "Identity":
            return True
        case "Cast" | "CastLike":
            return x.dtype is not None and x.dtype == out.dtype
        case "Expand" | "Tile":
            return same_shape(x, out)
        case "Slice":
            return same_shape(x, out) and _forward(node)
        case "Split" | "Concat":
            return len(node.outputs) == len(node.inputs) == 1 or (node.op_type == "Split" and len(node.outputs) == 1)
        case "Dropout":
            return not is_random(node) and not any(map(is_read, node.outputs[1:]))
    return False


def _forward(node: ir.Node) -> bool:
    known = slice_bounds(node).steps
    return known is not None and all(isinstance(s, int) and s > 0 for s in known)


def same_elements(node: ir.Node, op: Builder) -> Rewritten:
    """A chain of Reshape, Squeeze, Unsqueeze and Flatten that ends in the shape it started from does nothing."""
    for source in _sources(node):
        if same_shape(source, node.outputs[0]):
            return stand_in(node, source, op)
    return None


def reshape(node: ir.Node, op: Builder) -> Rewritten:
    """One constant target from the earliest value with the same elements."""
    sources = list(_sources(node))
    for source in reversed(sources):
        target = reshape_target(source, node.outputs[0])
        if target is None:
            continue
        written = constant(node.inputs[1])
        if source is node.inputs[0] and "allowzero" not in node.attributes and written is not None and written.tolist() == target:
            return None
        return [op.Reshape(source, op.const(np.array(target, np.int64), f"{node.outputs[0].name}_shape"))]
    return None


def batched_transpose(node: ir.Node, op: Builder) -> Rewritten:
    """Reshape that splits the first axis again, after Reshape that merged it and Transpose of the rest: one Transpose (a batched matrix's
    last two axes, in the spelling of an exporter that knows only rank 3)."""
    flip = producer(node.inputs[0], "Transpose")
    merge = producer(flip.inputs[0], "Reshape") if flip is not None else None
    x, out = merge.inputs[0] if merge is not None else None, node.outputs[0]
    if flip is None or merge is None or x is None or x.shape is None or out.shape is None or merge.outputs[0].shape is None:
        return None
    perm, middle = attr(flip, "perm"), merge.outputs[0].shape
    lead = len(x.shape) - len(middle) + 1  # axes of x that were merged into the first one
    if perm is None or perm[0] != 0 or lead < 1 or len(out.shape) != len(x.shape):
        return None
    whole = [*range(lead), *(p + lead - 1 for p in perm[1:])]
    kept = all(same_dim(a, b) for a, b in zip(x.shape[lead:], middle[1:], strict=True))
    return [op.Transpose(x, perm=whole)] if kept and all(same_dim(x.shape[p], d) for p, d in zip(whole, out.shape, strict=True)) else None


def bias_before_split(node: ir.Node, op: Builder) -> Rewritten:
    """A constant [heads, dim] behind the Reshape that splits the features of a product is added in front of it, where a bias stands."""
    split = producer(node.inputs[0], "Reshape")
    whole, bias, out = split.inputs[0] if split is not None else None, node.inputs[1], node.outputs[0]
    if split is None or whole is None or whole.shape is None or out.shape is None or producer(whole, "MatMul") is None:
        return None
    lead, width = len(whole.shape) - 1, static_dim(whole, -1)
    tail = out.shape[lead:]
    if not (used_once(split.outputs[0]) and used_once(whole) and same_shape(split.outputs[0], out) and len(tail) > 1):
        return None
    if not all(same_dim(a, b) for a, b in zip(whole.shape[:-1], out.shape, strict=False)) or width is None:
        return None
    array = constant(bias) if is_constant(bias) else None
    if array is None or array.size != width or array.shape[max(array.ndim - len(tail), 0) :] != tuple(tail):
        return None
    return [op.Reshape(op.Add(whole, op.const(array.reshape(-1), str(bias.name))), split.inputs[1])]  # type: ignore[union-attr]


def _sources(node: ir.Node) -> list[ir.Value]:
    """The values with the same elements in the same order, nearest first."""
    out: list[ir.Value] = []
    step: ir.Node | None = node
    while step is not None and step.inputs[0] is not None:
        out.append(step.inputs[0])
        step = producer(step.inputs[0], *_RESHAPERS)
    return out


def reshape_target(data: ir.Value, out: ir.Value) -> list[int] | None:
    """The constant target that gives `data` the shape of `out`, also for dimensions of size 0; None where there is none."""
    if data.shape is None or out.shape is None:
        return None
    target: list[int] = []
    for axis, dim in enumerate(out.shape):
        before = data.shape[axis] if axis < len(data.shape) else None
        if isinstance(dim, int) and dim != 0:
            target.append(dim)
        else:
            target.append(0 if before is not None and same_dim(dim, before) else -1)
    return None if target.count(-1) > 1 or (-1 in target and (0 in target or 0 in out.shape)) else target


def expand(node: ir.Node, op: Builder) -> Rewritten:
    """A constant target: 1 where the input already has the dimension."""
    x, out = node.inputs[0], node.outputs[0]
    if x is None or x.shape is None or out.shape is None:
        return None
    padded = [1] * (len(out.shape) - len(x.shape)) + list(x.shape)
    target = [1 if same_dim(a, b) else b for a, b in zip(padded, out.shape, strict=True)]
    written = constant(node.inputs[1])
    if not all(isinstance(d, int) for d in target) or (written is not None and written.tolist() == target):
        return None
    return [op.Expand(x, op.const(np.array(target, np.int64), f"{out.name}_shape"))]


def unexpanded(node: ir.Node, op: Builder) -> Rewritten:
    """An operand that is expanded to what its reader would broadcast it to is read as it was: it is expanded to the shape of another operand, or
    another has the shape of the result."""
    for k, value in enumerate(node.inputs):
        wide = producer(value, "Expand")
        others = [v for v in node.inputs if v is not None and v is not value]
        shape = None if wide is None else producer(wide.inputs[1], "Shape")
        if wide is not None and (_all_of(shape, others) or any(same_shape(v, node.outputs[0]) for v in others)):
            return [op.node(node.op_type, (*node.inputs[:k], wide.inputs[0], *node.inputs[k + 1 :]))]
    return None


def _all_of(shape: ir.Node | None, values: list[ir.Value]) -> bool:
    """Whether it is the Shape of one of the values, from its first axis to its last."""
    return shape is not None and not shape.attributes and shape.inputs[0] in values


def transpose(node: ir.Node, op: Builder) -> Rewritten:
    """An explicit permutation; two in a row become one, and one that moves nothing vanishes."""
    x = node.inputs[0]
    if x is None or rank(x) is None:
        return None
    perm = list(attr(node, "perm", range(rank(x) or 0)[::-1]))
    inner = producer(x, "Transpose")
    before = None if inner is None else attr(inner, "perm")
    if before is not None and inner is not None and inner.inputs[0] is not None:
        x, perm = inner.inputs[0], [before[p] for p in perm]
    if perm == sorted(perm):
        return stand_in(node, x, op)
    return [op.Transpose(x, perm=perm)] if x is not node.inputs[0] or "perm" not in node.attributes else None


def slice_ends(node: ir.Node, op: Builder) -> Rewritten:
    """Ends that are the size of the axis, known or computed, become "to the end"."""
    x, starts, ends, *rest = node.inputs
    axes, known, bounds, _ = slice_bounds(node)
    if x is None or x.shape is None or bounds is None or known is None or not _forward(node):
        return None
    if axes is None or not all(isinstance(a, int) for a in axes):
        return None
    dims = [x.shape[int(a)] for a in axes]  # type: ignore[arg-type]
    target = [_END if same_dim(b, d) or (isinstance(b, int) and isinstance(d, int) and b > d) else b for b, d in zip(bounds, dims, strict=True)]
    if not all(isinstance(b, int) for b in target) or target == bounds:
        return None
    dtype = np.int64 if ends is None or ends.dtype is None else ends.dtype.numpy()
    top = min(_END, np.iinfo(dtype).max)
    array = np.array([min(int(b), top) for b in target], dtype)  # type: ignore[arg-type]
    if bounds == array.tolist():
        return None
    return [op.Slice(x, starts, op.const(array, f"{node.outputs[0].name}_ends"), *rest)]


def concat(node: ir.Node, op: Builder) -> Rewritten:
    """Arms of size 0 along the axis go."""
    axis = attr(node, "axis")
    arms = [v for v in node.inputs if static_dim(v, axis) != 0]
    return [op.Concat(*arms, axis=axis)] if 0 < len(arms) < len(node.inputs) else None
