"""The public interface of a graph: what belongs to the user, and no pass may change."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import onnx_ir as ir

from graphopt.core.errors import VerifyError
from graphopt.graph.dims import is_opaque
from graphopt.graph.shapes import declared_shape

RESIZED = "graphopt.resized"  # graph.meta: names of inputs and outputs that the user let a pass make smaller (caches, a vocabulary)
RETYPED = "graphopt.retyped"  # graph.meta: name -> type of inputs and outputs that the user had a pass give another one


@dataclasses.dataclass(frozen=True)
class Port:
    """One input or output as its author declared it; `dims` is None where the rank is not declared, a dimension without a name is None."""

    name: str
    dtype: str
    dims: tuple[int | str | None, ...] | None

    def __str__(self) -> str:
        dims = "?" if self.dims is None else ",".join("?" if d is None else str(d) for d in self.dims)
        return f"{self.name}: {self.dtype}[{dims}]"


@dataclasses.dataclass(frozen=True)
class Interface:
    """Inputs and outputs in order, and the inputs that have a default (overridable initializers)."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    overridable: tuple[str, ...]


def interface(model: ir.Model) -> Interface:
    """The interface of a model as it is now."""
    inputs, outputs = model.graph.inputs, model.graph.outputs
    return Interface(
        tuple(_port(v, v.shape) for v in inputs),
        tuple(_port(v, declared_shape(v)) for v in outputs),
        tuple(str(v.name) for v in inputs if v.const_value is not None),
    )


def check_interface(before: Interface, model: ir.Model) -> None:
    """Compare with an earlier snapshot. A dimension of an output that was not declared may have become known.

    Raises:
        VerifyError: names the first input or output that changed.
    """
    now, resized, retyped = interface(model), model.graph.meta.get(RESIZED, frozenset()), model.graph.meta.get(RETYPED, {})
    _same("input", before.inputs, now.inputs, resized, retyped)
    _same("output", before.outputs, now.outputs, resized, retyped)
    if before.overridable != now.overridable:
        raise VerifyError(f"interface: the overridable inputs were {_list(before.overridable)}, and are now {_list(now.overridable)}")


def _same(what: str, before: tuple[Port, ...], now: tuple[Port, ...], resized: Collection[str], retyped: Mapping[str, str]) -> None:
    names, found = [p.name for p in before], [p.name for p in now]
    if names != found:
        raise VerifyError(f"interface: the {what}s were {_list(names)}, and are now {_list(found)}")
    for old, new in zip(before, now, strict=True):
        if new.dtype not in (old.dtype, retyped.get(old.name)) or not (_kept(old.dims, new.dims) or old.name in resized):
            raise VerifyError(f"interface: {what} `{old}` has become `{new}`")


def _kept(old: tuple[int | str | None, ...] | None, new: tuple[int | str | None, ...] | None) -> bool:
    if old is None:
        return True
    return new is not None and len(old) == len(new) and all(a is None or a == b for a, b in zip(old, new, strict=True))


def _list(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names) or "none"


def _port(value: ir.Value, shape: ir.Shape | None) -> Port:
    dtype = "?" if value.dtype is None else value.dtype.name.lower()
    return Port(str(value.name), dtype, None if shape is None else tuple(_dim(d) for d in shape))


def _dim(dim: int | ir.SymbolicDim) -> int | str | None:
    """Inference names dimensions that have no name; they stay nameless here."""
    return dim if isinstance(dim, int) else None if is_opaque(dim) else dim.value
