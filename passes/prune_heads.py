"""prune-heads: attention heads that matter least are really removed."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from graphopt.compress.prune.units import Pruning, Ratio, explicit
from graphopt.core.contract import Context
from graphopt.core.options import exclusive, option_error


@dataclasses.dataclass(frozen=True)
class PruneHeads(Pruning, Ratio):
    """Remove attention heads: projections, biases, norms and position tables of each head, reshapes and split sizes.

    What is left computes what the old graph would if the removed heads gave zeros, and then the output projections are refitted to make up for
    them (Kwon et al. 2022). Query heads that share a key head go together, unless it is the only one, or as many of every key head are named.
    Heads of layers that share their weights go from all of them; heads that are named go from the named layer alone, whose weights are then
    forked. Key and value caches shrink with their heads.

    Args:
        ratio: this fraction of all heads goes, chosen over all layers.
        flops: heads go until this fraction of the model's multiplications with stored weights is saved.
        latency: heads go until this fraction of the model's latency is saved, as measured on the target.
        heads: these go, LAYER:HEAD, `heads=0:2+3:7`; layers are counted as attentions in graph order.
        importance: obs, fisher, taylor, reconstruction, magnitude, attention, entropy or random (see docs/pruning.md).
        refit: fit the output projections by least squares on the samples.
        loss: what importance measures: auto, projection or sampled (both need no labels), or FILE.py:FUNCTION.
        rows: so many rows (tokens) of the samples are used.
        seed: of random numbers.
        resize: names of inputs and outputs that may change their size with the heads.

    Raises:
        PipelineError: none or several of ratio, flops, latency and heads; a head that there is not.
        SampleError: importance or refit needs samples, and there are none.
    """

    heads: tuple[str, ...] = ()
    resize: tuple[str, ...] = ()
    kinds: ClassVar[tuple[str, ...]] = ("heads",)
    ways = exclusive("ratio", "flops", "latency", "heads", says="how much is to go")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._listed()

    def run(self, model: ir.Model, ctx: Context) -> int:
        if self.heads:
            return explicit(model, ctx, self._listed(), self)
        return super().run(model, ctx)

    def _listed(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for item in self.heads:
            layer, _, head = item.partition(":")
            if not (layer.isdecimal() and head.isdecimal()):
                raise option_error(self.name, "heads", "LAYER:HEAD+LAYER:HEAD", item)
            found.setdefault(int(layer), []).append(int(head))
        return found
