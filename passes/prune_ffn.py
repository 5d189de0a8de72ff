"""prune-ffn: feed-forward neurons that matter least are really removed."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from graphopt.compress.prune.units import Pruning, Ratio
from graphopt.core.options import option


@dataclasses.dataclass(frozen=True)
class PruneFfn(Pruning, Ratio):
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

    multiple: int = option(32, least=1)
    kinds: ClassVar[tuple[str, ...]] = ("neurons",)
