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
from graphopt.core.contract import Pass, Spelling
from graphopt.driver.lowering.decompose import DecomposeAttention

from ._blocked import SpellBlockedMatmul, SpellBlockedTable, SpellInt8Blocks
from ._integer import SpellIntegerMatmul, SpellQuantizedTable
from ._kernels import SpellBiasGelu, SpellMultiHead, SpellSkipNorm
from ._nf4 import SpellNf4Matmul, SpellNf4Table
from ._spell import SpellResidual


@functools.cache
def cpu_table(*, vendor: bool, int8_blocks: bool = False) -> tuple[Spelling, ...]:
    """`vendor`: with operators of the runtime; `int8_blocks`: also spellings that round the activations of weight-only multiplies to 8 bits."""
    shared = (
        Spelling(Lookup(), "codes", (*((SpellBlockedTable(), SpellNf4Table()) if vendor else ()), SpellQuantizedTable())),
        Spelling(BlockedMatmul(), "blocks" if vendor else "decoded", (SpellBlockedMatmul(), SpellNf4Matmul()) if vendor else ()),
        Spelling(IntegerMatmul(), "auto", (SpellIntegerMatmul(vendor=vendor),)),
        Spelling(IntegerMatmul(), "runtime", (SpellIntegerMatmul(vendor=vendor, form="runtime"),)),
        Spelling(Projections(), "separate"),
        Spelling(Projections(), "merged", (_pass("merge-projections"),)),
        Spelling(AttentionCore(), "attention"),
        Spelling(AttentionCore(), "matmul-softmax", (DecomposeAttention(),)),
        Spelling(ResidualNorm(), "sum", (SpellResidual(),)),
        Spelling(ResidualNorm(), "add"),
        Spelling(Activation(), "gelu"),
    )
    own = (
        Spelling(IntegerMatmul(), "quantize-each", (SpellIntegerMatmul(form="each"),)),
        Spelling(IntegerMatmul(), "quantize-once", (SpellIntegerMatmul(form="once"),)),
        Spelling(AttentionCore(), "multi-head", (SpellMultiHead(),)),
        Spelling(ResidualNorm(), "skip-norm", (SpellSkipNorm(),)),
        Spelling(Activation(), "bias-gelu", (SpellBiasGelu(),)),
    )
    rounded = (Spelling(BlockedMatmul(), "int8-blocks", (SpellInt8Blocks(),)),) if int8_blocks else ()
    table = shared + own + rounded if vendor else shared
    kinds = list(dict.fromkeys(s.kind for s in table))
    return tuple(sorted(table, key=lambda s: kinds.index(s.kind)))


def _pass(name: str) -> Pass:
    found: Any = registry.passes()[name]()
    assert isinstance(found, Pass)
    return found
