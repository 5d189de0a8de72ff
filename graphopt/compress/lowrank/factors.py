"""Puts the factors of a weight in its place: x @ W becomes (x @ A) @ B, the bias stays where it was and is added once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.linear import Embedding, Linear
from graphopt.compress.lowrank.factorable import Item
from graphopt.core.contract import Array, Context
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.match import Match, Miss
from graphopt.rewrite.rules import RewritePass


@dataclasses.dataclass(frozen=True)
class Cut:
    """What an item becomes: `left` [.., in, r], and one `right` [.., r, out] for each weight.

    Attributes:
        error: ||y - cut y|| / ||y||, as far as it is known (on the samples, or of the weight).
        sampled: whether it is of outputs on samples.
    """

    item: Item
    left: Array
    rights: tuple[Array, ...]
    error: float
    sampled: bool

    @property
    def rank(self) -> int:
        return int(self.left.shape[-1])


@dataclasses.dataclass(frozen=True)
class TableCut:
    """An embedding table [rows, width] as `rows` [rows, r] and `right` [r, width]."""

    embeddings: tuple[Embedding, ...]
    rows: Array
    right: Array
    error: float


@dataclasses.dataclass(frozen=True)
class CutMatch(Match):
    linears: tuple[Linear, ...]
    cut: Cut

    @property
    def facts(self) -> Mapping[str, Any]:
        item = self.cut.item
        told = {"rank": self.cut.rank, "shape": [item.in_features, item.out_features], "before": item.size, "after": item.kept(self.cut.rank)}
        named = {"joint": [x.node.name for x in self.linears]} if item.joint else {}
        return {**told, "error": round(self.cut.error, 6), "of": "outputs on samples" if self.cut.sampled else "weight", **named}


@dataclasses.dataclass(frozen=True)
class TableCutMatch(Match):
    cut: TableCut

    @property
    def facts(self) -> Mapping[str, Any]:
        rows, rank = self.cut.rows.shape
        width = self.cut.right.shape[1]
        told = {"rank": rank, "shape": [rows, width], "before": rows * width, "after": rank * (rows + width)}
        return {**told, "error": round(self.cut.error, 6), "of": "weight"}


class PutFactors(RewritePass[Match]):
    """Not in the registry: `factorize` decides what is cut, this puts it in place."""

    exact: ClassVar[bool] = False
    anchors: ClassVar[frozenset[str]] = frozenset({"MatMul", "Gemm", "Gather"})

    def __init__(self, cuts: Sequence[Cut], tables: Sequence[TableCut] = (), whole: Mapping[ir.Node, str] | None = None) -> None:
        self.whole = whole or {}
        self.found: dict[ir.Node, Match] = {}
        for cut in cuts:
            groups = [cut.item.linears] if cut.item.joint else [(x,) for x in cut.item.linears]
            for linears in groups:
                nodes = tuple(x.node for x in linears)
                self.found[nodes[0]] = CutMatch(nodes, tuple(n.outputs[0] for n in nodes), linears, cut)
        for table in tables:
            self.found |= {e.node: TableCutMatch((e.node,), (e.node.outputs[0],), table) for e in table.embeddings}

    def match(self, node: ir.Node, ctx: Context) -> Match | Miss | None:
        if node in self.found:
            return self.found[node]
        return Miss(node, f"stays whole: {self.whole[node]}") if node in self.whole else None

    def build(self, op: Builder, m: Match) -> Sequence[ir.Value]:
        if isinstance(m, TableCutMatch):
            return [_lookup(op, m)]
        assert isinstance(m, CutMatch)
        first, cut = m.linears[0], m.cut
        left = _stored(op, cut.left, first, "left")
        if cut.item.joint or first.node.op_type == "MatMul":
            narrow = op.MatMul(first.x, left)
        else:
            narrow = op.Gemm(first.x, left, alpha=first.alpha, transA=int(first.trans_x))
        return [_widen(op, narrow, x, right) for x, right in zip(m.linears, cut.rights, strict=True)]


def _widen(op: Builder, narrow: ir.Value, linear: Linear, right: Array) -> ir.Value:
    weight = _stored(op, right, linear, "right")
    third = linear.node.inputs[2] if len(linear.node.inputs) > 2 else None
    plain = linear.node.op_type == "MatMul" or third is None
    made: ir.Value = op.MatMul(narrow, weight) if plain else op.Gemm(narrow, weight, third, beta=linear.beta)
    return made


def _stored(op: Builder, array: Array, linear: Linear, side: str) -> ir.Value:
    """The factor in the type of the weight, stored once for all that read that weight; cast where the weight was."""
    weight = linear.weight
    assert weight.dtype is not None
    kind = weight.dtype.numpy()
    made: ir.Value = op.shared(("factor", side, weight), lambda: op.const(np.ascontiguousarray(array.astype(kind)), f"{weight.name}_{side}"))
    if weight.dtype == linear.x.dtype:
        return made
    return op.shared(("cast factor", side, weight, linear.node.graph), lambda: op.Cast(made, to=linear.x.dtype))


def _lookup(op: Builder, m: TableCutMatch) -> ir.Value:
    table, node = m.cut.embeddings[0].table, m.nodes[0]
    assert table.dtype is not None
    kind, name = table.dtype.numpy(), table.name
    rows = op.shared(("table rows", table), lambda: op.const(np.ascontiguousarray(m.cut.rows.astype(kind)), f"{name}_rows"))
    right = op.shared(("table right", table), lambda: op.const(np.ascontiguousarray(m.cut.right.astype(kind)), f"{name}_right"))
    made: ir.Value = op.MatMul(op.Gather(rows, node.inputs[1], axis=0), right)
    return made
