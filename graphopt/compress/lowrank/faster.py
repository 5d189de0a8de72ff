"""Is the product of two narrow matrices faster than the one that it replaces, on the target?"""

from __future__ import annotations

import math
import time

import numpy as np
import onnx_ir as ir

from graphopt.compress.lowrank.factorable import Item
from graphopt.core.contract import Context
from graphopt.core.errors import GraphoptError
from graphopt.graph.dims import size_of
from graphopt.graph.questions import initializer
from graphopt.run import guarded, race

_SECONDS = 20.0  # for all timing of one pass
_ROWS = 4096


class Stopwatch:
    """Times an item against its factors, at the sizes that the target was asked for; equal ones once."""

    def __init__(self, model: ir.Model, ctx: Context) -> None:
        target = ctx.target
        timed = target is not None and ctx.tune and target.tune == "on" and target.processor is None and target.runs_here()
        self.target = target if timed else None
        self.sizes = {} if self.target is None else race.sizes_for(model, race.shapes_of(self.target))
        self.known: dict[tuple[int, ...], str | None] = {}
        self.spent = 0.0

    def why_slower(self, item: Item, rank: int) -> str | None:
        """None if the factors take less time, or if nothing can be timed here."""
        first = item.linears[0]
        if self.target is None or first.weight.dtype != ir.DataType.FLOAT or first.batch or first.x.dtype != ir.DataType.FLOAT:
            return None
        rows = sorted({n for sizes in self.sizes.values() if (n := _rows(first.x, sizes)) is not None})
        widths = tuple(x.out_features for x in item.weights)
        key = (item.in_features, rank, *widths, -1, *rows)
        if key not in self.known and self.spent < _SECONDS:
            start = time.perf_counter()
            self.known[key] = self._compare(item.in_features, rank, widths, rows)
            self.spent += time.perf_counter() - start
        return self.known.get(key)

    def _compare(self, inner: int, rank: int, widths: tuple[int, ...], rows: list[int]) -> str | None:
        assert self.target is not None
        first = {"x": np.zeros((1, inner), np.float32)}
        try:
            sessions = {
                "whole": guarded.opened(self.target, _product(inner, (), widths), first),
                "factors": guarded.opened(self.target, _product(inner, (rank,), widths), first),
            }
        except GraphoptError:
            return None
        feeds = {str(count): {"x": np.random.default_rng(0).standard_normal((min(count, _ROWS), inner)).astype(np.float32)} for count in rows}
        mean = race.race(sessions, feeds, clock=race.clock_of(self.target), effort=race.CHOICE).speedup("factors") if rows else math.inf
        if mean > 1:
            return None
        return f"[{inner},{'+'.join(map(str, widths))}]: factors of rank {rank} are {mean:.2f}x as fast on {self.target.name}, at {rows} rows"


def _rows(x: ir.Value, sizes: dict[str, int]) -> int | None:
    """How many rows a value [.., features] has at these sizes."""
    dims = [size_of(d, sizes) for d in (x.shape or ())[:-1]] if x.shape is not None else [None]
    return None if None in dims else math.prod(d for d in dims if d is not None)


def _product(inner: int, ranks: tuple[int, ...], widths: tuple[int, ...]) -> ir.Model:
    """x [rows, inner] times one weight, or two factors, for each output."""
    rng = np.random.default_rng(1)

    def weight(name: str, shape: tuple[int, int]) -> ir.Value:
        return initializer((0.05 * rng.standard_normal(shape)).astype(np.float32), name)

    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", inner]))
    nodes, stored, at, width = [], [], x, inner
    for rank in ranks:
        stored.append(weight("left", (inner, rank)))
        nodes.append(ir.node("MatMul", [at, stored[-1]]))
        at, width = nodes[-1].outputs[0], rank
        at.name = "narrow"
    outputs = []
    for k, out in enumerate(widths):
        stored.append(weight(f"right{k}", (width, out)))
        nodes.append(ir.node("MatMul", [at, stored[-1]]))
        outputs.append(nodes[-1].outputs[0])
        outputs[-1].name, outputs[-1].type = f"y{k}", ir.TensorType(ir.DataType.FLOAT)
        outputs[-1].shape = ir.Shape(["rows", out])
    graph = ir.Graph([x], outputs, nodes=nodes, initializers=stored, opset_imports={"": 17}, name="product")
    return ir.Model(graph, ir_version=8)
