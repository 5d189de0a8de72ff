"""What ONNX Runtime refuses to load at its default level although it is legal, or dies of, and the same written so that it loads.

Found with onnxruntime 1.32 on x86-64 (tests/cases/test_k02_does_not_load.py tries the spellings one by one, in a process that may die):
- A scalar DequantizeLinear of signed 8-bit codes moves behind a layout operator at load. From opset 21 on, the rewrite to unsigned codes
  then forgets `output_dtype` and the load fails; below, it takes codes without a zero point for unsigned ones, and the numbers are wrong.
- A Transpose of a 16-bit value that moves the first axis behind the others of a stack of rows, in front of a MatMul: the process dies.
- A LayerNormalization spelled out in 16 bits, whose input is cast there: the fused node gets two types.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.core.contract import Analysis, Context
from graphopt.graph.questions import attr, constant, consumers, is_constant, producer, rank, scalar
from graphopt.io.save import finish
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.match import Match, Miss
from graphopt.rewrite.rules import RewritePass

_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "MaxPool")  # a DequantizeLinear moves behind these
_SIGN = 128  # from a signed code to the unsigned one of the same value
_HALF, _FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT


@dataclasses.dataclass(frozen=True)
class ShippedOpset(Analysis[int]):
    """The opset that the graph would be written with now."""

    def compute(self, model: ir.Model, ctx: Context) -> int:
        return finish(model)[0].opset_imports[""]


@dataclasses.dataclass(frozen=True)
class SignedMatch(Match):
    """`quantize`: what makes the codes, if all that read them can read unsigned ones; None: they are decoded by arithmetic."""

    decodes: tuple[ir.Node, ...]
    quantize: ir.Node | None


@dataclasses.dataclass(frozen=True)
class SpellSigned(RewritePass[SignedMatch]):
    """Signed codes in front of a layout operator: unsigned ones where a QuantizeLinear makes them, else Cast, Sub and Mul. Bit for bit the same."""

    anchors: ClassVar[frozenset[str]] = frozenset({"DequantizeLinear"})

    def run(self, model: ir.Model, ctx: Context) -> int:
        changes = super().run(model, ctx)
        if changes:
            text = "ONNX Runtime cannot load signed codes in front of a layout operator at this opset; they are spelled otherwise, with equal numbers"
            ctx.remarks.applied("", text, places=changes)
        return changes

    def match(self, node: ir.Node, ctx: Context) -> SignedMatch | Miss | None:
        codes, scale, zero = (*node.inputs, None)[:3]
        if codes is None or scale is None or codes.dtype != ir.DataType.INT8 or is_constant(codes) or not _moves(node):
            return None
        if not _single(scale) or (zero is None) == (ctx.get(ShippedOpset()) >= 21):
            return None
        if node.outputs[0].dtype != scale.dtype:
            return Miss(node, f"stays as it is: it decodes to {node.outputs[0].dtype}, and its scale is {scale.dtype}")
        made, readers = producer(codes, "QuantizeLinear"), consumers(codes)
        alike = all(n.op_type == "DequantizeLinear" and tuple(n.inputs[1:]) == tuple(node.inputs[1:]) for n in readers)
        if made is not None and alike and not codes.is_graph_output() and (zero is None or constant(zero) is not None):
            return SignedMatch((made, *readers), tuple(n.outputs[0] for n in readers), tuple(readers), made)
        return SignedMatch((node,), (node.outputs[0],), (node,), None)

    def build(self, op: Builder, m: SignedMatch) -> Sequence[ir.Value]:
        codes, scale, zero = (*m.decodes[0].inputs, None)[:3]
        if m.quantize is not None:
            old = np.zeros((), np.int8) if zero is None else np.asarray(constant(zero))
            unsigned = op.const((old.astype(np.int16) + _SIGN).astype(np.uint8), "zero_point")
            made = op.QuantizeLinear(m.quantize.inputs[0], m.quantize.inputs[1], unsigned)
            return [op.DequantizeLinear(made, scale, unsigned) for _ in m.decodes]
        dtype = m.outputs[0].dtype
        decoded = op.Cast(codes, to=dtype)
        if zero is not None and scalar(zero) != 0:
            decoded = op.Sub(decoded, op.Cast(zero, to=dtype))
        return [op.Mul(decoded, scale)]


def _moves(decode: ir.Node) -> bool:
    """Whether a layout operator reads it whose own result is read as floats: between codes the runtime leaves everything where it is."""
    moved = [n for n in consumers(decode.outputs[0]) if n.op_type in _MOVES and n.domain == "" and n.inputs[0] is decode.outputs[0]]
    results = [n.outputs[0] for n in moved]
    return any(v.is_graph_output() or any(n.op_type != "QuantizeLinear" for n in consumers(v)) for v in results)


def _single(value: ir.Value) -> bool:
    sizes = value.shape if value.const_value is None else value.const_value.shape
    return sizes is not None and all(size == 1 for size in sizes)


@dataclasses.dataclass(frozen=True)
class HalfMatch(Match):
    """x [.., features] transposed by `perm`, times `weight`; `commutes`: the Transpose may as well stand behind the product."""

    x: ir.Value
    weight: ir.Value
    perm: tuple[int, ...]
    commutes: bool


@dataclasses.dataclass(frozen=True)
class SpellHalfTransposed(RewritePass[HalfMatch]):
    """MatMul(Transpose(x), w) in 16 bits -> Transpose(MatMul(x, w)); where the features move too, x is cast before it is transposed, and not after.

    (The runtime multiplies in float32 in either case, and has no kernel for the other.)
    """

    anchors: ClassVar[frozenset[str]] = frozenset({"MatMul"})

    def match(self, node: ir.Node, ctx: Context) -> HalfMatch | None:
        x, weight = node.inputs
        cast = producer(x, "Cast")
        moved = producer(x if cast is None else cast.inputs[0], "Transpose")
        if moved is None or weight is None or moved.inputs[0] is None or moved.inputs[0].dtype != _HALF or rank(weight) not in (1, 2, None):
            return None
        perm, size = tuple(attr(moved, "perm", ())), rank(moved.inputs[0]) or 0
        if size < 3 or perm not in ((*range(1, size - 1), 0, size - 1), (*range(1, size), 0)):
            return None
        commutes = cast is None and perm[-1] == size - 1 and rank(weight) is not None
        if cast is not None and cast.outputs[0].dtype != _FLOAT:
            return None
        return HalfMatch((node,), (node.outputs[0],), moved.inputs[0], weight, perm, commutes)

    def build(self, op: Builder, m: HalfMatch) -> Sequence[ir.Value]:
        if m.commutes:
            perm = m.perm if rank(m.weight) == 2 else m.perm[:-1]
            return [op.Transpose(op.MatMul(m.x, m.weight), perm=list(perm))]
        wide = op.shared(("wide", m.x, m.perm, m.nodes[0].graph), lambda: op.Transpose(op.Cast(m.x, to=_FLOAT), perm=list(m.perm)))
        weight = m.weight if m.weight.dtype == _FLOAT else op.Cast(m.weight, to=_FLOAT)
        product = op.MatMul(wide, weight)
        return [product if m.outputs[0].dtype == _FLOAT else op.Cast(product, to=m.outputs[0].dtype)]


@dataclasses.dataclass(frozen=True)
class SpellHalfNorm(RewritePass[Match]):
    """In the variance of a norm whose input was cast to 16 bits, Pow(d, 2) -> Mul(d, d), which the runtime does not fuse."""

    anchors: ClassVar[frozenset[str]] = frozenset({"Pow"})

    def match(self, node: ir.Node, ctx: Context) -> Match | None:
        wide = producer(node.inputs[0], "Cast")
        centred = producer(wide.inputs[0] if wide is not None else None, "Sub")
        cast = producer(centred.inputs[0] if centred is not None else None, "Cast")
        if cast is None or cast.outputs[0].dtype != _HALF or scalar(node.inputs[1]) != 2:
            return None
        return Match((node,), (node.outputs[0],))

    def build(self, op: Builder, m: Match) -> Sequence[ir.Value]:
        return [op.Mul(m.nodes[0].inputs[0], m.nodes[0].inputs[0])]
