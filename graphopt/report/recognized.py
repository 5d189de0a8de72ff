"""The passes behind which a graph is read for a report."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graphopt.core import registry
from graphopt.core.contract import Context
from graphopt.core.pipeline import PassManager, parse

RECOGNIZE = "canonicalize"  # attention facts are read off the graph in its one spelling
FUSE = "simplify-masks, fuse-norm, fuse-activation, fuse-rotary, fuse-attention"  # and the blocks off the fused graph


def read_behind(passes: str, model: ir.Model, plugins: Sequence[str] = ()) -> Context:
    """Run the passes over `model`, in place; what stands in it is then read from the context."""
    ctx = Context(model)
    PassManager(parse(passes, registry.passes(tuple(plugins)))).run(model, ctx)
    ctx.invalidate()
    return ctx
