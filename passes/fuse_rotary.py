"""fuse-rotary: every recognized rotary position embedding becomes one standard RotaryEmbedding node (ONNX opset 23)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.layout import Tracer, merged
from graphopt.analysis.rotary import RotaryFacts, rotary_of
from graphopt.core import Context
from graphopt.graph import rank, static_dim
from graphopt.rewrite import Builder, Match, Miss, RewritePass
from graphopt.shapes import is_opaque


@dataclasses.dataclass(frozen=True)
class RotaryMatch(Match):
    """`packed`: [batch, rows, heads * features], where x [batch, heads, rows, features] is only another view of it."""

    rotary: RotaryFacts
    packed: ir.Value | None
    heads: int

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
        heads, packed = static_dim(found.x, 1), _packed(found.x)
        if node.op_type == "RotaryEmbedding":
            return None if packed is None or heads is None else RotaryMatch((node,), (found.output,), found, packed, heads)
        reason = _unfit(found, heads)
        if reason is not None or heads is None:
            return Miss(node, f"rotary embedding not fused: {reason}")
        return RotaryMatch(found.nodes, (found.output,), found, packed, heads)

    def build(self, op: Builder, m: RotaryMatch) -> Sequence[ir.Value]:
        f = m.rotary
        cos, sin = (f.cos, f.sin) if f.nodes[0].op_type == "RotaryEmbedding" else (_cache(op, f, c) for c in (f.cos, f.sin))
        partial = None if f.dim == static_dim(f.x, -1) else f.dim
        interleaved = 1 if f.pairing == "interleaved" else None
        if m.packed is None:
            return [op.RotaryEmbedding(f.x, cos, sin, interleaved=interleaved, rotary_embedding_dim=partial)]
        out = op.RotaryEmbedding(m.packed, cos, sin, interleaved=interleaved, rotary_embedding_dim=partial, num_heads=m.heads)
        split = op.Reshape(out, op.const(np.array([0, 0, m.heads, static_dim(f.x, -1)], np.int64), "heads"))
        return [op.Transpose(split, perm=[0, 2, 1, 3])]


def _unfit(f: RotaryFacts, heads: int | None) -> str | None:
    if rank(f.x) != 4 or heads is None:
        return f"`{f.x.name}` is not [batch, heads, rows, features] with a constant number of heads"
    for cache in (f.cos, f.sin):
        shape = cache.shape
        if shape is None or not 2 <= len(shape) <= 4 or (len(shape) > 2 and shape[-3] != 1) or shape[-2] == 1:
            return f"`{cache.name}` does not hold one angle for each row, the same for all heads"
    return None


def _packed(x: ir.Value) -> ir.Value | None:
    view = Tracer().view(x)
    if view is None or len(view.axes) != 4:
        return None
    batch, heads, rows, dim = view.axes
    wanted = [merged(batch), merged(rows), merged((*heads, *dim))]
    return next((s.value for s in view.steps if s.scale == 1.0 and [merged(g) for g in s.axes] == wanted), None)


def _cache(op: Builder, f: RotaryFacts, cache: ir.Value) -> ir.Value:
    """[batch, rows, dim / 2] of a cache that broadcasts against [batch, heads, rows, features]."""
    batch = f.x.shape[0] if f.x.shape is not None else None
    source: Any = f.x if is_opaque(batch) else str(batch)

    def build() -> ir.Value:
        value = cache
        if f.doubled:
            ends, step = ([f.dim // 2], 1) if f.pairing == "half" else ([f.dim], 2)
            value = op.Slice(value, _ints(op, [0]), _ints(op, ends), _ints(op, [-1]), _ints(op, [step]))
        size = rank(cache) or 0
        if size == 4:
            value = op.Squeeze(value, _ints(op, [1]))
        elif size == 2:
            value = op.Unsqueeze(value, _ints(op, [0]))
        if size != 4 or cache.shape is None or cache.shape[0] == 1:  # the kernel wants the batch of x
            count = _ints(op, [batch]) if isinstance(batch, int) else op.Shape(f.x, start=0, end=1)
            value = op.Expand(value, op.Concat(count, _ints(op, [1, 1]), axis=0))
        return value

    out: ir.Value = op.shared(("cache", cache, f.doubled, f.pairing, f.dim, source), build)
    return out


def _ints(op: Builder, values: Sequence[int]) -> ir.Value:
    return op.const(np.array(values, np.int64), "ints")
