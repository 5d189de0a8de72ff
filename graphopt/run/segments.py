"""A graph in pieces that follow each other, so that a change in the middle costs a run of what stands behind it and no more."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from graphopt.core.errors import GraphoptError
from graphopt.core.replay import Spool
from graphopt.graph.questions import is_constant, is_tensor, subgraphs
from graphopt.graph.serialize import join_islands
from graphopt.run import Feeds, ort
from graphopt.run.distance import arrays_in

State = dict[str, Any]  # the values that cross a cut, by name: arrays, or what a sequence or an optional holds


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Other nodes that make one value of a graph out of values that the graph has, too.

    Attributes:
        nodes: in topological order, the last one makes the value; of the main graph of another model, without subgraphs. What they read and do
            not make are constants of their own model, or values of the graph by name.
        label: of the other model; nodes of one label are shared between recipes.
    """

    nodes: tuple[ir.Node, ...]
    label: str

    @property
    def reads(self) -> tuple[str, ...]:
        """The values of the graph that it needs."""
        made = {v for node in self.nodes for v in node.outputs}
        return tuple(dict.fromkeys(str(v.name) for node in self.nodes for v in node.inputs if v is not None and v not in made and not is_constant(v)))

    @property
    def constants(self) -> tuple[ir.Value, ...]:
        return tuple(dict.fromkeys(v for node in self.nodes for v in node.inputs if is_constant(v) and v is not None))


Change = Mapping[str, Recipe]  # value name -> how it is made instead


class Segments:
    """The main graph of `model`, cut before the nodes that make the values `cuts`. It must not change meanwhile.

    Each piece is a session of its own, made when it first runs, with the types that it then meets; together they hold every weight once (a
    weight that several pieces read, once in each).

    Args:
        cuts: names of values that nodes of the main graph make.
        needs: value -> further values that its recipes read.

    Raises:
        GraphoptError: no node of the main graph makes a value of `cuts`.
    """

    def __init__(self, model: ir.Model, cuts: Iterable[str], needs: Mapping[str, Iterable[str]] | None = None) -> None:
        self._model, self._nodes = model, list(model.graph)
        self._place = {str(v.name): k for k, node in enumerate(self._nodes) for v in node.outputs if v.name}
        cuts = list(cuts)
        unknown = [name for name in cuts if name not in self._place]
        if unknown:
            raise GraphoptError(f"`{unknown[0]}` is made by no node of the main graph; choose one of its values to cut at")
        self._starts = sorted({0, *(self._place[name] for name in cuts)})
        self._last: dict[str, int] = {}  # the last piece that reads a value
        for k, node in enumerate(self._nodes):
            extra = [name for v in node.outputs for name in (needs or {}).get(str(v.name), ())]
            self._last.update(dict.fromkeys([*_reads(node), *extra], self._piece(k)))
        self._outputs = [str(v.name) for v in model.graph.outputs if v.name in self._place]
        self._last.update(dict.fromkeys(self._outputs, len(self._starts)))
        self._sessions: dict[tuple[int, object], ort.OrtSession] = {}

    def __len__(self) -> int:
        return len(self._starts)

    def piece_of(self, value: str) -> int:
        """The piece that makes a value."""
        return self._piece(self._place[value])

    def begin(self, feed: Feeds) -> State:
        """The state before the first piece."""
        return {name: array for name, array in _given(self._model, feed).items() if name in self._last}

    def step(self, piece: int, state: State, change: Change | None = None, key: object = None) -> State:
        """The state behind a piece, out of the state before it.

        Args:
            change: values of this piece that are made otherwise; those of other pieces are ignored.
            key: of the change, to keep its session for the next batch.
        """
        inside = {name: recipe for name, recipe in (change or {}).items() if self.piece_of(name) == piece}
        runner = self._sessions.get((piece, key if inside else None))
        if runner is None:
            runner = self._session(piece, state, inside)
            if not inside or key is not None:
                self._sessions[piece, key if inside else None] = runner
        return _stepped(runner, state, lambda name: self._last.get(name, -1) > piece)

    def finish(self, piece: int, state: State, change: Change | None = None, key: object = None) -> dict[str, Any]:
        """The outputs of the model, from the state before a piece on."""
        for k in range(piece, len(self)):
            state = self.step(k, state, change, key)
        return {name: state[name] for name in self._outputs}

    def _piece(self, node: int) -> int:
        return bisect.bisect_right(self._starts, node) - 1

    def _session(self, piece: int, state: State, change: Change) -> ort.OrtSession:
        start, end = self._starts[piece], (*self._starts[1:], len(self._nodes))[piece]
        return _session(self._model, self._nodes[start:end], state, lambda name: self._last.get(name, -1) > piece, change)


