"""The normal form, the contract of design and passes: one spelling of a graph whatever exporter wrote it.

Functions and decided Ifs are inlined, the opset is the working one, constants are initializers of the main graph, everything is named once,
sorted and alive, and shapes are those that follow from the inputs. What belongs to the user stays: the interface, overridable initializers,
names, metadata, random nodes.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Iterator

import onnx_ir as ir

from graphopt.core.errors import LoadError
from graphopt.core.remarks import Remarks
from graphopt.graph.opset import versions as opset
from graphopt.graph.questions import Names, all_nodes, captured, closed_nodes, graphs, is_read, open_nodes
from graphopt.graph.shapes import drop_contradicted, infer_shapes
from graphopt.io import advisories as notices
from graphopt.io import closed, inline
from graphopt.io.dim_names import hide_names
from graphopt.io.legal import check_nodes
from graphopt.io.order import check_sources, sort
from graphopt.io.repair import count_axes, repair
from graphopt.io.runtime_ops import read as runtime_ops
from graphopt.io.save import STATES_SHAPES
from graphopt.rewrite.dead import remove_dead

_FREE_INITIALIZERS = 4  # the IR version since which an initializer need not be a graph input


def normalize(model: ir.Model, remarks: Remarks) -> None:
    """Bring `model` into normal form, in place; time is linear in its nodes.

    Raises:
        LoadError: the graph is not valid, or a node cannot be written at the working opset.
    """
    notices.disorder(model, _repeated_names(model), remarks)
    _spell_standard_domain(model)
    inline.functions(model)
    closed.keep_names(model)
    check_sources(model)
    check_nodes(model)
    lift_constants(model)
    _freeze_listed_weights(model)
    sort(model.graph)
    name_everything(model)
    count_axes(model, remarks)
    hide_names(model)
    claims = notices.take_claims(model)
    model.graph.meta.setdefault(STATES_SHAPES, any(not v.is_graph_output() for v in claims))
    opset.lift(model)
    remove_dead(model)
    reason = infer_shapes(model)
    decided = inline.decided_ifs(model)
    if decided:
        notices.decided(decided, remarks)
        sort(model.graph)
        remove_dead(model)
        reason = infer_shapes(model)
    name_everything(model)
    notices.contradicted(drop_contradicted(model), remarks)
    closed.close_impossible(model, remarks)
    islands = runtime_ops.read(model, remarks)
    repair(model, remarks)
    notices.random_nodes(model, remarks)
    notices.foreign_nodes(model, remarks, islands)
    notices.shape_claims(model, claims, reason, remarks)


# ---- validity and order -------------------------------------------------------------------------------------------------------------------


def _repeated_names(model: ir.Model) -> list[str]:
    """Names that several nodes of the file have."""
    counts = collections.Counter(n.name for n in all_nodes(model) if n.name)
    return [name for name, count in counts.items() if count > 1]


def _spell_standard_domain(model: ir.Model) -> None:
    """`ai.onnx` is another name of the empty domain."""
    for imports in (model.opset_imports, *(f.opset_imports for f in model.functions.values())):
        if "ai.onnx" in imports:
            imports.setdefault("", imports.pop("ai.onnx"))
    for node in itertools.chain(all_nodes(model), *(open_nodes(f) for f in model.functions.values())):
        if node.domain == "ai.onnx":
            node.domain = ""


# ---- constants ----------------------------------------------------------------------------------------------------------------------------


def lift_constants(model: ir.Model) -> None:
    """Turn Constant nodes into initializers and move the initializers of subgraphs into the main graph; data are shared, not copied."""
    names = Names(model)
    for graph in list(graphs(model)):
        if graph is not model.graph:
            for value in list(graph.initializers.values()):
                _move(value, graph, model.graph, names)
        for node in [n for n in graph if n.op_type == "Constant" and n.domain == ""]:
            _to_initializer(node, graph, model.graph, names)
    for value in model.graph.initializers.values():  # a file may name a weight in value_info without saying its type
        tensor = value.const_value
        if tensor is not None and value.type is None:
            value.type, value.shape = ir.TensorType(tensor.dtype), _frozen(tensor.shape)


def _move(value: ir.Value, graph: ir.Graph, main: ir.Graph, names: Names) -> None:
    if value.is_graph_input():
        raise LoadError(f"invalid graph: the subgraph input `{value.name}` has a default value, which ONNX does not allow")
    name = value.name or "const"
    del graph.initializers[name]
    _own_outputs(value, graph)
    value.name = names.fresh(name)
    main.register_initializer(value)


def _to_initializer(node: ir.Node, graph: ir.Graph, main: ir.Graph, names: Names) -> None:
    tensor, old = _tensor_of(node), node.outputs[0]
    name = old.name or "const"
    if graph is not main:
        _own_outputs(old, graph)
        name = names.fresh(name)
    new = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=_frozen(tensor.shape), doc_string=old.doc_string, const_value=tensor)
    new.metadata_props.update(old.metadata_props)
    old.name = None
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    main.register_initializer(new)


def _frozen(shape: object) -> ir.Shape:
    return shape if isinstance(shape, ir.Shape) else ir.Shape(shape)  # type: ignore[arg-type]


def _own_outputs(value: ir.Value, graph: ir.Graph) -> None:
    """A subgraph may not return a value of an outer graph as it is: runtimes want a node of its own."""
    for index, output in enumerate(graph.outputs):
        if output is value:
            node = ir.node("Identity", [value])
            node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
            graph.append(node)
            graph.outputs[index] = node.outputs[0]


def _tensor_of(node: ir.Node) -> ir.TensorProtocol:
    """The contents of a Constant node."""
    if len(node.attributes) != 1:
        raise LoadError(f"invalid graph: the Constant node `{node.name}` has {len(node.attributes)} attributes instead of one")
    ((name, attribute),) = node.attributes.items()
    if name == "value":
        return attribute.as_tensor()
    if name in ("value_float", "value_floats"):
        return ir.tensor(attribute.value, dtype=ir.DataType.FLOAT)
    if name in ("value_int", "value_ints"):
        return ir.tensor(attribute.value, dtype=ir.DataType.INT64)
    if name in ("value_string", "value_strings"):
        texts = [attribute.value] if name == "value_string" else list(attribute.value)
        return ir.StringTensor([t.encode() for t in texts], shape=ir.Shape(() if name == "value_string" else (len(texts),)))
    raise LoadError(f"the Constant node `{node.name}` holds its data as `{name}`, which graphopt does not read; store it as a dense tensor")


def _freeze_listed_weights(model: ir.Model) -> None:
    """Before IR version 4 every weight had to be listed as a graph input; there it does not mean that a caller may replace it."""
    if model.ir_version >= _FREE_INITIALIZERS:
        return
    kept = [v for v in model.graph.inputs if not v.is_initializer()]
    model.graph.inputs.clear()
    model.graph.inputs.extend(kept)
    model.ir_version = _FREE_INITIALIZERS


# ---- names --------------------------------------------------------------------------------------------------------------------------------


class _Unique:
    """Names of one kind. The first to ask for a name gets it; the next gets a number that nobody else uses."""

    def __init__(self, wanted: Iterable[str | None]) -> None:
        self.wanted = set(wanted)
        self.taken: set[str] = set()
        self.last: dict[str, int] = {}

    def claim(self, name: str) -> str:
        new = name
        while new in self.taken or (new != name and new in self.wanted):
            self.last[name] = self.last.get(name, 0) + 1
            new = f"{name}_{self.last[name]}"
        self.taken.add(new)
        return new


def name_everything(model: ir.Model) -> None:
    """Give every value and node a name that no other has, in the main graph and all subgraphs; the interface keeps its names."""
    public = dict.fromkeys((*model.graph.inputs, *model.graph.outputs, *(v for n in closed_nodes(model) for v in captured(n))))
    values = [*public, *(v for v in _all_values(model) if v not in public)]
    unique = _Unique(v.name for v in values)
    for value in values:
        name = unique.claim(value.name or "value")
        if name != value.name:
            value.name = name
    nodes = list(all_nodes(model))
    unique = _Unique(n.name for n in nodes)
    for node in nodes:
        node.name = unique.claim(node.name or node.op_type)


def _all_values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in graphs(model):
        yield from dict.fromkeys((*graph.initializers.values(), *graph.inputs))
    for node in all_nodes(model):
        yield from (v for v in node.outputs if v.name != "" or is_read(v))
