"""prune: heads and feed-forward neurons together, each where it costs least."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from graphopt.compress.prune.units import Pruning
from graphopt.core.options import exclusive, option
from graphopt.core.strength import Dial


@dataclasses.dataclass(frozen=True)
class Prune(Pruning):
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

    multiple: int = option(32, least=1)
    resize: tuple[str, ...] = ()
    kinds: ClassVar[tuple[str, ...]] = ("heads", "neurons")
    ways = exclusive("flops", "latency", says="the fraction of multiplications to save")
    dials = (Dial("flops"), Dial("latency"))
