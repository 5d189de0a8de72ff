"""NF4 weights as MatMulBnb4, and lookups in an NF4 table: both read the codes in one packed layout.

The operator reads uint8 [rows * in / 2], two codes in a byte, the first one high, of the rows of the weight (its output features) one after the
other, with the scale of each block in the same order. A lookup takes rows of the same bytes by a Reshape without a copy, and unpacks them in
standard operators. A multiply decodes its whole weight at every run: small in memory, and slow for few tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.codebook import NF4, Codebook
from graphopt.analysis.linear import Embedding, Linear, StoredOperands
from graphopt.core.contract import Array, Context
from graphopt.graph.questions import constant, rank
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.match import Match, Miss
from graphopt.rewrite.rules import RewritePass

from ._blocked import weight_only, with_rest
from ._packed import Known, known
from ._vendored import VENDOR

_BLOCKS = (16, 32, 64, 128, 256)  # that the runtime's kernel has; its documentation speaks of any power of two
_NF4 = 1  # its quant_type


@dataclasses.dataclass(frozen=True)
class Nf4Match(Match):
    """`codebook` lies as rows along the input features where `transposed`; `known`: what is packed of it already; `tied`: a lookup whose codes
    a product reads, too."""

    operand: Linear | Embedding
    codebook: Codebook
    transposed: bool
    block: int
    known: Known
    tied: bool = False

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"weight": self.codebook.codes.name, "codes": "nf4", "block": self.block}


@dataclasses.dataclass(frozen=True)
class SpellNf4Table(RewritePass[Nf4Match]):
    """Gather(NF4 table) -> Gather of its packed rows, unpacked and looked up."""

    anchors: ClassVar[frozenset[str]] = frozenset({"Gather"})

    def match(self, node: ir.Node, ctx: Context) -> Nf4Match | Miss | None:
        e = ctx.get(StoredOperands()).get(node)
        if not isinstance(e, Embedding) or e.codebook is None:
            return None
        if rank(e.ids) is None:
            return Miss(node, "the table is decoded as a whole: the rank of its ids is not known")
        codes = e.codebook.codes
        tied = any(isinstance(x, Linear) and x.codebook is not None and x.codebook.codes is codes for x in ctx.get(StoredOperands()).values())
        found = _match(e, e.codebook, True, ctx)
        return dataclasses.replace(found, tied=tied) if isinstance(found, Nf4Match) else found

    def build(self, op: Builder, m: Nf4Match) -> Sequence[ir.Value]:
        e = m.operand
        assert isinstance(e, Embedding)
        keep = [0] * (rank(e.ids) or 0)  # of Reshape: this axis as it is

        def shaped(value: Any, *shape: int) -> Any:
            return op.Reshape(value, op.const(np.array(shape, np.int64), "shape"))

        def number(value: int) -> ir.Value:
            return op.const(np.array(value, np.uint8), "bits")

        if m.tied:  # stored once, in the layout of the product
            rows, row_scales = (shaped(x, e.rows, n) for x, n in zip(_packed(op, m), (e.width // 2, e.width // m.block), strict=True))
        else:
            rows = m.known.once(op, "pair_rows", lambda: _pairs(m).reshape(e.rows, -1))
            row_scales = m.known.once(op, "row_scales", lambda: _scales(m).reshape(e.rows, -1))
        pairs = op.Gather(rows, e.ids, axis=0)
        last = op.const(np.array([-1], np.int64), "axes")
        high, low = op.BitShift(pairs, number(4), direction="RIGHT"), op.BitwiseAnd(pairs, number(15))
        codes = shaped(op.Concat(op.Unsqueeze(high, last), op.Unsqueeze(low, last), axis=-1), *keep, e.width // m.block, m.block)
        scales = op.Unsqueeze(op.Gather(row_scales, e.ids, axis=0), last)
        values = op.Mul(op.Gather(m.codebook.table, op.Cast(codes, to=ir.DataType.INT32), axis=0), scales)
        return [shaped(values, *keep, e.width)]


@dataclasses.dataclass(frozen=True)
class SpellNf4Matmul(RewritePass[Nf4Match]):
    """MatMul or Gemm of float activations and an NF4 weight -> MatMulBnb4, where the provider has it."""

    anchors: ClassVar[frozenset[str]] = frozenset({"MatMul", "Gemm"})

    def match(self, node: ir.Node, ctx: Context) -> Nf4Match | Miss | None:
        linear = ctx.get(StoredOperands()).get(node)
        if not isinstance(linear, Linear) or linear.codebook is None or not weight_only(linear):
            return None
        if linear.batch or linear.trans_x or linear.x.dtype != ir.DataType.FLOAT:
            reason = "a batch of matrices, transposed or half-precision activations"
            return Miss(node, f"`{linear.weight.name}` is looked up as a whole: {reason}")
        if ctx.target is not None and not ctx.target.supports(ir.Node(VENDOR, "MatMulBnb4", [])):
            return Miss(node, f"`{linear.weight.name}` is looked up as a whole: the provider has no MatMulBnb4")
        return _match(linear, linear.codebook, linear.transposed, ctx)

    def build(self, op: Builder, m: Nf4Match) -> Sequence[ir.Value]:
        linear = m.operand
        assert isinstance(linear, Linear)
        options = {"K": linear.in_features, "N": linear.out_features, "block_size": m.block, "quant_type": _NF4}
        return [with_rest(op, linear, op.node("MatMulBnb4", (linear.x, *_packed(op, m)), _domain=VENDOR, **options))]


def _match(operand: Linear | Embedding, codebook: Codebook, transposed: bool, ctx: Context) -> Nf4Match | Miss:
    node, name = operand.node, codebook.codes.name
    axis = 1 if transposed else 0
    assert codebook.codes.const_value is not None
    width = int(codebook.codes.const_value.shape.numpy()[axis])
    table, reason = constant(codebook.table), None
    if codebook.axis is not None or table is None or not np.array_equal(table, NF4):
        reason = "the runtime has no kernel for its codebook, only for NF4"
    elif codebook.scale is None or codebook.scale.dtype != ir.DataType.FLOAT or (codebook.block and codebook.block_axis != axis):
        reason = "it has no scales along its input features"
    elif not codebook.block and not _one_for_each_row(codebook, axis):
        reason = "it has no scale for each output feature"
    block = codebook.block or min(width & -width, _BLOCKS[-1])  # of one scale for a row: the largest power of two in it, the scale repeated
    if reason is None and block not in _BLOCKS:
        reason = f"the runtime has no kernel for blocks of {block}"
    if reason is not None:
        return Miss(node, f"`{name}` is looked up as a whole: {reason}")
    return Nf4Match((node,), (node.outputs[0],), operand, codebook, transposed, block, known(ctx, codebook.codes, codebook.scale, "nf4"))


def _one_for_each_row(codebook: Codebook, axis: int) -> bool:
    assert codebook.codes.const_value is not None
    assert codebook.scale is not None
    assert codebook.scale.const_value is not None
    shape = [int(d) for d in codebook.codes.const_value.shape.numpy()]
    shape[axis] = 1
    return [int(d) for d in codebook.scale.const_value.shape.numpy()] == shape


def _packed(op: Builder, m: Nf4Match) -> tuple[ir.Value, ir.Value]:
    """Codes and scales as one long vector each; made once."""
    return m.known.once(op, "pairs", lambda: _pairs(m)), m.known.once(op, "pairs_scale", lambda: _scales(m))


def _pairs(m: Nf4Match) -> Array:
    codes = constant(m.codebook.codes)
    assert codes is not None
    flat = np.ascontiguousarray((codes if m.transposed else codes.T).astype(np.uint8)).reshape(-1)
    packed: Array = flat[::2] << 4 | flat[1::2]
    return packed


def _scales(m: Nf4Match) -> Array:
    scale = constant(m.codebook.scale)
    codes = m.codebook.codes.const_value
    assert scale is not None
    assert codes is not None
    count, width = (0, 1) if m.transposed else (1, 0)
    shape = codes.shape.numpy()
    rows = scale.reshape(shape[count], -1) if m.transposed else scale.reshape(-1, shape[count]).T
    blocks = int(shape[width]) // m.block
    return np.ascontiguousarray(np.broadcast_to(rows, (rows.shape[0], blocks)), dtype=np.float32).reshape(-1)
