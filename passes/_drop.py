"""Takes blocks out of the residual stream: what read the stream behind a block reads the stream before it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.stream import Branch, StreamLayer, StreamStep
from graphopt.core.contract import Array, Context
from graphopt.graph.questions import all_nodes, consumers
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.match import Match, Miss
from graphopt.rewrite.rules import RewritePass

KINDS = {"layer": ("attention", "cross", "ffn"), "attention": ("attention", "cross"), "ffn": ("ffn",)}


@dataclasses.dataclass(frozen=True)
class StreamUnit:
    """What is dropped together: the branches of some kinds in one layer. `cuts`: (step, the branches of it that go)."""

    number: int
    stream: int
    cuts: tuple[tuple[StreamStep, tuple[Branch, ...]], ...]

    @property
    def before(self) -> ir.Value:
        return self.cuts[0][0].before

    @property
    def after(self) -> ir.Value:
        return self.cuts[-1][0].after

    @property
    def whole(self) -> bool:
        """Its steps go, with all their branches."""
        return all(len(gone) == len(step.branches) for step, gone in self.cuts)


def units(layers: Sequence[StreamLayer], what: str) -> tuple[list[StreamUnit], list[tuple[int, str]]]:
    """One for each layer that has such branches, and why it cannot be dropped where it cannot."""
    found: list[StreamUnit] = []
    refused: list[tuple[int, str]] = []
    for number, layer in enumerate(layers):
        parts = [(step, tuple(b for b in step.branches if b.kind in KINDS[what])) for step in layer.steps]
        unit = StreamUnit(number, layer.stream, tuple((step, gone) for step, gone in parts if gone))
        if not unit.cuts:
            refused.append((number, f"it has no {what} of its own in the residual stream"))
        elif not unit.whole and len(unit.cuts) > 1:
            refused.append((number, "its branches are added in parallel and one after the other"))
        elif not unit.whole and (unit.cuts[0][0].norm is not None or unit.cuts[0][0].constants):
            refused.append((number, "the sum that its branches share has a norm or a stored summand, which belongs to neither of them for sure"))
        else:
            found.append(unit)
    return found, refused


def inside(unit: StreamUnit) -> set[ir.Node]:
    """The nodes that its branches are computed by, from the stream on."""
    below, todo = set[ir.Node](), [unit.before]
    while todo:
        for node in consumers(todo.pop()):
            if node not in below and not any(v is unit.after for v in node.outputs):
                below.add(node)
                todo += node.outputs
    found: set[ir.Node] = set()
    todo = [b.value for _, gone in unit.cuts for b in gone]
    while todo:
        made = todo.pop().producer()
        if made is not None and made in below and made not in found:
            found.add(made)
            todo += [v for v in made.inputs if v is not None]
    return found


@dataclasses.dataclass(frozen=True)
class DropMatch(Match):
    before: ir.Value
    kept: tuple[ir.Value, ...]
    told: Mapping[str, Any]

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.told


class DropSteps(RewritePass[DropMatch]):
    """Not in the registry: `drop-layers` decides which, this takes them out."""

    exact: ClassVar[bool] = False
    anchors: ClassVar[frozenset[str]] = frozenset({"Add", "Sum", "LayerNormalization", "RMSNormalization"})

    def __init__(self, chosen: Mapping[StreamUnit, Mapping[str, Any]]) -> None:
        self.found: dict[ir.Node, DropMatch] = {}
        for unit, told in chosen.items():
            for step, gone in unit.cuts:
                nodes = (*step.adds, *(() if step.norm is None else (step.norm,)))
                kept = tuple(b.value for b in step.branches if b not in gone)
                kinds = "+".join(b.kind for b in gone)
                self.found[nodes[-1]] = DropMatch(nodes, (step.after,), step.before, kept, {**told, "block": kinds})

    def match(self, node: ir.Node, ctx: Context) -> DropMatch | Miss | None:
        return self.found.get(node)

    def build(self, op: Builder, m: DropMatch) -> Sequence[ir.Value]:
        total = m.before
        for value in m.kept:
            total = op.Add(total, value)
        return [total]


def left_over(model: ir.Model, nodes: set[ir.Node]) -> list[str]:
    """Outputs of the model (such as the cache of a dropped layer) for which multiplies of a dropped block are still computed."""
    still = nodes.intersection(all_nodes(model))
    if not any(n.op_type in ("MatMul", "Gemm", "Attention") for n in still):
        return []
    reached: set[ir.Node] = set()
    names: list[str] = []
    todo = [v for n in still if n.op_type in ("MatMul", "Gemm", "Attention") for v in n.outputs]
    while todo:
        value = todo.pop()
        if value.is_graph_output():
            names.append(str(value.name))
        for node in consumers(value):
            if node not in reached:
                reached.add(node)
                todo += node.outputs
    return sorted(dict.fromkeys(names))


def cosines(a: Array, b: Array) -> tuple[float, int]:
    """The sum over rows of the cosine of two [.., H], and the number of rows that are not zero."""
    x, y = (v.reshape(-1, v.shape[-1]).astype(np.float64) for v in (a, b))
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    kept = norms > 0
    return float(((x * y).sum(1)[kept] / norms[kept]).sum()), int(kept.sum())
