"""What the tests of pruning share: masked references, and small attention blocks in the spellings that exporters write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from models import assert_same, run  # type: ignore[import-not-found]

from graphopt.analysis.heads import Unit, Units
from graphopt.core.contract import Context
from graphopt.core.pipeline import PassManager, PassRecord
from graphopt.core.pipeline import parse as steps
from graphopt.core.registry import passes
from graphopt.core.remarks import Remark
from graphopt.graph.questions import all_nodes, consumers
from graphopt.graph.verify import verify

Array = np.ndarray[Any, Any]
Feeds = dict[str, Array]


def masked(model: ir.Model, gone: Mapping[Unit, Sequence[int]]) -> ir.Model:
    """A copy in which the results of these heads and neurons are multiplied by zero: what pruning must equal."""
    copy = model.clone()
    values = {str(v.name): v for node in all_nodes(copy) for v in node.outputs}
    for k, (unit, members) in enumerate(gone.items()):
        value = values[str(unit.value.name)]
        assert value.shape is not None
        shape = [1] * len(value.shape)
        shape[unit.axis] = int(value.shape[unit.axis])  # type: ignore[arg-type]
        keep = (~unit.mask(members)).astype(np.float32).reshape(shape)
        mask = ir.Value(name=f"mask{k}", type=value.type, shape=ir.Shape(shape), const_value=ir.tensor(keep, name=f"mask{k}"))
        copy.graph.register_initializer(mask)
        product = ir.node("Mul", [value, mask], name=f"masked{k}")
        product.outputs[0].name, product.outputs[0].type, product.outputs[0].shape = f"masked{k}_out", value.type, value.shape
        readers = [n for n in consumers(value) if n is not product]
        copy.graph.insert_after(value.producer(), product)  # type: ignore[arg-type]
        for node in readers:
            for place in [i for i, v in enumerate(node.inputs) if v is value]:
                node.replace_input_with(place, product.outputs[0])
    return copy


def units(model: ir.Model) -> dict[str, Unit]:
    """Heads by `h0`, `h1`, neurons by `n0`, `n1`."""
    blocks = Context(model).get(Units())
    return {**{f"h{h.index}": h for h in blocks.attention}, **{f"n{n.index}": n for n in blocks.ffn}}


def prune(model: ir.Model, text: str, samples: Any = None) -> tuple[list[PassRecord], list[Remark]]:
    """Run a pipeline in place; the graph is verified after it."""
    records = PassManager(steps(text, passes())).run(model, Context(model, samples=samples))
    verify(model)
    return records, [remark for record in records for remark in record.remarks]


def same(a: ir.Model, b: ir.Model, batches: Sequence[Feeds]) -> None:
    for feeds in batches:
        assert_same(run(a, feeds), run(b, feeds))


def shapes(model: ir.Model) -> dict[str, tuple[int, ...]]:
    """Of stored float matrices and vectors, by name."""
    return {n: tuple(v.shape.numpy()) for n, v in model.graph.initializers.items() if v.shape is not None and v.dtype == ir.DataType.FLOAT}
