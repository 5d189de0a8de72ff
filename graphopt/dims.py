"""Arithmetic of dimensions: ints and symbolic expressions."""

from __future__ import annotations

import functools
import re

import onnx_ir as ir

_OPAQUE = re.compile(r"\b(_d\d+|join_\w+)\b")  # symbols that inference made up


def is_opaque(dim: object) -> bool:
    """True for a dimension that inference could not express in the symbols of the graph inputs."""
    return not isinstance(dim, int) and (getattr(dim, "value", None) is None or bool(_OPAQUE.search(str(dim))))


def nonnegative(dim: int | ir.SymbolicDim) -> bool:
    """True if the value of a dimension expression is proved >= 0 (dimension symbols are)."""
    if isinstance(dim, int):
        return dim >= 0
    text = str(dim.value)
    return dim.value is not None and "-" not in text


def multiply(a: int | ir.SymbolicDim, b: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
    """The product of two dimensions."""
    if a == 1:
        return b
    if b == 1:
        return a
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    return _multiply(a, b)


def divide(a: int | ir.SymbolicDim, b: int | ir.SymbolicDim) -> int | ir.SymbolicDim | None:
    """a / b where it is proved to leave no rest (as polynomials in the dimension symbols), else None."""
    if a == b:
        return 1
    if b == 1:
        return a
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    return None if isinstance(a, int) else _divide(a, b)


def quotient(a: int | ir.SymbolicDim, b: int | ir.SymbolicDim) -> int | ir.SymbolicDim | None:
    """a / b rounded down, for a length `a` and a positive number `b`; exact also for a symbolic `b`."""
    exact = divide(a, b)
    if exact is not None or not isinstance(b, int) or b <= 0 or isinstance(a, int):
        return exact
    return _floor(a, b)


@functools.lru_cache(maxsize=4096)
def _floor(a: ir.SymbolicDim, b: int) -> ir.SymbolicDim | None:
    import sympy

    return None if a._expr is None else ir.SymbolicDim(sympy.floor(a._expr / b))


@functools.lru_cache(maxsize=4096)
def _multiply(a: int | ir.SymbolicDim, b: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
    return a * b


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
