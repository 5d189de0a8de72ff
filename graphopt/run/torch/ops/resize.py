"""Resize, in all its modes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch

from graphopt.run.torch.table import op
from graphopt.run.torch.types import Ints, Tensor, along


@op("Resize")
def resize(
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
    *,
    antialias: int = 0,
    axes: Ints | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:
    """One axis after the other: every mode of the operator is a product of a small matrix [new size, old size] for each axis."""
    dims = [a % x.dim() for a in (range(x.dim()) if axes is None else axes)]
    factors, targets = _targets(x, dims, scales, sizes, keep_aspect_ratio_policy)
    kernel = _kernel(mode, nearest_mode, cubic_coeff_a)
    cropped = coordinate_transformation_mode == "tf_crop_and_resize"
    crop = roi.tolist() if cropped and roi is not None else [0.0] * len(dims) + [1.0] * len(dims)
    outside = torch.zeros((), dtype=torch.bool, device=x.device)
    dtype, x = x.dtype, x if mode == "nearest" or x.is_floating_point() else x.float()
    for i, (dim, factor, target) in enumerate(zip(dims, factors, targets, strict=True)):
        size = x.shape[dim]
        at = _coordinates(size, target, factor, coordinate_transformation_mode, (crop[i], crop[i + len(dims)]))
        if cropped:
            outside = outside | along((at < 0) | (at > size - 1), dim, x.dim()).to(x.device)
        if target == size and torch.equal(at, torch.arange(size, dtype=at.dtype)):
            continue
        if mode == "nearest":
            x = x.index_select(dim, kernel(at.double()).clamp(0, size - 1).long().to(x.device))
        else:
            matrix = _matrix(at.double(), size, kernel, min(factor, 1.0) if antialias else 1.0, exclude_outside)
            x = torch.tensordot(x, matrix.to(x.device, x.dtype), dims=([dim], [1])).movedim(-1, dim)
    if outside.any():
        x = torch.where(outside, torch.full_like(x, extrapolation_value), x)
    return x.to(dtype)


def _targets(x: Tensor, dims: Ints, scales: Tensor | None, sizes: Tensor | None, policy: str) -> tuple[list[float], list[int]]:
    if scales is not None and scales.numel():
        factors: list[float] = scales.tolist()
        return factors, [math.floor(x.shape[d] * f) for d, f in zip(dims, factors, strict=True)]
    assert sizes is not None
    targets: list[int] = sizes.tolist()
    factors = [t / x.shape[d] for d, t in zip(dims, targets, strict=True)]
    if policy != "stretch":
        factor = min(factors) if policy == "not_larger" else max(factors)
        return [factor] * len(dims), [math.floor(x.shape[d] * factor + 0.5) for d in dims]
    return factors, targets


def _coordinates(size: int, target: int, factor: float, mode: str, crop: tuple[float, float]) -> Tensor:
    """For each place of the output, where it lies in the input, [target]; in float32, as runtimes have it: what is a tie there must be one here."""
    at = torch.arange(target, dtype=torch.float32)
    ratio = torch.tensor(factor, dtype=torch.float32)
    if mode == "asymmetric":
        return at / ratio
    if mode == "align_corners":
        last = size * factor - 1  # not rounded, as the specification has it
        return at * ((size - 1) / last) if target > 1 else at * 0
    if mode == "tf_crop_and_resize":
        start, end = crop
        step = (end - start) * (size - 1) / (target - 1) if target > 1 else 0.0
        return start * (size - 1) + at * step if target > 1 else at * 0 + 0.5 * (start + end) * (size - 1)
    if mode == "pytorch_half_pixel" and target <= 1:
        return at * 0
    if mode == "half_pixel_symmetric":
        exact = size * factor
        center, adjust = size / 2, target / exact
        return center * (1 - adjust) + (at + 0.5) / ratio - 0.5
    return (at + 0.5) / ratio - 0.5


Kernel = Callable[[Tensor], Tensor]  # distance to a sample of the input -> weight
_ROUNDING: dict[str, Kernel] = {
    "floor": torch.floor,
    "ceil": torch.ceil,
    "round_prefer_floor": lambda at: torch.ceil(at - 0.5),
    "round_prefer_ceil": lambda at: torch.floor(at + 0.5),
}


def _kernel(mode: str, rounding: str, a: float) -> Kernel:
    kernels: dict[str, Kernel] = {"nearest": _ROUNDING[rounding], "linear": _linear, "cubic": functools.partial(_cubic, a)}
    return kernels[mode]


def _linear(distance: Tensor) -> Tensor:
    return (1 - distance.abs()).clamp(min=0)


def _cubic(a: float, distance: Tensor) -> Tensor:
    d = distance.abs()
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return torch.where(d <= 1, near, torch.where(d < 2, far, torch.zeros_like(d)))


def _matrix(at: Tensor, size: int, kernel: Kernel, shrink: float, exclude_outside: int) -> Tensor:
    """[new size, old size]. `shrink` below 1 widens the kernel, so that no sample is passed over (antialias)."""
    reach = math.ceil(2 / shrink) + 1
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    samples = torch.floor(at)[:, None] + offsets  # beyond the ends too
    weights = kernel((samples - at[:, None]) * shrink)
    if exclude_outside:
        weights = torch.where((samples < 0) | (samples > size - 1), torch.zeros_like(weights), weights)
    if exclude_outside or shrink < 1:
        weights = weights / weights.sum(-1, keepdim=True)
    places = samples.clamp(0, size - 1).long()  # what lies outside repeats the edge
    return torch.zeros(len(at), size, dtype=torch.float64).scatter_add(1, places, weights)
