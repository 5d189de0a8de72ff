"""The sums that feed normalizations: a residual block has no standard operator, so that a target spells residual + norm from these facts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import onnx_ir as ir

from graphopt.core import Analysis, Context
from graphopt.graph import all_nodes, is_constant, producer, rank, same_dim, same_shape, used_once

_NORMS = ("LayerNormalization", "RMSNormalization")


@dataclasses.dataclass(frozen=True)
class Term:
    """One summand.

    Attributes:
        bias: a constant vector over the last axis.
        same_shape: proved to have the shape of the sum; if not, it broadcasts.
        skippable: of the shape [B, S, H], [1, S, H] or [S, H] of a sum [B, S, H]: what the kernels that add a residual take.
    """

    value: ir.Value
    bias: bool
    same_shape: bool
    skippable: bool


@dataclasses.dataclass(frozen=True)
class Residual:
    """`norm` normalizes `total`, the sum of `terms` (in the order in which the Adds read them).

    Attributes:
        adds: the Add or Sum nodes; the last makes `total`. Only the last may have other readers.
        shared: the sum itself is read elsewhere too, or is public (pre-norm models carry it on).
    """

    norm: ir.Node
    total: ir.Value
    terms: tuple[Term, ...]
    adds: tuple[ir.Node, ...]
    shared: bool


@dataclasses.dataclass(frozen=True)
class Residuals(Analysis[tuple[Residual, ...]]):
    """Every LayerNormalization and RMSNormalization that reads a sum, in graph order."""

    def compute(self, model: ir.Model, ctx: Context) -> tuple[Residual, ...]:
        found = (_residual(node) for node in all_nodes(model) if node.op_type in _NORMS and node.domain == "")
        return tuple(r for r in found if r is not None)


def _residual(norm: ir.Node) -> Residual | None:
    total = norm.inputs[0]
    last = producer(total, "Add", "Sum")
    if total is None or last is None or last.graph is not norm.graph:
        return None
    adds: list[ir.Node] = []
    terms = tuple(_term(v, total) for v in _flatten(last, total, adds))
    return Residual(norm, total, terms, tuple(adds), not used_once(total))


def _flatten(node: ir.Node, total: ir.Value, adds: list[ir.Node]) -> Iterator[ir.Value]:
    """The summands of nested sums. An inner sum is opened if nothing else reads it and it has the shape of the whole."""
    for value in node.inputs:
        if value is None:
            continue
        inner = producer(value, "Add", "Sum")
        if inner is not None and inner.graph is node.graph and used_once(value) and same_shape(value, total):
            yield from _flatten(inner, total, adds)
        else:
            yield value
    adds.append(node)


def _term(value: ir.Value, total: ir.Value) -> Term:
    bias = (
        is_constant(value) and rank(value) == 1 and total.shape is not None and value.shape is not None and same_dim(value.shape[0], total.shape[-1])
    )
    return Term(value, bias, same_shape(value, total), _skippable(value, total))


def _skippable(value: ir.Value, total: ir.Value) -> bool:
    if value.shape is None or total.shape is None or len(total.shape) != 3 or len(value.shape) not in (2, 3):
        return False
    if not all(same_dim(a, b) for a, b in zip(value.shape[-2:], total.shape[-2:], strict=True)):
        return False
    return len(value.shape) == 2 or value.shape[0] == 1 or same_dim(value.shape[0], total.shape[0])
