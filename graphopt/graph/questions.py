"""Small questions about an `onnx_ir` graph that every pass asks."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir

T = TypeVar("T", bound=Hashable)


def is_constant(value: ir.Value | None) -> bool:
    """True for an initializer that no caller can override (an initializer that is also a graph input has only a default)."""
    return value is not None and value.const_value is not None and not value.is_graph_input()


def is_tensor(value: ir.Value) -> bool:
    """False for a sequence, an optional or a map; their `dtype` and `shape` are those of what they hold."""
    return value.type is None or isinstance(value.type, ir.TensorType)


def constant(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """The contents of a constant, or None. Reads the data: ask `is_constant` where only the fact matters."""
    if value is None or not is_constant(value):
        return None
    assert value.const_value is not None
    return value.const_value.numpy()


def initializer(array: np.ndarray[Any, Any], name: str) -> ir.Value:
    """A stored value of that name, not yet part of a graph."""
    tensor = ir.tensor(np.asarray(array, order="C"), name=name)
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)


def scalar(value: ir.Value | None) -> float | int | bool | None:
    """The one element of a constant of size 1 (any rank), or None."""
    if value is None or value.const_value is None or value.const_value.size != 1:
        return None
    array = constant(value)
    return None if array is None else array.reshape(()).item()


_SCOPES = "pkg.torch.onnx.name_scopes"  # metadata of nodes that torch's exporter writes
ORIGINS = "graphopt.origins"  # node.meta: the names of the input's nodes that a node stands for, where they are not its own


def origins(node: ir.Node) -> frozenset[str]:
    """The names of the input's nodes that a node stands for: its own, unless a change of the graph made it; also behind the place in the torch
    module that it comes from, where torch's exporter says so: `lm_head/node_linear_28`."""
    found: frozenset[str] | None = node.meta.get(ORIGINS)
    if found:
        return found
    name, module = node.name or "", module_of(node)
    return frozenset((name, f"{module}/{name}")) if module and not name.startswith(f"{module}/") else frozenset((name,))


def module_of(node: ir.Node) -> str:
    """The torch module that a node comes from, such as `model.layers.0.mlp`; empty where nobody says."""
    scopes = re.findall(r"'([^']*)'", node.metadata_props.get(_SCOPES, ""))  # ['', 'model', 'model.norm', 'add_692']: modules, then the operator
    return scopes[-2] if len(scopes) > 1 else ""


def attr(node: ir.Node, name: str, default: Any = None) -> Any:
    """The value of an attribute, or `default` where the node does not spell it."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The standard-domain node that makes `value`, if it is one of `op_types` (any, if none is named)."""
    node = None if value is None else value.producer()
    if node is None or node.domain not in ("", "ai.onnx"):
        return None
    return node if not op_types or node.op_type in op_types else None


def makers(values: Iterable[ir.Value | None]) -> list[ir.Node]:
    """The nodes that make values, as often as they do."""
    return [node for v in values if v is not None and (node := v.producer()) is not None]


def consumers(value: ir.Value) -> list[ir.Node]:
    """The distinct nodes that read `value`, in the order of use."""
    return list(dict.fromkeys(use.node for use in value.uses()))


def downstream(sources: Iterable[ir.Value]) -> set[ir.Value]:
    """Everything that is computed from the contents of `sources`, and they themselves; what is computed from their sizes alone is not."""
    return reached(sources, lambda v: (out for node in consumers(v) if node.op_type != "Shape" or node.domain for out in node.outputs))


def reached(start: Iterable[T], onward: Callable[[T], Iterable[T]]) -> set[T]:
    """`start`, and all that `onward` leads to from there."""
    found = set(start)
    todo = list(found)
    while todo:
        fresh = set(onward(todo.pop())) - found
        found |= fresh
        todo += fresh
    return found


def is_read(value: ir.Value) -> bool:
    """Something in the graph, or who runs it, reads a value."""
    return bool(value.uses()) or value.is_graph_output()


