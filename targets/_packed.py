"""Weights in the packed layout of an operator: made once for all nodes that read them, also in another spelling of the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir

from graphopt.core.contract import Analysis, Array, Context
from graphopt.rewrite.builder import Builder

PACKED = "graphopt.packed"  # value.meta of an initializer: what it was packed from and how, and which part of it; another spelling finds it there


@dataclasses.dataclass(frozen=True)
class Known:
    """The parts of one weight that are packed already, by name."""

    key: tuple[Any, ...]
    parts: Mapping[str, ir.Value]

    def once(self, op: Builder, part: str, make: Callable[[], Array]) -> ir.Value:
        """One part, which `make` gives if it is not known."""

        def build() -> ir.Value:
            value = op.const(make(), f"{self.key[0]}_{part}")
            value.meta[PACKED] = (self.key, part)
            return value

        return self.parts.get(part) or op.shared((PACKED, self.key, part), build)


def known(ctx: Context, codes: ir.Value, scale: ir.Value | None, *how: Any) -> Known:
    """What is packed of these codes and their scale, in the layout `how`."""
    key = (codes.name, None if scale is None else scale.name, *how)
    return Known(key, ctx.get(_Packed()).get(key, {}))


@dataclasses.dataclass(frozen=True)
class _Packed(Analysis[Mapping[Any, Mapping[str, ir.Value]]]):
    """The packed initializers of a graph: what they were packed from -> part -> initializer."""

    def compute(self, model: ir.Model, ctx: Context) -> Mapping[Any, Mapping[str, ir.Value]]:
        found: dict[Any, dict[str, ir.Value]] = {}
        for value in model.graph.initializers.values():
            key, part = value.meta.get(PACKED, (None, ""))
            if key is not None:
                found.setdefault(key, {})[part] = value
        return found
