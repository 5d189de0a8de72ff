"""Which stored weights may be quantized, and why the others stay float; what the passes share that quantize."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analysis.linear import Embedding, Linear, StoredOperands
from graphopt.core import Array, Context
from graphopt.errors import PipelineError
from graphopt.graph import all_nodes, constant, consumers, is_constant
from graphopt.options import near
from graphopt.rewrite import ORIGINS

LONGEST_SUM = 2**31 // (255 * 128)  # products of 8-bit numbers that a 32-bit sum is sure to hold
_WORTH = 4096  # bytes; a table that saves less is not worth the nodes that decode it


def passed_over(node: ir.Node, include: Sequence[str], exclude: Sequence[str]) -> str | None:
    """Why `include` and `exclude` leave this node out, by its name here or in the input model."""
    names = {node.name or "", *node.meta.get(ORIGINS, ())}
    if include and not any(fits(n, include) for n in names):
        return f"not among include={'+'.join(include)}"
    return f"excluded by exclude={'+'.join(exclude)}" if any(fits(n, exclude) for n in names) else None


def tied_table(linear: Linear, ctx: Context, unfit: Callable[[Embedding], str | None]) -> Embedding | None:
    """An embedding that will be quantized (`unfit` gives no reason) and whose table is the transpose of this weight, as another constant."""
    if linear.transposed or linear.batch:
        return None
    tables = (e for e in ctx.get(StoredOperands(casts=True)).values() if isinstance(e, Embedding) and not e.quantized)
    fitting = (e for e in tables if (e.rows, e.width) == (linear.out_features, linear.in_features) and unfit(e) is None)
    return next((e for e in fitting if np.array_equal(numbers(e.table).T, numbers(linear.weight))), None)


def quantized_before(ctx: Context) -> int:
    """How many stored operands are integers already."""
    return sum(x.quantized for x in ctx.get(StoredOperands(casts=True)).values())


def say_nothing_to_do(ctx: Context, before: int) -> None:
    """The remark of a pass that changed nothing; `before`: what `quantized_before` counted."""
    why = f"{before} weights are quantized already" if before else "no MatMul, Gemm or Gather reads a stored weight that fits"
    ctx.remarks.missed("", f"nothing to quantize: {why}")


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


def not_finite(value: ir.Value) -> str | None:
    return None if np.isfinite(numbers(value)).all() else f"`{value.name}` holds numbers that are not finite"


def numbers(value: ir.Value) -> Array:
    array = constant(value)
    assert array is not None, f"`{value.name}` is not a constant"
    return array


def why_no_linear(node: ir.Node) -> str:
    left, right = node.inputs[0], node.inputs[1]
    if right is not None and right.const_value is not None:
        return "a caller may override its weight" if right.is_graph_input() else "its weight is a vector"
    if is_constant(left):
        return "its stored operand stands on the left"
    return "both operands are computed at run time"


def fits(name: str, patterns: Iterable[str]) -> bool:
    return any(name == p or fnmatch.fnmatchcase(name, p) for p in patterns)


def check_patterns(model: ir.Model, patterns: Sequence[str], anchors: Iterable[str]) -> None:
    """Raises PipelineError for a pattern that fits the name of no node of these types, here or in the input model."""
    if not patterns:
        return
    nodes = [n for n in all_nodes(model) if n.op_type in anchors]
    names = {name for n in nodes for name in ((n.name or ""), *n.meta.get(ORIGINS, ()))}
    for pattern in patterns:
        if not any(fits(name, (pattern,)) for name in names):
            raise PipelineError(f"`{pattern}` fits the name of no MatMul, Gemm or Gather{near(pattern, names)}")
