"""prune-heads: attention heads that matter least are really removed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import onnx_ir as ir

from graphopt.compress.prune.criterion import check_importance
from graphopt.compress.prune.units import Settings, explicit, prune
from graphopt.core.contract import Context, Pass
from graphopt.core.options import exclusive, option, option_error
from graphopt.core.strength import Dial


@dataclasses.dataclass(frozen=True)
class PruneHeads(Pass):
    """Remove attention heads: projections, biases, norms and position tables of each head, reshapes and split sizes.

    What is left computes what the old graph would if the removed heads gave zeros, and then the output projections are refitted to make up for
    them (Kwon et al. 2022). Query heads that share a key head go together. Heads of layers that share their weights go from all of them; heads
    that are named go from the named layer alone, whose weights are then forked. Key and value caches shrink with their heads.

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

    ratio: float | None = option(None, above=0, below=1, what="a fraction")
    flops: float | None = option(None, above=0, below=1, what="a fraction")
    latency: float | None = option(None, above=0, below=1, what="a fraction")
    heads: tuple[str, ...] = ()
    importance: str = "obs"
    refit: bool = True
    loss: str = "auto"
    rows: int = option(32768, least=1)
    seed: int = 0
    resize: tuple[str, ...] = ()
    exact: ClassVar[bool] = False
    ways = exclusive("ratio", "flops", "latency", "heads", says="how much is to go")
    dials = (Dial("ratio"), Dial("flops"), Dial("latency"))

    def __post_init__(self) -> None:
        super().__post_init__()
        self._listed()

    def check(self, known: Mapping[str, type[Pass]]) -> None:
        check_importance(self.name, self.importance, known)

    def run(self, model: ir.Model, ctx: Context) -> int:
        if self.heads:
            return explicit(model, ctx, self._listed(), "heads", Settings.of(self))
        self.ways.require(self)
        return prune(model, ctx, ("heads",), Settings.of(self))

    def _listed(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for item in self.heads:
            layer, _, head = item.partition(":")
            if not (layer.isdecimal() and head.isdecimal()):
                raise option_error(self.name, "heads", "LAYER:HEAD+LAYER:HEAD", item)
            found.setdefault(int(layer), []).append(int(head))
        return found
