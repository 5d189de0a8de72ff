"""A graph made ready to run: a list of (function, places it reads, places it writes, places nobody reads any more)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch

from graphopt.core.errors import GraphoptError, TargetError
from graphopt.graph.questions import bodies
from graphopt.run import one_line
from graphopt.run.torch.ops import attention, control, gather, index, math, norm, quantized, resize, window
from graphopt.run.torch.table import Function, function_of

_FILL = (attention, control, gather, index, math, norm, quantized, resize, window)  # the table
Hooks = Mapping[int, Callable[[Any], Any]]  # place -> what replaces the value as soon as it is there
_NONE = 0  # the place of an input that a node leaves out


class Program:
    """One graph. A value that it reads and does not make is `captured`: a weight, or a value of an outer graph."""

    def __init__(self, graph: ir.Graph, opsets: Mapping[str, int], extra: Mapping[tuple[str, str], Function], dtype: torch.dtype) -> None:
        self.captured: list[ir.Value] = []
        self._places: dict[ir.Value, int] = {}
        self._opsets, self._extra, self._dtype = opsets, extra, dtype
        self.input_places = [self._new(v) for v in graph.inputs]
        prepared = [self._prepare(node) for node in graph]
        self.output_places = [self._read(v) for v in graph.outputs]
        self.captured_places = [self._places[v] for v in self.captured]
        self.size = len(self._places) + 1
        self.steps = _with_ends(prepared, {*self.output_places, _NONE})
        self._labels = [f"`{node.name}` ({node.op_type})" for node in graph]
        self.place = {str(v.name): p for v, p in self._places.items()}
        del self._places, self._opsets, self._extra  # a program holds no part of the graph, so that it can be copied

    def _new(self, value: ir.Value) -> int:
        return self._places.setdefault(value, len(self._places) + 1)

    def _read(self, value: ir.Value | None) -> int:
        if value is None:
            return _NONE
        if value not in self._places:
            self.captured.append(value)
        return self._new(value)

    def _prepare(self, node: ir.Node) -> tuple[Function, list[int], list[int]]:
        version = node.version or self._opsets.get(node.domain, self._opsets.get("ai.onnx") if not node.domain else None)
        function = function_of(node, version, self._extra, self._dtype)
        reads = [self._read(v) for v in node.inputs]
        if bodies(node):
            held = [a for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
            inner = {a.name: Program(a.as_graph(), self._opsets, self._extra, self._dtype) for a in held}
            function = _Control(function, len(reads), inner)
            reads += [self._read(v) for program in inner.values() for v in program.captured]
        return function, reads, [self._new(v) for v in node.outputs]

    def run(self, frame: list[Any], hooks: Hooks) -> None:
        """Compute every value into its place of `frame`, which holds the inputs and what is captured.

        Raises:
            TargetError: a node failed; one line that names it.
        """
        index = 0
        try:
            for index, (function, reads, writes, ends) in enumerate(self.steps):  # noqa: B007  the index tells which node failed
                result = function(*[frame[i] for i in reads])
                if type(result) is tuple:
                    for place, value in zip(writes, result, strict=False):
                        frame[place] = value
                else:
                    frame[writes[0]] = result
                if hooks:
                    for place in writes:
                        if place in hooks:
                            frame[place] = hooks[place](frame[place])
                for place in ends:
                    frame[place] = None
        except GraphoptError:
            raise
        except Exception as error:
            raise TargetError(f"the torch executor failed at node {self._labels[index]}: {one_line(error)}") from error

    def call(self, captured: Sequence[Any], *inputs: Any) -> list[Any]:
        """The outputs of a subgraph."""
        frame: list[Any] = [None] * self.size
        for place, value in zip(self.input_places, inputs, strict=True):
            frame[place] = value
        for place, value in zip(self.captured_places, captured, strict=True):
            frame[place] = value
        self.run(frame, {})
        return [frame[place] for place in self.output_places]


class _Control:
    """A node with subgraphs: behind its own inputs come the values that the subgraphs read from outside."""

    def __init__(self, function: Function, count: int, inner: Mapping[str, Program]) -> None:
        self.function, self.count, self.inner = function, count, inner

    def __call__(self, *values: Any) -> Any:
        start, ready = self.count, {}
        for name, program in self.inner.items():
            end = start + len(program.captured_places)
            ready[name] = functools.partial(program.call, values[start:end])
            start = end
        return self.function(*values[: self.count], **ready)


def _with_ends(prepared: Sequence[tuple[Function, list[int], list[int]]], kept: set[int]) -> list[tuple[Function, list[int], list[int], list[int]]]:
    """Add to each step the places that are read or written there for the last time: their memory is free then, unless a gradient needs it."""
    seen, steps = set(kept), []
    for function, reads, writes in reversed(prepared):
        ends = [place for place in dict.fromkeys((*reads, *writes)) if place not in seen]
        seen.update(ends)
        steps.append((function, reads, writes, ends))
    return steps[::-1]
