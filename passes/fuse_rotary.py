"""fuse-rotary: every recognized rotary position embedding becomes one standard RotaryEmbedding node (ONNX opset 23)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.formulas.rotary import RotaryFacts, rotary_of
from graphopt.core.contract import Context
from graphopt.graph.dims import is_opaque
from graphopt.graph.layout import Tracer, merged
from graphopt.graph.questions import rank, same_dim, static_dim
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.match import Match, Miss
from graphopt.rewrite.rules import RewritePass


@dataclasses.dataclass(frozen=True)
class RotaryMatch(Match):
    """`packed`: [batch, rows, heads * features], where x is only another view of it. `axis`: where x has its heads, 1 or 2 (behind the rows)."""

    rotary: RotaryFacts
    packed: ir.Value | None
    heads: int
    axis: int = 1

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"dim": self.rotary.dim, "interleaved": self.rotary.pairing == "interleaved", "heads": self.heads}


@dataclasses.dataclass(frozen=True)
class FuseRotary(RewritePass[RotaryMatch]):
    """Fuse rotary position embeddings into the standard RotaryEmbedding operator, reading and writing the packed layout where it can.

    Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding"; ONNX operator RotaryEmbedding-23.
    """

    anchors: ClassVar[frozenset[str]] = frozenset({"Add", "Concat", "RotaryEmbedding"})

    def match(self, node: ir.Node, ctx: Context) -> RotaryMatch | Miss | None:
        found = rotary_of(node)
        if found is None:
            return None
        if isinstance(found, str):
            return Miss(node, f"rotary embedding not fused: {found}")
        axis = _heads_axis(found)
        heads, packed = static_dim(found.x, axis), _packed(found.x, axis)
        if node.op_type == "RotaryEmbedding":
            return None if packed is None or heads is None else RotaryMatch((node,), (found.output,), found, packed, heads)
        reason = _unfit(found, heads, axis)
        if reason is not None or heads is None:
            return Miss(node, f"rotary embedding not fused: {reason}")
        return RotaryMatch(found.nodes, (found.output,), found, packed, heads, axis)

    def build(self, op: Builder, m: RotaryMatch) -> Sequence[ir.Value]:
        f = m.rotary
        cos, sin = (f.cos, f.sin) if f.nodes[0].op_type == "RotaryEmbedding" else (_cache(op, f, c, m.axis) for c in (f.cos, f.sin))
        partial = None if f.dim == static_dim(f.x, -1) else f.dim
        interleaved = 1 if f.pairing == "interleaved" else None
        packed = m.packed
        if packed is None and m.axis == 2:
            packed = op.Reshape(f.x, op.const(np.array([0, 0, m.heads * (static_dim(f.x, -1) or 0)], np.int64), "packed"))
        if packed is None:
            return [op.RotaryEmbedding(f.x, cos, sin, interleaved=interleaved, rotary_embedding_dim=partial)]
        out = op.RotaryEmbedding(packed, cos, sin, interleaved=interleaved, rotary_embedding_dim=partial, num_heads=m.heads)
        split = op.Reshape(out, op.const(np.array([0, 0, m.heads, static_dim(f.x, -1)], np.int64), "heads"))
        return [split if m.axis == 2 else op.Transpose(split, perm=[0, 2, 1, 3])]


def _heads_axis(f: RotaryFacts) -> int:
    """Where x [batch, heads, rows, features] or [batch, rows, heads, features] has its heads: the cache is the same for all of them."""
    shape = f.cos.shape
    return 2 if shape is not None and len(shape) >= 3 and shape[-2] == 1 and shape[-3] != 1 else 1


def _unfit(f: RotaryFacts, heads: int | None, axis: int) -> str | None:
    if rank(f.x) != 4 or heads is None or static_dim(f.x, -1) is None:
        return f"`{f.x.name}` is not [batch, heads, rows, features] or [batch, rows, heads, features] with constant heads and features"
    for cache in (f.cos, f.sin):
        shape = cache.shape
        if shape is None or not 2 <= len(shape) <= 4 or (len(shape) > 2 and shape[axis - 4] != 1) or shape[(3 - axis) - 4] == 1:
            return f"`{cache.name}` does not hold one angle for each row, the same for all heads"
        if static_dim(cache, -1) != (f.dim if f.doubled else f.dim // 2):
            return f"`{cache.name}` does not hold one angle for each pair of features"
        if f.x.shape is None or not same_dim(shape[(3 - axis) - 4], f.x.shape[3 - axis]):
            return f"`{cache.name}` is not proved to have as many rows as `{f.x.name}`"
    return None


def _packed(x: ir.Value, axis: int) -> ir.Value | None:
    view = Tracer().view(x)
    if view is None or len(view.axes) != 4:
        return None
    batch, dim, heads, rows = view.axes[0], view.axes[3], view.axes[axis], view.axes[3 - axis]
    wanted = [merged(batch), merged(rows), merged((*heads, *dim))]
    return next((s.value for s in view.steps if s.scale == 1.0 and [merged(g) for g in s.axes] == wanted), None)


def _cache(op: Builder, f: RotaryFacts, cache: ir.Value, axis: int) -> ir.Value:
    """[batch, rows, dim / 2] of a cache that broadcasts against x, whose heads are axis `axis`."""
    batch = f.x.shape[0] if f.x.shape is not None else None
    source: Any = f.x if is_opaque(batch) else str(batch)

    def build() -> ir.Value:
        value = cache
        if f.doubled:
            ends, step = ([f.dim // 2], 1) if f.pairing == "half" else ([f.dim], 2)
            value = op.Slice(value, _ints(op, [0]), _ints(op, ends), _ints(op, [-1]), _ints(op, [step]))
        size = rank(cache) or 0
        if size > 2:
            value = op.Squeeze(value, _ints(op, [size + axis - 4]))
        if size < 4:  # no batch
            value = op.Unsqueeze(value, _ints(op, [0]))
        if size != 4 or cache.shape is None or not same_dim(cache.shape[0], batch):  # the kernel wants the batch of x
            count = _ints(op, [batch]) if isinstance(batch, int) else op.Shape(f.x, start=0, end=1)
            value = op.Expand(value, op.Concat(count, _ints(op, [1, 1]), axis=0))
        return value

    out: ir.Value = op.shared(("cache", cache, axis, f.doubled, f.pairing, f.dim, source), build)
    return out


def _ints(op: Builder, values: Sequence[int]) -> ir.Value:
    return op.const(np.array(values, np.int64), "ints")
