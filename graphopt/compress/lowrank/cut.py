"""What will be cut how far: the matrix of an item (several weights side by side where it is joint), its spectrum, and its rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.compress.lowrank.factorable import Item
from graphopt.compress.lowrank.factors import Cut
from graphopt.compress.lowrank.spectrum import Spectrum, factors, spectrum
from graphopt.core.contract import Array


@dataclasses.dataclass(frozen=True)
class RankPlan:
    """`scales`: what each weight of a joint item is multiplied by, so that the mean square of its output is what an error there counts; rank 0:
    not decided."""

    item: Item
    scales: tuple[float, ...]
    spectrum: Spectrum
    rank: int = 0

    def cut(self, sampled: bool) -> Cut:
        left, rights = split(self.item, self.scales, *factors(wide(self.item, self.scales), self.spectrum, self.rank))
        return Cut(self.item, left, rights, self.spectrum.error(self.rank) ** 0.5, sampled)


def plan(item: Item, moments: Mapping[ir.Value, Array], method: str, counts: Sequence[float] = ()) -> RankPlan:
    """Ready but for its rank.

    Args:
        moments: of the inputs, where samples show them.
        counts: how much a relative error of each output of a joint item counts; alike by default.
    """
    seen = moment(item, moments)
    sizes = [_scale(x.matrix(), seen) for x in item.weights] if item.joint else []
    scales = tuple(size * count**0.5 for size, count in zip(sizes, counts or [1.0] * len(sizes), strict=True)) or (1.0,)
    return RankPlan(item, scales, spectrum(wide(item, scales), seen, method))


def moment(item: Item, moments: Mapping[ir.Value, Array]) -> Array | None:
    """The second moment of what the item reads: of its input, or the mean over the inputs of all readers of a shared weight."""
    seen = [moments[x.x] for x in item.linears if x.x in moments]
    return np.mean(np.stack(seen), axis=0) if seen else None


def wide(item: Item, scales: tuple[float, ...]) -> Array:
    """The weights side by side, [.., in, out of all]."""
    return np.concatenate([s * np.asarray(x.matrix(), np.float64) for s, x in zip(scales, item.weights, strict=True)], axis=-1)


def split(item: Item, scales: tuple[float, ...], left: Array, right: Array) -> tuple[Array, tuple[Array, ...]]:
    """The second factor by weight, in the size that each had."""
    ends = np.cumsum([x.out_features for x in item.weights])[:-1]
    return left, tuple(part / s for part, s in zip(np.split(right, ends, axis=-1), scales, strict=True))


def _scale(weight: Array, moments: Array | None) -> float:
    w = np.asarray(weight, np.float64)
    size = float(np.square(w).sum() if moments is None else (w * (moments.astype(np.float64) @ w)).sum())
    return size**-0.5 if size > 0 else 1.0
