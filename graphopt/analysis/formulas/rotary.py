"""Rotary position embedding, recognized by its algebra (Su et al. 2021, "RoFormer").

Pairs of features (a, b) are rotated: (a cos - b sin, b cos + a sin). The pairs are the two halves of the features ("half-split") or their
neighbours ("interleaved"). Two shapes of code are found: x * cos + rotated(x) * sin with caches that hold every angle twice, and the
rotation written out on the two parts with caches that hold it once. That a cache really holds every angle twice is proved, never assumed.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import onnx_ir as ir

from graphopt.graph import shapes
from graphopt.graph.questions import attr, constant, is_constant, producer, rank, scalar, static_dim

Pairing = Literal["half", "interleaved"]
_ELEMENTWISE = ("Cos", "Sin", "Cast", "Neg", "Identity")


@dataclasses.dataclass(frozen=True)
class RotaryFacts:
    """`output` = rotary(x) over the first `dim` features of x [batch, heads, rows, features]; the rest passes through.

    `cos`, `sin` broadcast against x; `doubled`: they hold `dim` angles (each twice), else dim / 2.
    """

    nodes: tuple[ir.Node, ...]
    output: ir.Value
    x: ir.Value
    cos: ir.Value
    sin: ir.Value
    dim: int
    pairing: Pairing
    doubled: bool


@dataclasses.dataclass(frozen=True)
class _Part:
    """A piece of the features of `x`: features start, start + step, ... (`size` of them)."""

    x: ir.Value
    start: int
    step: int
    size: int
    nodes: tuple[ir.Node, ...]


def rotary_of(node: ir.Node) -> RotaryFacts | str | None:
    """The rotary embedding that ends in `node` (an Add, a Concat, or the operator itself on four axes), why a near one is not, or None."""
    if node.op_type == "RotaryEmbedding":
        return _operator(node)
    if node.op_type == "Add":
        return _widened(_whole(node))
    if node.op_type == "Concat" and attr(node, "axis") in (-1, (rank(node.outputs[0]) or 0) - 1) and len(node.inputs) == 2:
        return _widened(_written_out(node))
    return None


def _operator(node: ir.Node) -> RotaryFacts | None:
    """A RotaryEmbedding without position ids, on [batch, heads, rows, features]."""
    x, cos, sin = node.inputs[:3]
    dim = attr(node, "rotary_embedding_dim", 0) or static_dim(x, -1)
    if x is None or cos is None or sin is None or dim is None or rank(x) != 4 or len(node.inputs) > 3 or rank(cos) != 3:
        return None
    pairing: Pairing = "interleaved" if attr(node, "interleaved", 0) else "half"
    return RotaryFacts((node,), node.outputs[0], x, cos, sin, dim, pairing, doubled=False)


def _whole(add: ir.Node) -> RotaryFacts | str | None:
    """x * cos + rotated(x) * sin."""
    products = [producer(v, "Mul") for v in add.inputs]
    for plain, turned in (products, products[::-1]):
        if plain is None or turned is None:
            continue
        for rotated, sin in (turned.inputs, turned.inputs[::-1]):
            found = _rotated(rotated)
            if found is None or sin is None:
                continue
            x, pairing, nodes = found
            cos = next((b for a, b in (plain.inputs, plain.inputs[::-1]) if a is x), None)
            dim = static_dim(x, -1)
            if cos is None or dim is None:
                return f"the rotated half of `{x.name}` is not added to a multiple of it"
            reason = next((r for r in (_not_doubled(c, pairing) for c in (cos, sin)) if r is not None), None)
            return reason or RotaryFacts((*nodes, plain, turned, add), add.outputs[0], x, cos, sin, dim, pairing, doubled=True)
    return None


def _rotated(value: ir.Value | None) -> tuple[ir.Value, Pairing, tuple[ir.Node, ...]] | None:
    """(x, pairing, nodes) if `value` is x with every pair (a, b) turned into (-b, a)."""
    outer = producer(value, "Reshape", "Flatten")
    join = producer(outer.inputs[0] if outer is not None else value, "Concat")
    if join is None or len(join.inputs) != 2:
        return None
    negative = producer(_lifted(join.inputs[0])[0], "Neg")
    if negative is None:
        return None
    (b, over_b), (a, over_a) = (_lifted(negative.inputs[0]), _lifted(join.inputs[1]))
    second, first = _part(b), _part(a)
    if first is None or second is None or first.x is not second.x:
        return None
    pairing = _pairing(first, second, static_dim(first.x, -1))
    if pairing is None or (pairing == "interleaved") != (outer is not None):
        return None
    lifted = (*over_a, *over_b, *_lifted(join.inputs[0])[1])
    if (pairing == "interleaved") != bool(lifted):
        return None
    nodes = (*second.nodes, *first.nodes, negative, *lifted, join)
    return first.x, pairing, nodes if outer is None else (*nodes, outer)


def _lifted(value: ir.Value | None) -> tuple[ir.Value | None, tuple[ir.Node, ...]]:
    """Under an Unsqueeze of the last axis, as a stack of the pairs is written."""
    node = producer(value, "Unsqueeze")
    if node is None or value is None or shapes.contents(node.inputs[1]) not in ([-1], [(rank(value) or 0) - 1]):
        return value, ()
    return node.inputs[0], (node,)


def _part(value: ir.Value | None) -> _Part | None:
    """Which features of which value a Slice or a Split takes."""
    node = producer(value, "Slice", "Split")
    if node is None or value is None or node.inputs[0] is None:
        return None
    x, size, last = node.inputs[0], static_dim(value, -1), (rank(value) or 0) - 1
    if size is None:
        return None
    if node.op_type == "Split":
        sizes = [static_dim(v, -1) for v in node.outputs]
        before = sizes[: value.index()]
        return None if attr(node, "axis", 0) not in (-1, last) or None in before else _Part(x, sum(s or 0 for s in before), 1, size, (node,))
    starts, axes = shapes.contents(node.inputs[1]), shapes.contents(node.inputs[3]) if len(node.inputs) > 3 else None
    steps = shapes.contents(node.inputs[4]) if len(node.inputs) > 4 else [1]
    if axes not in ([-1], [last]) or starts is None or steps is None or not isinstance(starts[0], int) or not isinstance(steps[0], int):
        return None
    full = static_dim(x, -1)
    start = starts[0] + full if starts[0] < 0 and full is not None else starts[0]
    return _Part(x, start, steps[0], size, (node,))


def _pairing(first: _Part, second: _Part, dim: int | None) -> Pairing | None:
    half = first.size
    if dim != 2 * half or second.size != half:
        return None
    if (first.start, first.step, second.start, second.step) == (0, 1, half, 1):
        return "half"
    return "interleaved" if (first.start, first.step, second.start, second.step) == (0, 2, 1, 2) else None


def _written_out(join: ir.Node) -> RotaryFacts | str | None:
    """Concat(a cos - b sin, b cos + a sin)."""
    minus, plus = producer(join.inputs[0], "Sub"), producer(join.inputs[1], "Add")
    if minus is None or plus is None:
        return None
    products = [producer(v, "Mul") for v in (*minus.inputs, *plus.inputs)]
    if any(p is None for p in products):
        return None
    muls = [p for p in products if p is not None]
    first, second = _factor_part(muls[0]), _factor_part(muls[1])
    if first is None or second is None or first[0].x is not second[0].x:
        return None
    (a, cos), (b, sin) = first, second
    wanted = [{b.nodes[0].outputs[0] if len(b.nodes[0].outputs) == 1 else _of(muls[1], sin), cos}, {_of(muls[0], cos), sin}]
    if {frozenset(wanted[0]), frozenset(wanted[1])} != {frozenset(muls[2].inputs), frozenset(muls[3].inputs)}:
        return None
    pairing = _pairing(a, b, static_dim(a.x, -1))
    if pairing != "half":
        return None
    nodes = (*a.nodes, *b.nodes, *muls, minus, plus, join)
    return RotaryFacts(tuple(dict.fromkeys(nodes)), join.outputs[0], a.x, cos, sin, 2 * a.size, pairing, doubled=False)


def _factor_part(mul: ir.Node) -> tuple[_Part, ir.Value] | None:
    for value, other in (mul.inputs, mul.inputs[::-1]):
        part = _part(value)
        if part is not None and other is not None:
            return part, other
    return None


def _of(mul: ir.Node, factor: ir.Value) -> ir.Value | None:
    return next((v for v in mul.inputs if v is not factor), None)


def _widened(found: RotaryFacts | str | None) -> RotaryFacts | str | None:
    """Take in Concat(rotary(x[:dim]), x[dim:]), where only a part of the features is rotated."""
    if not isinstance(found, RotaryFacts):
        return found
    readers = {u.node for u in found.output.uses()}
    join = next(iter(readers)) if len(readers) == 1 else None
    head = _part(found.x)
    if join is None or head is None or join.op_type != "Concat" or len(join.inputs) != 2 or join.inputs[0] is not found.output:
        return found
    tail, full = _part(join.inputs[1]), static_dim(head.x, -1)
    if tail is None or tail.x is not head.x or full is None or attr(join, "axis") not in (-1, (rank(join.outputs[0]) or 0) - 1):
        return found
    if (head.start, head.step, head.size, tail.start, tail.step, tail.size) != (0, 1, found.dim, found.dim, 1, full - found.dim):
        return found
    nodes = (*head.nodes, *tail.nodes, *found.nodes, join)
    return dataclasses.replace(found, nodes=tuple(dict.fromkeys(nodes)), output=join.outputs[0], x=head.x)


def _not_doubled(cache: ir.Value, pairing: Pairing) -> str | None:
    """None if the last axis of `cache` is proved to hold every angle twice in the given pairing, else the reason."""
    value, elementwise = cache, ir.Value()
    while value is not elementwise:
        elementwise = value
        node = producer(value)
        if node is None or is_constant(value):
            break
        if node.op_type in _ELEMENTWISE or (node.op_type in ("Squeeze", "Unsqueeze", "Expand", "Gather") and _keeps_last(node)):
            value = node.inputs[0]  # type: ignore[assignment]
        elif node.op_type in ("Mul", "Add", "Div") and any(scalar(v) is not None for v in node.inputs):
            value = next(v for v in node.inputs if scalar(v) is None)  # type: ignore[assignment]
        assert value is not None
    if _is_doubled(value, pairing):
        return None
    return f"`{cache.name}` is not proved to hold every angle twice ({pairing} pairs)"


def _keeps_last(node: ir.Node) -> bool:
    source, out = node.inputs[0], node.outputs[0]
    if node.op_type == "Gather":
        return attr(node, "axis", 0) == 0 and (rank(source) or 0) > 1
    size = static_dim(source, -1)
    return size is not None and size > 1 and size == static_dim(out, -1)


def _is_doubled(value: ir.Value, pairing: Pairing) -> bool:
    array = constant(value)
    if array is not None:
        half = array.shape[-1] // 2
        a, b = (array[..., :half], array[..., half:]) if pairing == "half" else (array[..., 0::2], array[..., 1::2])
        return a.shape == b.shape and bool(np.array_equal(a, b))
    if pairing == "half":
        join = producer(value, "Concat")
        return join is not None and len(join.inputs) == 2 and join.inputs[0] is join.inputs[1] and attr(join, "axis") in (-1, (rank(value) or 0) - 1)
    return _neighbours(value)


def _neighbours(value: ir.Value) -> bool:
    """Reshape [..., n, 2] -> [..., 2n] of something that is constant along the last axis."""
    fold = producer(value, "Reshape", "Flatten")
    inner = fold.inputs[0] if fold is not None else None
    if inner is None or static_dim(inner, -1) != 2:
        return False
    spread = producer(inner, "Expand", "Concat", "Tile")
    if spread is None or spread.inputs[0] is None:
        return False
    if spread.op_type == "Concat":
        return len(spread.inputs) == 2 and spread.inputs[0] is spread.inputs[1] and static_dim(spread.inputs[0], -1) == 1
    return static_dim(spread.inputs[0], -1) == 1