def used_once(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def enclosed(path: Sequence[ir.Node], side: Iterable[ir.Node]) -> tuple[ir.Node, ...]:
    """The nodes of a match: `path`, and those of `side` that nothing else needs (the others stay in the graph). The path comes last, in order."""
    inside = {n for n in side if n.graph is path[0].graph}.union(path)
    while True:
        needed = [n for n in inside.difference(path) if any(v.is_graph_output() or any(u.node not in inside for u in v.uses()) for v in n.outputs)]
        if not needed:
            return (*inside.difference(path), *path)
        inside.difference_update(needed)


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Every node of the main graph and of every subgraph that is open, outer before inner."""
    for graph in graphs(model):
        yield from graph


def graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """The main graph and every subgraph that is open, outer before inner."""
    todo = [model.graph]
    while todo:
        graph = todo.pop()
        yield graph
        todo += [body for node in graph if node.attributes for body in bodies(node)]


def open_nodes(function: ir.Function) -> Iterator[ir.Node]:
    """Every node of a function and of every subgraph in it that is open."""
    todo = list(function)
    while todo:
        node = todo.pop()
        yield node
        todo += [inner for body in bodies(node) for inner in body]


def is_graph(attribute: ir.Attr) -> bool:
    """True for an attribute that holds one subgraph or several."""
    return attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


ISLAND = "ai.onnx.newer"  # the domain of a standard node that has no form at the working opset; its version is that of the file
CLOSED = "graphopt.closed"  # node.meta: why the bodies of a standard operator stay as they are


def is_closed(node: ir.Node) -> bool:
    """True if the bodies of a node belong to somebody else, and nothing in them is read or changed: under an operator outside of ai.onnx,
    whose names and versions mean what it says, or where the node is marked."""
    return node.domain not in ("", "ai.onnx") or CLOSED in node.meta


def bodies(node: ir.Node) -> list[ir.Graph]:
    """The open subgraphs that a node holds (the branches of an If, the body of a Loop)."""
    found = [graph for _, graph in subgraphs(node)] if node.attributes else []
    return [] if found and is_closed(node) else found


def closed_nodes(model: ir.Model) -> list[ir.Node]:
    """The nodes that hold closed bodies."""
    return [n for n in all_nodes(model) if n.attributes and any(map(is_graph, n.attributes.values())) and is_closed(n)]


def captured(node: ir.Node) -> list[ir.Value]:
    """What the bodies of a node read and do not make themselves, as often as they do, in order."""
    held = [graph for _, graph in subgraphs(node)]
    inner = [graph for graph in held for graph in (graph, *graph.subgraphs())]
    own = {v for graph in inner for v in (*graph.inputs, *graph.initializers.values(), *(v for n in graph for v in n.outputs))}
    read = [v for graph in inner for v in (*(v for n in graph for v in n.inputs), *graph.outputs)]
    return [v for v in read if v is not None and v not in own]


def within(node: ir.Node) -> Iterator[ir.Node]:
    """Every node in the bodies of a node, open or not."""
    for _, graph in subgraphs(node):
        yield from ir.traversal.RecursiveGraphIterator(graph)


def subgraphs(node: ir.Node) -> Iterator[tuple[str, ir.Graph]]:
    """All of them, open or not, with the name of the attribute that holds each."""
    for name, attribute in node.attributes.items():
        if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
            yield name, attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS and not attribute.is_ref():
            yield from ((f"{name}[{k}]", graph) for k, graph in enumerate(attribute.as_graphs()))


def rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def static_dim(value: ir.Value | None, axis: int) -> int | None:
    """The size of one axis where it is a known integer."""
    if value is None or value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else None


def same_dim(a: object, b: object) -> bool:
    """True if two dimensions are proved equal; an unknown dimension equals nothing."""
    if isinstance(a, int) or isinstance(b, int):
        return a == b
    return getattr(a, "value", None) is not None and a == b


def same_shape(a: ir.Value, b: ir.Value) -> bool:
    if a.shape is None or b.shape is None or len(a.shape) != len(b.shape):
        return False
    return all(same_dim(x, y) for x, y in zip(a.shape, b.shape, strict=True))


def shape_text(value: ir.Value) -> str:
    kind = "?" if value.dtype is None else value.dtype.name.lower()
    return f"{kind}[{','.join(str(d) for d in value.shape)}]" if value.shape is not None else f"{kind}[?]"


def parameters(model: ir.Model) -> int:
    """Number of stored weight elements, each initializer counted once."""
    return sum(tensor.size for tensor in _stored(model))


def nbytes(model: ir.Model) -> int:
    """Bytes of stored weights."""
    return sum(tensor.nbytes for tensor in _stored(model))


def _stored(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    return (v.const_value for g in model.graphs() for v in g.initializers.values() if v.const_value is not None)


def annotated(model: ir.Model) -> Iterator[dict[str, str]]:
    """The metadata of every graph, node and value (of functions too), each once; not that of the model itself."""
    places: list[ir.Graph | ir.Function] = [*graphs(model), *model.functions.values()]
    for graph in places:
        stored = graph.initializers.values() if isinstance(graph, ir.Graph) else ()
        values = dict.fromkeys((*graph.inputs, *stored, *(v for node in graph for v in node.outputs)))
        yield from (thing.metadata_props for thing in (graph, *graph, *values))


def metadata_bytes(model: ir.Model) -> int:
    """Bytes of the keys and texts of `annotated`."""
    return sum(len(text.encode()) for properties in annotated(model) for item in properties.items() for text in item)


class Names:
    """Fresh names for one model: values and nodes never collide with what is there."""

    def __init__(self, model: ir.Model) -> None:
        self.taken: set[str] = set()
        self._last: dict[str, int] = {}  # hint -> the last number tried: a thousand equal hints stay linear
        for graph in model.graphs():
            self.taken.update(graph.initializers)
            self.taken.update(v.name for v in graph.inputs if v.name)
            for node in graph:
                self.taken.update(v.name for v in node.outputs if v.name)
                if node.name:
                    self.taken.add(node.name)

    def fresh(self, hint: str) -> str:
        name, k = hint, self._last.get(hint, 0)
        while name in self.taken:
            k += 1
            name = f"{hint}_{k}"
        self._last[hint] = k
        self.taken.add(name)
        return name


_CODES = ("Quantize", "Dequantize", "Integer", "QLinear", "QAttention", "QGemm", "NBits", "Round")  # in names of operators that round to codes


def grain(model: ir.Model) -> str:
    """The coarsest that a graph rounds to on its way: `codes`, a float type, or nothing that is coarser than its outputs."""
    if any(mark in node.op_type for node in all_nodes(model) for mark in _CODES):
        return "codes"
    values = [*model.graph.inputs, *model.graph.initializers.values(), *(v for node in all_nodes(model) for v in node.outputs)]
    kinds = {v.dtype for v in values}
    coarse = {ir.DataType.BFLOAT16: "bfloat16", ir.DataType.FLOAT16: "float16", ir.DataType.FLOAT: "float32"}
    return next((name for kind, name in coarse.items() if kind in kinds), "")
