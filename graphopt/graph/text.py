"""A graph as text for people and for tests: one node per line, weights as dtype, shape and hash.

graph (%x: f32[batch,seq,4]) -> (%y: f32[batch,seq,4]) {
  %w = f32[4,4] #1f2e3d4c
  %shape = i64[2] {0, -1}
  %h: f32[batch,seq,4] = MatMul(%x, %w)
  %y: f32[batch,seq,4] = Add(%h, %x)
}
"""

from __future__ import annotations

import difflib
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import onnx_ir as ir

from graphopt.graph.dims import is_opaque
from graphopt.graph.questions import consumers, is_graph, makers, subgraphs

_SPELLED = 8  # elements of a weight that are printed instead of hashed
_INDENT = "  "


def graph_text(model: ir.Model, *, canonical: bool = False, weights: bool = True) -> str:
    """The whole graph.

    Args:
        canonical: number values and weights in the order of a walk from the outputs, so that neither the names inside the graph nor the
            order of independent nodes matter, nor an attribute that spells its default, nor a dimension that inference only made up.
            The names of inputs and outputs belong to the interface and stay.
        weights: False prints only dtype and shape of each weight.
    """
    printer = _Canonical(model, weights) if canonical else _Printer(weights)
    return "\n".join(printer.graph(model.graph, "graph", "")) + "\n"


def node_text(node: ir.Node) -> str:
    """One node on one line; a subgraph is printed as its number of nodes."""
    return _Printer(weights=False).line(node)


def value_text(value: ir.Value) -> str:
    """`%name: f32[batch,seq]`."""
    return _Printer(weights=False).typed(value)


def diff(before: str, after: str, *, context: int = 2) -> str:
    """What changed between two graph texts, as a unified diff without file names; empty if nothing did."""
    lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=context))
    return "\n".join(lines[2:]) + "\n" if lines else ""


def neighbourhood(culprit: ir.Node | ir.Value) -> str:
    """A node (or value) with the nodes that feed it and the nodes that read it, one a line; `>` marks the culprit."""
    if isinstance(culprit, ir.Value):
        made = culprit.producer()
        feeding = [] if made is None else [node_text(made)]
        return _marked(feeding, value_text(culprit), [node_text(n) for n in consumers(culprit)])
    feeding = [_source(v) for v in dict.fromkeys(culprit.inputs) if v is not None]
    reading = [node_text(n) for v in culprit.outputs for n in consumers(v)]
    return _marked(feeding, node_text(culprit), list(dict.fromkeys(reading)))


def _marked(before: list[str], culprit: str, after: list[str], most: int = 6) -> str:
    rows = [f"    {line}" for line in _first(before, most)] + [f"  > {culprit}"] + [f"    {line}" for line in _first(after, most)]
    return "\n".join(rows)


def _first(lines: list[str], most: int) -> list[str]:
    return lines if len(lines) <= most else [*lines[:most], f"... and {len(lines) - most} more"]


def _source(value: ir.Value) -> str:
    node = value.producer()
    if node is not None:
        return node_text(node)
    kind = "weight" if value.is_initializer() else "input" if value.is_graph_input() else "undefined"
    return f"{value_text(value)}  ({kind})"


class _Printer:
    """Prints names as they are, nodes in the order of the graph."""

    def __init__(self, weights: bool) -> None:
        self.weights = weights

    def name(self, value: ir.Value | None) -> str:
        return "" if value is None or value.name == "" else f"%{value.name}"

    def typed(self, value: ir.Value) -> str:
        return f"{self.name(value)}: {_type(value, self.dim)}" if value.name != "" else ""

    def dim(self, dim: int | ir.SymbolicDim) -> str:
        return "?" if str(dim) == "None" else str(dim)

    def attributes(self, node: ir.Node) -> list[ir.Attr]:
        return sorted((a for a in node.attributes.values() if not is_graph(a)), key=lambda a: a.name)

    def order(self, graph: ir.Graph) -> list[ir.Node]:
        return list(graph)

    def stored(self, graph: ir.Graph) -> list[ir.Value]:
        return list(graph.initializers.values())

    def graph(self, graph: ir.Graph, head: str, indent: str) -> Iterator[str]:
        inputs, outputs = (", ".join(self.typed(v) for v in values) for values in (graph.inputs, graph.outputs))
        yield f"{indent}{head} ({inputs}) -> ({outputs}) {{"
        for value in self.stored(graph):
            yield f"{indent}{_INDENT}{self.name(value)} = {self.weight(value)}"
        for node in self.order(graph):
            yield indent + _INDENT + self.line(node)
            for key, inner in sorted(subgraphs(node)):
                yield from self.graph(inner, key, indent + _INDENT * 2)
        yield f"{indent}}}"

    def line(self, node: ir.Node) -> str:
        outputs = ", ".join(self.typed(v) for v in node.outputs)
        inputs = ", ".join(self.name(v) for v in node.inputs)
        text = ", ".join(f"{a.name}={_attribute(a)}" for a in self.attributes(node))
        inner = "".join(f" {key}:{len(g)} nodes" for key, g in sorted(subgraphs(node)))
        domain = "" if node.domain in ("", "ai.onnx") else f"{node.domain}::"
        return f"{outputs} = {domain}{node.op_type}({inputs})" + (f" {{{text}}}" if text else "") + inner

    def weight(self, value: ir.Value) -> str:
        tensor = value.const_value
        if tensor is None:
            return "?"
        kind = f"{_short(tensor.dtype)}[{','.join(map(str, tensor.shape))}]"
        return f"{kind} {_contents(tensor)}" if self.weights else kind


