"""Arithmetic of dimensions: ints and symbolic expressions."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

import onnx_ir as ir

Dim = int | ir.SymbolicDim
_FAR = 2**31 - 1  # bounds of a Slice from here on mean the end of the axis, as exporters write them
_LARGE = 2**20  # elements of an axis
_OPAQUE = re.compile(r"\b(_d\d+|join_\w+)\b")  # symbols that inference made up


_MINUS = re.compile(r"(^|[(,+\-/%]|(?<!\*)\*)\s*-")  # one that negates; that of an exponent stands behind **


def symbolic(text: str) -> ir.SymbolicDim:
    """The dimension that a text says, with the usual precedence: the parser of onnx_ir takes -s**2 for (-s)**2."""
    if "**" not in text or not _MINUS.search(text):
        return ir.SymbolicDim(text)
    return ir.SymbolicDim(ir.SymbolicDim(_MINUS.sub(r"\1-1*", text))._expr)


def is_opaque(dim: object) -> bool:
    """True for a dimension that inference could not express in the symbols of the graph inputs."""
    return not isinstance(dim, int) and (getattr(dim, "value", None) is None or bool(_OPAQUE.search(str(dim))))


def nonnegative(dim: int | ir.SymbolicDim) -> bool:
    """True if the value of a dimension expression is proved >= 0 (dimension symbols are)."""
    if isinstance(dim, int):
        return dim >= 0
    text = str(dim.value)
    return dim.value is not None and "-" not in text


@functools.lru_cache(maxsize=4096)
def multiply(a: int | ir.SymbolicDim, b: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
    """The product of two dimensions."""
    if a == 0 or b == 0:
        return 0
    if a == 1:
        return b
    return a if b == 1 else a * b


def divide(a: int | ir.SymbolicDim, b: int | ir.SymbolicDim) -> int | ir.SymbolicDim | None:
    """a / b where it is proved to leave no rest (as polynomials in the dimension symbols), else None."""
    if b == 0:
        return None
    if a == b:
        return 1
    if b == 1:
        return a
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    return None if isinstance(a, int) else _divide(a, b)


def quotient(a: int | ir.SymbolicDim, b: int | ir.SymbolicDim) -> int | ir.SymbolicDim | None:
    """a / b rounded down, for a length `a` (which is not negative) and a positive number `b`; exact also for a symbolic `b`."""
    exact = divide(a, b)
    if exact is not None or not isinstance(b, int) or b <= 0 or isinstance(a, int):
        return exact
    return _floor(a, b)


def extent(dim: Dim, start: Dim, end: Dim, step: Dim) -> Dim | None:
    """The length of dim[start:end:step], or None where it has no expression that holds for every size (from 1 on, as symbols are taken to be)."""
    if not isinstance(start, int) and not isinstance(dim, int) and -start == dim:
        start = 0  # x[-len(x):] is all of it, also where it is empty
    if not isinstance(start, int) or not isinstance(step, int) or step == 0:
        return None
    if isinstance(dim, int) and isinstance(end, int):
        return len(range(dim)[start:end:step])
    if step > 0 and isinstance(end, int) and (start < 0) == (end < 0) and end <= start:
        return 0  # counted from the same end, whatever its length
    if step < 0:
        whole = step == -1 and (start == -1 or start >= _FAR) and isinstance(end, int) and end < -_FAR
        return dim if whole else None
    if isinstance(end, int) and end >= _FAR:
        end = dim
    if start < 0 or (not isinstance(end, int) and not nonnegative(end) and end != dim):
        return None  # counted from the other end where it is negative
    if end == dim and start == 0 and step == 1:
        return dim
    stop = end if end == dim else _least(dim, dim + end) if isinstance(end, int) and end < 0 else _least(dim, end)
    if stop is None or (start == 0 and step == 1 and isinstance(end, int) and end >= 0):
        return stop
    return _positive((stop - start + step - 1) // step)


def _least(a: Dim, b: Dim) -> Dim | None:
    from onnx_shape_inference._ops._utils import min_dim

    least: Dim | None = min_dim(a, b)
    return least


def _positive(a: Dim) -> Dim | None:
    from onnx_shape_inference._ops._utils import max_dim

    most: Dim | None = max_dim(0, a)
    return most


@functools.lru_cache(maxsize=4096)
def _floor(a: ir.SymbolicDim, b: int) -> ir.SymbolicDim | None:
    """None for what is negative where every symbol is large: no length is, and operators round it towards 0."""
    import sympy

    if a._expr is None or a._expr.subs(dict.fromkeys(a._expr.free_symbols, _LARGE)) < 0:
        return None
    return ir.SymbolicDim(sympy.floor(a._expr / b))


def rounded(dim: Dim) -> Dim:
    """The same dimension by floor alone: texts with ceiling are what onnx_ir writes and cannot read."""
    if isinstance(dim, int) or "ceiling" not in str(dim) or dim._expr is None:
        return dim
    import sympy

    def up(x: sympy.Expr) -> sympy.Expr:
        over, under = sympy.fraction(sympy.together(x))
        return sympy.floor((over + under - 1) / under) if under.is_Integer else -sympy.floor(-x)

    return ir.SymbolicDim(dim._expr.replace(sympy.ceiling, up))


@functools.lru_cache(maxsize=4096)
def _divide(a: ir.SymbolicDim, b: int | ir.SymbolicDim) -> int | ir.SymbolicDim | None:
    import sympy

    if a._expr is None or (isinstance(b, ir.SymbolicDim) and b._expr is None):
        return None
    over = sympy.cancel(a._expr / (b if isinstance(b, int) else b._expr))
    if over.is_Integer:
        return int(over)
    symbols = sorted(over.free_symbols, key=str)
    if not symbols or not over.is_polynomial(*symbols):
        return None
    return ir.SymbolicDim(over) if all(c.is_integer for c in sympy.Poly(over, *symbols).coeffs()) else None


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
    if text in bindings or text in dim_names(text):
        return bindings.get(text)
    found = symbolic(text).evaluate(bindings)
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


@functools.lru_cache(maxsize=4096)
def dim_names(text: str) -> frozenset[str]:
    """The symbols in a dimension: those of an expression, or the text itself where it is none (`input::dim 0`, or a name such as `2`)."""
    try:
        return ir.SymbolicDim(text).free_symbols() or frozenset({text})
    except (ValueError, TypeError):  # as a name was read as a number, or as a function without arguments
        return frozenset({text})
