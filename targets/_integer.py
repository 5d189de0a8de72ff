"""How quantized pieces are spelled for ONNX Runtime's CPU provider; every spelling is an ordinary rewrite pass.

Measured for MiniLM on a CPU with AVX512-VNNI, one thread (docs/benchmarks.md): DynamicQuantizeMatMul with the bias inside; where several
multiplies read one activation, DynamicQuantizeLinear once and MatMulIntegerToFloat for each, which also beats one wide multiply and a
Split; int8 weights (uint8 ones take 2.3 times as long); rows of a table are gathered as codes and decoded by Cast and Mul (a blocked
DequantizeLinear takes 4 times as long). The runtime fuses the standard spelling, MatMulInteger, Cast, Mul, Add, into the same kernels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from graphopt.analysis.linear import Embedding, Linear, StoredOperands, stored
from graphopt.core.contract import Context
from graphopt.core.errors import TargetError
from graphopt.graph.questions import all_nodes, constant, consumers, is_constant, producer, rank
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.match import Match, Miss
from graphopt.rewrite.rules import RewritePass

from ._at_load import INTEGER, ROUNDED, multiplied_at_load
from ._vendored import VENDOR, blocked_weights

_EIGHT_BITS = (ir.DataType.INT8, ir.DataType.UINT8)
WEIGHT_ONLY = "its input is not quantized to 8 bits by one scale (weight-only)"
_SIGNED = "its input has signed codes, for which there is no kernel of its own; between codes the runtime multiplies integers"
_CONVOLVED = "a Conv reads it"
_LOOKED_UP = "its codes are looked up in a codebook when the runtime loads it, which then holds and multiplies floats"
_UNSPELLED = "it was left as DequantizeLinear, and the runtime does not fuse it"
_AT_LOAD = (_UNSPELLED, WEIGHT_ONLY, _SIGNED, _CONVOLVED)  # true unless the runtime makes an integer product of it when it loads the file


@dataclasses.dataclass(frozen=True)
class CodesMatch(Match):
    embedding: Embedding


@dataclasses.dataclass(frozen=True)
class SpellQuantizedTable(RewritePass[CodesMatch]):
    """Gather(DequantizeLinear(table)) decodes the whole table at every run; gather codes and scales instead, and decode the rows."""

    anchors: ClassVar[frozenset[str]] = frozenset({"Gather"})

    def match(self, node: ir.Node, ctx: Context) -> CodesMatch | Miss | None:
        e = ctx.get(StoredOperands()).get(node)
        if not isinstance(e, Embedding) or e.grid is None:
            return None
        if e.grid.block or e.grid.axis not in (0, None):
            return Miss(node, "the table has no one scale for each row, so it is decoded as a whole")
        return CodesMatch((node,), (node.outputs[0],), e)

    def build(self, op: Builder, m: CodesMatch) -> Sequence[ir.Value]:
        e, grid, dtype = m.embedding, m.embedding.grid, m.outputs[0].dtype
        assert grid is not None
        rows = op.Gather(e.table, e.ids, axis=0)
        if grid.axis is None:
            return [op.DequantizeLinear(rows, grid.scale, grid.zero_point)]
        decoded = op.Cast(rows, to=dtype)
        if grid.zero_point is not None:
            decoded = op.Sub(decoded, op.Cast(_of_row(op, m, grid.zero_point), to=dtype))
        return [op.Mul(decoded, _of_row(op, m, grid.scale))]


def _of_row(op: Builder, m: CodesMatch, per_row: ir.Value) -> ir.Value:
    """What belongs to the gathered rows, shape [..., 1]. The vector itself stays as it is: a tied multiply reads it too."""
    return op.Unsqueeze(op.Gather(per_row, m.embedding.ids, axis=0), op.const(np.array([-1], np.int64), "axes"))


@dataclasses.dataclass(frozen=True)
class MatmulMatch(Match):
    """`codes`, `x_scale`, `x_zero`: the quantized activation; `x`: what it was made from at run time, None where its grid is stored;
    `shared`: it is quantized by a node of its own, as others read it too or its grid is stored."""

    linear: Linear
    x: ir.Value | None
    codes: ir.Value
    x_scale: ir.Value
    x_zero: ir.Value | None
    shared: bool

    @property
    def facts(self) -> Mapping[str, Any]:
        inside = self.linear.bias is not None and not self.linear.batch
        return {"weight": self.linear.weight.name, "shared_activation": self.shared, "bias_inside": inside}


@dataclasses.dataclass(frozen=True)
class SpellIntegerMatmul(RewritePass[MatmulMatch]):
    """MatMul or Gemm of a quantized activation and an int8 weight -> one integer multiply, with the bias inside.

    The runtime's kernels add no bias to a batch of matrices with a scale for each channel, so there it is added behind the multiply.

    Args:
        vendor: with operators of the runtime.
        form: `each` multiply quantizes its input itself; it is quantized `once` by a node of its own; `auto`: once where several read it.
            An activation on a stored grid is quantized once in any case; `runtime` leaves its MatMuls as they are, for the runtime to fuse
            (without the bias), and is `auto` for the others, and for matrices: the runtime makes a float Gemm of MatMul and Add first.
    """

    vendor: bool = True
    form: Literal["auto", "each", "once", "runtime"] = "auto"
    anchors: ClassVar[frozenset[str]] = frozenset({"MatMul", "Gemm"})

    def match(self, node: ir.Node, ctx: Context) -> MatmulMatch | Miss | None:
        linear = ctx.get(StoredOperands()).get(node)
        if not isinstance(linear, Linear) or linear.grid is None:
            return None
        reason = why_float(linear) or (None if self.vendor else _bias_lost(linear))
        if reason is not None:
            left = reason == _SIGNED or (reason == WEIGHT_ONLY and not self.vendor)
            return Miss(node, f"`{linear.weight.name}` is {'left to the runtime' if left else 'multiplied as float'}: {reason}")
        decode = producer(linear.x, "DequantizeLinear")
        assert decode is not None
        dynamic = producer(decode.inputs[0], "DynamicQuantizeLinear")
        if dynamic is None and self.form == "runtime" and node.op_type == "MatMul" and (rank(linear.x) or 0) > 2:
            return None
        codes, scale, zero = (*decode.inputs, None)[:3]
        assert codes is not None
        assert scale is not None
        several = len(consumers(linear.x)) > 1 or len(consumers(codes)) > 1
        shared = dynamic is None or linear.trans_x or self.form == "once" or (self.form in ("auto", "runtime") and several)
        x = None if dynamic is None else dynamic.inputs[0]
        nodes = (node,) if linear.bias_node is None else (node, linear.bias_node)
        return MatmulMatch(nodes, (linear.output,), linear, x, codes, scale, zero, shared)

    def build(self, op: Builder, m: MatmulMatch) -> Sequence[ir.Value]:
        linear, grid = m.linear, m.linear.grid
        assert grid is not None
        weight, scale = _weight(op, m), _scaled(op, grid.scale, linear.alpha)
        bias = None if linear.bias is None else _bias(op, linear)
        inside = None if linear.batch else bias
        codes = op.Transpose(m.codes, perm=[1, 0]) if linear.trans_x else m.codes
        if not self.vendor:
            product = _standard(op, m, codes, weight, scale)
            out = product if bias is None else op.Add(product, bias)
        elif m.shared:
            inputs = (codes, weight, m.x_scale, scale, m.x_zero, grid.zero_point, inside)
            out = op.node("MatMulIntegerToFloat", inputs, _domain=VENDOR)
        else:
            out = op.node("DynamicQuantizeMatMul", (m.x, weight, scale, grid.zero_point, inside), _domain=VENDOR)
        if self.vendor and bias is not inside:
            out = op.Add(out, bias)
        if linear.addend is None:
            return [out]
        return [op.Add(out, _scaled(op, linear.addend, linear.beta))]


def why_float(linear: Linear) -> str | None:
    """Why a multiply with a quantized weight cannot be an integer one, or None if it can."""
    grid = linear.grid
    assert grid is not None
    decode = producer(linear.x, "DequantizeLinear")
    dynamic = None if decode is None else producer(decode.inputs[0], "DynamicQuantizeLinear")
    if decode is None or not (_on_stored_grid(decode) if dynamic is None else tuple(decode.inputs) == tuple(dynamic.outputs)):
        return WEIGHT_ONLY
    if dynamic is None and decode.inputs[0] is not None and decode.inputs[0].dtype == ir.DataType.INT8:
        return _SIGNED
    if grid.block or grid.axis not in (None, linear.channel_axis):
        return "its scales do not run along the output features"
    if linear.weight.dtype not in _EIGHT_BITS:
        return f"it is stored as {linear.weight.dtype}"
    if linear.batch and grid.zero_point is not None:
        return "it is batched and has a zero point"
    return None


def _on_stored_grid(decode: ir.Node) -> bool:
    """An 8-bit activation with one constant scale and zero point."""
    codes, scale, zero = (*decode.inputs, None)[:3]
    sizes = [None if v is None or v.const_value is None else v.const_value.size for v in (scale, zero)]
    return codes is not None and codes.dtype in _EIGHT_BITS and is_constant(scale) and sizes[0] == 1 and (zero is None or sizes[1] == 1)


def _bias_lost(linear: Linear) -> str | None:
    """The runtime fuses MatMulInteger, Cast, Mul and Add into a kernel that drops the bias of a batch of matrices; it adds it to decoded ones."""
    added = any(n.op_type == "Add" for n in consumers(linear.node.outputs[0]))
    return "it is batched and a bias is added, which the runtime drops when it fuses the standard spelling" if linear.batch and added else None


def _weight(op: Builder, m: MatmulMatch) -> ir.Value:
    """The codes as [..., in, out]; exchanged in place where nothing else reads them, else by a Transpose that the runtime folds at load."""
    weight = m.linear.weight
    if not m.linear.transposed:
        return weight
    decoded = m.linear.path[0].outputs[0]
    if len(weight.uses()) == 1 and len(consumers(decoded)) == 1 and not decoded.is_graph_output():
        array = constant(weight)
        assert array is not None
        return op.const(np.ascontiguousarray(np.swapaxes(array, -1, -2)), weight.name or "weight")
    rank = len(m.linear.batch) + 2
    perm = [*range(rank - 2), rank - 1, rank - 2]
    return op.shared(("codes", weight, m.nodes[0].graph), lambda: op.Transpose(weight, perm=perm))


def _scaled(op: Builder, value: ir.Value, factor: float) -> ir.Value:
    if factor == 1.0:
        return value
    array = constant(value)
    if array is None:
        return op.Mul(value, op.const(np.array(factor, np.float32), "factor"))
    return op.const((array * np.float32(factor)).astype(array.dtype), f"{value.name}_scaled")


def _bias(op: Builder, linear: Linear) -> ir.Value:
    """The bias as [out], beta included."""
    bias = linear.bias
    assert bias is not None
    assert bias.const_value is not None
    if linear.beta == 1.0 and tuple(bias.const_value.shape.numpy()) == (linear.out_features,):
        return bias
    array = np.asarray(constant(bias))
    spread = np.broadcast_to(array.reshape(-1) * np.asarray(linear.beta, array.dtype), (linear.out_features,))
    return op.const(np.ascontiguousarray(spread), f"{bias.name}_vector")


def _standard(op: Builder, m: MatmulMatch, codes: ir.Value, weight: ir.Value, scale: ir.Value) -> ir.Value:
    grid = m.linear.grid
    assert grid is not None
    total = op.MatMulInteger(codes, weight, m.x_zero, grid.zero_point)
    return op.Mul(op.Cast(total, to=ir.DataType.FLOAT), op.Mul(m.x_scale, scale))


def integer_report(model: ir.Model, shipped: Callable[[], ir.Model]) -> dict[str, Any]:
    """Which stored integer weights of a lowered graph are multiplied as integers, which as floats and why, and which are tables of rows.

    A multiply that still stands between DequantizeLinear nodes counts as what the installed runtime makes of it when it loads the model;
    `rounded_at_load` names the weight-only ones among them whose activations it then rounds to 8 bits, although the graph does not.

    Args:
        shipped: makes the model as it is written; asked only where it matters.
    """
    integer: dict[str, None] = {}
    tables: dict[str, None] = {}
    floats: dict[str, str] = {}
    operands = Context(model).get(StoredOperands())
    readers = {step: x for x in reversed(list(operands.values())) if isinstance(x, Linear) for step in x.path}  # the first of each
    blocked: dict[str, str] = {}
    for node in all_nodes(model):
        if (found := blocked_weights(node)) is not None:
            kind, name, whole = found
            if kind == "table" or whole:
                (tables if kind == "table" else integer)[name] = None
            else:
                blocked[name] = node.op_type
        elif node.op_type in INTEGER and (weight := stored(node.inputs[1])) is not None:
            integer[weight.value.name or ""] = None
        elif node.op_type == "Gather" and (table := stored(node.inputs[0])) is not None and table.value.dtype in _EIGHT_BITS:
            if rank(table.value) != 1 and table.codebook is None:  # not the zero points of the rows
                tables[table.value.name or ""] = None
        elif node.op_type == "DequantizeLinear" and (weight := stored(node.outputs[0])) is not None:
            floats[weight.value.name or ""] = _why_decoded(node, readers)
    floats.update((name, _LOOKED_UP) for x in operands.values() if x.codebook is not None and (name := x.codebook.codes.name or ""))
    report: dict[str, Any] = {}
    if any(reason in _AT_LOAD for reason in floats.values()):
        try:
            fused, rounded = multiplied_at_load(shipped(), operands.values())
        except TargetError as error:
            fused, rounded = set(), set()
            report["warnings"] = [f"which weights it multiplies as integers is not known: {error}"]
            floats = {name: f"not known; {reason}" if reason in _AT_LOAD else reason for name, reason in floats.items()}
        integer.update(dict.fromkeys(name for name in floats if name in fused or name in rounded))
        if rounded:
            report["rounded_at_load"] = [{"name": name, "reason": ROUNDED} for name in floats if name in rounded]
    told = [{"name": name, "reason": reason} for name, reason in floats.items() if name not in integer and name not in tables]
    told += [{"name": name, "reason": f"blocks of it are decoded inside {op}, which multiplies floats"} for name, op in blocked.items()]
    return {"integer": list(integer), "float": told, "tables": list(tables), **report}


def _why_decoded(decode: ir.Node, linears: Mapping[ir.Node, Linear]) -> str:
    if decode in linears:
        return why_float(linears[decode]) or _UNSPELLED
    readers = consumers(decode.outputs[0])
    return f"a {readers[0].op_type} reads it" if readers else "it is an output of the graph"
