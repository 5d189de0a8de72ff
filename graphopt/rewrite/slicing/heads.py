"""Attention and rotary embedding: heads go whole, features in pairs, query and key together."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.core.contract import Array
from graphopt.graph.attention_node import AttentionNode
from graphopt.graph.questions import attr, static_dim
from graphopt.rewrite.slicing.places import rank, same, union
from graphopt.rewrite.slicing.plan import Refusal, Remedy, Removals, Slot, factor, is_ragged, spread


def attention(node: ir.Node, s: Removals, final: bool) -> None:
    """Query heads go by whole groups with their key and value head, or evenly in every group; features go from query and key together."""
    a = AttentionNode.of(node)
    if a is None or not a.heads or not a.kv_heads:
        raise Refusal(f"Attention `{node.name}`: its number of heads is unknown")
    q, y, heads, kv_heads = Slot(node, 0), Slot(node, 0, True), a.heads, a.kv_heads
    keys, values = ([slot for slot in (Slot(node, n), Slot(node, n + 3), Slot(node, n, True)) if slot.there] for n in (1, 2))
    counts = {slot: heads if slot in (q, y) else kv_heads for slot in (q, y, *keys, *values)}
    read = {slot: _heads_and_dims(node, s, slot, n, final) for slot, n in counts.items()}
    gone = union([read[q][0], read[y][0]], heads)
    gone_kv = union([read[p][0] for p in (*keys, *values)], kv_heads)
    shown = [p for p in (Slot(node, 3), Slot(node, 3, True)) if p.there and rank(p) >= 3 and static_dim(p.value, rank(p) - 3) != 1]  # mask and scores
    gone = union([gone, *(s.mask(slot, rank(slot) - 3) for slot in shown)], heads)
    gone, gone_kv = (_regrouped if node in s.regrouped else _grouped)(node, gone, gone_kv, final)
    shared, own = union([read[p][1] for p in (q, *keys)]), union([read[p][1] for p in (y, *values)])
    for slot, n in counts.items():
        dims = shared if slot in (q, *keys) else own
        _mark_heads(s, slot, gone if n == heads and slot in (q, y) else gone_kv, dims, _head_dim(slot, n))
    for slot in shown:
        s.mark(slot, rank(slot) - 3, gone)


def _grouped(node: ir.Node, gone: Array, gone_kv: Array, final: bool) -> tuple[Array, Array]:
    """Query heads [heads] that lost their key head, and key heads [kv_heads] that no query is left for, go as well."""
    heads, kv_heads = len(gone), len(gone_kv)
    group = heads // kv_heads
    gone = gone | np.repeat(gone_kv, group)
    gone_kv = gone_kv | gone.reshape(kv_heads, group).all(axis=1)
    left = (~gone).reshape(kv_heads, group).sum(axis=1)[~gone_kv]
    if final and len(set(left.tolist())) > 1:
        text = f"{heads} query heads share {kv_heads} key heads; whole groups of {group} must go, or as many of each"
        raise Refusal(f"Attention `{node.name}`: {text}", Remedy.UNEVEN)
    return gone, gone_kv


def _regrouped(node: ir.Node, gone: Array, gone_kv: Array, final: bool) -> tuple[Array, Array]:
    """Key heads go alone: more query heads share what is left of them."""
    if gone.any():
        raise Refusal(f"Attention `{node.name}`: its query heads would go with their key heads, from which they are not laid out apart")
    stay = int((~gone_kv).sum())
    if final and len(gone) % max(stay, 1):
        raise Refusal(f"Attention `{node.name}`: {len(gone)} query heads cannot share {stay} key heads evenly", Remedy.UNEVEN)
    return gone, gone_kv


def _head_dim(slot: Slot, heads: int) -> int:
    width = static_dim(slot.value, rank(slot) - 1)
    if width is None:
        raise Refusal(f"Attention `{slot.node.name}`: the size of its heads is unknown")
    return width if rank(slot) == 4 else width // heads


def _heads_and_dims(node: ir.Node, s: Removals, slot: Slot, heads: int, final: bool) -> tuple[Array | None, Array | None]:
    if rank(slot) == 4:
        return s.mask(slot, 1), s.mask(slot, 3)
    mask = s.mask(slot, rank(slot) - 1)
    if mask is None:
        return None, None
    sizes = [heads, _head_dim(slot, heads)]
    if final and is_ragged(mask, sizes):
        raise Refusal(f"Attention `{node.name}`: its heads would have different sizes", Remedy.UNEVEN)
    whole, dims = factor(mask, sizes)
    return whole, dims


def _mark_heads(s: Removals, slot: Slot, heads: Array, dims: Array, head_dim: int) -> None:
    if rank(slot) == 4:
        s.mark(slot, 1, heads)
        s.mark(slot, 3, dims if len(dims) else None)
        return
    s.mark(slot, rank(slot) - 1, spread([heads, dims if len(dims) else np.zeros(head_dim, bool)]))


def rotary(node: ir.Node, s: Removals, final: bool) -> None:
    """Features go in pairs that are rotated together, with their angle; whole heads pass."""
    x, y = Slot(node, 0), Slot(node, 0, True)
    if rank(x) == 4:
        for k in (0, 1, 2):
            same(s, [(x, k), (y, k)])
        head_dim, heads = static_dim(x.value, 3), 1
    else:
        same(s, [(x, 0), (y, 0)])
        heads = int(attr(node, "num_heads", 0))
        width = static_dim(x.value, 2)
        head_dim = None if not heads or width is None else width // heads
    if head_dim is None:
        raise Refusal(f"RotaryEmbedding `{node.name}`: the size of its heads is unknown")
    last = rank(x) - 1
    either = union([s.mask(x, last), s.mask(y, last)], heads * head_dim)
    if not either.any() and all(s.mask(Slot(node, n), rank(Slot(node, n)) - 1) is None for n in (1, 2)):
        return
    if final and is_ragged(either, [heads, head_dim]):
        raise Refusal(f"RotaryEmbedding `{node.name}`: its heads would have different sizes", Remedy.UNEVEN)
    gone, dims = factor(either, [heads, head_dim])
    size = int(attr(node, "rotary_embedding_dim", 0)) or head_dim
    pairs = dims[:size].reshape(-1, 2).T if attr(node, "interleaved", 0) else dims[:size].reshape(2, -1)
    angles: Array = np.any(pairs, axis=0)
    for n in (1, 2):
        cached = s.mask(Slot(node, n), rank(Slot(node, n)) - 1)
        angles = angles if cached is None else angles | cached
    turned = np.repeat(angles, 2) if attr(node, "interleaved", 0) else np.tile(angles, 2)
    dims = np.concatenate([turned, dims[size:]])
    for slot in (x, y):
        s.mark(slot, last, spread([gone, dims]) if heads > 1 else dims)
    for n in (1, 2):
        s.mark(Slot(node, n), rank(Slot(node, n)) - 1, angles)
