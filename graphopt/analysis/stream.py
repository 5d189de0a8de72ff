"""The residual stream: which sums carry it on, and which block hangs at each of them. Read off the graph, fused or not, never from names.

A sum is a step of the stream where one summand (the stream before it) is what the other summands are computed from, and where an attention or a
multiply with a stored weight stands in between. Pre-norm: the sum itself goes on, y = x + f(norm(x)). Post-norm: y = norm(x + f(x)) does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from graphopt.analysis.linear import Linear, Linears
from graphopt.core.contract import Analysis, Context
from graphopt.graph.attention_node import AttentionNode
from graphopt.graph.questions import all_nodes, consumers, is_constant, is_read, makers, producer, reached, same_dim, same_shape, used_once

_NORMS = ("LayerNormalization", "RMSNormalization")
_ON_THE_WAY = ("Cast", "Dropout", "Identity", "Where", "Mul", "Transpose", "Reshape", "Expand", "Unsqueeze", "Squeeze")
_DEPTH = 8


@dataclasses.dataclass(frozen=True)
class Branch:
    """One summand beside the stream. `kind`: attention, cross (keys from elsewhere), or ffn (any other with a stored weight)."""

    value: ir.Value
    kind: str


@dataclasses.dataclass(frozen=True)
class StreamStep:
    """`after` = `before` plus branches, normalized by `norm` where the model is post-norm; both are of one shape.

    Attributes:
        adds: the nodes of the sum, the last makes it.
        constants: summands that are stored, and belong to no branch for sure.
    """

    before: ir.Value
    after: ir.Value
    branches: tuple[Branch, ...]
    adds: tuple[ir.Node, ...]
    norm: ir.Node | None = None
    constants: tuple[ir.Value, ...] = ()


@dataclasses.dataclass(frozen=True)
class StreamLayer:
    """Neighbouring steps: attention first, FFN last. `stream`: encoder and decoder are two."""

    stream: int
    steps: tuple[StreamStep, ...]

    @property
    def before(self) -> ir.Value:
        return self.steps[0].before

    @property
    def after(self) -> ir.Value:
        return self.steps[-1].after


@dataclasses.dataclass(frozen=True)
class Streams(Analysis[tuple[StreamLayer, ...]]):
    """The layers of every residual stream of the main graph, in graph order, each stream as a whole."""

    def compute(self, model: ir.Model, ctx: Context) -> tuple[StreamLayer, ...]:
        order = {node: k for k, node in enumerate(model.graph)}
        linears = {x.node: x for x in ctx.get(Linears(casts=True))}
        steps = [step for node in order if (step := _step(node, order, linears)) is not None]
        inner = {add for step in steps for add in step.adds[:-1]}
        steps = [step for step in steps if step.adds[-1] not in inner]
        return tuple(layer for number, chain in enumerate(_chains(steps)) for layer in _layers(number, chain))


def _step(node: ir.Node, order: Mapping[ir.Node, int], linears: Mapping[ir.Node, Linear]) -> StreamStep | None:
    if node.domain != "" or node.op_type not in ("Add", "Sum") or node.outputs[0].dtype is None or not node.outputs[0].dtype.is_floating_point():
        return None
    total, adds = node.outputs[0], list[ir.Node]()
    terms = list(_summands(node, total, adds, biased=False))
    live = [v for v in terms if not is_constant(v)]
    if len(live) < 2:
        return None
    for before in live:
        others = [v for v in live if v is not before]
        if not same_shape(before, total) or any(v is before for v in terms if v in others):
            continue
        below = _below(before, order, order[node])
        if not all(v.producer() in below for v in others):
            continue
        kinds = [_kind(v, before, below, linears) for v in others]
        if any(kind is None for kind in kinds):
            return None
        branches = tuple(Branch(v, str(kind)) for v, kind in zip(others, kinds, strict=True))
        norm = _post_norm(before, total)
        after = total if norm is None else norm.outputs[0]
        return StreamStep(before, after, branches, tuple(adds), norm, tuple(v for v in terms if is_constant(v)))
    return None


def _summands(node: ir.Node, total: ir.Value, adds: list[ir.Node], *, biased: bool) -> Iterator[ir.Value]:
    """The summands of nested sums. An inner sum is opened if nothing else reads it and it has the shape of the whole.

    `biased` False: not where it adds a constant, which makes it a branch with its bias.
    """
    for value in node.inputs:
        inner = producer(value, "Add", "Sum")
        if value is None:
            continue
        opened = inner is not None and inner.graph is node.graph and used_once(value) and same_shape(value, total)
        if opened and inner is not None and (biased or not any(map(is_constant, inner.inputs))):
            yield from _summands(inner, total, adds, biased=biased)
        else:
            yield value
    adds.append(node)


def _below(value: ir.Value, order: Mapping[ir.Node, int], end: int) -> set[ir.Node]:
    """The nodes before place `end` that are computed from a value."""

    def readers(values: Sequence[ir.Value]) -> Iterator[ir.Node]:
        return (node for v in values for node in consumers(v) if order.get(node, end) < end)

    return reached(readers([value]), lambda node: readers(node.outputs))


def _kind(value: ir.Value, before: ir.Value, below: set[ir.Node], linears: Mapping[ir.Node, Linear]) -> str | None:
    """What stands between the stream and a branch: the nodes that the branch is computed from, and that are computed from the stream."""
    between = reached(makers([value]), lambda node: below.intersection(makers(node.inputs)))
    attention = [node for node in between if node.domain == "" and node.op_type in ("Softmax", "Attention")]
    if attention:
        return "cross" if any(_is_cross(node, before, below) for node in attention) else "attention"
    return None if between.isdisjoint(linears) else "ffn"


def _is_cross(node: ir.Node, before: ir.Value, below: set[ir.Node]) -> bool:
    """The values that an attention averages are not computed from the stream that it stands in."""
    a = AttentionNode.of(node)
    values = _averaged(node.outputs[0], _DEPTH) if a is None else a.v
    return values is not None and values is not before and values.producer() not in below


def _averaged(probabilities: ir.Value, depth: int) -> ir.Value | None:
    """The right operand of the product that softmax goes into."""
    for node in consumers(probabilities):
        if node.domain == "" and node.op_type == "MatMul":
            return node.inputs[1] if node.inputs[0] is probabilities else node.inputs[0]
        if depth and node.domain == "" and node.op_type in _ON_THE_WAY and (found := _averaged(node.outputs[0], depth - 1)) is not None:
            return found
    return None


def _post_norm(before: ir.Value, total: ir.Value) -> ir.Node | None:
    """The norm behind a sum, where the stream goes on behind it: nothing else reads the sum, and the stream before it came out of a norm too."""
    readers = consumers(total)
    if len(readers) != 1 or total.is_graph_output() or readers[0].op_type not in _NORMS or readers[0].domain:
        return None
    norm = readers[0]
    out = norm.outputs[0]
    single = not any(map(is_read, norm.outputs[1:]))
    return norm if norm.inputs[0] is total and single and same_shape(out, total) and producer(before, *_NORMS) is not None else None


def _chains(steps: Sequence[StreamStep]) -> list[list[StreamStep]]:
    """Steps of which each begins where the one before it ends."""
    chains: list[list[StreamStep]] = []
    by_end: dict[ir.Value, list[StreamStep]] = {}
    for step in steps:
        chain = by_end.pop(step.before, [])
        if not chain:
            chains.append(chain)
        chain.append(step)
        by_end[step.after] = chain
    return chains


def _layers(stream: int, chain: Sequence[StreamStep]) -> Iterator[StreamLayer]:
    """A layer starts at an attention that follows an FFN, or one of its own kind."""
    steps: list[StreamStep] = []
    for step in chain:
        kinds = {b.kind for b in step.branches}
        so_far = {b.kind for s in steps for b in s.branches}
        if steps and kinds & {"attention", "cross"} and ("ffn" in so_far or "attention" in kinds):
            yield StreamLayer(stream, tuple(steps))
            steps = []
        steps.append(step)
    if steps:
        yield StreamLayer(stream, tuple(steps))


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
        found = (residual_of(node) for node in all_nodes(model) if node.op_type in _NORMS and node.domain == "")
        return tuple(r for r in found if r is not None)


def residual_of(norm: ir.Node) -> Residual | None:
    total = norm.inputs[0]
    last = producer(total, "Add", "Sum")
    if total is None or last is None or last.graph is not norm.graph:
        return None
    adds: list[ir.Node] = []
    terms = tuple(_term(v, total) for v in _summands(last, total, adds, biased=True))
    return Residual(norm, total, terms, tuple(adds), not used_once(total))


def _term(value: ir.Value, total: ir.Value) -> Term:
    vector = is_constant(value) and value.shape is not None and len(value.shape) == 1 and total.shape is not None
    bias = vector and same_dim(value.shape[0], total.shape[-1])  # type: ignore[index]
    return Term(value, bias, same_shape(value, total), _skippable(value, total))


def _skippable(value: ir.Value, total: ir.Value) -> bool:
    if value.shape is None or total.shape is None or len(total.shape) != 3 or len(value.shape) not in (2, 3):
        return False
    if not all(same_dim(a, b) for a, b in zip(value.shape[-2:], total.shape[-2:], strict=True)):
        return False
    return len(value.shape) == 2 or value.shape[0] == 1 or same_dim(value.shape[0], total.shape[0])
