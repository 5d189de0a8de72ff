"""Activations, products, norms, embeddings and rotary embeddings of ONNX Runtime in standard operators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.graph.questions import attr, is_read, rank, static_dim
from graphopt.io.runtime_ops.unread import Reader, Unread, inputs, present, refuse
from graphopt.rewrite.builder import Builder

_ACTIVATIONS = ("Relu", "Sigmoid", "Tanh")


# ---- activations and products ------------------------------------------------------------------------------------------------------------


def _gelu(node: ir.Node, op: Builder) -> list[ir.Value]:
    """Gelu(X), BiasGelu(A, B) = Gelu(A + B), and FastGelu(X, bias), which is its approximation by tanh."""
    x, bias = inputs(node, 2)
    total = present(x, "input") if bias is None else op.Add(x, bias)
    return [op.Gelu(total, approximate="tanh" if node.op_type == "FastGelu" else None)]


def _quick_gelu(node: ir.Node, op: Builder) -> list[ir.Value]:
    """x * sigmoid(alpha * x)."""
    x = present(node.inputs[0], "input")
    if x.dtype is None:
        raise Unread("the type of its input is not known")
    alpha = attr(node, "alpha", 1.702)
    scaled = x if alpha == 1 else op.Mul(x, op.const(np.array(alpha, x.dtype.numpy()), "alpha"))
    return [op.Mul(x, op.Sigmoid(scaled))]


def _fused_matmul(node: ir.Node, op: Builder) -> list[ir.Value]:
    """alpha * A' @ B', each with its last two axes exchanged where it says so."""
    if attr(node, "transBatchA", 0) or attr(node, "transBatchB", 0):
        raise Unread("it exchanges a batch axis with the rows (transBatchA, transBatchB)")
    sides = [_turned(op, present(v, "operand"), bool(attr(node, key, 0))) for v, key in zip(node.inputs, ("transA", "transB"), strict=True)]
    return [_times(op, op.MatMul(*sides), attr(node, "alpha", 1.0), node)]


def _turned(op: Builder, value: ir.Value, swap: bool) -> ir.Value:
    if not swap:
        return value
    size = rank(value)
    if size is None or size < 2:
        raise Unread(f"the rank of `{value.name}` is not known, or it has one axis")
    return op.Transpose(value, perm=[*range(size - 2), size - 1, size - 2])


def _times(op: Builder, value: ir.Value, factor: float, node: ir.Node) -> ir.Value:
    dtype = node.inputs[0].dtype if node.inputs[0] is not None else None
    if factor == 1:
        return value
    if dtype is None:
        raise Unread("the type of its input is not known")
    return op.Mul(value, op.const(np.array(factor, dtype.numpy()), "alpha"))


def _activated(node: ir.Node, op: Builder) -> list[ir.Value]:
    """FusedConv and FusedGemm: the operator [+ Z], then an activation without parameters."""
    activation = attr(node, "activation", "")
    if activation and activation not in _ACTIVATIONS:
        raise Unread(f"its activation is {activation}")
    values = inputs(node, 4)
    kept = {k: a for k, a in node.attributes.items() if not k.startswith("activation")}
    made = op.node(node.op_type.removeprefix("Fused"), values[:3])
    made.producer().attributes.update(kept)
    made = made if values[3] is None else op.Add(made, values[3])
    return [op.node(activation, (made,)) if activation else made]


# ---- norms and embeddings ------------------------------------------------------------------------------------------------------------------


def _simplified_norm(node: ir.Node, op: Builder) -> list[ir.Value]:
    refuse(node, outputs={1: "inv_std_var"})
    x, scale = inputs(node, 2)
    if x is None or scale is None or x.dtype is None or x.dtype != scale.dtype:
        raise Unread("its scale has another type than its input")
    return [op.RMSNormalization(x, scale, axis=attr(node, "axis", -1), epsilon=attr(node, "epsilon", 1e-5))]


def _skip_norm(node: ir.Node, op: Builder) -> list[ir.Value]:
    """The norm of input + skip + bias, and that sum."""
    refuse(node, outputs={1: "mean", 2: "inv_std_var"})
    layer = node.op_type == "SkipLayerNormalization"
    x, skip, gamma, *rest = inputs(node, 5)
    beta, bias = rest if layer else (None, rest[0])
    total = op.Add(present(x, "input"), present(skip, "skip"))
    total = total if bias is None else op.Add(total, bias)
    epsilon = attr(node, "epsilon", 1e-12)
    out = _layer_norm(op, total, gamma, beta, epsilon) if layer else op.RMSNormalization(total, gamma, axis=-1, epsilon=epsilon)
    return [out, total, total, total]


def _layer_norm(op: Builder, x: ir.Value, gamma: ir.Value | None, beta: ir.Value | None, epsilon: float) -> ir.Value:
    made: ir.Value = op.node("LayerNormalization", (x, gamma, beta), axis=-1, epsilon=epsilon)
    return made


def _embedding(node: ir.Node, op: Builder) -> list[ir.Value]:
    """The norm of a word's, a position's and a segment's row; `mask_index` counts the ones of the mask."""
    ids, segments, words, places, kinds, gamma, beta, mask, where = inputs(node, 9)
    if attr(node, "mask_index_type", 1) != 1:
        raise Unread("its mask index is not the length of each row")
    ids, places = present(ids, "input_ids"), present(places, "position_embedding")
    total = op.Gather(present(words, "word_embedding"), ids)
    if where is None:
        zero, length = op.ints(0, name="zero"), op.Shape(ids, start=1, end=2)
        row = op.Slice(places, zero, length, zero)
    else:
        row = op.Gather(places, where)
    total = op.Add(total, row)
    if segments is not None:
        total = op.Add(total, op.Gather(present(kinds, "segment_embedding"), segments))
    out = _layer_norm(op, total, gamma, beta, attr(node, "epsilon", 1e-12))
    if not (len(node.outputs) > 1 and is_read(node.outputs[1])):
        return [out, out, total]
    if mask is None:
        raise Unread("its mask index is read, and it has no mask")
    ones = op.Cast(op.Equal(mask, op.const(np.array(1, np.int32), "one")), to=int(ir.DataType.INT32))
    return [out, op.ReduceSum(ones, op.ints(1, name="axes"), keepdims=0), total]


