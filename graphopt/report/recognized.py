"""The passes behind which a graph is read for a report."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt.core import registry
from graphopt.core.contract import Context
from graphopt.core.pipeline import PassManager, parse
from graphopt.graph.questions import is_constant, producer

RECOGNIZE = "canonicalize"  # attention facts are read off the graph in its one spelling
FUSE = "simplify-masks, fuse-norm, fuse-activation, fuse-rotary, fuse-attention"  # and the blocks off the fused graph


def decode(model: ir.Model) -> None:
    """Weights that are stored as codes, cast and scaled, Cast(codes) * scale, become the floats that they stand for, which are computed if read."""
    for node in list(model.graph):
        if node.op_type != "Mul" or node.domain or node.outputs[0].is_graph_output():
            continue
        for side, scale in (node.inputs, node.inputs[::-1]):
            cast, out = producer(side, "Cast"), node.outputs[0]
            codes = None if cast is None else cast.inputs[0]
            if codes is None or scale is None or not is_constant(codes) or not is_constant(scale) or out.dtype is None:
                continue
            shape = np.broadcast_shapes(*(tuple(v.const_value.shape.numpy()) for v in (codes, scale) if v.const_value is not None))
            tensor = ir.LazyTensor(functools.partial(_decoded, codes, scale), dtype=out.dtype, shape=ir.Shape(shape), name=f"{out.name}_decoded")
            value = ir.Value(name=tensor.name, type=ir.TensorType(out.dtype), shape=ir.Shape(shape), const_value=tensor)
            model.graph.register_initializer(value)
            out.replace_all_uses_with(value)
            break


def _decoded(codes: ir.Value, scale: ir.Value) -> ir.TensorProtocol:
    assert codes.const_value is not None
    assert scale.const_value is not None
    factor = scale.const_value.numpy()
    return ir.tensor(codes.const_value.numpy().astype(factor.dtype) * factor)


def read_behind(passes: str, model: ir.Model, plugins: Sequence[str] = ()) -> Context:
    """Run the passes over `model`, in place; what stands in it is then read from the context."""
    ctx = Context(model)
    PassManager(parse(passes, registry.passes(tuple(plugins)))).run(model, ctx)
    ctx.invalidate()
    return ctx
