"""The projections of an attention as several products, each for some of its heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.head_columns import HeadBlock, HeadBlocks
from graphopt.analysis.linear import Linear
from graphopt.compress.weights import numbers
from graphopt.core.contract import Array, Context
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.match import Match
from graphopt.rewrite.rules import RewritePass

Groups = tuple[tuple[int, ...], ...]  # a partition of the groups of a block (a key/value head and its query heads), in the new order


@dataclasses.dataclass(frozen=True)
class HeadsMatch(Match):
    block: HeadBlock


class SplitHeads(RewritePass[HeadsMatch]):
    """Exact but for the order in which the output projection adds up.

    Query, key and value become Concats of products with some of the columns each, the output projection a sum of products with some of the
    rows. The heads follow the order of the partition, in all four alike, as attention does not care which head comes first.

    Args:
        groups: name of an Attention node -> partition.
    """

    anchors: ClassVar[frozenset[str]] = frozenset({"Attention"})

    def __init__(self, groups: Mapping[str, Groups]) -> None:
        self.groups = groups
        self._owners: dict[str, tuple[str, int]] = {}

    def owner(self, weight: str) -> tuple[str, int] | None:
        """(name of the Attention node, number of the piece of its partition) of a weight that was made here."""
        return self._owners.get(weight)

    def match(self, node: ir.Node, ctx: Context) -> HeadsMatch | None:
        block = ctx.get(HeadBlocks()).get(node) if node.name in self.groups else None
        if not isinstance(block, HeadBlock):
            return None
        linears = [linear for linear, _ in block.inputs]
        nodes = [n for x in linears for n in (x.node, x.bias_node) if n is not None]
        return HeadsMatch((*nodes, block.o.node), (*(x.output for x in linears), block.o.node.outputs[0]), block)

    def build(self, op: Builder, m: HeadsMatch) -> Sequence[ir.Value]:
        name = str(m.block.node.name)
        groups = self.groups[name]
        values = [self._columns(op, name, linear, width, groups) for linear, width in m.block.inputs]
        linear, width = m.block.o, m.block.rows
        matrix = linear.matrix()
        sizes = np.array([len(piece) * width for piece in groups], np.int64)
        parts = op.Split(linear.x, op.const(sizes, "heads"), axis=-1, _outputs=len(groups))
        rows = [self._stored(op, linear, matrix[_places(piece, width)], name, k) for k, piece in enumerate(groups)]
        return [*values, op.Sum(*(op.MatMul(x, w) for x, w in zip(parts, rows, strict=True)))]

    def _columns(self, op: Builder, name: str, linear: Linear, width: int, groups: Groups) -> ir.Value:
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
