"""Sizes that the user states for the dimensions of inputs."""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from graphopt.core.errors import LoadError
from graphopt.graph.serialize import DECLARED


def parse_shape(text: str) -> tuple[str, list[int | str]]:
    """`"x:0,4,s"` -> `("x", [0, 4, "s"])`, an item of `input_shapes`; a name may hold colons.

    Raises:
        LoadError: no colon, or an empty axis.
    """
    name, colon, dims = text.rpartition(":")
    parts = [p.strip() for p in dims.split(",")]
    if not colon or not name or not all(parts):
        raise LoadError(f"`{text}` is no input shape: write NAME:DIM,DIM,... such as input_ids:1,128 or x:batch,16")
    dims_ = [int(p) if re.fullmatch(r"[+-]?[0-9]{1,18}", p) else p for p in parts]
    for dim in dims_:
        _check_dim(name, dim)
    return name, dims_


def _check_dim(name: str, dim: object) -> None:
    """A size that a tensor can have, or a name that can stand in an expression."""
    number = isinstance(dim, int) and not isinstance(dim, bool) and dim < 2**31
    if not number and not (isinstance(dim, str) and dim.isidentifier() and not keyword.iskeyword(dim)):
        raise LoadError(f"`{dim}` is no axis of input `{name}`: give a whole number below 2^31, or a name such as batch")


def override_shapes(model: ir.Model, wanted: Mapping[str, Sequence[int | str]]) -> None:
    """Bind dimensions of the inputs: a symbol that becomes a number, or another symbol, does so at every input and output.

    Raises:
        LoadError: unknown name, wrong rank, or a size that contradicts the model.
    """
    inputs = {v.name: v for v in model.graph.inputs}
    bound: dict[str, int | str] = {}
    for name, dims in wanted.items():
        value = inputs.get(name)
        if value is None:
            raise LoadError(f"there is no input `{name}` to shape; inputs: {', '.join(str(n) for n in inputs)}")
        if value.shape is not None and len(value.shape) != len(dims):
            raise LoadError(f"input `{name}` has {len(value.shape)} axes {value.shape}, not {len(dims)}; give one size or symbol for each")
        known = set(map(str, value.shape or ()))
        for dim in dims:
            if str(dim) not in known:  # what the model says itself may be more than a name
                _check_dim(name, dim)
        for axis, (old, new) in enumerate(zip(value.shape or (), dims, strict=False)):
            _bind(name, axis, old, new, bound)
    for value in dict.fromkeys((*model.graph.inputs, *model.graph.outputs)):
        dims = wanted.get(value.name or "", ()) if value.is_graph_input() else ()
        old_dims = value.shape if value.shape is not None else [None] * len(dims) if dims else None
        if old_dims is not None:
            value.meta.pop(DECLARED, None)  # of a model that was loaded before
            value.shape = ir.Shape([_new_dim(old, dims[axis] if dims else 0, bound) for axis, old in enumerate(old_dims)])


def _bind(name: str, axis: int, old: Any, new: int | str, bound: dict[str, int | str]) -> None:
    """Note what a symbol becomes."""
    if _keeps(new) or str(new) == str(old):
        return
    if isinstance(old, int):
        raise LoadError(f"axis {axis} of input `{name}` is fixed at {old} in the model and cannot become {new}")
    if old.value is not None and bound.setdefault(str(old), new) != new:
        raise LoadError(f"axis {axis} of input `{name}` is `{old}`, which cannot be both {bound[str(old)]} and {new}")


def _keeps(new: int | str) -> bool:
    return isinstance(new, int) and new < 1


def _new_dim(old: Any, new: int | str, bound: Mapping[str, int | str]) -> Any:
    if isinstance(old, int):
        return old
    if old is not None and old.value is not None:
        return bound.get(str(old), old)
    return old if _keeps(new) else new
