"""Stored weights become codes: what the halves of quantize share, with integer products and with float ones."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import onnx_ir as ir

from graphopt.analysis.linear import Embedding, Linear, StoredOperands
from graphopt.compress.quantize.activation_grid import ActivationGrid
from graphopt.compress.quantize.forms import Form
from graphopt.compress.select import passed_over
from graphopt.compress.weights import not_finite, numbers, tied_table, why_no_linear
from graphopt.core.contract import Context
from graphopt.graph.questions import attr, consumers, is_constant
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.match import Match, Miss
from graphopt.rewrite.rules import RewritePass

LONGEST_SUM = 2**31 // (255 * 128)  # products of 8-bit numbers that a 32-bit sum is sure to hold
_WORTH = 4096  # bytes; a table that saves less is not worth the nodes that decode it


@dataclasses.dataclass(frozen=True)
class QuantizeMatch(Match):
    """`source`: the stored float constant, `coded`: what replaces it (None: it is decoded from integers already, and only the activation
    is quantized); `transposed`: the multiply wants its last two axes exchanged; `activation`: the fixed grid of its input, if it has one;
    `rows`: each row of its input has a scale of its own."""

    source: ir.Value
    coded: Form | None
    transposed: bool = False
    tied: str = ""
    activation: ActivationGrid | None = None
    rows: bool = False

    @property
    def facts(self) -> Mapping[str, Any]:
        told: dict[str, Any] = {"name": self.nodes[0].name, "op": self.nodes[0].op_type, "weight": self.source.name}
        if self.activation is not None:
            told |= {"covers": [self.activation.low, self.activation.high], "seen": list(self.activation.seen)}
        if self.rows:
            told["rows"] = True
        if self.coded is not None:
            told |= {"shape": list(self.coded.codes.shape), **self.coded.facts}
        return {**told, "tied_to": self.tied} if self.tied and self.coded is not None else told


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizeStored(RewritePass[QuantizeMatch]):
    """Not in the registry: quantize runs a half of it; the fields are those of its options that count there. Each multiply and lookup is rewritten
    once; codes of a constant are stored once, whoever reads it."""

    symmetric: bool
    embeddings: bool
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    exact: ClassVar[bool] = False
    anchors: ClassVar[frozenset[str]] = frozenset({"MatMul", "Gemm", "Gather", "Einsum"})

    @classmethod
    def of(cls, options: object, **others: Any) -> Self:
        """With the options of quantize, and what it makes of `others`."""
        return cls(**{f.name: getattr(options, f.name) for f in dataclasses.fields(cls) if f.init and f.name not in others}, **others)

    @abstractmethod
    def code(self, operand: Linear | Embedding, source: ir.Value, ctx: Context) -> Form:
        """Codes of the constant that `operand` reads, or, if that is another than its own, of the table that it is tied to."""

    def match(self, node: ir.Node, ctx: Context) -> QuantizeMatch | Miss | None:
        operand = ctx.get(StoredOperands(casts=True)).get(node)
        if operand is None and node.op_type in ("Gather", "Einsum"):
            stored = node.op_type == "Einsum" and any(map(is_constant, node.inputs))
            return Miss(node, "stays float: it is an Einsum; canonicalize makes a product of it, or says why not") if stored else None
        if operand is None:
            return Miss(node, f"stays float: {why_no_linear(node)}")
        if operand.quantized:
            return self.match_decoded(operand)
        reason = self.unfit(operand)
        if reason is not None:
            return Miss(node, f"stays float: {reason}")
        tied = tied_table(operand, ctx, self.unfit) if isinstance(operand, Linear) else None
        source = operand.table if isinstance(operand, Embedding) else operand.weight if tied is None else tied.table
        coded, size = self.code(operand, source, ctx), numbers(source).nbytes
        if coded.nbytes >= size:
            return Miss(node, f"stays float: codes and scales of {coded.nbytes} bytes are no smaller than the weight, {size} bytes")
        transposed = isinstance(operand, Linear) and (tied is not None or operand.transposed)
        return QuantizeMatch((node,), (node.outputs[0],), source, coded, transposed, "" if tied is None else tied.node.name or "")

    def match_decoded(self, operand: Linear | Embedding) -> QuantizeMatch | Miss | None:
        """One whose constant is stored as integers."""
        return None

    def build(self, op: Builder, m: QuantizeMatch) -> Sequence[ir.Value]:
        node = m.nodes[0]
        across = m.transposed and node.op_type == "MatMul"
        weight = node.inputs[1] if m.coded is None else m.coded.decoded(op, m.source, node.graph, transposed=across)
        assert weight is not None
        return [op.Gather(weight, node.inputs[1], axis=0) if node.op_type == "Gather" else self.multiply(op, m, weight)]

    def multiply(self, op: Builder, m: QuantizeMatch, weight: ir.Value) -> ir.Value:
        return product(op, m, m.nodes[0].inputs[0], weight)

    def unfit(self, operand: Linear | Embedding) -> str | None:
        """Why this operand must stay float."""
        reason = passed_over(operand.node, self.include, self.exclude)
        if reason is not None:
            return reason
        if isinstance(operand, Linear):
            return self.unfit_linear(operand)
        return self.unfit_table(operand) if self.embeddings else "embeddings=false"

    def unfit_linear(self, linear: Linear) -> str | None:
        return unfit_linear(linear)

    def unfit_table(self, e: Embedding) -> str | None:
        return unfit_table(e)


def product(op: Builder, m: QuantizeMatch, x: ir.Value | None, weight: ir.Value, *, added: bool = True) -> ir.Value:
    """x times the weight, as the node had it; a Gemm without its third input where that is not to be `added`."""
    node = m.nodes[0]
    if node.op_type == "MatMul":
        return op.MatMul(x, weight)
    kept = {name: a.value for name, a in node.attributes.items() if name != "transB" and (added or name != "beta")}
    across = attr(node, "transB", 0) if m.coded is None else int(m.transposed)
    return op.Gemm(x, weight, *(node.inputs[2:] if added else ()), transB=across, **kept)  # type: ignore[no-any-return]


def unfit_linear(linear: Linear, *, integer: bool = True) -> str | None:
    """`integer`: the products are added as 32-bit integers."""
    weight = linear.weight
    assert weight.const_value is not None
    if linear.x.dtype != ir.DataType.FLOAT:
        return f"its input is {linear.x.dtype}, not FLOAT"
    if is_constant(linear.x):
        return "both operands are stored; canonicalize folds them"
    if weight.const_value.size == 0:
        return f"the weight {list(weight.const_value.shape)} is empty"
    if integer and linear.in_features > LONGEST_SUM:
        return f"a sum over {linear.in_features} products of 8-bit numbers may leave 32 bits; the limit is {LONGEST_SUM}"
    return not_finite(weight)


def unfit_table(e: Embedding) -> str | None:
    if e.node.outputs[0].dtype != ir.DataType.FLOAT:
        return f"its rows are {e.node.outputs[0].dtype}, not FLOAT"
    saved = 4 * e.rows * e.width - e.rows * (e.width + 4)
    if saved < _WORTH:
        return f"the table [{e.rows},{e.width}] would shrink by {max(saved, 0)} bytes only"
    floats = [n.name for n in consumers(e.table) if n.op_type not in ("Gather", "MatMul", "Gemm", "Transpose", "Identity", "Cast")]
    if floats:
        return f"`{floats[0]}` reads the float table too, which would be stored twice"
    return not_finite(e.table)
