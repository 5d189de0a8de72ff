"""Einsum of two operands as Transpose and MatMul."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.graph.questions import attr, rank, same_dim
from graphopt.rewrite.builder import Builder

from ._algebra import Rewritten


def einsum(node: ir.Node, op: Builder) -> Rewritten:
    """One contracted index, and one index of its own for each operand; any others are a batch that both have: a batched matrix product.

    An index that stands twice in an operand, an ellipsis, and a sum over an index of one operand alone are left to Einsum; so is an index whose
    sizes in the two operands are not proved equal: Einsum broadcasts a 1, a matrix product does not sum over it.
    """
    if len(node.inputs) != 2 or any(v is None for v in node.inputs):
        return None
    parts = _parse(str(attr(node, "equation", "")).replace(" ", ""))
    if parts is None:
        return None
    left, right, out = parts
    if (rank(node.inputs[0]), rank(node.inputs[1])) != (len(left), len(right)):
        return None
    batch = [i for i in out if i in left and i in right]
    contracted = [i for i in left if i in right and i not in out]
    rows, columns = ([i for i in own if i not in other] for own, other in ((left, right), (right, left)))
    if len(contracted) != 1 or len(rows) != 1 or len(columns) != 1 or len(out) != len(batch) + 2:
        return None
    if not all(_agree(node, left.index(i), right.index(i)) for i in (*batch, *contracted)):
        return None
    a = _transposed(op, node.inputs[0], left, [*batch, *rows, *contracted])
    b = _transposed(op, node.inputs[1], right, [*batch, *contracted, *columns])
    return _transposed(op, op.MatMul(a, b), [*batch, *rows, *columns], out)


def _agree(node: ir.Node, left: int, right: int) -> bool:
    a, b = node.inputs[0], node.inputs[1]
    return a is not None and b is not None and a.shape is not None and b.shape is not None and same_dim(a.shape[left], b.shape[right])


def _parse(equation: str) -> tuple[list[str], list[str], list[str]] | None:
    operands, arrow, out = equation.partition("->")
    left, _, right = operands.partition(",")
    if not arrow or not all(part.isalpha() and len(set(part)) == len(part) for part in (left, right, out)):
        return None
    if set(out) - set(left + right) or "," in right:
        return None
    return list(left), list(right), list(out)


def _transposed(op: Builder, value: ir.Value | None, have: list[str], want: list[str]) -> ir.Value:
    assert value is not None
    if have == want:
        return value
    return op.Transpose(value, perm=[have.index(i) for i in want])
