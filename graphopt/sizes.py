"""Sizes for the symbolic dimensions of a graph: which symbols there are, which sizes they may take, what an expression comes to."""

from __future__ import annotations

import re
from collections.abc import Mapping

import onnx_ir as ir

Bindings = Mapping[str, int]


def fed_inputs(model: ir.Model) -> list[ir.Value]:
    """The inputs that a caller must feed; an overridable initializer has its default."""
    return [v for v in model.graph.inputs if v.const_value is None]


def size_of(dim: object, bindings: Bindings) -> int | None:
    """The size of one dimension where the bindings decide it; `past + 1` is computed."""
    if isinstance(dim, int):
        return dim
    text = getattr(dim, "value", dim)
    if not isinstance(text, str):
        return None
    if text in bindings:
        return bindings[text]
    try:
        found = ir.SymbolicDim(text).evaluate(bindings)
    except ValueError:  # a name that is no expression, such as `input::dim 0`
        return None
    return found if isinstance(found, int) else None


def dim_at(value: ir.Value, axis: int) -> int | str:
    """One dimension of an input as a number or text; one without a name gets one of its own."""
    assert value.shape is not None
    dim = value.shape[axis]
    if isinstance(dim, int):
        return dim
    return dim.value or f"{value.name}.{axis}"


def shape_at(value: ir.Value, bindings: Bindings) -> tuple[int, ...] | None:
    """The shape of an input at the given sizes, or None where it is not decided."""
    if value.shape is None:
        return None
    sizes = [size_of(dim_at(value, axis), bindings) for axis in range(len(value.shape))]
    return None if None in sizes else tuple(s for s in sizes if s is not None)


def symbols(model: ir.Model) -> dict[str, int]:
    """Every symbol in the shapes of the fed inputs -> the axis where it stands first."""
    found: dict[str, int] = {}
    for value in fed_inputs(model):
        for axis in range(len(value.shape or ())):
            dim = dim_at(value, axis)
            for name in dim_names(dim) if isinstance(dim, str) else ():
                found[name] = min(axis, found.get(name, axis))
    return found


def limits(model: ir.Model) -> dict[str, int]:
    """Upper bounds of symbols that the graph shows: a position table of 512 rows, sliced to `seq`, gives Min(512, seq)."""
    found: dict[str, int] = {}
    for text in _dims(model):
        for size, name in re.findall(r"Min\((\d+), ([^()]+)\)", text):
            found[name] = min(int(size), found.get(name, int(size)))
    return found


def fits(model: ir.Model, bindings: Bindings) -> bool:
    """False if some value of the graph would be empty at these sizes, as behind a convolution that is wider than its input."""
    sizes = (size_of(text, bindings) for text in _dims(model))
    return all(size is None or size > 0 for size in sizes)


def _dims(model: ir.Model) -> set[str]:
    """Every distinct symbolic dimension in the graph, as text."""
    shapes = (value.shape for node in model.graph for value in node.outputs if value.shape is not None)
    return {dim.value for shape in shapes for dim in shape if not isinstance(dim, int) and dim.value is not None}


def dim_names(text: str) -> frozenset[str]:
    """The symbols in a dimension: those of an expression, or the text itself where it is none."""
    try:
        return ir.SymbolicDim(text).free_symbols()
    except ValueError:
        return frozenset({text})
