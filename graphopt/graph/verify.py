"""The normal form, the contract that every pass may rely on, as a table of rules; and the public interface, which no pass may change.

A broken rule is reported with the message first and then the neighbourhood of the culprit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterator
from itertools import count

import onnx_ir as ir

from graphopt.core.errors import VerifyError
from graphopt.graph.dims import dim_names, is_opaque, size_of
from graphopt.graph.interface import Interface, check_interface, interface
from graphopt.graph.questions import all_nodes, bodies, closed_nodes, is_read, makers, reached, shape_text, within
from graphopt.graph.serialize import light
from graphopt.graph.shapes import infer_shapes
from graphopt.graph.text import neighbourhood

__all__ = ["RULES", "Interface", "Rule", "check_interface", "complaints", "interface", "verify"]

Culprit = ir.Node | ir.Value | None
Finding = tuple[str, Culprit]


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of the contract. `check` yields what breaks it."""

    name: str
    check: Callable[[ir.Model], Iterator[Finding]]


def verify(model: ir.Model, *, interface: Interface | None = None, shapes: bool = True, known: Container[str] = ()) -> None:
    """Check every rule, in order; later rules may rely on earlier ones.

    Args:
        interface: what the inputs and outputs must still be (see `interface(model)`).
        shapes: False leaves out that every shape which inference can know is there and right.
        known: complaints that do not count, as the input of the run gave rise to them already (see `complaints`).

    Raises:
        VerifyError: the first broken rule: its name, what is wrong, and the neighbourhood of the culprit.
    """
    for rule in RULES:
        if (rule.name == "shapes" and not shapes) or rule.name in known:
            continue
        for message, culprit in rule.check(model):
            if f"{rule.name}: {message}" in known:
                continue
            around = "" if culprit is None else "\n" + neighbourhood(culprit)
            raise VerifyError(f"{rule.name}: {message}{around}")
    if interface is not None:
        check_interface(interface, model)


def complaints(model: ir.Model) -> frozenset[str]:
    """All that is wrong with a graph, each as text. Where the ONNX checker refuses it, `checker` stands for whatever it would say: it stops at the
    first fault, and words that for the graph at hand."""
    found = {f"{rule.name}: {message}" for rule in RULES for message, _ in rule.check(model)}
    return frozenset(found | {"checker"} if any(text.startswith("checker: ") for text in found) else found)


def _functions(model: ir.Model) -> Iterator[Finding]:
    calls = {node.op_identifier() for node in all_nodes(model)}
    for identifier, function in model.functions.items():
        if identifier in calls or not closed_nodes(model):
            yield f"function {function.domain}::{function.name} is not inlined", None


def _owners(model: ir.Model) -> Iterator[Finding]:
    for graph, _ in _scopes(model):
        for node in graph:
            if node.graph is not graph:
                yield f"node `{node.name}` stands in a graph that does not own it", node
            for value in node.outputs:
                if value.producer() is not node:
                    yield f"`{value.name}` is an output of node `{node.name}` but names another producer", node


def _sources(model: ir.Model) -> Iterator[Finding]:
    for graph, outer in _scopes(model):
        for node in graph:
            for value in node.inputs:
                complaint = None if value is None else _unreachable(value, (graph, *outer))
                if complaint:
                    yield f"node `{node.name}` reads {complaint}", node


def _order(model: ir.Model) -> Iterator[Finding]:
    for graph, _ in _scopes(model):
        place = {node: k for k, node in enumerate(graph)}
        for node, position in place.items():
            for value in _reads(node):
                made = value.producer()
                if made is None or made not in place or place[made] < position:
                    continue
                what = "is in a cycle" if _depends(made, node, place) else "is not topologically sorted"
                yield f"the graph {what}: node `{node.name}` reads `{value.name}`, which `{made.name}` makes later", node


def _outputs(model: ir.Model) -> Iterator[Finding]:
    for graph, outer in _scopes(model):
        for value in graph.outputs:
            made = value.producer()
            here = value in graph.inputs or graph.initializers.get(value.name or "") is value if made is None else made.graph is graph
            if not here or (outer and value.is_initializer()):
                yield f"graph output `{value.name}` is not made in its graph", value
        if len(set(graph.outputs)) != len(graph.outputs):
            yield f"graph `{graph.name}` gives one value as two outputs; an Identity must stand between", None


def _names(model: ir.Model) -> Iterator[Finding]:
    values: dict[str, ir.Value] = {}
    nodes: dict[str, ir.Node] = {}
    for graph, _ in _scopes(model):
        for value in dict.fromkeys((*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs))):
            if value.name == "" and not value.uses() and not value.is_graph_output():
                continue  # an optional output that is left out
            if not value.name:
                yield "a value has no name", value
            elif values.setdefault(value.name, value) is not value:
                yield f"two values are called `{value.name}`", value
        for node in graph:
            if not node.name:
                yield f"a {node.op_type} node has no name", node
            elif nodes.setdefault(node.name, node) is not node:
                yield f"two nodes are called `{node.name}`", node


def _dead(model: ir.Model) -> Iterator[Finding]:
    for graph, _ in _scopes(model):
        for node in graph:
            if not any(map(is_read, node.outputs)):
                yield f"node `{node.name}` is dead: nothing reads its outputs", node
        for value in graph.initializers.values():
            if not (is_read(value) or value.is_graph_input()):
                yield f"weight `{value.name}` is dead: nothing reads it", value


