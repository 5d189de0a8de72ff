"""simplify-masks: a boolean attention mask whose meaning is proved is computed in its shortest form."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.formulas.masks import MaskFacts, MaskReader
from graphopt.core.contract import Context
from graphopt.graph.attention_node import AttentionNode
from graphopt.graph.questions import is_constant, producer, rank, same_dim, scalar
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.match import Match, Miss
from graphopt.rewrite.rules import RewritePass

_LOW = -1e4  # a constant that masks: below any ordinary score
_SHORT = 6  # operators: no short form takes fewer


@dataclasses.dataclass(frozen=True)
class MaskMatch(Match):
    mask: MaskFacts

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"kinds": list(self.mask.kinds), "axes": list(self.mask.axes), "window": self.mask.window}


@dataclasses.dataclass(frozen=True)
class SimplifyMasks(RewritePass[MaskMatch]):
    """Rewrite the chains of Range, GatherND and And that exporters emit for masks: padding, causal and sliding-window, and their sums.

    Only a mask that `graphopt.analysis.formulas.masks` proves, and that takes fewer operators in the short form, is rewritten.
    """

    anchors: ClassVar[frozenset[str]] = frozenset({"Where", "Attention"})

    def match(self, node: ir.Node, ctx: Context) -> MaskMatch | Miss | None:
        keep = _mask_of(node)
        made = None if keep is None else keep.producer()
        if keep is None or made is None:
            return None
        facts = ctx.get(MaskReader()).facts(keep)
        if _chain(keep) <= max(_SHORT, 0 if facts is None else _cost(facts)):
            return None  # it is as short as can be, perhaps since it was rewritten here
        reason = _why_not(keep, facts)
        if reason is not None or facts is None:
            return Miss(node, f"the mask `{keep.name}` stays as it is: {reason}")
        return MaskMatch((made,), (keep,), facts)

    def build(self, op: Builder, m: MaskMatch) -> Sequence[ir.Value]:
        """[batch, 1, rows, keys], true = may be read."""
        f, keep = m.mask, m.outputs[0]
        parts = [op.Unsqueeze(_boolean(op, v), _ints(op, 1, 2)) for v in f.padding]
        length = op.shared(("length", f.padding[0]), lambda: op.Shape(f.padding[0], start=1, end=2))
        if f.causal or f.window is not None:
            count = op.Squeeze(length, _ints(op, 0))
            index = op.Range(_int(op, 0), count, _int(op, 1))
            key, row = op.Unsqueeze(index, _ints(op, 0)), op.Unsqueeze(index, _ints(op, 1))
            if f.causal:
                parts.append(op.LessOrEqual(key, row))
            if f.window is not None:
                parts.append(op.Less(op.Sub(row, key), _int(op, f.window)))
        total = parts[0]
        for part in parts[1:]:
            total = op.And(total, part)
        if f.causal or f.window is not None or keep.shape is None or keep.shape[2] == 1:
            return [total]
        rows = _ints(op, int(keep.shape[2])) if isinstance(keep.shape[2], int) else length
        return [op.Expand(total, op.Concat(rows, _ints(op, 1), axis=0))]


def _mask_of(node: ir.Node) -> ir.Value | None:
    """The boolean mask that an Attention node reads, or that chooses between 0 and a very low constant."""
    if node.op_type == "Attention":
        a = AttentionNode.of(node)
        return a.mask if a is not None and a.mask is not None and a.mask.dtype == ir.DataType.BOOL else None
    low = scalar(node.inputs[2])
    return node.inputs[0] if scalar(node.inputs[1]) == 0.0 and low is not None and float(low) <= _LOW else None


def _why_not(keep: ir.Value, facts: MaskFacts | None) -> str | None:
    """Why a mask is not written in its short form."""
    if facts is None:
        return "its meaning is not proved"
    if keep.is_graph_output():
        return "it is an output of the model"
    if rank(keep) != 4 or keep.shape is None or keep.shape[1] != 1:
        return "it is not [batch, 1, rows, keys], the same for all heads"
    if not facts.padding:
        return "it has no padding mask to take the number of keys from"
    if (facts.causal or facts.window is not None) and not same_dim(keep.shape[2], keep.shape[3]):
        return "it is not proved to have as many rows as keys"
    return None if all(_covers(v, keep) for v in facts.padding) else "its size does not follow from its padding mask"


def _covers(padding: ir.Value, keep: ir.Value) -> bool:
    """The padding mask is [batch, keys] of the mask it is part of; its rows, where they are not static, are as many as its keys."""
    a, b = padding.shape, keep.shape
    if a is None or b is None or len(a) != 2 or not same_dim(a[1], b[3]) or not (a[0] == 1 or same_dim(a[0], b[0])):
        return False
    return isinstance(b[2], int) or same_dim(b[2], b[3])


def _chain(value: ir.Value) -> int:
    """How many operators compute `value` from graph inputs."""
    seen: set[ir.Node] = set()
    todo = [value]
    while todo:
        node = todo.pop().producer()
        if node is None or node in seen or node.op_type == "Shape":
            continue
        seen.add(node)
        todo += [v for v in node.inputs if v is not None and not is_constant(v)]
    return len(seen)


def _cost(f: MaskFacts) -> int:
    rows = f.causal or f.window is not None
    return 3 * len(f.padding) + (4 + f.causal + 2 * (f.window is not None) if rows else 2) + len(f.padding)


def _boolean(op: Builder, value: ir.Value) -> ir.Value:
    if value.dtype == ir.DataType.BOOL:
        return value
    node = producer(value, "Cast")
    if node is not None and node.inputs[0] is not None and node.inputs[0].dtype == ir.DataType.BOOL:
        return node.inputs[0]
    out: ir.Value = op.Cast(value, to=int(ir.DataType.BOOL))
    return out


def _int(op: Builder, value: int) -> ir.Value:
    return op.const(np.array(value, np.int64), "int")


def _ints(op: Builder, *values: int) -> ir.Value:
    return op.const(np.array(values, np.int64), "ints")
