"""Standard Attention written as MatMul and Softmax, with the numbers of ONNX Runtime's kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.core import Array, Context
from graphopt.graph import attr, constant, producer, rank, scalar, static_dim
from graphopt.rewrite import Builder, Match, Miss, RewritePass

_HIDDEN = -3e38  # a float32 mask that may reach this can leave a row without any key
_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Expand", "Slice", "Cast")
_RAW, _PROBABILITIES = 0, 3  # qk_matmul_output_mode


@dataclasses.dataclass(frozen=True)
class AttentionMatch(Match):
    """`made`: which outputs of the node are replaced; `dim`: features of one head; `guarded`: a row may have no key to read."""

    made: tuple[int, ...]
    heads: int
    kv_heads: int
    dim: int
    guarded: bool


@dataclasses.dataclass(frozen=True)
class DecomposeAttention(RewritePass[AttentionMatch]):
    """Attention-23 -> MatMul, mask, Softmax, MatMul.

    ONNX Runtime gives 0 for a row all of whose scores are at the lowest float or below; a comparison with the largest score of the row keeps
    that, where the mask cannot be shown to stay above (with -1e30 it is the average of all values in both spellings).

    Args:
        opset: the artifact's limit, where that is the reason; None: the runtime is faster so, or has no kernel.
    """

    opset: int | None = None
    anchors: ClassVar[frozenset[str]] = frozenset({"Attention"})

    @property
    def binding(self) -> bool:
        return self.opset is not None

    def match(self, node: ir.Node, ctx: Context) -> AttentionMatch | Miss | None:
        if node.version is not None and node.version > 23:
            return Miss(node, f"stays Attention: it is written for opset {node.version}")
        q, k = node.inputs[0], node.inputs[1]
        made = tuple(i for i, v in enumerate(node.outputs) if v.uses() or v.is_graph_output())
        if 3 in made and attr(node, "qk_matmul_output_mode", 0) not in (_RAW, _PROBABILITIES):
            return Miss(node, "stays Attention: its scores are read in between")
        packed = rank(q) == 3
        heads, kv_heads = (attr(node, "q_num_heads"), attr(node, "kv_num_heads")) if packed else (static_dim(q, 1), static_dim(k, 1))
        size = static_dim(q, -1)
        if rank(q) not in (3, 4) or not heads or not kv_heads or size is None:
            return Miss(node, "stays Attention: the number of heads or the size of one is unknown")
        dim = size // heads if packed else size
        guarded = _may_hide_rows(_operand(node, 3))
        return AttentionMatch((node,), tuple(node.outputs[i] for i in made), made, heads, kv_heads, dim, guarded)

    def build(self, op: Builder, m: AttentionMatch) -> Sequence[ir.Value]:
        (node,) = m.nodes
        q, k, v = (_split(op, _given(node, i), m.heads if i == 0 else m.kv_heads) for i in range(3))
        past = _operand(node, 4)
        if past is not None:
            k, v = op.Concat(past, k, axis=2), op.Concat(_given(node, 5), v, axis=2)
        present = (k, v)
        k, v = (_repeated(op, x, m.heads, m.kv_heads, x is v) for x in (k, v))
        scores = _scores(op, node, m, q, k)
        masked = _masked(op, node, scores, q, k, past)
        probabilities = _softmax(op, node, masked)
        visible = None
        if m.guarded:
            largest = op.ReduceMax(masked, _ints(op, -1), keepdims=1)
            visible = op.Greater(largest, _number(op, masked, _lowest(masked.dtype)))
            if 3 in m.made:
                probabilities = op.Where(visible, probabilities, _number(op, masked, 0))
        out = op.MatMul(probabilities, v)
        if visible is not None and 3 not in m.made:
            out = op.Where(visible, out, _number(op, out, 0))
        if rank(node.inputs[0]) == 3:
            out = op.Reshape(op.Transpose(out, perm=[0, 2, 1, 3]), _ints(op, 0, 0, _width(node, m.heads, m.kv_heads)))
        raw = attr(node, "qk_matmul_output_mode", 0) == _RAW
        every = (out, *present, scores if raw else probabilities)
        return [every[i] for i in m.made]


def _operand(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _given(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _split(op: Builder, x: ir.Value, heads: int) -> ir.Value:
    """[batch, rows, heads * dim] -> [batch, heads, rows, dim]; what has four axes already stays."""
    if rank(x) == 4:
        return x
    size = static_dim(x, -1)
    parts = op.Reshape(x, _ints(op, 0, 0, heads, -1 if size is None else size // heads))
    return op.Transpose(parts, perm=[0, 2, 1, 3])  # type: ignore[no-any-return]


def _width(node: ir.Node, heads: int, kv_heads: int) -> int:
    size = static_dim(node.inputs[2], -1)
    return -1 if size is None else size // kv_heads * heads


def _repeated(op: Builder, x: ir.Value, heads: int, kv_heads: int, is_value: bool) -> ir.Value:
    """Each key head serves heads / kv_heads query heads in a row. Ainslie et al., GQA (2023)."""
    if heads == kv_heads:
        return x
    every = op.Expand(op.Unsqueeze(x, _ints(op, 2)), _ints(op, 1, 1, heads // kv_heads, 1, 1))
    tail = op.Shape(x, start=2, end=4)
    return op.Reshape(every, op.Concat(op.Shape(x, start=0, end=1), _ints(op, heads), tail, axis=0))  # type: ignore[no-any-return]


def _scores(op: Builder, node: ir.Node, m: AttentionMatch, q: ir.Value, k: ir.Value) -> ir.Value:
    """query x key, scaled; in 16 bits the query is scaled first, for the product alone could leave the range."""
    dtype = _given(node, 0).dtype or ir.DataType.FLOAT
    scale = op.const(np.array(attr(node, "scale") or 1 / np.sqrt(m.dim), dtype.numpy()), "scale")
    keys = op.Transpose(k, perm=[0, 1, 3, 2])
    narrow = dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    scores = op.MatMul(op.Mul(q, scale), keys) if narrow else op.Mul(op.MatMul(q, keys), scale)
    cap = attr(node, "softcap", 0.0)
    if cap:
        limit = op.const(np.array(cap, dtype.numpy()), "softcap")
        scores = op.Mul(op.Tanh(op.Div(scores, limit)), limit)
    return scores  # type: ignore[no-any-return]


def _masked(op: Builder, node: ir.Node, scores: ir.Value, q: ir.Value, k: ir.Value, past: ir.Value | None) -> ir.Value:
    dtype = (_given(node, 0).dtype or ir.DataType.FLOAT).numpy()
    zero, hidden = op.const(np.array(0, dtype), "zero"), op.const(np.array(-np.inf, dtype), "hidden")
    mask = _operand(node, 3)
    if mask is not None:
        bias = op.Where(mask, zero, hidden) if mask.dtype == ir.DataType.BOOL else mask
        scores = op.Add(scores, bias)
    if attr(node, "is_causal", 0):
        rows, keys = (_count(op, x, 2) for x in (q, k))
        row = op.Unsqueeze(op.Range(*_bounds(op, rows)), _ints(op, 1))
        if past is not None:
            row = op.Add(row, _count(op, past, 2))
        scores = op.Add(scores, op.Where(op.LessOrEqual(op.Range(*_bounds(op, keys)), row), zero, hidden))
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


def _number(op: Builder, like: ir.Value, value: float) -> ir.Value:
    return op.const(np.array(value, (like.dtype or ir.DataType.FLOAT).numpy()), "number")


def _lowest(dtype: ir.DataType | None) -> float:
    import ml_dtypes

    return float(ml_dtypes.finfo((dtype or ir.DataType.FLOAT).numpy()).min)  # type: ignore[no-untyped-call]


def _ints(op: Builder, *values: int) -> ir.Value:
    return op.const(np.array(values, np.int64), "ints")


def _may_hide_rows(mask: ir.Value | None) -> bool:
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
