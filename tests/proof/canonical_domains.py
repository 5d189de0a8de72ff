"""Random graphs for every rule of canonicalize: all shapes, attributes and broadcasts that it may meet, and the edges of its condition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from equivalence import Graph  # type: ignore[import-not-found]

Dims = tuple[int | str, ...]


def dims(g: Graph, least: int = 0, most: int = 4) -> Dims:
    """A shape with sizes from 1 to 4, and symbols."""
    return tuple(g.pick(1, 2, 3, 4, "a", "b", "c") for _ in range(int(g.rng.integers(least, most + 1))))


def beside(g: Graph, shape: Dims) -> Dims:
    """A static shape that broadcasts with `shape`, now and then with more axes, or with larger ones."""
    kept = shape[int(g.rng.integers(0, len(shape) + 1)) :]
    fixed = tuple(1 if isinstance(d, str) or g.chance(0.4) else d if d != 1 or g.chance(0.7) else 2 for d in kept)
    return (*g.pick((), (), (1,), (2,)), *fixed) if len(kept) == len(shape) else fixed


def elementwise(g: Graph, op: str, value: Any, *, swap: bool = False, dtype: Any = None, shape: Dims | None = None) -> None:
    shape = dims(g) if shape is None else shape
    x, c = g.input(*shape, dtype=dtype), g.const(np.full([int(d) for d in beside(g, shape)], value), dtype)
    g.output(g.add("Abs", g.add(op, *((c, x) if swap else (x, c)))) if g.chance() and dtype is None else g.add(op, *((c, x) if swap else (x, c))))


# ---- arithmetic -----------------------------------------------------------------------------------------------------------------------


def neutral_element(g: Graph) -> None:
    op = g.pick("Add", "Sub", "Mul", "Div")
    neutral = 0.0 if op in ("Add", "Sub") else 1.0
    elementwise(g, op, g.pick(neutral, neutral, neutral + 1e-9, 1 - neutral, -neutral), swap=g.chance())


def constant_on_the_right(g: Graph) -> None:
    elementwise(g, g.pick("Add", "Mul", "Sub", "Div"), g.rng.standard_normal(), swap=True)


def subtraction(g: Graph) -> None:
    dtype = g.pick(None, None, np.int64, np.uint8)
    elementwise(g, "Sub", g.pick(2.5, -1.0, math.inf, 1e-310) if dtype is None else g.pick(1, 3), dtype=dtype, swap=g.chance(0.2))


def division(g: Graph) -> None:
    dtype = g.pick(None, None, None, np.int64)
    value = g.pick(3.0, -0.7, math.inf, 5e-324, 1e300, 1.0, math.nan) if dtype is None else g.pick(2, 3)
    elementwise(g, "Div", value, dtype=dtype, swap=g.chance(0.4))


def power(g: Graph) -> None:
    shape = dims(g)
    x = g.add("Abs", g.input(*shape)) if g.chance(0.8) else g.input(*shape)
    kind = g.pick(np.float64, np.float64, np.int64)
    c = g.const(np.full([int(d) for d in beside(g, shape)], g.pick(1, 2, 3, 0, -1) if kind is np.int64 else g.pick(0.5, -0.5, 1, 2, -1, 0.25)), kind)
    g.output(g.add("Pow", x, c))


def chained_scales(g: Graph) -> None:
    shape = dims(g)
    value = g.input(*shape)
    for _ in range(int(g.rng.integers(2, 4))):
        value = g.add("Mul", value, g.const(np.full([1] * int(g.rng.integers(0, 5)), g.pick(0.5, 3.0, -1e200, 1e-200, 0.0, math.inf))))
        if g.chance(0.15):
            g.output(value)
    g.output(g.add("Tanh", value))


def logic(g: Graph) -> None:
    op, shape = g.pick("And", "Or", "Not", "Where"), dims(g)
    if op == "Not":
        g.output(g.add("Not", g.add("Not", g.input(*shape, dtype=bool))))
        return
    size = [int(d) for d in beside(g, shape)]
    flags = g.const(np.full(size, g.chance()) if g.chance(0.8) else g.rng.random(size) < 0.5, bool)
    if op == "Where":
        other = g.const(g.rng.standard_normal([int(d) for d in beside(g, shape)]))
        g.output(g.add("Where", flags, *((x := g.input(*shape)), other) if g.chance() else (other, (x := g.input(*shape)))), g.add("Neg", x))
        return
    x = g.input(*shape, dtype=bool)
    g.output(g.add(op, *((x, flags) if g.chance() else (flags, x))))


# ---- layout ---------------------------------------------------------------------------------------------------------------------------


def size_of(g: Graph, x: str, axis: int) -> str:
    """[size] of an axis, computed at run time."""
    return g.add("Gather", g.add("Shape", x), g.ints(axis))


def target(g: Graph, x: str, shape: Sequence[int | str]) -> str:
    """The shape as a tensor: symbols are read from x."""
    parts = [g.ints(d) if isinstance(d, int) and g.chance(0.7) else size_of(g, x, k) for k, d in enumerate(shape)]
    return g.add("Concat", *parts, axis=0) if parts else g.const(np.zeros(0), np.int64)


def identity(g: Graph) -> None:
    shape = dims(g, 1)
    x = g.input(*shape)
    op, axis = g.pick("Identity", "Cast", "CastLike", "Tile", "Split", "Dropout", "Concat", "Expand", "Slice"), int(g.rng.integers(len(shape)))
    match op:
        case "Cast":
            out = g.add("Cast", x, to=g.pick(11, 11, 1, 7))
        case "CastLike":
            out = g.add("CastLike", x, g.pick(x, g.ints(1)))
        case "Tile":
            out = g.add("Tile", x, g.ints(*(1 if g.chance(0.9) else 2 for _ in shape)))
        case "Split":
            out = g.add("Split", x, axis=axis, num_outputs=1)
        case "Concat":
            out = g.add("Concat", x, axis=axis - (len(shape) if g.chance() else 0))
        case "Expand":
            out = g.add("Expand", x, target(g, x, shape) if g.chance() else g.ints(*(1 for _ in shape)))
        case "Slice":
            ends = g.pick(size_of(g, x, axis), g.ints(2**31 - 1), g.ints(2**63 - 1), g.ints(3), g.ints(-1), g.ints(-(2**63)))
            out = g.add("Slice", x, g.ints(g.pick(0, 0, 0, -1, -9, 1)), ends, g.ints(axis), g.ints(g.pick(1, 1, 1, -1, 2)))
        case _:
            out = g.add(op, x)
    g.output(g.add("Neg", out) if g.chance() else out)


def expand(g: Graph) -> None:
    shape = dims(g)
    x = g.add("Neg", g.input(*shape))
    wanted = [d if d != 1 or g.chance() else g.pick(2, 3) for d in shape]
    wanted = [1 if g.chance(0.2) else d for d in wanted]
    lead = [g.ints(d) for d in g.pick((), (1,), (2,))]
    g.output(g.add("Expand", x, g.add("Concat", *lead, target(g, x, wanted), axis=0)))


def unexpanded(g: Graph) -> None:
    """An operand expanded to the shape of another one, of the result, or to something larger, in front of an elementwise operator."""
    shape = dims(g, 1)
    x = g.input(*shape)
    narrow = g.add("Neg", g.input(*(1 if g.chance(0.4) else d for d in shape[int(g.rng.integers(len(shape))) :])))
    part = {} if g.chance(0.8) else {"start": 0, "end": len(shape)}
    other = g.add("Abs", x) if g.chance() else x
    wanted = g.add("Shape", g.pick(x, x, narrow), **part)
    if g.chance(0.2):
        wanted = g.add("Concat", g.ints(2), wanted, axis=0)
    both = [other, g.add("Expand", narrow, wanted)]
    g.output(g.add("Tanh", g.add(g.pick("Add", "Mul", "Sub", "Max"), *(both if g.chance() else both[::-1]))))


def slice_ends(g: Graph) -> None:
    shape = dims(g, 1)
    x, kind = g.input(*shape), g.pick(np.int64, np.int64, np.int32)
    some = list(g.rng.permutation(len(shape))[: int(g.rng.integers(1, len(shape) + 1))])
    ends = [size_of(g, x, int(k)) if kind is np.int64 and g.chance() else g.const([g.pick(2, 3, 4, 5, 100, -1, 2**31 - 1)], kind) for k in some]
    starts = g.const([g.pick(0, 0, 1, -1, -2, 7) for _ in some], kind)
    axes = g.const([int(k) - (len(shape) if g.chance(0.3) else 0) for k in some], kind)
    steps = [g.const([g.pick(1, 1, 2, -1) for _ in some], kind)] if g.chance() else []
    g.output(g.add("Slice", x, starts, g.add("Concat", *ends, axis=0), axes, *steps))


def concat(g: Graph) -> None:
    shape = dims(g, 1)
    axis = int(g.rng.integers(len(shape)))
    arms = [g.input(*shape)]
    for _ in range(int(g.rng.integers(1, 4))):
        empty = g.add("Slice", arms[0], g.ints(g.pick(0, 1)), g.ints(g.pick(0, 0, 1)), g.ints(axis))
        arms.insert(int(g.rng.integers(len(arms) + 1)), g.pick(empty, g.add("Neg", arms[0])))
    g.output(g.add("Concat", *arms, axis=axis - (len(shape) if g.chance() else 0)))


def transpose(g: Graph) -> None:
    shape = dims(g, 1)
    value = g.input(*shape)
    for _ in range(int(g.rng.integers(1, 4))):
        perm = {} if g.chance(0.3) else {"perm": [int(p) for p in g.rng.permutation(len(shape))]}
        value = g.add("Transpose", value, **perm)
        if g.chance(0.15):
            g.output(value)
    g.output(value)


def regrouped(g: Graph, shape: Sequence[int | str]) -> list[list[int | str]]:
    """Neighbouring axes in groups, each of which will be one axis."""
    groups: list[list[int | str]] = []
    for d in shape:
        if groups and g.chance(0.4):
            groups[-1].append(d)
        else:
            groups.append([d])
    return groups


def reshape(g: Graph) -> None:
    """Merges and splits, with 0, -1, and sizes that are read at run time; back again, or not."""
    shape = dims(g, 1)
    x = g.input(*shape)
    value, groups = x, regrouped(g, shape)
    free = int(g.rng.integers(len(groups) + 1))
    parts, axis = [], 0
    for k, group in enumerate(groups):
        sizes = [g.ints(d) if isinstance(d, int) else size_of(g, x, axis + i) for i, d in enumerate(group)]
        product = sizes[0]
        for s in sizes[1:]:
            product = g.add("Mul", product, s)
        parts.append(g.ints(-1) if k == free else g.ints(0) if len(group) == 1 and axis == k and g.chance() else product)
        axis += len(group)
    value = g.add("Reshape", g.add("Neg", value) if g.chance() else value, g.add("Concat", *parts, axis=0), **g.pick({}, {}, {"allowzero": 0}))
    if g.chance():
        value = g.add("Reshape", value, target(g, x, shape))
    g.output(value)


def batched_transpose(g: Graph) -> None:
    lead, rest = dims(g, 1, 2), dims(g, 2, 2)
    x = g.input(*lead, *rest)
    tail = [size_of(g, x, len(lead) + k) for k in range(2)]
    perm = g.pick([0, 2, 1], [0, 2, 1], [0, 1, 2], [1, 0, 2])
    flipped = g.add("Transpose", g.add("Reshape", x, g.add("Concat", g.ints(-1), *tail, axis=0)), perm=perm)
    order = (0, 1) if g.chance(0.2) else (1, 0)
    g.output(g.add("Reshape", flipped, g.add("Concat", *(size_of(g, x, k) for k in range(len(lead))), *(tail[k] for k in order), axis=0)))


def same_elements(g: Graph) -> None:
    """Squeeze, Unsqueeze, Flatten and Reshape, there and back."""
    shape = dims(g, 1, 3)
    x = g.input(*shape)
    value, now = x, list(shape)
    for _ in range(int(g.rng.integers(1, 4))):
        ones = [k for k, d in enumerate(now) if d == 1]
        match g.pick("Unsqueeze", "Squeeze", "Flatten", "back"):
            case "Unsqueeze":
                k = int(g.rng.integers(len(now) + 1))
                value, now = g.add("Unsqueeze", value, g.ints(k - (len(now) + 1 if g.chance(0.3) else 0))), [*now[:k], 1, *now[k:]]
            case "Squeeze" if ones:
                k = g.pick(*ones)
                value, now = g.add("Squeeze", value, g.ints(k)), [*now[:k], *now[k + 1 :]]
            case "Flatten" if len(now) == 2:
                value = g.add("Flatten", value, axis=g.pick(1, -1))
            case "back":
                value, now = g.add("Reshape", value, target(g, x, shape)), list(shape)
    g.output(g.add("Neg", value) if g.chance(0.7) else value)


# ---- folding and merging --------------------------------------------------------------------------------------------------------------


def fold(g: Graph) -> None:
    """Arithmetic of constants and of sizes."""
    shape = dims(g, 1)
    x, axis = g.input(*shape), int(g.rng.integers(len(shape)))
    number = size_of(g, x, axis)
    for _ in range(int(g.rng.integers(1, 4))):
        number = g.add(g.pick("Add", "Mul", "Sub"), number, g.ints(g.pick(1, 2, 3)))
    a, b = g.const(g.rng.standard_normal((2, 3))), g.const(g.rng.standard_normal((3,)))
    made = g.add(g.pick("Add", "Mul", "Sub"), g.add("Exp", a), b)
    g.output(g.add("Mul", g.add("ReduceSum", x), g.add("ReduceMax", made)), number, g.add("Cast", number, to=11))


def seen_before(g: Graph) -> None:
    shape = dims(g, 1)
    x, y = g.input(*shape), g.input(*shape)
    op = g.pick("Add", "Sub", "Mul", "Pow", "Max")
    x, y = (g.add("Abs", v) for v in (x, y))
    first, second = g.add(op, x, y), g.add(op, *((x, y) if g.chance() else (y, x)))
    pair = [g.add("Softmax", v, axis=g.pick(-1, 0)) for v in (first, second)]
    g.output(g.add("Sub", *pair))


def equal_weights_merged(g: Graph) -> None:
    x = g.input("a", 3)
    values = np.array(g.pick([1.0, 2.0, 3.0], [0.0, -0.0, np.nan]))
    other = values.copy()
    if g.chance():
        other[g.pick(0, 1, 2)] = g.pick(-0.0, 7.0)
    a, b = g.const(values), g.const(other)
    g.output(g.add("Div", g.add("Add", x, a), g.add("Abs", b)), g.add("Atan", g.add("Div", x, b)))


def einsum(g: Graph) -> None:
    """Two operands with any indices, in any order: a matrix product of groups of indices, or with an index that one operand has alone."""
    sizes = dict(zip("ijklm", g.rng.permutation(np.array(["a", "b", 2, 3, 4], dtype=object)), strict=True))
    roles = dict.fromkeys("i", "rows") | dict.fromkeys("j", "inner") | dict.fromkeys("k", "columns")
    roles |= {label: g.pick("batch", "rows", "inner", "columns", "summed", None, None) for label in "lm"}
    left = [i for i, role in roles.items() if role in ("rows", "inner", "batch", "summed")]
    right = [i for i, role in roles.items() if role in ("columns", "inner", "batch")]
    out = [i for i, role in roles.items() if role in ("rows", "columns", "batch")]
    left, right, out = (list(g.rng.permutation(side)) for side in (left, right, out))
    if g.chance(0.1):
        right.append(right[-1])  # a diagonal
    if g.chance(0.1):
        out = out[1:]
    a, b = g.input(*(sizes[i] for i in left)), g.input(*(sizes[i] for i in right))
    b = b if g.chance(0.7) or any(isinstance(sizes[i], str) for i in right) else g.const(g.rng.standard_normal([sizes[i] for i in right]))
    g.output(g.add("Einsum", a, b, equation=f"{''.join(left)},{''.join(right)}->{''.join(out)}"))


def bias_before_split(g: Graph) -> None:
    """Heads cut from what a product makes, and a constant for each of their features, for each of one head, or for rows."""
    x = g.input(*g.pick(("a",), ("a", "b"), (2, 3, "a")), 3)
    made = g.add("MatMul", x, g.const(g.rng.standard_normal([3, 8])))
    split = g.pick((2, 4), (4, 2), (4, 1, 2))
    heads = g.add("Reshape", made if g.chance(0.9) else g.add("Relu", made), g.ints(*[0] * (len(g.inputs[x][1]) - 1), *split))
    g.output(g.add("Add", heads, g.const(g.rng.standard_normal(g.pick(split, split, (1, *split), (1, *split[1:]), split[-1:], (1,))))))
    if g.chance(0.1):
        g.output(heads)


DOMAINS = (
    neutral_element, constant_on_the_right, subtraction, division, power, chained_scales, logic, identity, expand, slice_ends, concat, unexpanded, transpose,
    reshape, batched_transpose, same_elements, fold, seen_before, equal_weights_merged, einsum,
    bias_before_split,
)  # fmt: skip