class Walk:
    """A graph on its way through samples, all batches at one place: each node runs once a batch, however often one stops.

    What lies behind the place may change meanwhile, what lies in front of it may not.

    Args:
        held: bytes of states that are kept in memory; more are written to a temporary folder.
    """

    def __init__(self, model: ir.Model, samples: Iterable[Feeds], held: int = 2**31) -> None:
        self._model, self._held, self._done = model, held, set[ir.Node]()
        self.states: Sequence[State] = _kept((_given(model, feed) for feed in samples), held)

    def until(self, node: ir.Node) -> Sequence[State]:
        """The values in front of a node of the main graph that something behind still reads, for every batch."""
        todo = [other for other in itertools.takewhile(lambda other: other is not node, self._model.graph) if other not in self._done]
        self._done.update(todo)
        alive = {name for other in self._model.graph if other not in self._done for name in _reads(other)}
        if any(v.name in alive for other in todo for v in other.outputs):
            runner = _session(self._model, todo, self.states[0], alive.__contains__, {})
            self.states = _kept((_stepped(runner, state, alive.__contains__) for state in self.states), self._held)
        return self.states


def _given(model: ir.Model, feed: Feeds) -> State:
    """The state before the first node; an input that is not fed has its default."""
    defaults = {str(v.name): v.const_value.numpy() for v in model.graph.inputs if v.const_value is not None and v.name not in feed}
    return {**defaults, **feed}


def _stepped(runner: ort.OrtSession, state: State, wanted: Callable[[str], bool]) -> State:
    made = runner.run({port.name: state[port.name] for port in runner.inputs})
    return {name: array for name, array in {**state, **made}.items() if wanted(name)}


def _kept(states: Iterator[State], held: int) -> Sequence[State]:
    first, size = list[State](), 0
    for state in states:
        first.append(state)
        size += sum(array.nbytes for _, array in arrays_in(list(state.values())))
        if size > held:
            return Spool(itertools.chain(first, states))
    return first


def _session(model: ir.Model, nodes: Sequence[ir.Node], state: State, wanted: Callable[[str], bool], change: Change) -> ort.OrtSession:
    """A session of some nodes, fed from `state`; what it makes is what is wanted."""
    writer = _Writer(model, state)
    for node in nodes:
        replaced = [str(v.name) for v in node.outputs if v.name in change]
        for name in replaced:
            writer.recipe(name, change[name])
        if len(replaced) < sum(bool(v.name) for v in node.outputs):
            writer.node(node)
    # the runtime would round activations in some of its fused kernels for quantized weights; the change is to be measured as it is written
    return ort.session(writer.model([name for name in writer.made if wanted(name)]), optimize=not change)


def alone(model: ir.Model, change: Change, state: Mapping[str, Any]) -> onnx.ModelProto:
    """The recipes of a change as a model of their own; its inputs have the shapes that they have in `state`."""
    writer = _Writer(model, state)
    for name, recipe in change.items():
        writer.recipe(name, recipe)
    return writer.model(list(change), static=True)


