"""The table of equivalent spellings for ONNX Runtime's CPU provider: a name, what it applies to, and the passes that write it.

The first spelling of a kind is its default. It decides where nothing was measured (`tune=off`, another machine); the defaults are what won
for MiniLM on a CPU with AVX512-VNNI, one thread (docs/benchmarks.md). A spelling without a pass leaves the piece as the pipeline made it.
The kinds stand in the order in which they are written: integer multiplies first, as they take the bias that a residual sum could take.
"""

from __future__ import annotations

import functools
from typing import Any

from graphopt.analysis.pieces import Activation, AttentionCore, BlockedMatmul, IntegerMatmul, Lookup, Projections, ResidualNorm
from graphopt.core import registry
from graphopt.core.contract import Alternative, Pass
from graphopt.driver.lowering.decompose import DecomposeAttention

from ._blocked import SpellBlockedMatmul, SpellBlockedTable, SpellInt8Blocks
from ._integer import SpellIntegerMatmul, SpellQuantizedTable
from ._kernels import SpellBiasGelu, SpellMultiHead, SpellSkipNorm
from ._nf4 import SpellNf4Matmul, SpellNf4Table
from ._spell import SpellResidual


@functools.cache
def cpu_table(*, vendor: bool, int8_blocks: bool = False) -> tuple[Alternative, ...]:
    """`vendor`: with operators of the runtime; `int8_blocks`: also spellings that round the activations of weight-only multiplies to 8 bits."""
    shared = (
        Alternative(Lookup(), "codes", (*((SpellBlockedTable(), SpellNf4Table()) if vendor else ()), SpellQuantizedTable())),
        Alternative(BlockedMatmul(), "blocks" if vendor else "decoded", (SpellBlockedMatmul(), SpellNf4Matmul()) if vendor else ()),
        Alternative(IntegerMatmul(), "auto", (SpellIntegerMatmul(vendor=vendor),)),
        Alternative(IntegerMatmul(), "runtime", (SpellIntegerMatmul(vendor=vendor, form="runtime"),)),
        Alternative(Projections(), "separate"),
        Alternative(Projections(), "merged", (_pass("merge-projections"),)),
        Alternative(AttentionCore(), "attention"),
        Alternative(AttentionCore(), "matmul-softmax", (DecomposeAttention(),)),
        Alternative(ResidualNorm(), "sum", (SpellResidual(),)),
        Alternative(ResidualNorm(), "add"),
        Alternative(Activation(), "gelu"),
    )
    own = (
        Alternative(IntegerMatmul(), "quantize-each", (SpellIntegerMatmul(form="each"),)),
        Alternative(IntegerMatmul(), "quantize-once", (SpellIntegerMatmul(form="once"),)),
        Alternative(AttentionCore(), "multi-head", (SpellMultiHead(),)),
        Alternative(ResidualNorm(), "skip-norm", (SpellSkipNorm(),)),
        Alternative(Activation(), "bias-gelu", (SpellBiasGelu(),)),
    )
    rounded = (Alternative(BlockedMatmul(), "int8-blocks", (SpellInt8Blocks(),)),) if int8_blocks else ()
    table = shared + own + rounded if vendor else shared
    kinds = list(dict.fromkeys(s.kind for s in table))
    return tuple(sorted(table, key=lambda s: kinds.index(s.kind)))


def _pass(name: str) -> Pass:
    found: Any = registry.passes()[name]()
    assert isinstance(found, Pass)
    return found
