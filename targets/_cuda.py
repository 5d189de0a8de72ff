"""How pieces are told to ONNX Runtime's CUDA provider; what the CPU provider has as well is in `_kernels.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.core.contract import Array, Context
from graphopt.graph.attention_node import AttentionNode
from graphopt.graph.questions import attr, constant, is_constant, producer, rank, scalar, static_dim
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.match import Match, Miss
from graphopt.rewrite.rules import RewritePass

from ._attention import AttentionMatch
from ._limits import VENDOR

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_NIBBLES = (ir.DataType.UINT4, ir.DataType.INT4)


@dataclasses.dataclass(frozen=True)
class QuickMatch(Match):
    x: ir.Value
    slope: float


@dataclasses.dataclass(frozen=True)
class SpellQuickGelu(RewritePass[QuickMatch]):
    """x * sigmoid(slope * x) -> QuickGelu; SiLU is slope 1. Hendrycks and Gimpel, GELUs (2016)."""

    anchors: ClassVar[frozenset[str]] = frozenset({"Sigmoid"})

    def match(self, node: ir.Node, ctx: Context) -> QuickMatch | None:
        inner, out = node.inputs[0], node.outputs[0]
        users = [u.node for u in out.uses()]
        if inner is None or len(users) != 1 or users[0].op_type != "Mul" or out.is_graph_output():
            return None
        other = next((v for v in users[0].inputs if v is not out), None)
        nodes: tuple[ir.Node, ...] = (node, users[0])
        if other is inner:
            return QuickMatch(nodes, (users[0].outputs[0],), inner, 1.0)
        scaled = producer(inner, "Mul")
        if scaled is None or other is None or other not in scaled.inputs:
            return None
        slope = scalar(next((v for v in scaled.inputs if v is not other), None))
        alone = len(inner.uses()) == 1 and not inner.is_graph_output()
        return QuickMatch((scaled, *nodes) if alone else nodes, (users[0].outputs[0],), other, float(slope)) if slope is not None else None

    def build(self, op: Builder, m: QuickMatch) -> Sequence[ir.Value]:
        return [op.node("QuickGelu", (m.x,), _domain=VENDOR, alpha=m.slope)]


@dataclasses.dataclass(frozen=True)
class SpellGroupQuery(RewritePass[AttentionMatch]):
    """Causal Attention with shared key heads, in half precision -> GroupQueryAttention. Ainslie et al., GQA (2023)."""

    anchors: ClassVar[frozenset[str]] = frozenset({"Attention"})

    def match(self, node: ir.Node, ctx: Context) -> AttentionMatch | Miss | None:
        a = AttentionNode.of(node)
        if a is not None and a.heads == a.kv_heads:
            return None
        if a is None or not a.packed:
            return Miss(node, "GroupQueryAttention reads packed heads")
        if a.q.dtype not in _HALF:
            return Miss(node, f"GroupQueryAttention has no kernel for {a.q.dtype and a.q.dtype.name.lower()}", "use dtype=float16 or dtype=bfloat16")
        if not a.causal or a.mask is not None or a.cached:
            return Miss(node, "GroupQueryAttention is causal and takes no mask of its own; this one has a mask, a cache, or is not causal")
        if a.shown is not None or a.precision or a.window != (-1, -1):
            return Miss(node, "stays Attention: its scores are read, or it has a window, or its softmax a type of its own")
        if not a.head_dim or a.head_dim % 8:
            return Miss(node, "GroupQueryAttention wants heads of a multiple of 8 features")
        if not _same_rows(a.q, a.k):
            return Miss(node, "stays Attention: keys and queries are not shown to have the same length")
        return AttentionMatch((node,), (node.outputs[0],), a)

    def build(self, op: Builder, m: AttentionMatch) -> Sequence[ir.Value]:
        a = m.attention
        one = op.const(np.array(1, np.int64), "one")
        length = op.shared(("length", a.q), lambda: op.Squeeze(op.Shape(a.q, start=1, end=2)))
        total = op.Cast(length, to=ir.DataType.INT32)
        last = op.Expand(op.Cast(op.Sub(length, one), to=ir.DataType.INT32), op.Shape(a.q, start=0, end=1))
        made = op.node(
            "GroupQueryAttention", (*a.operands, None, None, last, total), _domain=VENDOR, _outputs=3,
            softcap=a.softcap or None, num_heads=a.heads, kv_num_heads=a.kv_heads, scale=attr(a.node, "scale"),
        )  # fmt: skip
        return [made[0]]


def _same_rows(q: ir.Value, k: ir.Value) -> bool:
    return q.shape is not None and k.shape is not None and q.shape[1] == k.shape[1] and str(q.shape[1]) != "None"


@dataclasses.dataclass(frozen=True)
class BitsMatch(Match):
    """MatMul of `x` with a weight [rows, columns] whose blocks of `block` rows share a scale; `bits` 4 or 8."""

    x: ir.Value
    weight: ir.Value
    scale: ir.Value
    zero: ir.Value | None
    block: int
    bits: int

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"weight": self.weight.name, "bits": self.bits, "block": self.block}


@dataclasses.dataclass(frozen=True)
class SpellNBits(RewritePass[BitsMatch]):
    """MatMul(x, DequantizeLinear(weight, blocks along the rows)) -> MatMulNBits, which decodes while it multiplies."""

    anchors: ClassVar[frozenset[str]] = frozenset({"MatMul"})

    def match(self, node: ir.Node, ctx: Context) -> BitsMatch | Miss | None:
        decode, x = producer(node.inputs[1], "DequantizeLinear"), node.inputs[0]
        if decode is None or x is None or not attr(decode, "block_size", 0):
            return None
        weight, scale = decode.inputs[0], decode.inputs[1]
        zero = decode.inputs[2] if len(decode.inputs) > 2 else None
        if weight is None or scale is None or not all(is_constant(v) for v in (weight, scale, zero) if v is not None):
            return Miss(node, "stays DequantizeLinear: its weight is not stored")
        block, rows = attr(decode, "block_size"), static_dim(weight, 0)
        if rank(weight) != 2 or attr(decode, "axis", 1) % 2 != 0 or rows is None or rows % block or block < 16 or block & (block - 1):
            return Miss(node, "stays DequantizeLinear: MatMulNBits wants blocks of 16, 32, .. whole input features")
        if weight.dtype not in (*_NIBBLES, ir.DataType.UINT8, ir.DataType.INT8):
            return Miss(node, f"stays DequantizeLinear: it is stored as {weight.dtype}")
        nodes = (decode, node) if len(decode.outputs[0].uses()) == 1 and not decode.outputs[0].is_graph_output() else (node,)
        return BitsMatch(nodes, (node.outputs[0],), x, weight, scale, zero, block, 4 if weight.dtype in _NIBBLES else 8)

    def build(self, op: Builder, m: BitsMatch) -> Sequence[ir.Value]:
        codes, scales = _codes(m.weight), np.asarray(constant(m.scale))
        signed = m.weight.dtype in (ir.DataType.INT4, ir.DataType.INT8)
        middle = 1 << (m.bits - 1) if signed else 0
        rows, columns = codes.shape
        zeros = np.full(scales.shape, 0, np.int16) if m.zero is None else _codes(m.zero)
        packed = _packed((codes + middle).T.reshape(columns, rows // m.block, m.block), m.bits)
        points = _packed((zeros + middle).T, m.bits)
        inputs = [op.const(packed, f"{m.weight.name}_blocks"), op.const(np.ascontiguousarray(scales.T).reshape(-1), f"{m.scale.name}_blocks")]
        if bool((zeros + middle != 1 << (m.bits - 1)).any()):  # the middle is what the kernel assumes
            inputs.append(op.const(points.reshape(-1), "zero_points"))
        return [op.node("MatMulNBits", (m.x, *inputs), _domain=VENDOR, K=rows, N=columns, bits=m.bits, block_size=m.block)]


def _codes(value: ir.Value) -> Array:
    return np.asarray(constant(value)).astype(np.int16)


def _packed(codes: Array, bits: int) -> Array:
    """The codes along the last axis as bytes; two of 4 bits in one, the earlier in the low half; an odd end is filled up."""
    if bits == 8:
        return np.ascontiguousarray(codes.astype(np.uint8))
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], 1), codes.dtype)], axis=-1)
    return np.ascontiguousarray((codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8))
