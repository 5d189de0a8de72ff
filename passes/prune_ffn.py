"""prune-ffn: feed-forward neurons that matter least are really removed."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Self

import onnx_ir as ir

from graphopt.compress.prune.units import Settings, check, prune, weaker
from graphopt.core.contract import Context, Pass
from graphopt.core.options import option_error


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

    ratio: float | None = None
    flops: float | None = None
    latency: float | None = None
    importance: str = "obs"
    multiple: int = 32
    refit: bool = True
    loss: str = "auto"
    rows: int = 32768
    seed: int = 0
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check(self.name, Settings.of(self))

    def weaker(self) -> Self | None:
        return weaker(self)

    def run(self, model: ir.Model, ctx: Context) -> int:
        if Settings.of(self).amount is None:
            raise option_error(self.name, "ratio", "how much is to go (or flops, latency)", "nothing")
        return prune(model, ctx, ("neurons",), Settings.of(self))
