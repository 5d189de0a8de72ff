"""Standard Attention written as MatMul, mask, Softmax and MatMul, with the numbers of ONNX Runtime's kernel."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.core.contract import Array
from graphopt.graph.attention_node import PROBABILITIES, SCORES, AttentionNode
from graphopt.graph.questions import constant, producer, rank, scalar, static_dim
from graphopt.rewrite.builder import Builder

_HIDDEN = -3e38  # a float32 mask that may reach this can leave a row without any key
_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Expand", "Slice", "Cast")


def why_not_unfused(a: AttentionNode) -> str | None:
    """Why `unfused` cannot write an Attention node."""
    if a.node.version is not None and a.node.version > 23:
        return f"it is written for opset {a.node.version}"
    if a.shown is not None and a.shows not in (SCORES, PROBABILITIES):
        return "its scores are read in between"
    if not a.heads or not a.kv_heads or not a.head_dim or rank(a.q) is None:
        return "the number of heads or the size of one is unknown"
    return None


def unfused(op: Builder, a: AttentionNode) -> list[ir.Value]:
    """The outputs of an Attention node that are read.

    ONNX Runtime gives 0 for a row all of whose scores are at the lowest float or below; a comparison with the largest score of the row keeps
    that, where the mask cannot be shown to stay above (with -1e30 it is the average of all values in both spellings).
    """
    q, k, v = split(op, a, a.q, a.heads), split(op, a, a.k, a.kv_heads), split(op, a, a.v, a.kv_heads)
    past_key, past_value = a.past
    if past_key is not None:
        k, v = op.Concat(past_key, k, axis=2), op.Concat(past_value, v, axis=2)
    present = (k, v)
    k, v = repeated(op, a, k), repeated(op, a, v)
    scores, probabilities, visible = _weights(op, a, q, k)
    if visible is not None and a.shown is not None:
        probabilities = op.Where(visible, probabilities, _number(op, a, 0))
    out = op.MatMul(probabilities, v)
    if visible is not None and a.shown is None:
        out = op.Where(visible, out, _number(op, a, 0))
    every = (joined(op, a, out), *present, scores if a.shows == SCORES else probabilities)
    return [every[i] for i in read_outputs(a)]


def read_outputs(a: AttentionNode) -> list[int]:
    """Which outputs of a node something reads."""
    return [i for i, v in enumerate(a.node.outputs) if v.uses() or v.is_graph_output()]


def weights(op: Builder, a: AttentionNode) -> ir.Value:
    """The attention weights [batch, heads, rows, keys] of a node without a cache; rows that see no key are zero."""
    _, probabilities, visible = _weights(op, a, split(op, a, a.q, a.heads), repeated(op, a, split(op, a, a.k, a.kv_heads)))
    return probabilities if visible is None else op.Where(visible, probabilities, _number(op, a, 0))


def _weights(op: Builder, a: AttentionNode, q: ir.Value, k: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """Raw scores, weights, and which rows see a key (None: all do)."""
    scores = _scores(op, a, q, k)
    masked = _masked(op, a, _capped(op, a, scores), q, k)
    probabilities = _softmax(op, a, masked)
    if not may_hide_rows(a.mask):
        return scores, probabilities, None
    largest = op.ReduceMax(masked, _ints(op, -1), keepdims=1)
    return scores, probabilities, op.Greater(largest, _number(op, a, _lowest(a)))


def joined(op: Builder, a: AttentionNode, out: ir.Value) -> ir.Value:
    """[batch, heads, rows, value_dim] -> what the node gives."""
    if not a.packed:
        return out
    return op.Reshape(op.Transpose(out, perm=[0, 2, 1, 3]), _ints(op, 0, 0, a.value_dim * a.heads or -1))  # type: ignore[no-any-return]


def split(op: Builder, a: AttentionNode, x: ir.Value, heads: int) -> ir.Value:
    """Query, key or value as [batch, heads, rows, dim]."""
    if not a.packed:
        return x
    size = static_dim(x, -1)
    parts = op.Reshape(x, _ints(op, 0, 0, heads, -1 if size is None else size // heads))
    return op.Transpose(parts, perm=[0, 2, 1, 3])  # type: ignore[no-any-return]


def repeated(op: Builder, a: AttentionNode, x: ir.Value) -> ir.Value:
    """Each key head serves heads / kv_heads query heads in a row. Ainslie et al., GQA (2023)."""
    if a.heads == a.kv_heads:
        return x
    every = op.Expand(op.Unsqueeze(x, _ints(op, 2)), _ints(op, 1, 1, a.group, 1, 1))
    tail = op.Shape(x, start=2, end=4)
    return op.Reshape(every, op.Concat(op.Shape(x, start=0, end=1), _ints(op, a.heads), tail, axis=0))  # type: ignore[no-any-return]


def _fills(op: Builder, a: AttentionNode) -> tuple[ir.Value, ir.Value]:
    return op.const(np.array(0, _dtype(a).numpy()), "zero"), op.const(np.array(-np.inf, _dtype(a).numpy()), "hidden")


def _scores(op: Builder, a: AttentionNode, q: ir.Value, k: ir.Value) -> ir.Value:
    """query x key, scaled; in 16 bits the query is scaled first, for the product alone could leave the range."""
    dtype = _dtype(a)
    scale = op.const(np.array(a.scale, dtype.numpy()), "scale")
    keys = op.Transpose(k, perm=[0, 1, 3, 2])
    narrow = dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    return op.MatMul(op.Mul(q, scale), keys) if narrow else op.Mul(op.MatMul(q, keys), scale)  # type: ignore[no-any-return]


def _capped(op: Builder, a: AttentionNode, scores: ir.Value) -> ir.Value:
    if not a.softcap:
        return scores
    limit = op.const(np.array(a.softcap, _dtype(a).numpy()), "softcap")
    return op.Mul(op.Tanh(op.Div(scores, limit)), limit)  # type: ignore[no-any-return]


def _masked(op: Builder, a: AttentionNode, scores: ir.Value, q: ir.Value, k: ir.Value) -> ir.Value:
    if a.mask is not None:
        scores = op.Add(scores, op.Where(a.mask, *_fills(op, a)) if a.mask.dtype == ir.DataType.BOOL else a.mask)
    if a.causal:
        rows, keys = (_count(op, x, 2) for x in (q, k))
        row = op.Unsqueeze(op.Range(*_bounds(op, rows)), _ints(op, 1))
        if a.past[0] is not None:
            row = op.Add(row, _count(op, a.past[0], 2))
        scores = op.Add(scores, op.Where(op.LessOrEqual(op.Range(*_bounds(op, keys)), row), *_fills(op, a)))
    return scores


def _count(op: Builder, x: ir.Value, axis: int) -> ir.Value:
    """The size of an axis, as a scalar."""
    return op.shared(("count", x, axis), lambda: op.Squeeze(op.Shape(x, start=axis, end=axis + 1), _ints(op, 0)))


def _bounds(op: Builder, end: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    return op.const(np.array(0, np.int64), "start"), end, op.const(np.array(1, np.int64), "step")


def _softmax(op: Builder, a: AttentionNode, scores: ir.Value) -> ir.Value:
    if a.precision is None or ir.DataType(a.precision) == a.q.dtype:
        return op.Softmax(scores, axis=-1)  # type: ignore[no-any-return]
    return op.Cast(op.Softmax(op.Cast(scores, to=a.precision), axis=-1), to=a.q.dtype)  # type: ignore[no-any-return]


def _dtype(a: AttentionNode) -> ir.DataType:
    """Asked of the operand: the values that a Builder made have no dtype yet."""
    return a.q.dtype or ir.DataType.FLOAT


def _number(op: Builder, a: AttentionNode, value: float) -> ir.Value:
    return op.const(np.array(value, _dtype(a).numpy()), "number")


def _lowest(a: AttentionNode) -> float:
    import ml_dtypes

    return float(ml_dtypes.finfo(_dtype(a).numpy()).min)  # type: ignore[no-untyped-call]


def _ints(op: Builder, *values: int) -> ir.Value:
    return op.const(np.array(values, np.int64), "ints")


def may_hide_rows(mask: ir.Value | None) -> bool:
    """False if it is shown that a mask is nowhere at the lowest float or below."""
    return mask is not None and (mask.dtype == ir.DataType.BOOL or _floor(mask) <= _HIDDEN)


def _floor(value: ir.Value | None, depth: int = 12) -> float:
    """A lower bound of a float mask, as far as the constants that made it tell; a computed bias counts as ordinary numbers."""
    array = constant(value)
    if array is not None:
        return _least(array)
    node = producer(value)
    if node is None or depth == 0:
        return -np.inf
    below = [_floor(v, depth - 1) for v in node.inputs if v is not None and v.dtype == node.outputs[0].dtype]
    match node.op_type:
        case "Max":
            return max(_floor(v, depth - 1) if v is not None else -np.inf for v in node.inputs)
        case "Where" | "Min" | "Concat":
            return min(below)
        case "Add" | "Sum":
            return sum(min(b, 0.0) for b in below)
        case "Mul":
            factors = [scalar(v) for v in node.inputs]
            return -abs(float(next((f for f in factors if f is not None), np.inf))) * _flag(node)
        case op if op in _MOVES:
            source = node.inputs[0]
            return 0.0 if source is None or source.dtype in (ir.DataType.BOOL, ir.DataType.INT64) else _floor(source, depth - 1)
        case "Gather" | "MatMul" | "Gemm" | "LayerNormalization":
            return 0.0
    return -np.inf


def _flag(node: ir.Node) -> float:
    """What the other factor of a mask product can be at most: 1 for a Cast or 1 - Cast of flags."""
    return 1.0 if any(producer(v, "Sub", "Cast", "Unsqueeze", "Expand") is not None for v in node.inputs) else np.inf


def _least(array: Array) -> float:
    return float(array.min()) if array.size else 0.0
