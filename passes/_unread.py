"""A projection whose result is split, without the parts that nobody reads any more."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.linear import Linear, StoredOperands
from graphopt.core.contract import Context
from graphopt.graph.questions import attr, constant, producer, rank, static_dim, used_once
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.match import Match
from graphopt.rewrite.rules import RewritePass


@dataclasses.dataclass(frozen=True)
class SplitMatch(Match):
    """`columns` of the projection are read, in parts of `sizes`. `shape`: of a Reshape between it and the Split that keeps the last axis."""

    linear: Linear
    shape: ir.Value | None
    columns: tuple[slice, ...]
    sizes: tuple[int, ...]


class DropUnread(RewritePass[SplitMatch]):
    """Exact. Queries and keys that were computed together with the values go where they are not needed."""

    anchors: ClassVar[frozenset[str]] = frozenset({"Split"})

    def match(self, node: ir.Node, ctx: Context) -> SplitMatch | None:
        read = [k for k, v in enumerate(node.outputs) if v.uses() or v.is_graph_output()]
        x, sizes = node.inputs[0], [static_dim(v, -1) for v in node.outputs]
        if len(read) in (0, len(node.outputs)) or None in sizes or attr(node, "axis", 0) not in (-1, (rank(x) or 0) - 1):
            return None
        reshape = producer(x, "Reshape")
        made = x if reshape is None else reshape.inputs[0]
        linear = _linear_that_makes(made, ctx)
        if linear is None or x is None or not used_once(x) or not used_once(linear.output) or not used_once(linear.weight) or not _plain(linear):
            return None
        if static_dim(x, -1) != linear.out_features:
            return None
        ends = np.cumsum([int(s or 0) for s in sizes])
        columns = tuple(slice(int(ends[k]) - int(sizes[k] or 0), int(ends[k])) for k in read)
        nodes = tuple(n for n in (linear.node, linear.bias_node, reshape, node) if n is not None)
        shape = None if reshape is None else reshape.inputs[1]
        return SplitMatch(nodes, tuple(node.outputs[k] for k in read), linear, shape, columns, tuple(c.stop - c.start for c in columns))

    def build(self, op: Builder, m: SplitMatch) -> Sequence[ir.Value]:
        weight = np.concatenate([m.linear.matrix()[:, c] for c in m.columns], -1)
        out = op.MatMul(m.linear.x, op.const(np.ascontiguousarray(weight), f"{m.linear.weight.name}_read"))
        if m.linear.bias is not None:
            bias = np.asarray(constant(m.linear.bias))
            part = bias if bias.size == 1 else np.concatenate([bias[..., c] for c in m.columns], -1)
            out = op.Add(out, op.const(part, f"{m.linear.bias.name}_read"))
        if m.shape is not None:
            lead = op.Slice(m.shape, op.ints(0, name="start"), op.ints(-1, name="end"))
            out = op.Reshape(out, op.Concat(lead, op.ints(sum(m.sizes), name="width"), axis=0))
        if len(m.sizes) == 1:
            return [out]
        return op.node("Split", (out, op.ints(*m.sizes, name="sizes")), axis=-1, _outputs=len(m.sizes))  # type: ignore[no-any-return]


def _linear_that_makes(value: ir.Value | None, ctx: Context) -> Linear | None:
    """The multiply whose result, after the bias, is `value`."""
    add = producer(value, "Add")
    operands, products = ctx.get(StoredOperands()), (value, *(() if add is None else add.inputs))
    found = (operands.get(node) for v in products if v is not None and (node := v.producer()) is not None)
    return next((x for x in found if isinstance(x, Linear) and x.output is value), None)


def _plain(x: Linear) -> bool:
    """A float weight [in, out] or [out, in] of its own, and nothing but a bias added."""
    whole = not x.quantized and not x.batch and not x.trans_x and x.addend is None and (x.alpha, x.beta) == (1.0, 1.0)
    return whole and (x.bias is None or x.bias.const_value is None or x.bias.const_value.size in (1, x.out_features))
