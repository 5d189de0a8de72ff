"""prune-ffn: feed-forward neurons that matter least are really removed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import onnx_ir as ir

from graphopt.compress.prune.criterion import check_importance
from graphopt.compress.prune.units import Settings, prune
from graphopt.core.contract import Context, Pass
from graphopt.core.options import exclusive, option
from graphopt.core.strength import Dial


@dataclasses.dataclass(frozen=True)
class PruneFfn(Pass):
    """Remove neurons of feed-forward blocks, gated or not, from the projections on both sides, and refit the one behind them.

    Args:
        ratio: this fraction of all neurons goes, chosen over all layers.
        flops: neurons go until this fraction of the model's multiplications with stored weights is saved.
        latency: neurons go until this fraction of the model's latency is saved, as measured on the target.
        importance: obs, fisher, taylor, reconstruction, magnitude or random (see docs/pruning.md).
        multiple: the neurons that stay are a multiple of this, as kernels like it.
        refit, loss, rows, seed: as in prune-heads.

    Raises:
        PipelineError: none or several of ratio, flops and latency.
        SampleError: importance or refit needs samples, and there are none.
    """

    ratio: float | None = option(None, above=0, below=1, what="a fraction")
    flops: float | None = option(None, above=0, below=1, what="a fraction")
    latency: float | None = option(None, above=0, below=1, what="a fraction")
    importance: str = "obs"
    multiple: int = option(32, least=1)
    refit: bool = True
    loss: str = "auto"
    rows: int = option(32768, least=1)
    seed: int = 0
    exact: ClassVar[bool] = False
    ways = exclusive("ratio", "flops", "latency", says="how much is to go")
    dials = (Dial("ratio"), Dial("flops"), Dial("latency"))

    def check(self, known: Mapping[str, type[Pass]]) -> None:
        check_importance(self.name, self.importance, known)

    def run(self, model: ir.Model, ctx: Context) -> int:
        self.ways.require(self)
        return prune(model, ctx, ("neurons",), Settings.of(self))