def _rotary(node: ir.Node, op: Builder) -> list[ir.Value]:
    """The same operator; where the runtime takes one number, the rows count on from it."""
    x, where, cosines, sines = inputs(node, 4)
    x, where, cosines = present(x, "input"), present(where, "position_ids"), present(cosines, "cos_cache")
    if attr(node, "scale", 1.0) != 1 or attr(node, "is_packed_batching", 0):
        raise Unread("it scales, or reads a packed batch")
    size, half, width = rank(x), static_dim(cosines, -1), static_dim(x, -1)
    part, heads = attr(node, "rotary_embedding_dim", 0), attr(node, "num_heads", 0)
    if size not in (3, 4) or half is None or width is None or rank(where) not in (1, 2):
        raise Unread("its shapes are not known")
    if size == 3 and not heads:
        if part or width % (2 * half):
            raise Unread("how many heads it has is not known")
        heads = width // (2 * half)
    if rank(where) == 1:
        axis = size - 2
        count = op.Squeeze(op.Shape(x, start=axis, end=axis + 1))
        rows = op.Add(op.Range(_number(op, 0), count, _number(op, 1)), where)
        shape = op.Concat(op.Shape(x, start=0, end=1), op.Shape(x, start=axis, end=axis + 1), axis=0)
        where = op.Expand(op.Unsqueeze(rows, op.ints(0)), shape)
    given: dict[str, Any] = {
        "interleaved": attr(node, "interleaved", 0) or None,
        "rotary_embedding_dim": part or None,
        "num_heads": heads if size == 3 else None,
    }
    return [op.node("RotaryEmbedding", (x, cosines, sines, where), **given)]


def _number(op: Builder, value: int) -> ir.Value:
    return op.const(np.array(value, np.int64), "number")


READERS: Mapping[str, Reader] = {
    **dict.fromkeys(("Gelu", "BiasGelu", "FastGelu"), _gelu),
    "QuickGelu": _quick_gelu,
    **dict.fromkeys(("FusedMatMul", "TransposeMatMul"), _fused_matmul),
    **dict.fromkeys(("FusedConv", "FusedGemm"), _activated),
    **dict.fromkeys(("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"), _skip_norm),
    "SimplifiedLayerNormalization": _simplified_norm,
    "EmbedLayerNormalization": _embedding,
    "RotaryEmbedding": _rotary,
}
