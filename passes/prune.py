"""prune: heads and feed-forward neurons together, each where it costs least."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Self

import onnx_ir as ir

from graphopt.compress.prune.units import Settings, check, prune, weaker
from graphopt.core.contract import Context, Pass
from graphopt.core.options import option_error


@dataclasses.dataclass(frozen=True)
class Prune(Pass):
    """Save a fraction of the model's multiplications, or of its latency, by removing heads and neurons, searched over all layers at once.

    Args:
        flops: the fraction of multiplications with stored weights to save.
        latency: the fraction of the latency to save, as measured on the target.
        importance: a criterion for both: obs, fisher, taylor, reconstruction, magnitude or random (see docs/pruning.md).
        multiple: the neurons that stay in a block are a multiple of this, as kernels like it.
        refit, loss, rows, seed, resize: as in prune-heads.

    Raises:
        PipelineError: neither or both of flops and latency.
        SampleError: importance or refit needs samples, and there are none.
    """

    flops: float | None = None
    latency: float | None = None
    importance: str = "obs"
    multiple: int = 32
    refit: bool = True
    loss: str = "auto"
    rows: int = 32768
    seed: int = 0
    resize: tuple[str, ...] = ()
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check(self.name, Settings.of(self))

    def weaker(self) -> Self | None:
        return weaker(self)

    def run(self, model: ir.Model, ctx: Context) -> int:
        if Settings.of(self).amount is None:
            raise option_error(self.name, "flops", "the fraction of multiplications to save (or latency)", "nothing")
        return prune(model, ctx, ("heads", "neurons"), Settings.of(self))
