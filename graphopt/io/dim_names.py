"""Names of dimensions are opaque: whatever they say, inside they are symbols, and outside they are what the author wrote.

An expression of other names (`past + 1`, as exporters write it) is computed with. Any other name that could be read as a number, an expression, or a
symbol of our own making gets a symbol for the time of the run; one that says nothing (`?`) is none.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

import onnx_ir as ir

from graphopt.graph.dims import dim_names, is_opaque
from graphopt.graph.questions import all_nodes, graphs
from graphopt.graph.serialize import DECLARED

NAMES = "graphopt.dim_names"  # graph.meta: symbol -> the author's name
_LONG = 64  # characters; a longer name only makes expressions slow
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
_SAYS_NOTHING = re.compile(r"\W*|None|-1")
_ARITHMETIC = re.compile(r"(?![^-]*(\S-|-\S))[A-Za-z0-9_. +\-*/%(),]*")  # a minus with no blanks around it belongs to a name
_FUNCTIONS = frozenset({"max", "Max", "min", "Min", "floor", "sqrt", "mod", "Mod"})


def hide_names(model: ir.Model) -> None:
    """Give every dimension a name that can stand in an expression, in place; the declared shapes of inputs and outputs are kept aside."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.meta.setdefault(DECLARED, None if value.shape is None else ir.Shape(list(value.shape)))
    known: dict[str, str] = model.graph.meta.setdefault(NAMES, {})
    values = list(_shaped(model))
    written = {d.value for v in values for d in v.shape or () if not isinstance(d, int) and d.value is not None}
    words = {name for name in written if _is_symbol(name)} | set(known)
    hidden = {name: symbol for symbol, name in known.items()}
    for name in sorted(written - words):
        if not _SAYS_NOTHING.fullmatch(name) and not _is_expression(name, words):
            hidden[name] = _fresh(name, {*words, *hidden.values()})
    for value in values:
        assert value.shape is not None
        dims = [_hidden(d, hidden, words) for d in value.shape]
        if dims != list(value.shape):
            value.shape = ir.Shape(dims)
    known.update({symbol: name for name, symbol in hidden.items()})


def show_names(model: ir.Model) -> None:
    """The author's names again, in place; an input axis of which inference made up a name has the one that it came with, or none."""
    known: dict[str, str] = model.graph.meta.get(NAMES, {})
    for value in model.graph.inputs:
        declared = value.meta.get(DECLARED)
        if value.shape is not None:
            old = declared if declared is not None and len(declared) == len(value.shape) else [None] * len(value.shape)
            value.shape = ir.Shape([own if is_opaque(dim) else dim for dim, own in zip(value.shape, old, strict=True)])
    for value in _shaped(model) if known else ():
        assert value.shape is not None
        value.shape = ir.Shape([shown(model, d) for d in value.shape])


def shown(model: ir.Model, dim: Any) -> Any:
    """A dimension as its author calls it."""
    return dim if isinstance(dim, int) or dim.value is None else model.graph.meta.get(NAMES, {}).get(dim.value, dim)


def _shaped(model: ir.Model) -> Iterator[ir.Value]:
    for graph in graphs(model):
        yield from (v for v in dict.fromkeys((*graph.inputs, *graph.outputs)) if v.shape is not None)
    for node in all_nodes(model):
        yield from (v for v in node.outputs if v.shape is not None and not v.is_graph_output())


def _is_symbol(name: str) -> bool:
    return len(name) <= _LONG and _WORD.fullmatch(name) is not None and not is_opaque(ir.SymbolicDim(name)) and name not in {*_FUNCTIONS, "None"}


def _is_expression(name: str, words: Collection[str]) -> bool:
    if len(name) > 4 * _LONG or not _ARITHMETIC.fullmatch(name):
        return False
    names = dim_names(name)
    return name not in names and names <= set(words)


def _fresh(name: str, taken: Collection[str]) -> str:
    word = re.sub(r"[^A-Za-z0-9_]+", "_", name)[:_LONG].strip("_") or "dim"
    word = word if _is_symbol(word) else f"dim_{word}"
    symbol = word = word if _is_symbol(word) else "dim"
    count = 0
    while symbol in taken:
        count += 1
        symbol = f"{word}_{count}"
    return symbol


def _hidden(dim: Any, hidden: dict[str, str], words: Collection[str]) -> Any:
    if isinstance(dim, int):
        return dim if dim >= 0 else None  # as runtimes read it
    if dim.value is None:
        return dim
    if dim.value in hidden:
        return hidden[dim.value]
    return None if _SAYS_NOTHING.fullmatch(dim.value) and dim.value not in words else dim
