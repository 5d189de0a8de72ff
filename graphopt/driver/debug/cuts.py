"""Smaller graphs out of one: parts of it, nodes stepped over, branches in place of an If, weights without contents, axes with fewer elements.

Each gives a new graph (weights are shared), or None where there is nothing to do. Nothing here asks whether the numbers stay: they do not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.core.contract import Array
from graphopt.graph.dims import fed_inputs
from graphopt.graph.questions import all_nodes, attr, bodies, graphs, is_constant, same_shape
from graphopt.rewrite.dead import detach, remove_dead

_INDEX = 64  # elements up to which an integer weight may hold sizes


@dataclasses.dataclass(frozen=True)
class Case:
    """A graph, and the array of every value that may become an input of it, for each sample; without samples there is none."""

    model: ir.Model
    table: tuple[Mapping[str, Array], ...]

    @property
    def feeds(self) -> list[dict[str, Array]] | None:
        """For each sample; None where they are to be made up."""
        names = [str(v.name) for v in fed_inputs(self.model)]
        return [{name: values[name] for name in names} for values in self.table] or None

    @property
    def missing(self) -> list[str]:
        """Inputs for which there is no array."""
        return [name for v in fed_inputs(self.model) if any((name := str(v.name)) not in values for values in self.table)]


def names(model: ir.Model) -> list[str]:
    """Those of the nodes of the main graph, in order."""
    return [str(node.name) for node in model.graph]


# ---- parts ----------------------------------------------------------------------------------------------------------------------------


def part(model: ir.Model, keep: Collection[str]) -> ir.Model | None:
    """These nodes of the main graph alone: what they read of others becomes an input, what others read of them an output. None where such an
    input would be no tensor, or its shape is not known."""
    copy, kept = model.clone(), set(keep)
    gone = [node for node in copy.graph if str(node.name) not in kept]
    if not gone or len(gone) == len(copy.graph):
        return None
    owners = {inner: node for node in copy.graph for inner in (node, *_inside(node))}
    leaving = set(gone)
    outputs = [
        v for node in copy.graph if node not in leaving for v in node.outputs
        if v.name and (v.is_graph_output() or not v.uses() or any(owners[use.node] in leaving for use in v.uses()))
    ]  # fmt: skip
    for node in gone:
        for value in node.outputs:
            if any(owners[use.node] not in leaving for use in value.uses()) and not _to_input(copy.graph, value):
                return None
    _outputs(copy.graph, outputs)
    for node in reversed(gone):
        detach(node)
        copy.graph.remove(node)
    return _tidied(copy)


def with_outputs(model: ir.Model, keep: Collection[str]) -> ir.Model | None:
    """The same graph with these of its outputs, and what they need."""
    copy = model.clone()
    outputs = [v for v in copy.graph.outputs if str(v.name) in keep]
    if not outputs or len(outputs) == len(copy.graph.outputs):
        return None
    _outputs(copy.graph, outputs)
    return _tidied(copy)


def _to_input(graph: ir.Graph, value: ir.Value) -> bool:
    if value.shape is None or not isinstance(value.type, ir.TensorType):
        return False
    name, value.name = value.name, None
    port = ir.Value(name=name, type=value.type, shape=value.shape.copy())
    value.replace_all_uses_with(port, replace_graph_outputs=True)
    graph.inputs.append(port)
    return True


def _outputs(graph: ir.Graph, outputs: Iterable[ir.Value]) -> None:
    kept = list(outputs)
    graph.outputs.clear()
    graph.outputs.extend(kept)


def _inside(node: ir.Node) -> Iterator[ir.Node]:
    for body in bodies(node):
        yield from ir.traversal.RecursiveGraphIterator(body)


def _tidied(model: ir.Model) -> ir.Model | None:
    """Without what nothing reads, inputs too. None where nothing is left."""
    remove_dead(model)
    for value in [v for v in model.graph.inputs if not v.uses() and not v.is_graph_output()]:
        model.graph.inputs.remove(value)
        model.graph.initializers.pop(str(value.name), None)
    return model if len(model.graph) and model.graph.outputs else None


# ---- nodes ----------------------------------------------------------------------------------------------------------------------------


def stepped_over(model: ir.Model, name: str) -> ir.Model | None:
    """Without one node, of any graph: an input of the same type and shape takes the place of its output."""
    copy = model.clone()
    node = next((n for n in all_nodes(copy) if n.name == name), None)
    if node is None or len([v for v in node.outputs if v.uses() or v.is_graph_output()]) != 1:
        return None
    old = next(v for v in node.outputs if v.uses() or v.is_graph_output())
    same = (v for v in node.inputs if v is not None and not is_constant(v) and v.dtype == old.dtype and same_shape(v, old))
    new = next(same, None)
    if new is None or (old.is_graph_output() and (new.producer() is None or new.is_graph_output())):
        return None
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    detach(node)
    assert node.graph is not None
    node.graph.remove(node)
    return _tidied(copy)


def branch(model: ir.Model, name: str, attribute: str) -> ir.Model | None:
    """With one branch of an If of the main graph in its place."""
    copy = model.clone()
    node = next((n for n in copy.graph if n.name == name and n.op_type == "If"), None)
    body = None if node is None else attr(node, attribute)
    if node is None or body is None:
        return None
    outputs, inner = list(body.outputs), list(body)
    if any(v.producer() is None or v.producer().graph is not body for v in outputs):
        return None
    body.outputs.clear()
    for other in inner:
        body.remove(other)
    copy.graph.insert_before(node, inner)
    for old, new in zip(node.outputs, outputs, strict=True):
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    detach(node)
    copy.graph.remove(node)
    return _tidied(copy)


# ---- weights --------------------------------------------------------------------------------------------------------------------------


def weights(model: ir.Model, least: int = 9) -> list[str]:
    """Names of those with so many elements that are not one number all over."""
    found = ((name, value.const_value) for name, value in model.graph.initializers.items())
    return [name for name, t in found if t is not None and t.size >= least and t.dtype != ir.DataType.STRING and not _even(t)]


def filled(model: ir.Model, chosen: Iterable[str], number: int) -> ir.Model:
    """With weights that hold one number all over."""
    copy = model.clone()
    for name in chosen:
        tensor = copy.graph.initializers[name].const_value
        assert tensor is not None
        array = np.full(tensor.shape.numpy(), number, tensor.dtype.numpy())
        copy.graph.initializers[name].const_value = ir.Tensor(array, dtype=tensor.dtype, name=name)
    return copy


def _even(tensor: ir.TensorProtocol) -> bool:
    flat = tensor.numpy().reshape(-1)
    return bool((flat == flat[0]).all())


# ---- sizes ----------------------------------------------------------------------------------------------------------------------------


def sizes(model: ir.Model) -> list[int]:
    """The static sizes of axes of inputs and weights, the largest first."""
    found = {d for v in (*model.graph.inputs, *model.graph.initializers.values()) for d in v.shape or () if isinstance(d, int)}
    return sorted((d for d in found if d > 1), reverse=True)


def resized(case: Case, mapping: Mapping[int, int]) -> Case | None:
    """With other sizes, wherever they stand: in axes of inputs and weights, which lose their last elements, and in integers that are shapes.

    Shapes inside are left for inference.
    """
    copy = case.model.clone()
    changed = {str(v.name) for v in copy.graph.inputs if v.shape is not None and any(d in mapping for d in v.shape)}
    for value in copy.graph.inputs:
        if value.shape is not None:
            value.shape = ir.Shape([mapping.get(d, d) if isinstance(d, int) else d for d in value.shape])
    for graph in graphs(copy):
        for value in graph.initializers.values():
            _resize(value, mapping)
    for node in all_nodes(copy):
        for value in node.outputs:
            value.shape = None
            value.meta.clear()
    table = tuple({name: _fewer(array, mapping, name in changed) for name, array in values.items()} for values in case.table)
    return Case(copy, table)


def _resize(value: ir.Value, mapping: Mapping[int, int]) -> None:
    tensor = value.const_value
    if tensor is None or tensor.dtype == ir.DataType.STRING:
        return
    array: Array = tensor.numpy()
    small = array[tuple(slice(mapping.get(size, size)) for size in array.shape)]
    if array.dtype == np.int64 and array.size <= _INDEX and array.ndim <= 1:
        small = np.array([mapping.get(int(x), int(x)) for x in small.reshape(-1)], np.int64).reshape(small.shape)
    if small.shape == array.shape and small is not array and np.array_equal(small, array):
        return
    value.const_value = ir.Tensor(np.ascontiguousarray(small), dtype=tensor.dtype, name=value.name)
    value.shape = ir.Shape(small.shape)


def _fewer(array: Array, mapping: Mapping[int, int], shaped: bool) -> Array:
    """Of an input; numbers that index a table stay inside of it."""
    small = array[tuple(slice(mapping.get(size, size)) for size in array.shape)] if shaped else array
    if small.dtype.kind not in "iu" or not small.size:
        return small
    most = int(small.max())
    fitting = [new for old, new in mapping.items() if new <= most < old]
    return small % min(fitting) if fitting else small


# ---- the rest -------------------------------------------------------------------------------------------------------------------------


def bare(model: ir.Model) -> ir.Model:
    """Without what is only written about it: notes of exporters, docstrings."""
    copy = model.clone()
    copy.metadata_props.clear()
    copy.doc_string = None
    for graph in graphs(copy):
        graph.metadata_props.clear()
        graph.doc_string = None
        for thing in (*graph.inputs, *graph.initializers.values(), *graph, *(v for node in graph for v in node.outputs)):
            thing.metadata_props.clear()
            thing.doc_string = None
    return copy


def around(model: ir.Model, start: Collection[str], hops: int) -> set[str]:
    """Nodes of the main graph within so many steps of those named, in both directions; nodes inside a subgraph count as the one that holds it."""
    owners = {inner: node for node in model.graph for inner in (node, *_inside(node))}
    found = {owner for inner, owner in owners.items() if str(inner.name) in start}
    for _ in range(hops):
        found |= {other for node in found for other in _neighbours(node, lambda n: owners.get(n))}
    return {str(node.name) for node in found}


def _neighbours(node: ir.Node, owner: Callable[[ir.Node], Any]) -> Iterator[ir.Node]:
    for inner in (node, *_inside(node)):
        makers = (v.producer() for v in inner.inputs if v is not None)
        readers = (use.node for v in inner.outputs for use in v.uses())
        for other in (*makers, *readers):
            found = None if other is None else owner(other)
            if found is not None:
                yield found
