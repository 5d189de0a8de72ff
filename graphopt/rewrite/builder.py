"""New nodes and constants, recorded until they are put in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, overload

import numpy as np
import onnx_ir as ir

from graphopt.core.contract import Array
from graphopt.graph.questions import Names, initializer

_SMALL = 1024  # bytes; equal constants up to this size are stored once


class Emitter(Protocol):
    """Adds a node of one operator: its output, or with `_outputs` a sequence of so many."""

    @overload
    def __call__(self, *inputs: ir.Value | None, _outputs: int, **attributes: Any) -> Sequence[ir.Value]: ...
    @overload
    def __call__(self, *inputs: ir.Value | None, **attributes: Any) -> ir.Value: ...


class Builder:
    """Records new nodes: `op.Add(a, b)`, `op.node("Split", [x], axis=-1, num_outputs=3, _outputs=3)`, `op.const(array, "scale")`."""

    def __init__(self, names: Names, memo: dict[Any, list[ir.Value]], graph: ir.Graph | None) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []
        self.made: dict[Any, ir.Value] = {}  # joins the memo if the splice succeeds
        self._names, self._memo, self._graph = names, memo, graph

    def __getattr__(self, op_type: str) -> Emitter:
        if op_type.startswith("_"):
            raise AttributeError(op_type)
        return lambda *inputs, **options: self.node(op_type, inputs, **options)

    def node(self, op_type: str, inputs: Sequence[ir.Value | None], *, _domain: str = "", _outputs: int = 1, **attributes: Any) -> Any:
        """Add a node; returns its output, or a tuple of them where `_outputs` > 1. What is None at the end of the inputs is left out."""
        count = max((k for k, value in enumerate(inputs, start=1) if value is not None), default=0)
        given = {k: v for k, v in attributes.items() if v is not None}
        node = ir.node(op_type, inputs[:count], given, domain=_domain, num_outputs=_outputs)
        self.nodes.append(node)
        return node.outputs[0] if _outputs == 1 else node.outputs

    def const(self, array: Array, name: str = "const") -> ir.Value:
        """An initializer; equal small ones are stored once."""
        if array.nbytes > _SMALL or array.dtype.kind == "V":  # types that numpy lacks share one code
            return self._initializer(array, name)
        return self.shared((array.dtype.str, array.shape, array.tobytes()), lambda: self._initializer(array, name))

    def ints(self, *numbers: int, name: str = "ints") -> ir.Value:
        """An int64 vector: axes, sizes, the bounds of a Slice."""
        return self.const(np.array(numbers, np.int64), name)

    def shared(self, key: Any, build: Callable[[], ir.Value]) -> ir.Value:
        """What `build` makes, made once for all matches in one graph that ask with an equal `key` (name the values it reads in the key)."""
        for known in self._memo.get(key, ()):
            node = known.producer()  # None: an initializer, which every graph reads; what was merged away is neither
            if known.is_initializer() or (node is not None and node.graph is self._graph):
                return known
        if key not in self.made:
            self.made[key] = build()
        return self.made[key]

    def _initializer(self, array: Array, name: str) -> ir.Value:
        value = initializer(array, self._names.fresh(name))
        self.initializers.append(value)
        return value
