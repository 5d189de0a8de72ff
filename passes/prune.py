"""prune: heads and feed-forward neurons together, each where it costs least."""

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

    flops: float | None = option(None, above=0, below=1, what="a fraction")
    latency: float | None = option(None, above=0, below=1, what="a fraction")
    importance: str = "obs"
    multiple: int = option(32, least=1)
    refit: bool = True
    loss: str = "auto"
    rows: int = option(32768, least=1)
    seed: int = 0
    resize: tuple[str, ...] = ()
    exact: ClassVar[bool] = False
    ways = exclusive("flops", "latency", says="the fraction of multiplications to save")
    dials = (Dial("flops"), Dial("latency"))

    def check(self, known: Mapping[str, type[Pass]]) -> None:
        check_importance(self.name, self.importance, known)

    def run(self, model: ir.Model, ctx: Context) -> int:
        self.ways.require(self)
        return prune(model, ctx, ("heads", "neurons"), Settings.of(self))
