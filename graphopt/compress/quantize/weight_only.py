"""quantize{mode=weight-only}: stored weights as blocks of 4 or 8 bits, or as codes of a codebook, between float activations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import onnx_ir as ir

from graphopt.analysis.linear import Embedding, Linear, StoredOperands
from graphopt.calibration.moments import input_moments
from graphopt.compress.quantize.awq import scale_inputs
from graphopt.compress.quantize.codebooks import Lookup, kmeans, nf4
from graphopt.compress.quantize.eligible import quantized_before, say_nothing_to_do, unfit_linear, unfit_table
from graphopt.compress.quantize.forms import Form, blocked, tabled
from graphopt.compress.quantize.gptq import Inputs, gptq
from graphopt.compress.quantize.grids import Steps, steps
from graphopt.compress.select import passed_over
from graphopt.compress.weights import numbers, tied_table, why_no_linear
from graphopt.core.contract import Array, Context
from graphopt.graph.questions import static_dim
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.match import Match, Miss
from graphopt.rewrite.rules import RewritePass
from graphopt.run.observe import observable

_BLOCK = {("linear", 4): 32, ("nf4", 4): 32}  # where none is given; else 0


class Options(Protocol):
    """The options of quantize that count here."""

    @property
    def bits(self) -> int: ...
    @property
    def block(self) -> int | None: ...
    @property
    def codes(self) -> str: ...
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
class WeightMatch(Match):
    """`source`: the float constant, its input features along `axis`, and what stands for it."""

    source: ir.Value
    axis: int
    coded: Form
    transposed: bool = False
    tied: str = ""

    @property
    def facts(self) -> Mapping[str, Any]:
        told: dict[str, Any] = {"name": self.nodes[0].name, "op": self.nodes[0].op_type, "weight": self.source.name}
        told |= {"shape": list(self.coded.codes.shape), **self.coded.facts, "worst_error": round(self.coded.error, 6)}
        return {**told, "tied_to": self.tied} if self.tied else told


class WeightOnly(RewritePass[WeightMatch]):
    """Rewrites each multiply and lookup once; codes of a constant are made once and stored once, whoever reads it."""

    exact: ClassVar[bool] = False
    anchors: ClassVar[frozenset[str]] = frozenset({"MatMul", "Gemm", "Gather"})

    def __init__(self, options: Options) -> None:
        self.options = options
        self.block = _BLOCK.get((options.codes, options.bits), 0) if options.block is None else options.block
        self._coded: dict[tuple[ir.Value, int], Form] = {}

    def run(self, model: ir.Model, ctx: Context) -> int:
        scaled = 0
        if "awq" in self.options.method:
            scaled = scale_inputs(model, ctx, lambda x: not x.quantized and self._unfit(x) is None and self._own(x, ctx), self._rounded)
        if self.options.method != "nearest" or (self.options.codes == "kmeans" and ctx.samples is not None):
            self._look(model, ctx)
        done = quantized_before(ctx)
        changes = scaled + super().run(model, ctx)
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
        found = self._found(operand, ctx)
        size = numbers(found.source).nbytes
        if found.coded.nbytes >= size:
            return Miss(node, f"stays float: codes and scales of {found.coded.nbytes} bytes are no smaller than the weight, {size} bytes")
        return found

    def build(self, op: Builder, m: WeightMatch) -> Sequence[ir.Value]:
        node = m.nodes[0]
        weight = m.coded.decoded(op, m.source, m.axis, node.graph)
        if node.op_type == "Gather":
            return [op.Gather(weight, node.inputs[1], axis=0)]
        if node.op_type == "Gemm":
            kept = {name: a.value for name, a in node.attributes.items() if name != "transB"}
            return [op.Gemm(node.inputs[0], weight, *node.inputs[2:], transB=int(m.transposed), **kept)]
        if m.transposed:
            rank, source = m.coded.codes.ndim, weight
            order = [*range(rank - 2), rank - 1, rank - 2]
            weight = op.shared(("transposed", m.source, m.axis, node.graph), lambda: op.Transpose(source, perm=order))
        return [op.MatMul(node.inputs[0], weight)]

    def _found(self, operand: Linear | Embedding, ctx: Context) -> WeightMatch:
        nodes, outputs = (operand.node,), (operand.node.outputs[0],)
        if isinstance(operand, Embedding):
            return WeightMatch(nodes, outputs, operand.table, 1, self._code(operand.table, 1))
        tied = tied_table(operand, ctx, self._unfit)
        if tied is not None:
            return WeightMatch(nodes, outputs, tied.table, 1, self._code(tied.table, 1), True, tied.node.name or "")
        axis = _input_axis(operand)
        return WeightMatch(nodes, outputs, operand.weight, axis, self._code(operand.weight, axis), operand.transposed)

    def _code(self, value: ir.Value, axis: int) -> Form:
        """Codes of a constant whose `axis` runs along the input features; without a look at its inputs where there was none."""
        if (value, axis) not in self._coded:
            rows = _rows(numbers(value), axis)
            grid = self._grid(rows, None)
            self._coded[value, axis] = _form(value, axis, rows, grid, grid.round(rows))
        return self._coded[value, axis]

    def _rounded(self, rows: Array, moments: Array) -> Array:
        grid = self._grid(rows, moments)
        return grid.decode(grid.round(rows))

    def _grid(self, rows: Array, moments: Array | None) -> Steps | Lookup:
        importance = None if moments is None else np.diag(moments)
        if self.options.codes == "nf4":
            return nf4(rows, self.block)
        if self.options.codes == "kmeans":
            return kmeans(rows, 1 << self.options.bits, self.block, importance)
        return steps(
            rows,
            self.block,
            self.options.bits,
            symmetric=self.options.symmetric,
            importance=importance,
            moments=moments if self.options.method == "awq" else None,
        )

    def _look(self, model: ir.Model, ctx: Context) -> None:
        """Codes for every weight of a multiply that fits, by the second moments of its inputs; multiplies of one input share them."""
        groups: dict[ir.Value, dict[ir.Value, Linear]] = {}
        hidden: list[Linear] = []
        for operand in ctx.get(StoredOperands(casts=True)).values():
            if not isinstance(operand, Linear) or operand.quantized or self._unfit(operand) is not None:
                continue
            if not self._own(operand, ctx):
                continue  # the lookup would pay for the errors that the multiply no longer makes
            if operand.batch or operand.trans_x or not observable(model, operand.x) or static_dim(operand.x, -1) is None:
                hidden.append(operand)
                continue
            groups.setdefault(operand.x, {}).setdefault(operand.weight, operand)
        for x, moments in input_moments(ctx, list(groups)):
            inputs = Inputs.of(moments) if "gptq" in self.options.method else None
            for linear in groups[x].values():
                key = linear.weight, _input_axis(linear)
                if key in self._coded:
                    continue
                rows = _rows(numbers(linear.weight), key[1])
                grid = self._grid(rows, moments)
                self._coded[key] = _form(*key, rows, grid, grid.round(rows) if inputs is None else gptq(rows, inputs, grid))
        for linear in hidden:
            if (linear.weight, _input_axis(linear)) not in self._coded:
                ctx.remarks.missed(linear.node.name or "", "rounded to nearest: its input cannot be observed as rows of features")

    def _own(self, linear: Linear, ctx: Context) -> bool:
        """No lookup reads the same numbers."""
        return tied_table(linear, ctx, self._unfit) is None and not any(
            isinstance(e, Embedding) and e.table is linear.weight for e in ctx.get(StoredOperands(casts=True)).values()
        )

    def _unfit(self, operand: Linear | Embedding) -> str | None:
        reason = passed_over(operand.node, self.options.include, self.options.exclude)
        if reason is not None:
            return reason
        if isinstance(operand, Linear):
            if self.options.codes == "linear":
                return "it is a batch of matrices, which wants a block" if operand.batch and not self.block else unfit_linear(operand, integer=False)
            if self.block and operand.in_features % self.block:
                return f"its {operand.in_features} input features are no multiple of block={self.block}"
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


def _form(value: ir.Value, axis: int, rows: Array, grid: Steps | Lookup, codes: Array) -> Form:
    assert value.const_value is not None
    shape = tuple(value.const_value.shape.numpy())
    return blocked(shape, axis, rows, grid, codes) if isinstance(grid, Steps) else tabled(shape, axis, rows, grid, codes)
