"""What may be fed to each input of a graph, read off the graph itself: ids below the size of the table that they index, 0/1 masks.

A random feed that breaks these rules tests nothing: the run fails, or every row is masked, or both sides clamp the same bad index.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from graphopt.core.contract import Array
from graphopt.graph.dims import Bindings, fed_inputs, shape_at, size_of
from graphopt.graph.questions import constant

# fmt: off
# Op -> inputs whose elements come out again, unchanged.
_SAME = {
    "Identity": (0,), "Cast": (0,), "CastLike": (0,), "Slice": (0,), "Reshape": (0,), "Unsqueeze": (0,), "Squeeze": (0,), "Transpose": (0,),
    "Expand": (0,), "Flatten": (0,), "Split": (0,), "Tile": (0,), "Pad": (0,), "Gather": (0,), "GatherElements": (0,), "GatherND": (0,),
    "Compress": (0,), "Clip": (0,), "Trilu": (0,), "Where": (1, 2), "SequenceAt": (0,), "ConcatFromSequence": (0,), "OptionalGetElement": (0,),
}
# Op -> from this input on, elements are sizes or positions.
_SIZES = {
    "Reshape": 1, "Expand": 1, "Slice": 1, "Tile": 1, "TopK": 1, "ConstantOfShape": 0, "Range": 0, "Pad": 1, "Resize": 2, "Split": 1, "Loop": 0,
}
# fmt: on
_SAME_ANY = frozenset({"Concat", "Min", "Max"})
_INDICES = {"Gather": 1, "GatherElements": 1, "ScatterElements": 1, "GatherND": 1, "ScatterND": 1}
_TESTS = frozenset({"Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual", "Not", "And", "Or", "Xor"})
_ABOUT = frozenset({"Shape", "Size", "NonZero", "ArgMax", "ArgMin", "TopK", "Unique"})  # give integers about their input, not its elements
_BIG = 1e3  # (1 - mask) * big: what makes a mask additive
_FILL = -1e4  # "minus infinity" that float16 can hold
_STEPS = 10_000
_MOST = 1 << 28  # elements of an input that is made up; a file may declare any size


@dataclasses.dataclass(frozen=True)
class Role:
    """What an input is for. `low` and `high` (inclusive) bound an index, a count or an integer."""

    kind: Literal["index", "mask", "additive", "flag", "count", "integer", "float", "text"]
    low: int = 0
    high: int = 0


def random_feed(model: ir.Model, bindings: Bindings, *, seed: int = 0, turn: int = 0) -> dict[str, Any]:
    """One batch of typed random values for every fed input; a sequence has two.

    Args:
        bindings: a size for every symbol (see `symbols`).
        turn: which batch this is; it varies the values, and which rows of a mask are whole.

    Raises:
        ValueError: a dimension is not bound, or an input has no shape, or is too large; the text names it.
    """
    rng = np.random.default_rng([seed, turn])
    feed: dict[str, Any] = {}
    for value in fed_inputs(model):
        shape = shape_at(value, bindings)
        if value.dtype is None or value.dtype == ir.DataType.UNDEFINED:
            raise ValueError(f"input `{value.name}` has no type")
        if shape is None:
            raise ValueError(f"input `{value.name}` has {'an unknown shape' if value.shape is None else f'the unbound shape {value.shape}'}")
        if math.prod(shape) > _MOST:
            raise ValueError(f"input `{value.name}` has the shape {list(shape)}, too many numbers to make up")
        array = _fill(role(value, bindings), shape, value.dtype, rng, turn)
        feed[str(value.name)] = [array, array.copy()] if isinstance(value.type, ir.SequenceType) else array
    return feed


def role(value: ir.Value, bindings: Bindings) -> Role:
    """What the consumers of a graph input (and, for masks, its name) say that it is."""
    assert value.dtype is not None
    named_mask = "mask" in str(value.name).lower()
    if value.dtype == ir.DataType.STRING:
        return Role("text")
    if value.dtype == ir.DataType.BOOL:
        return Role("mask") if value.shape is not None and len(value.shape) > 0 else Role("flag")
    seen = _follow(value)
    if value.dtype.is_floating_point():
        if seen.inverted or (seen.tested and not seen.data):
            return Role("mask")
        return Role("float") if not named_mask else Role("additive" if seen.added else "mask")
    if named_mask:
        return Role("mask")
    if seen.bounds:
        ranges = [b.range(bindings) for b in seen.bounds]
        return Role("index", max(low for low, _ in ranges), min(high for _, high in ranges))
    if seen.counts:
        return Role("count", 1, 1)
    return Role("mask") if seen.tested or seen.inverted else Role("integer", 0, 1 if seen.opaque else 7)


@dataclasses.dataclass(frozen=True)
class _Affine:
    """What became of x on the way: scale * x + something between low and high; `exact` is False where that is not known."""

    scale: int = 1
    low: int = 0
    high: int = 0
    exact: bool = True


@dataclasses.dataclass(frozen=True)
class _Bound:
    """`way(x)` must be an index into an axis of size `size`."""

    size: Any
    way: _Affine

    def range(self, bindings: Bindings) -> tuple[int, int]:
        top = (size_of(self.size, bindings) or 1) - 1
        if not self.way.exact:
            return 0, min(1, top)
        low, high = -self.way.low / self.way.scale, (top - self.way.high) / self.way.scale
        return math.ceil(min(low, high)), math.floor(max(low, high))


@dataclasses.dataclass
class _Seen:
    bounds: list[_Bound] = dataclasses.field(default_factory=list)
    tested: bool = False  # compared, or cast to bool
    inverted: bool = False  # (1 - mask) * -10000
    data: bool = False  # computed with otherwise
    added: bool = False  # added to scores as it is
    counts: bool = False  # a size, a length or a position for another op
    opaque: bool = False  # reaches an op of another domain


def _follow(start: ir.Value) -> _Seen:
    """Walk from an input through everything that passes its elements on."""
    seen = _Seen()
    visited: set[tuple[ir.Value, _Affine]] = set()
    stack = [(start, _Affine())]
    while stack and len(visited) < _STEPS:
        state = stack.pop()
        if state in visited:
            continue
        visited.add(state)
        value, way = state
        seen.data |= value.is_graph_output()
        for node, index in value.uses():
            stack.extend(_step(node, index, way, seen))
    return seen


def _step(node: ir.Node, index: int, way: _Affine, seen: _Seen) -> Iterator[tuple[ir.Value, _Affine]]:
    """Note what this use tells, and give the values in which the elements go on."""
    op = node.op_type
    if node.domain not in ("", "ai.onnx"):
        seen.opaque = True
        return
    if _INDICES.get(op) == index:
        seen.bounds.extend(_Bound(size, way) for size in _indexed(node))
    elif op == "OneHot" and index == 0:
        depth = constant(node.inputs[1])
        seen.bounds.append(_Bound(1 if depth is None else int(depth.reshape(-1)[0]), way))
    elif op in _SIZES and index >= _SIZES[op] and not (op == "Loop" and index > 1):
        seen.counts = True
    elif op in _TESTS or (op == "Where" and index == 0) or (op == "Cast" and node.attributes["to"].as_int() == ir.DataType.BOOL):
        seen.tested |= way.exact
    elif index in _SAME.get(op, ()) or op in _SAME_ANY:
        yield from ((out, way) for out in node.outputs)
    elif op in ("Loop", "Scan"):
        body = node.attributes["body"].as_graph()
        yield body.inputs[index], way
    elif op in ("Add", "Sub", "Mul"):
        yield from _arithmetic(node, index, way, seen)
    elif op == "Attention" and index == 3:
        seen.added = True
    elif op not in _ABOUT:
        seen.data = True
        yield from ((out, dataclasses.replace(way, exact=False)) for out in node.outputs if out.dtype is not None and out.dtype.is_integer())


def _indexed(node: ir.Node) -> list[Any]:
    """The sizes that the indices of a Gather or Scatter must stay below."""
    data = node.inputs[0]
    if data is None or data.shape is None:
        return [None]
    if node.op_type in ("GatherND", "ScatterND"):
        return list(data.shape) or [None]
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    return [data.shape[axis]]


def _arithmetic(node: ir.Node, index: int, way: _Affine, seen: _Seen) -> Iterator[tuple[ir.Value, _Affine]]:
    out, other = node.outputs[0], constant(node.inputs[1 - index])
    if node.op_type in ("Add", "Sub") and other is not None and bool((abs(other) == 1).all()) and _scaled_up(out):
        seen.inverted = True
    else:
        seen.data = True
    if other is None or other.size == 0:
        seen.added |= node.op_type == "Add"
        yield out, dataclasses.replace(way, exact=False)
        return
    low, high = float(other.min()), float(other.max())
    if not (low.is_integer() and high.is_integer() and abs(low) < 2**53 and abs(high) < 2**53):
        yield out, dataclasses.replace(way, exact=False)
    elif node.op_type == "Add":
        yield out, dataclasses.replace(way, low=way.low + int(low), high=way.high + int(high))
    elif node.op_type == "Mul":
        factor = int(low)
        exact = way.exact and low == high and factor != 0
        ends = (way.low * factor, way.high * factor)
        yield out, _Affine(way.scale * factor, min(ends), max(ends)) if exact else dataclasses.replace(way, exact=False)
    elif index == 0:
        yield out, dataclasses.replace(way, low=way.low - int(high), high=way.high - int(low))
    else:
        yield out, _Affine(-way.scale, int(low) - way.high, int(high) - way.low, way.exact)


def _scaled_up(value: ir.Value, depth: int = 4) -> bool:
    """True if some consumer, seen through casts and layout, multiplies by a number as large as only masks need."""
    for node, index in value.uses():
        factor = constant(node.inputs[1 - index]) if node.op_type == "Mul" else None
        if factor is not None and factor.size == 1 and abs(float(factor.reshape(()))) >= _BIG:
            return True
        if depth and index in _SAME.get(node.op_type, ()) and _scaled_up(node.outputs[0], depth - 1):
            return True
    return False


def _fill(role: Role, shape: tuple[int, ...], dtype: ir.DataType, rng: np.random.Generator, turn: int) -> Array:
    if role.kind == "text":
        return np.array([f"word {i}" for i in rng.integers(0, 100, math.prod(shape))], dtype=object).reshape(shape)
    if role.kind == "mask":
        return _mask(shape, turn, rng).astype(dtype.numpy())
    if role.kind == "additive":
        return np.where(_mask(shape, turn, rng), 0.0, _FILL).astype(dtype.numpy())
    if role.kind == "flag":
        return np.full(shape, turn % 2 == 0)
    if role.kind == "float":
        return np.asarray(rng.standard_normal(shape)).astype(dtype.numpy())
    info = np.iinfo(dtype.numpy()) if dtype.numpy().kind in "iu" else None
    low, high = (role.low, role.high) if info is None else (max(role.low, int(info.min)), min(role.high, int(info.max)))
    return np.asarray(rng.integers(low, max(low, high) + 1, shape)).astype(dtype.numpy())


def _mask(shape: Sequence[int], turn: int, rng: np.random.Generator) -> Array:
    """True = keep. Along the last axis that is not 1, rows take turns: all ones; left padding and a hole; right padding and a hole.

    Row 0 of turn 0 is all ones, and no row is empty: what a model gives for a row without any key is its own affair.
    """
    axis = max((k for k, size in enumerate(shape) if size > 1), default=None)
    if axis is None:
        return np.ones(shape, bool)
    width = shape[axis]
    mask = np.ones((math.prod(shape) // width, width), bool)
    pad = max(1, width // 3)
    for row, kept in enumerate(mask):
        kind = (row + turn) % 3
        if kind == 0:
            continue
        kept[:pad] = False
        if width - pad > 2:
            kept[rng.integers(pad + 1, width - 1)] = False
        if kind == 2:
            kept[:] = kept[::-1]
    parts = [s for k, s in enumerate(shape) if k != axis]
    return np.moveaxis(mask.reshape([*parts, width]), -1, axis)
