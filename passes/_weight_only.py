"""quantize{mode=weight-only}: stored weights as blocks of 4 or 8 bits, between float activations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphopt.analysis.linear import Embedding, Linear, StoredOperands
from graphopt.analysis.moments import input_moments
from graphopt.core import Array, Context
from graphopt.graph import static_dim
from graphopt.rewrite import Builder, Match, Miss, RewritePass
from graphopt.run.observe import observable

from ._blocks import Steps, steps
from ._decoded import decoded
from ._eligible import numbers, passed_over, quantized_before, say_nothing_to_do, tied_table, unfit_linear, unfit_table, why_no_linear
from ._gptq import Inputs, gptq

_TYPES: Mapping[tuple[int, bool], Any] = {(4, True): ml_dtypes.int4, (4, False): ml_dtypes.uint4, (8, True): np.int8, (8, False): np.uint8}


class Options(Protocol):
    """The options of quantize that count here."""

    @property
    def bits(self) -> int: ...
    @property
    def block(self) -> int | None: ...
    @property
    def symmetric(self) -> bool: ...
    @property
    def method(self) -> str: ...
    @property
    def embeddings(self) -> bool: ...
    @property
    def include(self) -> tuple[str, ...]: ...
    @property
    def exclude(self) -> tuple[str, ...]: ...


@dataclasses.dataclass(frozen=True)
class Blocked:
    """A constant as (codes - zero_point) * scale, in its own shape; one scale for `block` neighbours along `axis`.

    `block` 0: `axis` is the channel axis, and `scale` a vector. `error`: ||w - decoded|| / ||w|| of the worst output feature or row.
    """

    codes: Array
    scale: Array
    zero_point: Array | None
    axis: int
    block: int
    error: float

    @property
    def nbytes(self) -> int:
        bits = 4 if self.codes.dtype in (ml_dtypes.int4, ml_dtypes.uint4) else 8
        zeros = 0 if self.zero_point is None else self.zero_point.size * bits // 8
        return self.codes.size * bits // 8 + self.scale.nbytes + zeros


@dataclasses.dataclass(frozen=True)
class WeightMatch(Match):
    source: ir.Value
    coded: Blocked
    transposed: bool = False
    tied: str = ""

    @property
    def facts(self) -> Mapping[str, Any]:
        told: dict[str, Any] = {"name": self.nodes[0].name, "op": self.nodes[0].op_type, "weight": self.source.name}
        told |= {"shape": list(self.coded.codes.shape), "axis": self.coded.axis, "block": self.coded.block, "worst_error": round(self.coded.error, 6)}
        return {**told, "tied_to": self.tied} if self.tied else told


class WeightOnly(RewritePass[WeightMatch]):
    """Rewrites each multiply and lookup once; codes of a constant are made once and stored once, whoever reads it."""

    exact: ClassVar[bool] = False
    anchors: ClassVar[frozenset[str]] = frozenset({"MatMul", "Gemm", "Gather"})

    def __init__(self, options: Options) -> None:
        self.options = options
        self.block = options.block if options.block is not None else 32 if options.bits == 4 else 0
        self._coded: dict[tuple[ir.Value, int], Blocked] = {}

    def run(self, model: ir.Model, ctx: Context) -> int:
        if self.options.method == "gptq":
            self._solve(model, ctx)
        done = quantized_before(ctx)
        changes = super().run(model, ctx)
        if not changes:
            say_nothing_to_do(ctx, done)
        return changes

    def match(self, node: ir.Node, ctx: Context) -> WeightMatch | Miss | None:
        operand = ctx.get(StoredOperands(casts=True)).get(node)
        if operand is None:
            return None if node.op_type == "Gather" else Miss(node, f"stays float: {why_no_linear(node)}")
        if operand.quantized:
            return None
        reason = self._unfit(operand)
        if reason is not None:
            return Miss(node, f"stays float: {reason}")
        nodes, outputs = (node,), (node.outputs[0],)
        if isinstance(operand, Embedding):
            found = WeightMatch(nodes, outputs, operand.table, self._code(operand.table, 1))
        else:
            tied = tied_table(operand, ctx, self._unfit)
            if tied is not None:
                found = WeightMatch(nodes, outputs, tied.table, self._code(tied.table, 1), True, tied.node.name or "")
            else:
                found = WeightMatch(nodes, outputs, operand.weight, self._code(operand.weight, _input_axis(operand)), operand.transposed)
        size = numbers(found.source).nbytes
        if found.coded.nbytes >= size:
            return Miss(node, f"stays float: codes and scales of {found.coded.nbytes} bytes are no smaller than the weight, {size} bytes")
        return found

    def build(self, op: Builder, m: WeightMatch) -> Sequence[ir.Value]:
        node = m.nodes[0]
        weight = decoded(op, m.source, m.coded, node.graph, transposed=m.transposed and node.op_type == "MatMul")
        if node.op_type == "Gather":
            return [op.Gather(weight, node.inputs[1], axis=0)]
        if node.op_type == "Gemm":
            kept = {name: a.value for name, a in node.attributes.items() if name != "transB"}
            return [op.Gemm(node.inputs[0], weight, *node.inputs[2:], transB=int(m.transposed), **kept)]
        return [op.MatMul(node.inputs[0], weight)]

    def _code(self, value: ir.Value, axis: int) -> Blocked:
        """Codes of a constant whose `axis` runs along the input features; rounded to nearest where GPTQ has not been here."""
        if (value, axis) not in self._coded:
            rows = _rows(numbers(value), axis)
            grid = self._grid(rows, None)
            self._coded[value, axis] = self._stored(value, axis, rows, grid, grid.round(rows))
        return self._coded[value, axis]

    def _grid(self, rows: Array, importance: Array | None) -> Steps:
        return steps(rows, self.block, self.options.bits, symmetric=self.options.symmetric, importance=importance)

    def _stored(self, value: ir.Value, axis: int, rows: Array, grid: Steps, codes: Array) -> Blocked:
        """The codes of rows, in the shape of the constant."""
        assert value.const_value is not None
        shape = tuple(value.const_value.shape.numpy())
        moved = (*shape[:axis], *shape[axis + 1 :])
        kind = _TYPES[self.options.bits, self.options.symmetric]
        off = np.square(grid.decode(codes) - rows).sum(1) / np.maximum(np.square(rows, dtype=np.float64).sum(1), 1e-300)

        def back(array: Array, dtype: Any) -> Array:
            if not self.block and array.shape[1] == 1:
                return np.ascontiguousarray(array[:, 0].astype(dtype))
            return np.ascontiguousarray(np.moveaxis(array.reshape(*moved, -1), -1, axis).astype(dtype))

        stored = np.ascontiguousarray(np.moveaxis(codes.reshape(*moved, -1), -1, axis)).astype(kind)
        zero = None if self.options.symmetric else back(grid.zero, kind)
        where = axis if self.block else 1 - axis
        return Blocked(stored, back(grid.scale, np.float32), zero, where, self.block, float(np.sqrt(off.max())))

    def _solve(self, model: ir.Model, ctx: Context) -> None:
        """GPTQ for every weight of a multiply that fits; multiplies of one input share its moments."""
        groups: dict[ir.Value, dict[ir.Value, Linear]] = {}
        hidden: list[Linear] = []
        for operand in ctx.get(StoredOperands(casts=True)).values():
            if not isinstance(operand, Linear) or operand.quantized or self._unfit(operand) is not None:
                continue
            if tied_table(operand, ctx, self._unfit) is not None or self._read_as_rows(operand, ctx):
                continue  # the lookup would pay for the errors that the multiply no longer makes
            if operand.batch or operand.trans_x or not observable(model, operand.x) or static_dim(operand.x, -1) is None:
                hidden.append(operand)
                continue
            groups.setdefault(operand.x, {}).setdefault(operand.weight, operand)
        for x, moments in input_moments(model, ctx.require_samples(), list(groups)):
            inputs = Inputs.of(moments)
            for linear in groups[x].values():
                key = linear.weight, _input_axis(linear)
                if key in self._coded:
                    continue
                rows = _rows(numbers(linear.weight), key[1])
                grid = self._grid(rows, np.diag(moments))
                self._coded[key] = self._stored(*key, rows, grid, gptq(rows, inputs, grid))
        for linear in hidden:
            if (linear.weight, _input_axis(linear)) not in self._coded:
                ctx.remarks.missed(linear.node.name or "", "rounded to nearest: its input cannot be observed as rows of features")

    def _read_as_rows(self, linear: Linear, ctx: Context) -> bool:
        return any(isinstance(e, Embedding) and e.table is linear.weight for e in ctx.get(StoredOperands(casts=True)).values())

    def _unfit(self, operand: Linear | Embedding) -> str | None:
        reason = passed_over(operand.node, self.options.include, self.options.exclude)
        if reason is not None:
            return reason
        if isinstance(operand, Linear):
            if operand.batch and not self.block:
                return "it is a batch of matrices, which wants a block"
            return unfit_linear(operand, integer=False)
        if not self.options.embeddings:
            return "embeddings=false"
        if self.block and operand.width % self.block:
            return f"rows of {operand.width} numbers are no multiple of block={self.block}"
        return unfit_table(operand)


def _input_axis(linear: Linear) -> int:
    return len(linear.batch) + (1 if linear.transposed else 0)


def _rows(array: Array, axis: int) -> Array:
    """[..., in] as [rows, in], float32."""
    return np.ascontiguousarray(np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis]), dtype=np.float32)