def _constants(model: ir.Model) -> Iterator[Finding]:
    for node in all_nodes(model):
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            yield f"node `{node.name}` is a Constant; constants are initializers", node


def _initializers(model: ir.Model) -> Iterator[Finding]:
    for graph, outer in _scopes(model):
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if outer:
                yield f"weight `{name}` belongs to a subgraph; weights belong to the main graph", value
            elif tensor is None:
                yield f"weight `{name}` has no data", value
            elif value.name != name:
                yield f"weight `{name}` is registered under another name than its own, `{value.name}`", value
            elif value.dtype != tensor.dtype or value.shape is None or list(value.shape) != list(tensor.shape):
                yield f"weight `{name}` is declared {shape_text(value)}, but its data is {tensor.dtype.name.lower()}{list(tensor.shape)}", value
        for value in (v for node in graph for v in node.outputs):
            if value.const_value is not None:
                yield f"`{value.name}` carries data, but a node computes it; only weights have data", value


def _opsets(model: ir.Model) -> Iterator[Finding]:
    for node in all_nodes(model):
        if node.domain not in model.opset_imports:
            yield f"node `{node.name}` is of domain `{node.domain or 'ai.onnx'}`, which the model does not import", node


def _checker(model: ir.Model) -> Iterator[Finding]:
    import onnx

    proto = light(model)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:  # ValueError: a value of the type 0
        text = " ".join(str(error).split())
        named = (node for node in model.graph if node.name and f"Name: {node.name} " in text + " ")
        yield f"the ONNX checker says: {text}", next(named, None)


def _types(model: ir.Model) -> Iterator[Finding]:
    for node in all_nodes(model):
        if any(value is not None and value.type is None for value in node.inputs):
            continue  # it stands behind an operator without schema, where nothing is known
        for value in node.outputs:
            if value.type is None and value.name and node.domain in ("", "ai.onnx"):
                yield f"`{value.name}` has no dtype", node


def _shapes(model: ir.Model) -> Iterator[Finding]:
    known = model.clone()
    infer_shapes(known)
    for node, twin in zip(all_nodes(model), all_nodes(known), strict=True):
        for value, better in zip(node.outputs, twin.outputs, strict=True):
            if _contradicts(value, better) and node.domain in ("", "ai.onnx"):
                yield f"`{value.name}` is marked {shape_text(value)}, but inference gives {shape_text(better)}", node


RULES: tuple[Rule, ...] = (
    Rule("functions", _functions),  #       all inlined, but for those that only closed bodies call
    Rule("owners", _owners),  #             every node and output object belongs where it stands
    Rule("sources", _sources),  #           every input is made, fed or stored in this graph or one around it
    Rule("order", _order),  #               producers first; no cycle
    Rule("outputs", _outputs),  #           every graph output is made in its graph, and given once
    Rule("names", _names),  #               every value and node has one of its own
    Rule("dead", _dead),  #                 nothing is computed or stored in vain
    Rule("constants", _constants),  #       no Constant node
    Rule("initializers", _initializers),  # weights: in the main graph, with data, as declared
    Rule("opsets", _opsets),  #             every domain is imported
    Rule("types", _types),  #               every dtype is known
    Rule("shapes", _shapes),  #             every shape that can be known is there, and none is a lie
    Rule("checker", _checker),  #           the ONNX checker agrees, with types and shapes
)


def _scopes(model: ir.Model) -> Iterator[tuple[ir.Graph, tuple[ir.Graph, ...]]]:
    """Every graph with the graphs around it, inner to outer."""
    stack: list[tuple[ir.Graph, tuple[ir.Graph, ...]]] = [(model.graph, ())]
    while stack:
        graph, outer = stack.pop()
        yield graph, outer
        stack.extend((inner, (graph, *outer)) for node in graph for inner in bodies(node))


def _unreachable(value: ir.Value, scopes: tuple[ir.Graph, ...]) -> str | None:
    """Why a value cannot be read inside `scopes`, or None."""
    made = value.producer()
    if made is not None:
        return None if made.graph in scopes else f"`{value.name}`, whose producer `{made.name}` is not in the graph"
    if any(value in graph.inputs or graph.initializers.get(value.name or "") is value for graph in scopes):
        return None
    return f"`{value.name}`, which nothing makes, feeds or stores"


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    """What a node and its subgraphs read."""
    yield from (v for v in node.inputs if v is not None)
    yield from (v for inner in within(node) for v in inner.inputs if v is not None)


def _depends(node: ir.Node, on: ir.Node, place: dict[ir.Node, int]) -> bool:
    return on in reached([node], lambda n: (m for m in makers(_reads(n)) if m in place))


def _contradicts(value: ir.Value, inferred: ir.Value) -> bool:
    if value.dtype is not None and inferred.dtype is not None and value.dtype != inferred.dtype:
        return True
    if inferred.shape is None:
        return False
    if value.shape is None or len(value.shape) != len(inferred.shape):
        return True
    return any(_differ(a, b) for a, b in zip(value.shape, inferred.shape, strict=True))


def _differ(a: int | ir.SymbolicDim, b: int | ir.SymbolicDim) -> bool:
    """True if two dimensions are not the same expression; made-up and unknown ones may be anything."""
    if a == b or is_opaque(a) or is_opaque(b):
        return False
    names = sorted(dim_names(str(a)) | dim_names(str(b)))
    return any(size_of(a, sizes) != size_of(b, sizes) for sizes in (dict(zip(names, count(101, 2))), dict(zip(names, count(60, 7)))))
