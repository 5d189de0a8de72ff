"""Normalizations and dropout."""

from __future__ import annotations

import functools

import torch
from torch.nn import functional

from graphopt.run.torch.table import enter, op
from graphopt.run.torch.types import Tensor, along, dtype_of


@op("LayerNormalization")
def layer_norm(
    x: Tensor, scale: Tensor, bias: Tensor | None = None, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1, _outputs: int = 1
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    sizes = x.shape[axis:]
    if _outputs == 1 and scale.shape == sizes and (bias is None or bias.shape == sizes):
        return functional.layer_norm(x, sizes, scale, bias, epsilon)
    stash = dtype_of(stash_type)
    dims = list(range(axis % x.dim(), x.dim()))
    wide = x.to(stash)
    average = wide.mean(dims, keepdim=True)
    centered = wide - average
    inverse = torch.rsqrt((centered * centered).mean(dims, keepdim=True) + epsilon)
    y = (centered * inverse).to(x.dtype) * scale
    return (y if bias is None else y + bias), average, inverse


@op("RMSNormalization")
def rms_norm(x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Tensor:
    wide = x.to(dtype_of(stash_type))
    dims = list(range(axis % x.dim(), x.dim()))
    return (wide * torch.rsqrt((wide * wide).mean(dims, keepdim=True) + epsilon)).to(scale.dtype) * scale


@op("BatchNormalization")
def batch_norm(
    x: Tensor, scale: Tensor, bias: Tensor, average: Tensor, variance: Tensor, *, epsilon: float = 1e-5, momentum: float = 0.9, training_mode: int = 0
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    wide = functools.partial(along, axis=1, rank=x.dim())
    if not training_mode:
        factor = scale * torch.rsqrt(variance + epsilon)
        return (x * wide(factor) + wide(bias - average * factor)).to(x.dtype)
    dims = [d for d in range(x.dim()) if d != 1]
    own, spread = x.mean(dims), x.var(dims, correction=0)
    y = (x - wide(own)) * wide(torch.rsqrt(spread + epsilon)) * wide(scale) + wide(bias)
    return y, average * momentum + own * (1 - momentum), variance * momentum + spread * (1 - momentum)


enter({"InstanceNormalization": lambda x, scale, bias, *, epsilon=1e-5: functional.group_norm(x, x.shape[1], scale, bias, epsilon)})


@op("GroupNormalization", since=21)
def group_norm(x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1) -> Tensor:
    return functional.group_norm(x, num_groups, scale, bias, epsilon)


@op("GroupNormalization", since=18)
def group_norm_by_group(x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5) -> Tensor:
    """Before opset 21 scale and bias belong to a group, not to a channel."""
    channels = x.shape[1] // num_groups
    return functional.group_norm(x, num_groups, scale.repeat_interleave(channels), bias.repeat_interleave(channels), epsilon)


@op("LpNormalization")
def lp_norm(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    """0 where the norm is 0."""
    size = torch.linalg.vector_norm(x, p, axis, keepdim=True)
    return torch.where(size == 0, torch.zeros_like(x), x / torch.where(size == 0, torch.ones_like(size), size))


@op("MeanVarianceNormalization")
def mean_variance_norm(x: Tensor, *, axes: tuple[int, ...] = (0, 2, 3)) -> Tensor:
    centered = x - x.mean(axes, keepdim=True)
    return centered / (torch.sqrt((centered * centered).mean(axes, keepdim=True)) + 1e-9)


@op("LRN")
def local_response_norm(x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> Tensor:
    before = (size - 1) // 2
    widths = [0, 0] * (x.dim() - 2) + [before, size - 1 - before]
    squares = functional.pad(x * x, widths).unfold(1, size, 1).sum(-1)
    return x / (bias + alpha / size * squares) ** beta


@op("Dropout")
def dropout(
    x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None, *, seed: int | None = None, _outputs: int = 1
) -> Tensor | tuple[Tensor, Tensor]:
    """In training mode the mask is drawn by torch's generator: `torch.manual_seed` decides, not the attribute."""
    share = 0.5 if ratio is None else float(ratio)
    if training is None or not bool(training) or share == 0:
        return x if _outputs == 1 else (x, torch.ones_like(x, dtype=torch.bool))
    kept = torch.rand_like(x, dtype=torch.float32) >= share
    return torch.where(kept, x / (1 - share), torch.zeros_like(x)), kept
