"""How large the weights of an attention are on samples, head by head."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from graphopt.calibration.attention_maps import observe_maps
from graphopt.compress.attention_weights import Place
from graphopt.core.contract import Array, Context

_EDGES = np.append(np.geomspace(1e-7, 1, 281), np.inf)  # of the histogram of weights: 40 steps for each factor of ten


class WeightHistogram:
    """Counts of the weights of each head that are not zero, over all rows of all samples that are no padding.

    Args:
        by_head: False: one count for all heads, whose weights have no axis of their own.
    """

    def __init__(self, heads: int, by_head: bool, relative: bool) -> None:
        self.counts, self.relative = np.zeros((heads if by_head else 1, len(_EDGES)), np.int64), relative

    def __call__(self, p: Array) -> None:
        """[rows, heads, keys]"""
        if self.relative:
            p = p / np.maximum(p.max(-1, keepdims=True), np.finfo(np.float32).tiny)
        for head, array in enumerate(np.moveaxis(p, 1, 0) if len(self.counts) > 1 else p[None]):
            weights = array[array > 0]
            self.counts[head] += np.bincount(np.searchsorted(_EDGES, weights, side="right"), minlength=len(_EDGES))[: len(_EDGES)]

    def limit(self, sparsity: float) -> Array:
        """The largest edge below which at most this part of the weights of a head lies: [heads, 1, 1]."""
        below = np.cumsum(self.counts, 1) / np.maximum(self.counts.sum(1, keepdims=True), 1)
        last = np.maximum((below <= sparsity).sum(1) - 1, 0)
        found: Array = _EDGES[np.minimum(last, len(_EDGES) - 2)].astype(np.float32).reshape(-1, 1, 1)
        return found

    def below(self, limit: Array) -> float:
        """The part of the weights below a limit, to the nearest edge."""
        at = np.broadcast_to(np.searchsorted(_EDGES * 0.999, limit.reshape(-1), side="right") - 1, (len(self.counts),))
        under = sum(int(row[: k + 1].sum()) for row, k in zip(self.counts, at, strict=True))
        return under / max(int(self.counts.sum()), 1)


def histograms(model: ir.Model, ctx: Context, places: Mapping[ir.Node, Place], relative: bool) -> dict[ir.Node, WeightHistogram]:
    """What the samples show, by the node that makes the weights; without those that they do not show."""
    if ctx.samples is None or not places:
        return {}
    found = {node: WeightHistogram(place.heads, place.by_head, relative) for node, place in places.items()}
    observe_maps(model, ctx.samples, {node: (places[node].heads, histogram) for node, histogram in found.items()})
    return {node: histogram for node, histogram in found.items() if histogram.counts.any()}