class _Canonical(_Printer):
    """Prints values by number, in the order of a depth-first walk from the outputs."""

    def __init__(self, model: ir.Model, weights: bool) -> None:
        super().__init__(weights)
        self._numbers: dict[ir.Value, str] = {v: f"%{v.name}" for v in (*model.graph.inputs, *model.graph.outputs)}
        self._opsets = model.opset_imports
        self._orders: dict[ir.Graph, list[ir.Node]] = {}
        self._count = {"": 0, "w": 0}
        self._number(model.graph)

    def name(self, value: ir.Value | None) -> str:
        return "" if value is None or value.name == "" else self._numbers.get(value, f"%?{value.name}")

    def dim(self, dim: int | ir.SymbolicDim) -> str:
        return "?" if is_opaque(dim) else str(dim)

    def attributes(self, node: ir.Node) -> list[ir.Attr]:
        defaults = _defaults(node.op_type, node.domain, self._opsets.get(node.domain))
        return [a for a in super().attributes(node) if a.name not in defaults or a.is_ref() or _attribute(a) != defaults[a.name]]

    def order(self, graph: ir.Graph) -> list[ir.Node]:
        return self._orders[graph]

    def stored(self, graph: ir.Graph) -> list[ir.Value]:
        place = {value: k for k, value in enumerate(self._numbers)}
        return sorted(graph.initializers.values(), key=lambda v: place.get(v, len(place)))

    def _number(self, graph: ir.Graph) -> None:
        order = self._orders[graph] = _walk(graph)
        for value in graph.inputs:
            self._claim(value)
        for node in order:
            for used in node.inputs:
                if used is not None and used.is_initializer():
                    self._claim(used, "w")
            for _, inner in sorted(subgraphs(node)):
                self._number(inner)
            for made in node.outputs:
                self._claim(made)
        for value in graph.outputs:
            self._claim(value, "w" if value.is_initializer() else "")

    def _claim(self, value: ir.Value, kind: str = "") -> None:
        if value not in self._numbers:
            self._numbers[value] = f"%{kind}{self._count[kind]}"
            self._count[kind] += 1


def _walk(graph: ir.Graph) -> list[ir.Node]:
    """The nodes of one graph, producers first, in the order in which a walk from the outputs finishes them; dead nodes last."""
    done: dict[ir.Node, None] = {}
    roots = [v.producer() for v in graph.outputs]
    for root in [*roots, *graph]:
        stack = [] if root is None or root.graph is not graph else [(root, iter(_needs(root, graph)))]
        active = {node for node, _ in stack}
        while stack:
            node, needs = stack[-1]
            if node in done:
                stack.pop()
                continue
            following = next((n for n in needs if n not in done and n not in active), None)
            if following is None:
                done[node] = None
                stack.pop()
            else:
                active.add(following)
                stack.append((following, iter(_needs(following, graph))))
    return list(done)


def _needs(node: ir.Node, graph: ir.Graph) -> list[ir.Node]:
    """The producers, in `graph`, of what a node and its subgraphs read."""
    values = list(node.inputs)
    for _, inner in sorted(subgraphs(node)):
        values += [v for n in ir.traversal.RecursiveGraphIterator(inner) for v in n.inputs]
        values += list(inner.outputs)
    return [n for n in makers(values) if n.graph is graph]


def _short(dtype: ir.DataType | None) -> str:
    """`f32`, `i64`, `bool`."""
    return "?" if dtype is None else "bool" if dtype == ir.DataType.BOOL else dtype.short_name()


def _type(value: ir.Value, dim_text: Callable[[int | ir.SymbolicDim], str]) -> str:
    kind, short = value.type, _short(value.dtype)
    dims = "[*]" if value.shape is None else f"[{','.join(map(dim_text, value.shape))}]"
    if kind is None or isinstance(kind, ir.TensorType):
        return short + dims
    return f"{type(kind).__name__.removesuffix('Type').lower()}({short}{dims})"


@functools.cache
def _defaults(op_type: str, domain: str, opset: int | None) -> Mapping[str, str]:
    """What the schema of an op says of an attribute that is not spelled."""
    from onnx import defs

    if opset is None or not defs.has(op_type, opset, domain):
        return {}
    spelled = {name: a.default_value for name, a in defs.get_schema(op_type, opset, domain).attributes.items() if a.default_value.type}
    return {name: _attribute(ir.serde.deserialize_attribute(proto)) for name, proto in spelled.items()}


def _attribute(attribute: ir.Attr) -> str:
    if attribute.is_ref():
        return f"@{attribute.ref_attr_name}"
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return f"{_short(tensor.dtype)}[{','.join(map(str, tensor.shape))}] {_contents(tensor)}"
    if attribute.type == ir.AttributeType.FLOAT:
        return _number_text(attribute.as_float())
    value = attribute.value
    if attribute.name in ("to", "dtype") and attribute.type == ir.AttributeType.INT:
        return _short(ir.DataType(value))
    return "[" + ", ".join(map(str, value)) + "]" if isinstance(value, (list, tuple)) else str(value)


def _contents(tensor: ir.TensorProtocol) -> str:
    if tensor.size > _SPELLED:
        return "#" + hashlib.blake2b(tensor.tobytes(), digest_size=4).hexdigest()
    values = np.asarray(tensor.numpy()).reshape(-1).tolist()
    return "{" + ", ".join(_number_text(v) if isinstance(v, float) else str(v) for v in values) + "}"


def _number_text(number: float) -> str:
    """A float32 by its shortest digits: 0.1, not 0.10000000149011612."""
    return str(np.float32(number)) if np.isfinite(number) and float(np.float32(number)) == number else repr(float(number))
