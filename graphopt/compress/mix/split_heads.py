"""The projections of an attention as several products, each for some of its heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.heads import AttentionHeads, Heads
from graphopt.analysis.linear import Linear
from graphopt.analysis.projections import HeadOperand, only_reader
from graphopt.compress.weights import numbers
from graphopt.core.contract import Array, Context
from graphopt.graph.attention_node import AttentionNode
from graphopt.graph.questions import used_once
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.match import Match
from graphopt.rewrite.rules import RewritePass

HeadGroups = tuple[tuple[int, ...], ...]  # a partition of the groups of an attention (a key/value head and its query heads), in the new order


@dataclasses.dataclass(frozen=True)
class HeadsMatch(Match):
    heads: Heads


def shares(h: Heads) -> tuple[tuple[Linear, int], ...]:
    """Query, key, value and output projections, and how many columns of each (rows of the last) belong to one group of heads."""
    sizes = (h.group * h.head_dim, h.head_dim, h.value_dim, h.group * h.value_dim)
    return tuple((x, n) for x, n in zip((*(o.source for o in h.operands), h.output), sizes, strict=True) if x is not None)


def why_together(h: Heads) -> str | None:
    """Why the heads of an attention cannot be taken apart."""
    a = AttentionNode.of(h.node)
    if a is None:
        return "it is spelled out in primitive operators; put fuse-attention before"
    if a.cached or a.shown is not None:
        return "it has a key/value cache, or its probabilities are read"
    if a.mask is not None and a.mask_differs:
        return f"its mask `{a.mask.name}` may differ from head to head"
    for name, o in zip(("query", "key", "value"), h.operands, strict=True):
        shared = next((v for v in o.path if only_reader(v) is None), None)
        if shared is not None:
            return f"something else reads its {name}, `{shared.name}`"
        if o.source is None:
            return f"no projection with a stored weight makes its {name}: {o.reason}"
    if h.output is None:
        shared = h.value if only_reader(h.value) is None else None
        reads = "no projection with a stored weight reads its result, head by head"
        return reads if shared is None else f"something else reads its result, `{shared.name}`"
    projections = [x for x, _ in shares(h)]
    reason = next((r for name, x in zip(("query", "key", "value", "output"), projections, strict=True) if (r := _unfit(name, x)) is not None), None)
    if reason is None and len({x.node for x in projections}) < 4:
        return "its projections are one product"
    counts = (h.heads, h.kv_heads, h.kv_heads)
    if reason is None and not all(_in_order(o, n) for o, n in zip(h.operands, counts, strict=True)):
        return "its projections have columns that belong to no head, or stand in another order"
    return reason


def _unfit(name: str, linear: Linear) -> str | None:
    if linear.node.op_type != "MatMul" or linear.quantized or linear.batch or not used_once(linear.weight):
        return f"its {name} projection is not a MatMul with a float matrix of its own"
    if linear.bias is not None and (linear.bias.const_value is None or not linear.bias.const_value.shape.numpy()):
        return f"the bias of its {name} projection is one number"
    return None


def _in_order(o: HeadOperand, heads: int) -> bool:
    """The columns of the projection are those of the first head, then those of the second."""
    return o.source is not None and len(o.columns) == heads and np.array_equal(o.columns.reshape(-1), np.arange(o.source.out_features))


class SplitHeads(RewritePass[HeadsMatch]):
    """Exact but for the order in which the output projection adds up.

    Query, key and value become Concats of products with some of the columns each, the output projection a sum of products with some of the
    rows. The heads follow the order of the partition, in all four alike, as attention does not care which head comes first.

    Args:
        groups: name of an Attention node -> partition.
    """

    anchors: ClassVar[frozenset[str]] = frozenset({"Attention"})

    def __init__(self, groups: Mapping[str, HeadGroups]) -> None:
        self.groups = groups
        self._owners: dict[str, tuple[str, int]] = {}

    def owner(self, weight: str) -> tuple[str, int] | None:
        """(name of the Attention node, number of the piece of its partition) of a weight that was made here."""
        return self._owners.get(weight)

    def match(self, node: ir.Node, ctx: Context) -> HeadsMatch | None:
        heads = ctx.get(AttentionHeads()).get(node) if node.name in self.groups else None
        if not isinstance(heads, Heads) or why_together(heads) is not None:
            return None
        *linears, out = (x for x, _ in shares(heads))
        nodes = [n for x in linears for n in (x.node, x.bias_node) if n is not None]
        return HeadsMatch((*nodes, out.node), (*(x.output for x in linears), out.node.outputs[0]), heads)

    def build(self, op: Builder, m: HeadsMatch) -> Sequence[ir.Value]:
        name = str(m.heads.node.name)
        groups = self.groups[name]
        *inputs, (linear, width) = shares(m.heads)
        values = [self._columns(op, name, x, n, groups) for x, n in inputs]
        matrix = linear.matrix()
        sizes = np.array([len(piece) * width for piece in groups], np.int64)
        parts = op.node("Split", (linear.x, op.const(sizes, "heads")), axis=-1, _outputs=len(groups))
        rows = [self._stored(op, linear, matrix[_places(piece, width)], name, k) for k, piece in enumerate(groups)]
        return [*values, op.Sum(*(op.MatMul(x, w) for x, w in zip(parts, rows, strict=True)))]

    def _columns(self, op: Builder, name: str, linear: Linear, width: int, groups: HeadGroups) -> ir.Value:
        matrix = linear.matrix()
        weights = [self._stored(op, linear, matrix[:, _places(piece, width)], name, k) for k, piece in enumerate(groups)]
        out: ir.Value = op.Concat(*(op.MatMul(linear.x, w) for w in weights), axis=-1)
        if linear.bias is None:
            return out
        bias = numbers(linear.bias)
        order = np.concatenate([_places(piece, width) for piece in groups])
        value: ir.Value = op.Add(out, linear.bias if bias.size == 1 else op.const(bias[..., order], f"{linear.bias.name}_heads"))
        return value

    def _stored(self, op: Builder, linear: Linear, array: Array, name: str, piece: int) -> ir.Value:
        value = op.const(np.ascontiguousarray(array), f"{linear.weight.name}_heads")
        self._owners[str(value.name)] = name, piece
        return value


def _places(piece: Sequence[int], width: int) -> Array:
    """Columns (or rows) of these groups."""
    return np.concatenate([np.arange(g * width, (g + 1) * width) for g in piece])