class _Writer:
    """A small ModelProto out of nodes of several models."""

    def __init__(self, model: ir.Model, state: Mapping[str, Any]) -> None:
        self._ir, self._state = model, state
        self._nodes: list[onnx.NodeProto] = []
        self._stored: dict[str, onnx.TensorProto] = {}
        self._read: dict[str, None] = {}
        self.made: dict[str, None] = {}

    def node(self, node: ir.Node) -> None:
        for name in _reads(node):
            if name not in self.made:
                self._read[name] = None
        for value in _constants(node):
            self._store(value, str(value.name))
        self._nodes.append(ir.serde.serialize_node(node))
        self.made.update({str(v.name): None for v in node.outputs if v.name})

    def recipe(self, target: str, recipe: Recipe) -> None:
        """Inner values get the label of their model as a prefix, so that they meet no name of the graph; shared ones are made once."""
        own = {v: f"{recipe.label}:{v.name}" for node in recipe.nodes for v in node.outputs if v.name}
        for node in recipe.nodes:
            last = any(v.name == target for v in node.outputs)
            if not last and any(own[v] in self.made for v in node.outputs if v.name):
                continue
            names = dict(own)
            for value in (v for v in node.inputs if v is not None and v not in own):
                if is_constant(value):
                    names[value] = f"{recipe.label}:{value.name}"
                    self._store(value, names[value])
                else:
                    names[value] = str(value.name)
                    if value.name not in self.made:
                        self._read[str(value.name)] = None
            proto = ir.serde.serialize_node(node)
            proto.input[:] = ["" if v is None else names[v] for v in node.inputs]
            proto.output[:] = [target if v.name == target else names.get(v, "") for v in node.outputs]
            self._nodes.append(proto)
            self.made.update(dict.fromkeys(filter(None, proto.output)))

    def model(self, outputs: Sequence[str], *, static: bool = False) -> onnx.ModelProto:
        values = {} if static else {v.name: v for v in (*self._ir.graph.inputs, *(v for node in self._ir.graph for v in node.outputs))}
        inputs = [_typed(name, self._state[name], values.get(name)) for name in self._read]
        graph = onnx.helper.make_graph(
            self._nodes, "piece", inputs, [onnx.ValueInfoProto(name=name) for name in outputs], list(self._stored.values())
        )
        opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in self._ir.opset_imports.items()]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=self._ir.ir_version)
        join_islands(model)
        return model

    def _store(self, value: ir.Value, name: str) -> None:
        if name in self._stored:
            return
        tensor = value.const_value
        assert tensor is not None
        if isinstance(tensor, ir.ExternalTensor):
            tensor = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, shape=ir.Shape(tensor.shape))
        proto = ir.serde.serialize_tensor(tensor)
        proto.name = name
        self._stored[name] = proto


def _typed(name: str, array: Any, value: ir.Value | None) -> onnx.ValueInfoProto:
    """An input with the shape that the graph declares for `value` (runtimes infer wrongly from a Reshape of nothing), or that of the array.

    Raises:
        GraphoptError: it is neither an array nor of a declared type.
    """
    if value is not None and not is_tensor(value):
        described: onnx.ValueInfoProto = ir.to_proto(value)
        described.name = name
        return described
    if not isinstance(array, np.ndarray):
        raise GraphoptError(f"`{name}` is no tensor, and its type is not known; the graph cannot be cut there")
    kind = onnx.TensorProto.STRING if array.dtype.kind in "OUS" else onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    declared = None if value is None or value.shape is None else [d if isinstance(d, int) else d.value for d in value.shape]
    return onnx.helper.make_tensor_value_info(name, kind, array.shape if value is None else declared or [None] * array.ndim)


def _outer(node: ir.Node, wanted: Callable[[ir.Value], bool]) -> Iterator[ir.Value]:
    """What a node reads, its subgraphs included, and does not make inside them."""
    yield from (v for v in node.inputs if v is not None and wanted(v))
    for _, body in subgraphs(node) if node.attributes else ():
        own = {*body.inputs, *body.initializers.values(), *(v for n in body for v in n.outputs)}
        yield from (v for n in body for v in _outer(n, wanted) if v not in own)
        yield from (v for v in body.outputs if v not in own and wanted(v))


def _reads(node: ir.Node) -> list[str]:
    return list(dict.fromkeys(str(v.name) for v in _outer(node, lambda v: not is_constant(v))))


def _constants(node: ir.Node) -> list[ir.Value]:
    return list(dict.fromkeys(_outer(node, is_constant)))
