"""MultiHeadAttention, Attention and GroupQueryAttention of ONNX Runtime as the standard operator Attention.

A key that a padding mask hides gets `mask_filter_value` (a finite number) added to its score, so that a row whose keys are all hidden still weighs
them by their scores; the additive mask of the standard operator says the same.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.graph.attention_node import LOWEST, head_counts
from graphopt.graph.questions import attr, constant, is_read, rank, same_dim, static_dim
from graphopt.io.runtime_ops.unread import Reader, Unread, inputs, present, refuse
from graphopt.rewrite.builder import Builder

_FILTER = -10000.0  # of keys that a mask hides, where the node does not say


def _multi_head(node: ir.Node, op: Builder) -> list[ir.Value]:
    q, k, v, bias, padding, scores, past_key, past_value, length, beams = inputs(node, 10)
    refuse(node, given={"past_sequence_length": length, "cache_indirection": beams}, outputs={3: "qk"})
    heads = attr(node, "num_heads", 0)
    q, k, v = present(q, "query"), present(k, "key (it reads packed queries, keys and values)"), present(v, "value (it reads packed keys and values)")
    if {rank(q), rank(k), rank(v)} != {3}:
        raise Unread("query, key and value are not of three axes each")
    causal = bool(attr(node, "unidirectional", 0))
    if causal and past_key is None and not _same_rows(q, k):
        raise Unread("it is causal, and not proved to have as many rows as keys")
    parts = [_padding(op, node, padding, q, k), _own_mask(scores)]
    operands = (q, k, v) if bias is None else _biased(op, (q, k, v), bias)
    return _attention(op, node, operands, (heads, heads), parts, (past_key, past_value), causal, q)


def _packed(node: ir.Node, op: Builder) -> list[ir.Value]:
    """One stored projection for query, key and value, then attention; past and present hold keys and values as [2, ...]."""
    x, weight, bias, padding, past, scores, length = inputs(node, 7)
    refuse(node, given={"past_sequence_length": length})
    x, weight, heads = present(x, "input"), present(weight, "weights"), attr(node, "num_heads", 0)
    if attr(node, "do_rotary", 0) or attr(node, "past_present_share_buffer", 0):
        raise Unread("it rotates queries and keys itself, or writes into its cache")
    width = static_dim(weight, -1)
    sizes = list(attr(node, "qkv_hidden_sizes", [])) or ([width // 3] * 3 if width and width % 3 == 0 else [])
    if len(sizes) != 3 or not heads or rank(x) != 3:
        raise Unread("its sizes are not known")
    product = op.MatMul(x, weight)
    product = product if bias is None else op.Add(product, bias)
    q, k, v = op.node("Split", (product, op.ints(*sizes, name="sizes")), axis=-1, _outputs=3)
    cache: tuple[ir.Value | None, ir.Value | None] = (None, None)
    if past is not None:
        cache = (op.Gather(past, op.const(np.array(0, np.int64), "first")), op.Gather(past, op.const(np.array(1, np.int64), "second")))
    if past is not None and padding is not None and rank(padding) == 1:
        raise Unread("it counts the keys of each row, behind a cache")
    parts = [_padding(op, node, padding, x, x), _own_mask(scores)]
    made = _attention(op, node, (q, k, v), (heads, heads), parts, cache, bool(attr(node, "unidirectional", 0)), x)
    if not (len(node.outputs) > 1 and is_read(node.outputs[1])):
        return made[:1]
    if len(made) == 1:
        raise Unread("its present keys are read, and it has no past")
    zero = op.ints(0, name="axes")
    return [made[0], op.Concat(op.Unsqueeze(made[1], zero), op.Unsqueeze(made[2], zero), axis=0)]


def _group_query(node: ir.Node, op: Builder) -> list[ir.Value]:
    names = (
        "query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length", "cos_cache", "sin_cache", "position_ids",
        "attention_bias", "head_sink", "k_scale", "v_scale", "q_norm_weight", "k_norm_weight", "query_seqlens",
    )  # fmt: skip
    given = dict(zip(names, inputs(node, len(names)), strict=True))
    if given["past_key"] is not None or given["past_value"] is not None:
        raise Unread("it writes each row of its cache where seqlens_k says, which the standard operator has no words for")
    if attr(node, "do_rotary", 0):
        raise Unread("it rotates queries and keys by positions that seqlens_k decides")
    spare = names[7:10] + names[11:]
    refuse(node, given={name: given[name] for name in spare}, outputs={1: "present_key", 2: "present_value", 3: "output_qk"})
    plain = {"local_window_size": (-1,), "smooth_softmax": (-1, 0), "causal": (1,)}  # the first is the default
    odd = next((name for name, usual in plain.items() if attr(node, name, usual[0]) not in usual), None)
    if odd is not None:
        raise Unread(f"its {odd} is {attr(node, odd)}")
    q, k, v = (present(given[name], name) for name in names[:3])
    if {rank(q), rank(k), rank(v)} != {3} or not _same_rows(q, k):
        raise Unread("query and key are not proved to have as many rows")
    counts = attr(node, "num_heads", 0), attr(node, "kv_num_heads", 0)
    return _attention(op, node, (q, k, v), counts, [_own_mask(given["attention_bias"])], (None, None), True, q)


# ---- the parts -----------------------------------------------------------------------------------------------------------------------------


def _attention(
    op: Builder, node: ir.Node, operands: tuple[ir.Value, ...], heads: tuple[int, int], parts: list[ir.Value | None],
    past: tuple[ir.Value | None, ir.Value | None], causal: bool, source: ir.Value,
) -> list[ir.Value]:  # fmt: skip
    """`source`: what has the rows of the query, with a known shape."""
    if not all(heads):
        raise Unread("how many heads it has is not known")
    dtype = source.dtype
    if dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        raise Unread(f"it computes in {dtype}")
    cached = past[0] is not None
    if cached != (past[1] is not None):
        raise Unread("it has past keys without past values")
    terms = [p for p in parts if p is not None]
    if causal and cached:
        terms.append(_behind_cache(op, source, present(past[0], "past"), dtype))
    mask: ir.Value | None = functools.reduce(op.Add, terms) if terms else None
    if mask is not None and not (len(terms) == 1 and terms[0] is parts[-1]):
        mask = _for_rows(op, mask, source)
    counts = head_counts(*heads, causal=causal and not cached)
    given: dict[str, Any] = {"scale": attr(node, "scale", 0.0) or None, "softcap": attr(node, "softcap", 0.0) or None, **counts}
    wanted = any(k < len(node.outputs) and is_read(node.outputs[k]) for k in (1, 2))
    count = 3 if wanted or cached else 1
    made = op.node("Attention", (*operands, mask, *past), _outputs=count, **given)
    return list(made) if count > 1 else [made]


def _same_rows(q: ir.Value | None, k: ir.Value | None) -> bool:
    return q is not None and k is not None and q.shape is not None and k.shape is not None and same_dim(q.shape[1], k.shape[1])


def _biased(op: Builder, operands: tuple[ir.Value, ...], bias: ir.Value) -> tuple[ir.Value, ...]:
    """One stored vector holds the biases of query, key and value."""
    sizes = [size for v in operands if (size := static_dim(v, -1)) is not None]
    array = constant(bias)
    if array is None or sum(sizes) != array.size or len(sizes) < len(operands):
        raise Unread("its bias is not stored, or has not the width of query, key and value")
    pieces = np.split(array, np.cumsum(sizes)[:-1])
    return tuple(op.Add(v, op.const(piece, str(bias.name))) if piece.any() else v for v, piece in zip(operands, pieces, strict=True))


def _own_mask(scores: ir.Value | None) -> ir.Value | None:
    if scores is not None and rank(scores) != 4:
        raise Unread("its attention bias has not four axes")
    return scores


def _padding(op: Builder, node: ir.Node, mask: ir.Value | None, query: ir.Value, key: ir.Value) -> ir.Value | None:
    """[batch, 1, 1 or rows, keys]: 0, or what is added to the score of a hidden key."""
    if mask is None:
        return None
    size, dtype = rank(mask), query.dtype
    assert dtype is not None
    low = attr(node, "mask_filter_value", _FILTER)
    if not np.isfinite(low):
        raise Unread(f"a hidden key gets {low}, and a row that hides all of them no number")
    if size == 1:
        if mask.shape is None or query.shape is None or not same_dim(mask.shape[0], query.shape[0]):
            raise Unread("its mask is not proved to hold one length for each row")
        count = op.Squeeze(op.Shape(key, start=1, end=2))
        index = op.Cast(op.Range(op.const(np.array(0, np.int64), "zero"), count, op.const(np.array(1, np.int64), "one")), to=int(ir.DataType.INT32))
        seen = op.Less(op.Unsqueeze(index, op.ints(0)), op.Unsqueeze(mask, op.ints(1)))
    elif size in (2, 3) and static_dim(mask, -1) != 1:  # one number for all keys means something else
        seen = op.Greater(mask, op.const(np.array(0, np.int32), "zero"))
    else:
        raise Unread(f"its mask has the shape {mask.shape}")
    four = op.Unsqueeze(seen, op.ints(1, 2) if size != 3 else op.ints(1))
    hidden = op.const(np.array(max(low, LOWEST), dtype.numpy()), "hidden")
    return op.Where(four, op.const(np.array(0, dtype.numpy()), "seen"), hidden)


def _behind_cache(op: Builder, query: ir.Value, past: ir.Value, dtype: ir.DataType) -> ir.Value:
    """[rows, keys]: row r of the query stands behind all keys of the cache and may read r of its own."""
    zero, one = (op.const(np.array(n, np.int64), "number") for n in (0, 1))
    old, rows = (op.Squeeze(op.Shape(v, start=axis, end=axis + 1)) for v, axis in ((past, 2), (query, 1)))
    total = op.Add(old, rows)
    keys, row = op.Range(zero, total, one), op.Range(old, total, one)
    seen = op.LessOrEqual(op.Unsqueeze(keys, op.ints(0)), op.Unsqueeze(row, op.ints(1)))
    return op.Where(seen, op.const(np.array(0, dtype.numpy()), "seen"), op.const(np.array(-np.inf, dtype.numpy()), "hidden"))


def _for_rows(op: Builder, mask: ir.Value, query: ir.Value) -> ir.Value:
    """Runtimes want an axis for the query rows in a mask."""
    one = op.ints(1)
    return op.Expand(mask, op.Concat(one, one, op.Shape(query, start=1, end=2), one, axis=0))


READERS: Mapping[str, Reader] = {"MultiHeadAttention": _multi_head, "Attention": _packed, "GroupQueryAttention": _group_query}
