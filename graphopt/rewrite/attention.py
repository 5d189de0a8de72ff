"""Standard Attention written as MatMul, mask, Softmax and MatMul, with the numbers of ONNX Runtime's kernel."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from graphopt.core.contract import Array
from graphopt.graph.questions import attr, constant, producer, rank, scalar, static_dim
from graphopt.rewrite.builder import Builder

_HIDDEN = -3e38  # a float32 mask that may reach this can leave a row without any key
_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Expand", "Slice", "Cast")
_RAW, _PROBABILITIES = 0, 3  # qk_matmul_output_mode


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of an Attention node. `made`: which of its outputs are read; `dim`: features of one head; `guarded`: a row may have no key to read."""

    made: tuple[int, ...]
    heads: int
    kv_heads: int
    dim: int
    guarded: bool


def sizes_of(node: ir.Node) -> Sizes | str:
    """What `unfused` must know of an Attention node, or why it cannot write it."""
    if node.version is not None and node.version > 23:
        return f"it is written for opset {node.version}"
    q, k = node.inputs[0], node.inputs[1]
    made = tuple(i for i, v in enumerate(node.outputs) if v.uses() or v.is_graph_output())
    if 3 in made and attr(node, "qk_matmul_output_mode", 0) not in (_RAW, _PROBABILITIES):
        return "its scores are read in between"
    packed = rank(q) == 3
    heads, kv_heads = (attr(node, "q_num_heads"), attr(node, "kv_num_heads")) if packed else (static_dim(q, 1), static_dim(k, 1))
    size = static_dim(q, -1)
    if rank(q) not in (3, 4) or not heads or not kv_heads or size is None:
        return "the number of heads or the size of one is unknown"
    return Sizes(made, heads, kv_heads, size // heads if packed else size, may_hide_rows(operand(node, 3)))


def unfused(op: Builder, node: ir.Node, s: Sizes) -> list[ir.Value]:
    """The outputs `s.made` of an Attention node.

    ONNX Runtime gives 0 for a row all of whose scores are at the lowest float or below; a comparison with the largest score of the row keeps
    that, where the mask cannot be shown to stay above (with -1e30 it is the average of all values in both spellings).
    """
    q, k, v = (split(op, node, i, s) for i in range(3))
    past = operand(node, 4)
    if past is not None:
        k, v = op.Concat(past, k, axis=2), op.Concat(_given(node, 5), v, axis=2)
    present = (k, v)
    k, v = repeated(op, k, s), repeated(op, v, s)
    scores, probabilities, visible = _weights(op, node, s, q, k, past)
    if visible is not None and 3 in s.made:
        probabilities = op.Where(visible, probabilities, _number(op, node, 0))
    out = op.MatMul(probabilities, v)
    if visible is not None and 3 not in s.made:
        out = op.Where(visible, out, _number(op, node, 0))
    every = (joined(op, node, out, s), *present, scores if attr(node, "qk_matmul_output_mode", 0) == _RAW else probabilities)
    return [every[i] for i in s.made]


def weights(op: Builder, node: ir.Node, s: Sizes) -> ir.Value:
    """The attention weights [batch, heads, rows, keys] of a node without a cache; rows that see no key are zero."""
    _, probabilities, visible = _weights(op, node, s, split(op, node, 0, s), repeated(op, split(op, node, 1, s), s), None)
    return probabilities if visible is None else op.Where(visible, probabilities, _number(op, node, 0))


def _weights(op: Builder, node: ir.Node, s: Sizes, q: ir.Value, k: ir.Value, past: ir.Value | None) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """Raw scores, weights, and which rows see a key (None: all do)."""
    scores = _scores(op, node, s, q, k)
    masked = _masked(op, node, _capped(op, node, scores), q, k, past)
    probabilities = _softmax(op, node, masked)
    if not s.guarded:
        return scores, probabilities, None
    largest = op.ReduceMax(masked, _ints(op, -1), keepdims=1)
    return scores, probabilities, op.Greater(largest, _number(op, node, _lowest(node)))


def joined(op: Builder, node: ir.Node, out: ir.Value, s: Sizes) -> ir.Value:
    """[batch, heads, rows, value_dim] -> what the node gives."""
    if rank(node.inputs[0]) != 3:
        return out
    size = static_dim(node.inputs[2], -1)
    width = -1 if size is None else size // s.kv_heads * s.heads
    return op.Reshape(op.Transpose(out, perm=[0, 2, 1, 3]), _ints(op, 0, 0, width))  # type: ignore[no-any-return]


def split(op: Builder, node: ir.Node, index: int, s: Sizes) -> ir.Value:
    """Query (0), key (1) or value (2) as [batch, heads, rows, dim]."""
    x, heads = _given(node, index), s.kv_heads if index else s.heads
    if rank(x) == 4:
        return x
    size = static_dim(x, -1)
    parts = op.Reshape(x, _ints(op, 0, 0, heads, -1 if size is None else size // heads))
    return op.Transpose(parts, perm=[0, 2, 1, 3])  # type: ignore[no-any-return]


def repeated(op: Builder, x: ir.Value, s: Sizes) -> ir.Value:
    """Each key head serves heads / kv_heads query heads in a row. Ainslie et al., GQA (2023)."""
    if s.heads == s.kv_heads:
        return x
    every = op.Expand(op.Unsqueeze(x, _ints(op, 2)), _ints(op, 1, 1, s.heads // s.kv_heads, 1, 1))
    tail = op.Shape(x, start=2, end=4)
    return op.Reshape(every, op.Concat(op.Shape(x, start=0, end=1), _ints(op, s.heads), tail, axis=0))  # type: ignore[no-any-return]


def _fills(op: Builder, node: ir.Node) -> tuple[ir.Value, ir.Value]:
    return op.const(np.array(0, _dtype(node).numpy()), "zero"), op.const(np.array(-np.inf, _dtype(node).numpy()), "hidden")


def operand(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _given(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _scores(op: Builder, node: ir.Node, s: Sizes, q: ir.Value, k: ir.Value) -> ir.Value:
    """query x key, scaled; in 16 bits the query is scaled first, for the product alone could leave the range."""
    dtype = _dtype(node)
    scale = op.const(np.array(attr(node, "scale") or 1 / np.sqrt(s.dim), dtype.numpy()), "scale")
    keys = op.Transpose(k, perm=[0, 1, 3, 2])
    narrow = dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    return op.MatMul(op.Mul(q, scale), keys) if narrow else op.Mul(op.MatMul(q, keys), scale)  # type: ignore[no-any-return]


def _capped(op: Builder, node: ir.Node, scores: ir.Value) -> ir.Value:
    cap = attr(node, "softcap", 0.0)
    if not cap:
        return scores
    limit = op.const(np.array(cap, _dtype(node).numpy()), "softcap")
    return op.Mul(op.Tanh(op.Div(scores, limit)), limit)  # type: ignore[no-any-return]


def _masked(op: Builder, node: ir.Node, scores: ir.Value, q: ir.Value, k: ir.Value, past: ir.Value | None) -> ir.Value:
    mask = operand(node, 3)
    if mask is not None:
        scores = op.Add(scores, op.Where(mask, *_fills(op, node)) if mask.dtype == ir.DataType.BOOL else mask)
    if attr(node, "is_causal", 0):
        rows, keys = (_count(op, x, 2) for x in (q, k))
        row = op.Unsqueeze(op.Range(*_bounds(op, rows)), _ints(op, 1))
        if past is not None:
            row = op.Add(row, _count(op, past, 2))
        scores = op.Add(scores, op.Where(op.LessOrEqual(op.Range(*_bounds(op, keys)), row), *_fills(op, node)))
    return scores


def _count(op: Builder, x: ir.Value, axis: int) -> ir.Value:
    """The size of an axis, as a scalar."""
    return op.shared(("count", x, axis), lambda: op.Squeeze(op.Shape(x, start=axis, end=axis + 1), _ints(op, 0)))


def _bounds(op: Builder, end: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    return op.const(np.array(0, np.int64), "start"), end, op.const(np.array(1, np.int64), "step")


def _softmax(op: Builder, node: ir.Node, scores: ir.Value) -> ir.Value:
    own, wanted = _given(node, 0).dtype, attr(node, "softmax_precision")
    if wanted is None or ir.DataType(wanted) == own:
        return op.Softmax(scores, axis=-1)  # type: ignore[no-any-return]
    return op.Cast(op.Softmax(op.Cast(scores, to=wanted), axis=-1), to=own)  # type: ignore[no-any-return]


def _dtype(node: ir.Node) -> ir.DataType:
    """Asked of the operand: the values that a Builder made have no dtype yet."""
    return _given(node, 0).dtype or ir.DataType.FLOAT


def _number(op: Builder, node: ir.Node, value: float) -> ir.Value:
    return op.const(np.array(value, _dtype(node).numpy()), "number")


def _lowest(node: ir.Node) -> float:
    import ml_dtypes

    return float(ml_dtypes.finfo(_dtype(node).numpy()).min)  # type: ignore[no-untyped-call]


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
