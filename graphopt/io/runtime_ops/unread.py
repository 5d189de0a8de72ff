"""What readers of a runtime's operators share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from graphopt.graph.questions import is_read
from graphopt.rewrite.builder import Builder

Reader = Callable[[ir.Node, Builder], Sequence[ir.Value]]  # what stands for the outputs, in order; those behind are not made


class Unread(Exception):
    """Why a node has no exact form in standard operators, or none that is known here."""


def inputs(node: ir.Node, count: int) -> list[ir.Value | None]:
    """The first `count` inputs; what is left out is None."""
    return [*node.inputs, *[None] * count][:count]


def present(value: ir.Value | None, what: str) -> ir.Value:
    """Raises Unread if it is left out."""
    if value is None:
        raise Unread(f"it has no {what}")
    return value


def refuse(node: ir.Node, *, given: dict[str, ir.Value | None] | None = None, outputs: dict[int, str] | None = None) -> None:
    """Raises Unread for an input that is there, or an output that is read."""
    for name, value in (given or {}).items():
        if value is not None:
            raise Unread(f"it has the input {name}")
    for index, name in (outputs or {}).items():
        if index < len(node.outputs) and is_read(node.outputs[index]):
            raise Unread(f"its output {name} is read")
