"""Gather and scatter: what picks or writes elements by index tensors. Negative indices count from the end."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from graphopt.run.torch.table import enter, op
from graphopt.run.torch.types import Tensor, along


@op("Gather")
def gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    axis = axis % x.dim()
    if indices.dim() == 0:
        return x.select(axis, int(indices))
    if axis == 0 and x.dim() == 2 and x.is_floating_point():
        return functional.embedding(_wrapped(indices, x.shape[0]), x)
    flat = x.index_select(axis, _wrapped(indices, x.shape[axis]).reshape(-1))
    return flat.reshape(x.shape[:axis] + indices.shape + x.shape[axis + 1 :])


def _wrapped(indices: Tensor, size: int) -> Tensor:
    indices = indices.to(torch.int64)
    return torch.where(indices < 0, indices + size, indices)


enter({
    "GatherElements": lambda x, indices, *, axis=0: torch.gather(x, axis, _wrapped(indices, x.shape[axis])),
    "GatherND": lambda x, indices, *, batch_dims=0: x[_coordinates(x, indices, batch_dims)],
})  # fmt: skip


def _coordinates(x: Tensor, indices: Tensor, batch_dims: int) -> tuple[Tensor, ...]:
    """Rows of indices as one index tensor an axis, the batch axes first."""
    rows = tuple(_wrapped(part, x.shape[batch_dims + d]) for d, part in enumerate(indices.unbind(-1)))
    rank = indices.dim() - 1
    batch = (along(torch.arange(x.shape[d], device=x.device), d, rank).expand(indices.shape[:-1]) for d in range(batch_dims))
    return (*batch, *rows)


_SCATTER = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@op("ScatterElements", "Scatter")
def scatter_elements(x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none") -> Tensor:
    places = _wrapped(indices, x.shape[axis])
    if reduction == "none":
        return x.scatter(axis, places, updates)
    return x.scatter_reduce(axis, places, updates, _SCATTER[reduction])


@op("ScatterND")
def scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    where = _coordinates(x, indices, 0)
    if reduction in ("none", "add"):
        return x.index_put(where, updates, accumulate=reduction == "add")
    count = indices.shape[-1]
    tail = math.prod(x.shape[count:])
    row = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=x.device)
    for d, part in enumerate(where):
        row = row * x.shape[d] + part
    flat = (row.reshape(-1, 1) * tail + torch.arange(tail, device=x.device)).reshape(-1)
    return x.reshape(-1).scatter_reduce(0, flat, updates.reshape(-1), _SCATTER[reduction]).reshape(x.shape)


@op("TensorScatter")
def tensor_scatter(past: Tensor, update: Tensor, write: Tensor | None = None, *, axis: int = -2, mode: str = "linear") -> Tensor:
    """A key/value cache with the new rows written at a place of its own for each row of the batch."""
    start = torch.zeros(past.shape[0], dtype=torch.int64, device=past.device) if write is None else write
    places = along(start, 0, past.dim()) + along(torch.arange(update.shape[axis], device=past.device), axis, past.dim())
    places = places % past.shape[axis] if mode == "circular" else places
    return past.scatter(axis, places.expand(update.shape), update)


@op("ReverseSequence")
def reverse_sequence(x: Tensor, lengths: Tensor, *, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    steps = torch.arange(x.shape[time_axis], device=x.device)
    place = torch.where(steps < lengths[:, None], lengths[:, None] - 1 - steps, steps)  # [batch, time]
    place = place if batch_axis == 0 else place.t()
    return torch.gather(x, time_axis, place.reshape(list(place.shape) + [1] * (x.dim() - 2)).expand(x.shape))
