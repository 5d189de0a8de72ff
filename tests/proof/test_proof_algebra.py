"""The algebra of dimensions, layouts and masks, checked for every small case against plain numpy."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from equivalence import Graph  # type: ignore[import-not-found]

import graphopt
from graphopt.graph import dims
from graphopt.graph.layout import Tracer, View
from graphopt.graph.shapes import contents
from graphopt.rewrite.slicing.plan import factor, is_ragged, spread
from graphopt.run import ort

Array = np.ndarray[Any, Any]
S = ir.SymbolicDim("s")
FAR = 2**63 - 1
SIZES = range(1, 8)  # of s: symbols are taken to be 1 or more
EXPRESSIONS: Mapping[str, Any] = {"s": S, "s + 2": S + 2, "s - 1": S - 1, "2 * s": S * 2, "6 * s + 4": S * 6 + 4, "s * s": S * S}


def at(dim: Any, s: int) -> int:
    return dim if isinstance(dim, int) else _at(str(dim.value), s)


@functools.cache
def _at(text: str, s: int) -> int:
    size = dims.size_of(text, {"s": s})
    assert size is not None, f"{text} has no value at s = {s}"
    return size


# ---- dimensions -----------------------------------------------------------------------------------------------------------------------


def test_extent_is_the_length_of_a_slice() -> None:
    """Of known lengths exactly; of a symbolic one wherever it says anything, for every s."""
    bounds = (-2, -1, 0, 1, 3, FAR)
    said = 0
    for start, end, step in itertools.product((-3, -1, 0, 1, 3), bounds, (-2, -1, 1, 2)):
        for size in range(6):
            assert dims.extent(size, start, end, step) == len(range(size)[start:end:step])
        for dim in EXPRESSIONS.values():
            length = dims.extent(dim, start, end, step)
            if length is not None:
                said += 1
                for s in SIZES:
                    assert at(length, s) == len(range(at(dim, s))[start:end:step]), (str(dim), start, end, step, s)
    assert said > 100


def test_extent_up_to_a_symbol() -> None:
    said = 0
    for (name, dim), (until, end), start, step in itertools.product(EXPRESSIONS.items(), EXPRESSIONS.items(), (0, 1, 3), (1, 2)):
        length = dims.extent(dim, start, end, step)
        if length is None:
            continue
        said += 1
        for s in SIZES:
            assert at(length, s) == len(range(at(dim, s))[start : at(end, s) : step]), (name, start, until, step, s)
    assert said > 100


@pytest.mark.parametrize(
    ("text", "value"), [("-s**2", -9), ("2*-s**2", -18), ("t - s**2", -4), ("(-s**2 + t)*2", -8), ("2**-1*s*s*2", 9), ("-s*s", -9), ("t + -s", 2)]
)
def test_a_minus_binds_less_than_a_power(text: str, value: int) -> None:
    assert dims.size_of(text, {"s": 3, "t": 5}) == value


def test_quotients_leave_no_rest() -> None:
    said = 0
    for a, b in itertools.product((*EXPRESSIONS.values(), 0, 1, 4, 6), (*EXPRESSIONS.values(), 1, 2, 3)):
        exact, floored, product = dims.divide(a, b), dims.quotient(a, b), dims.multiply(a, b)
        for s in SIZES:
            assert at(product, s) == at(a, s) * at(b, s)
            if exact is not None:
                said += 1
                assert at(exact, s) * at(b, s) == at(a, s), (str(a), str(b), s)
            if floored is not None and at(b, s):
                assert at(floored, s) == at(a, s) // at(b, s), (str(a), str(b), s)
    assert said > 100


# ---- layouts --------------------------------------------------------------------------------------------------------------------------


def factorizations(size: int) -> Iterator[tuple[int, ...]]:
    """All shapes of up to three axes."""
    parts = [d for d in range(1, size + 1) if size % d == 0]
    for count in (1, 2, 3):
        yield from (shape for shape in itertools.product(parts, repeat=count) if np.prod(shape) == size)


def moves(g: Graph, x: str, shape: Sequence[int | str]) -> Iterator[tuple[str, tuple[int | str, ...]]]:
    """Every layout operator on x, with the shape of its result."""
    whole = range(len(shape))
    for perm in itertools.permutations(whole) if len(shape) else ():
        yield g.add("Transpose", x, perm=list(perm)), tuple(shape[p] for p in perm)
    fixed = [d for d in shape if isinstance(d, int)]
    if len(fixed) == len(shape):
        for wanted in factorizations(int(np.prod(fixed))):
            yield g.add("Reshape", x, g.ints(*wanted)), wanted
    elif isinstance(shape[0], str) and len(fixed) == len(shape) - 1:
        for wanted in factorizations(int(np.prod(fixed))):
            yield g.add("Reshape", x, g.ints(-1, *wanted)), (shape[0], *wanted)
    for axis in whole:
        yield g.add("Unsqueeze", x, g.ints(axis)), (*shape[:axis], 1, *shape[axis:])
        size = shape[axis]
        if size == 1:
            yield g.add("Squeeze", x, g.ints(axis)), (*shape[:axis], *shape[axis + 1 :])
            yield g.add("Expand", x, g.ints(*(3 if k == axis else 1 for k in whole))), (*shape[:axis], 3, *shape[axis + 1 :])
        if not isinstance(size, int):
            continue
        for k in range(-size, size):
            yield g.add("Gather", x, g.const(k, np.int64), axis=axis), (*shape[:axis], *shape[axis + 1 :])
        for start, end in itertools.combinations(range(size + 1), 2):
            cut = g.add("Slice", x, g.ints(start), g.ints(end if end < size else FAR), g.ints(axis - len(shape)))
            yield cut, (*shape[:axis], end - start, *shape[axis + 1 :])
        if size % 2 == 0:
            for half in g.several("Split", 2, x, axis=axis, num_outputs=2):
                yield half, (*shape[:axis], size // 2, *shape[axis + 1 :])


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 1, 2), ("s", 4), (2, 2, 2)], ids=str)
def test_views_of_every_stack_of_two_moves(shape: tuple[int | str, ...]) -> None:
    """Where a view says an element comes from is where it comes from; and every inferred shape is the shape."""
    g = Graph(np.random.default_rng(0))
    x = g.input(*shape, dtype=np.int64)
    for first, between in list(moves(g, x, shape)):
        g.output(first)
        for second, _ in moves(g, first, between):
            g.output(second)
    model = graphopt.load(g.proto())
    session = ort.session(model, optimize=False)
    values = {v.name: v for v in model.graph.outputs} | {x: model.graph.inputs[0]}
    tracer, seen = Tracer(), 0
    for s in (1, 2, 3):
        sizes = [s if d == "s" else int(d) for d in shape]
        feed = {x: np.arange(np.prod(sizes)).reshape(sizes)}
        found = session.run(feed) | feed
        for name, value in values.items():
            view = tracer.view(value)
            assert value.shape is not None
            assert view is not None
            assert [at(d, s) for d in value.shape] == list(found[name].shape)
            seen += view.root is values[x]
            assert np.array_equal(read(view, found[str(view.root.name)], s), found[name]), (name, s)
        if "s" not in shape:
            break
    assert seen > len(values) // 2  # most of them are seen through to the root


def read(view: View, root: Array, s: int) -> Array:
    """The elements that a view says it has."""
    step = view.steps[-1]
    axes = [list(itertools.product(*(range(at(atom.size, s)) for atom in group))) for group in step.axes]
    out = np.empty([len(digits) for digits in axes], root.dtype)
    for index in np.ndindex(*out.shape):
        place = list(step.offset)
        for group, k, digits in zip(step.axes, index, axes, strict=True):
            for atom, digit in zip(group, digits[k], strict=True):
                if atom.axis >= 0:
                    place[atom.axis] += digit * at(atom.stride, s)
        out[index] = root[tuple(place)]
    return out


# ---- contents of integer tensors ------------------------------------------------------------------------------------------------------


def test_known_contents_are_the_contents() -> None:
    """Every pair of integer operators on sizes: what inference says of the elements holds at every size (where no length is negative)."""
    g = Graph(np.random.default_rng(0))
    x = g.input("s", 3, 4)
    shape, three = g.add("Shape", x), g.ints(3)
    size = g.add("Gather", shape, g.ints(0))
    unary = ("Neg", "Abs", "Cast")
    binary = ("Add", "Sub", "Mul", "Div", "Mod", "Min", "Max", "Equal")

    def grow(value: str) -> Iterator[str]:
        for op in unary:
            yield g.add(op, value, **({"to": 6} if op == "Cast" else {}))
        for op, other in itertools.product(binary, (three, size)):
            yield g.add(op, value, other)
            yield g.add(op, other, value)

    numbers = [v for v in grow(size) if not _logical(g, v)]
    for value in [v for n in numbers for v in _guarded(g, n, grow)]:
        g.output(value)
    model = graphopt.load(g.proto())
    session = ort.session(model, optimize=False)
    said = 0
    for s in (6, 7, 11):
        found = session.run({"x0": np.zeros((s, 3, 4))})
        for value in model.graph.outputs:
            known = contents(value)
            if known is not None and not any(map(dims.is_opaque, known)):
                said += 1
                assert [at(k, s) for k in known] == found[str(value.name)].reshape(-1).tolist(), (
                    f"{value.producer()} of {[v.producer() for v in value.producer().inputs]} at s = {s}"
                )
    assert said > 100


def _logical(g: Graph, name: str) -> bool:
    return any(name in node.output and node.op_type in ("Equal",) for node in g.nodes)


def _guarded(g: Graph, name: str, grow: Any) -> Iterator[str]:
    """Further operators on a number of the right type, without dividing by what may be 0."""
    node = next(n for n in g.nodes if name in n.output)
    if node.op_type == "Cast":
        return
    for value in grow(name):
        made = next(n for n in g.nodes if value in n.output)
        if made.op_type in ("Div", "Mod") and made.input[1] == name:
            g.nodes.remove(made)
        else:
            yield value


# ---- removals along an axis -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[2], [2, 2], [2, 3], [3, 2], [2, 2, 2]], ids=str)
def test_every_removal_that_is_a_product_comes_back(sizes: list[int]) -> None:
    """A removal is ragged exactly where no removals along the pieces give it."""
    total = int(np.prod(sizes))
    products = {
        spread([np.array(m, bool) for m in masks]).tobytes() for masks in itertools.product(*(itertools.product((0, 1), repeat=n) for n in sizes))
    }
    for bits in itertools.product((False, True), repeat=total):
        mask = np.array(bits)
        assert is_ragged(mask, sizes) == (mask.tobytes() not in products)
        assert not (spread(factor(mask, sizes)) & ~mask).any()  # never more than was asked for
