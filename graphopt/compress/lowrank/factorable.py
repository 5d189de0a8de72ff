"""Which stored weights may become two factors, and why the others stay whole."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import onnx_ir as ir

from graphopt.analysis.linear import Embedding, Linear, StoredOperands
from graphopt.compress.select import passed_over
from graphopt.compress.weights import not_finite, tied_table, why_no_linear
from graphopt.core.contract import Context
from graphopt.graph.questions import all_nodes, consumers, is_constant

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)


@dataclasses.dataclass(frozen=True)
class Item:
    """Weights that are cut together: one with all multiplies that read it, or several (`joint`), read once each, whose input is one value.

    Attributes:
        linears: of one weight, its readers; of a joint item, one reader of each weight.
    """

    linears: tuple[Linear, ...]
    joint: bool = False

    @property
    def name(self) -> str:
        return self.linears[0].node.name or ""

    @property
    def weights(self) -> tuple[Linear, ...]:
        """One reader of each weight."""
        return self.linears if self.joint else self.linears[:1]

    @property
    def in_features(self) -> int:
        return self.linears[0].in_features

    @property
    def out_features(self) -> int:
        """Of all its weights."""
        return sum(x.out_features for x in self.weights)

    @property
    def size(self) -> int:
        """Stored elements."""
        return math.prod(self.linears[0].batch) * self.in_features * self.out_features

    def kept(self, rank: int) -> int:
        """Stored elements of the factors."""
        return math.prod(self.linears[0].batch) * rank * (self.in_features + self.out_features)

    @property
    def largest(self) -> int:
        """The largest rank whose factors hold fewer elements than the weight: below in * out / (in + out)."""
        whole, narrow = self.in_features * self.out_features, self.in_features + self.out_features
        return (whole - 1) // narrow


Whole = dict[ir.Node, str]  # multiplies and lookups that stay as they are, and why


def items(model: ir.Model, ctx: Context, include: Sequence[str], exclude: Sequence[str]) -> tuple[list[Item], Whole]:
    """Every weight that may be cut, in graph order, and what may not."""
    operands = ctx.get(StoredOperands(casts=True))
    by_weight: dict[ir.Value, list[Linear]] = {}
    whole: Whole = {}
    for node in all_nodes(model):
        if node.domain == "" and node.op_type in ("MatMul", "Gemm"):
            operand = operands.get(node)
            if isinstance(operand, Linear):
                by_weight.setdefault(operand.weight, []).append(operand)
            else:
                whole[node] = why_no_linear(node)
    found: list[Item] = []
    for readers in by_weight.values():
        reason = next((r for x in readers if (r := _unfit(x, ctx) or passed_over(x.node, include, exclude)) is not None), None)
        reason = reason or _shared(readers)
        if reason is None:
            found.append(Item(tuple(readers)))
        else:
            whole |= {x.node: reason for x in readers}
    return found, whole


def joined(found: Sequence[Item]) -> list[Item]:
    """Items of one input as one (query, key and value; gate and up), where each weight has one reader; the others as they are."""
    groups: dict[ir.Value, list[Item]] = {}
    for item in found:
        if len(item.linears) == 1 and _plain(item.linears[0]):
            groups.setdefault(item.linears[0].x, []).append(item)
    made: list[Item] = []
    for item in found:
        group = groups.get(item.linears[0].x, []) if len(item.linears) == 1 else []
        if item not in group or len(group) < 2:
            made.append(item)
        elif item is group[0]:
            made.append(Item(tuple(x for one in group for x in one.linears), joint=True))
    return made


def table_reason(e: Embedding, ctx: Context, include: Sequence[str], exclude: Sequence[str]) -> str | None:
    """Why a table that is looked up cannot become two factors."""
    if e.quantized:
        return "its table is quantized already; put factorize before quantize"
    if e.path or e.node.outputs[0].dtype not in _FLOATS:
        return "its table is no plain float constant"
    others = [n for n in consumers(e.table) if n.op_type != "Gather"]
    if others or e.table.is_graph_output():
        return f"its table is tied: `{others[0].name if others else e.table.name}` reads it too"
    linears = (x for x in ctx.get(StoredOperands(casts=True)).values() if isinstance(x, Linear) and not x.quantized)
    tied = next((x for x in linears if tied_table(x, ctx, lambda other: None if other.table is e.table else "another") is not None), None)
    if tied is not None:
        return f"its table is tied: `{tied.node.name}` multiplies with its transpose"
    return passed_over(e.node, include, exclude) or not_finite(e.table)


def _unfit(linear: Linear, ctx: Context) -> str | None:
    if linear.quantized:
        return "its weight is quantized already; put factorize before quantize"
    kind = linear.weight.dtype
    if kind not in _FLOATS or linear.x.dtype not in _FLOATS:
        return f"its weight is {kind} and its input {linear.x.dtype}; factors are made of FLOAT, FLOAT16 and DOUBLE"
    if is_constant(linear.x):
        return "both operands are stored; canonicalize folds them"
    if min(linear.in_features, linear.out_features) < 2 or 0 in linear.batch:
        return f"[{linear.in_features},{linear.out_features}] has no smaller rank"
    tied = next((n for n in consumers(linear.weight) if n.op_type == "Gather"), None)
    if tied is None:
        table = tied_table(linear, ctx, lambda e: None)
        tied = None if table is None else table.node
    if tied is not None:
        return f"its weight is tied to the table of `{tied.name}`: factors would be stored beside the table"
    return not_finite(linear.weight)


def _shared(readers: Sequence[Linear]) -> str | None:
    """Something else needs the weight whole, so that factors would be stored beside it."""
    inside = {n for x in readers for n in (x.node, *x.path)}
    values = [readers[0].weight, *(v for x in readers for n in x.path for v in n.outputs)]
    outside = next((n for v in values for n in consumers(v) if n not in inside), None)
    if outside is not None:
        return f"`{outside.name}` reads its weight too, which would be stored twice"
    public = next((v for v in values if v.is_graph_output()), None)
    if public is not None:
        return f"its weight is the output `{public.name}` too"
    if len({(x.transposed, x.batch) for x in readers}) > 1:
        return "its weight is read as it lies and transposed"
    return None


def _plain(linear: Linear) -> bool:
    return not linear.batch and not linear.trans_x and linear.alpha == 1.0
