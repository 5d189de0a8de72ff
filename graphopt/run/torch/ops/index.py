"""Shapes and places: what moves elements, reads sizes, or makes index tensors. Integers stay integers."""

from __future__ import annotations

import math

import onnx_ir as ir
import torch
from torch.nn import functional

from graphopt.core.errors import TargetError
from graphopt.run.torch.table import enter, op
from graphopt.run.torch.types import FLOAT8, Tensor, along, dtype_of, integers, kind_of


@op("Constant")
def constant(
    *,
    value: Tensor | None = None,
    value_float: float | None = None,
    value_floats: list[float] | None = None,
    value_int: int | None = None,
    value_ints: list[int] | None = None,
) -> Tensor:
    if value is not None:
        return value
    number = value_float if value_float is not None else value_floats
    if number is not None:
        return torch.tensor(number, dtype=torch.float32)
    return torch.tensor(value_int if value_int is not None else list(value_ints or ()), dtype=torch.int64)


@op("Cast")
def cast(x: Tensor, *, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor:
    kind, wanted = ir.DataType(to), dtype_of(to)
    if kind.is_integer() and kind.bitwidth < 8:
        return _cut(x, kind)
    if wanted in FLOAT8 and x.dtype not in FLOAT8:
        return to_float8(x, wanted, saturate)
    return x if x.dtype == wanted else x.to(wanted)


def to_float8(x: Tensor, wanted: torch.dtype, saturate: int) -> Tensor:
    """What is too large becomes the largest number, or with saturate=0 what the type has for it."""
    top = torch.finfo(wanted).max
    if saturate:
        return x.clamp(-top, top).to(wanted)
    if wanted == torch.float8_e4m3fn:  # it has no infinity, and torch saturates; 464 is half way to the number that it lacks
        x = torch.where(x.abs() > 464, torch.full_like(x, math.nan), x)
    return x.to(wanted)


def _cut(x: Tensor, kind: ir.DataType) -> Tensor:
    """The lowest bits of the whole number."""
    bits = kind.bitwidth
    low = torch.trunc(x.float()).to(torch.int32) & ((1 << bits) - 1)
    return (low - ((low >> (bits - 1)) << bits)).to(torch.int8) if kind.is_signed() else low.to(torch.uint8)


@op("CastLike")
def cast_like(x: Tensor, like: Tensor, *, saturate: int = 1, round_mode: str = "up", _dtype: ir.DataType | None = None) -> Tensor:
    return cast(x, to=int(kind_of(like.dtype) if _dtype is None else _dtype), saturate=saturate)


# ---- sizes --------------------------------------------------------------------------------------------------------------------------------


enter(
    {
        "Identity": lambda x: x,
        "Shape": lambda x, *, start=0, end=None: torch.tensor(x.shape[start:end], dtype=torch.int64, device=x.device),
        "Size": lambda x: torch.tensor(x.numel(), dtype=torch.int64, device=x.device),
        "Squeeze": lambda x, axes=None: x.squeeze() if axes is None else x.squeeze(tuple(integers(axes))),
        "Transpose": lambda x, *, perm=None: x.permute(list(reversed(range(x.dim()))) if perm is None else list(perm)),
        "Expand": lambda x, wanted: x.expand(torch.broadcast_shapes(x.shape, integers(wanted))),
        "Tile": lambda x, repeats: x.repeat(integers(repeats)) if x.dim() else x.clone(),
        "Concat": lambda *parts, axis: torch.cat(parts, axis),
        "NonZero": lambda x: torch.nonzero(x).t() if x.dim() else torch.nonzero(x.reshape(1)).t()[:0],
    }
)


@op("Reshape")
def reshape(x: Tensor, wanted: Tensor, *, allowzero: int = 0) -> Tensor:
    sizes = integers(wanted)
    if not allowzero and 0 in sizes:
        sizes = [x.shape[i] if n == 0 else n for i, n in enumerate(sizes)]
    return x.reshape(sizes)


@op("Flatten")
def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    axis = axis + x.dim() if axis < 0 else axis
    rows = math.prod(x.shape[:axis])
    return x.reshape(rows, math.prod(x.shape[axis:]))


@op("Unsqueeze")
def unsqueeze(x: Tensor, axes: Tensor) -> Tensor:
    wanted = integers(axes)
    final = x.dim() + len(wanted)
    for axis in sorted(a % final for a in wanted):
        x = x.unsqueeze(axis)
    return x


@op("Split")
def split(x: Tensor, sizes: Tensor | None = None, *, axis: int = 0, num_outputs: int | None = None, _outputs: int) -> tuple[Tensor, ...]:
    if sizes is not None:
        return torch.split(x, integers(sizes), axis)  # type: ignore[no-any-return]
    parts = num_outputs or _outputs
    part = -(-x.shape[axis] // parts)
    return torch.split(x, [min(part, max(x.shape[axis] - part * i, 0)) for i in range(parts)], axis)  # type: ignore[no-any-return]


@op("Slice")
def slice_(x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None) -> Tensor:
    first, last = integers(starts), integers(ends)
    dims = list(range(len(first))) if axes is None else integers(axes)
    strides = [1] * len(first) if steps is None else integers(steps)
    for start, end, dim, stride in zip(first, last, dims, strides, strict=True):
        if stride > 0:
            cut = range(x.shape[dim])[start:end:stride]
            x = x[(*[slice(None)] * (dim % x.dim()), slice(cut.start, cut.stop, stride))]
        else:
            picked = range(x.shape[dim])[_reverse(start, end, stride, x.shape[dim])]
            x = x.index_select(dim, torch.tensor(list(picked), dtype=torch.int64, device=x.device))
    return x


def _reverse(start: int, end: int, stride: int, size: int) -> slice:
    """A start before the first element is the first one, as the specification says and numpy does not; an end may lie before the first."""
    start = min(max(start + size if start < 0 else start, 0), size - 1)
    end = min(max(end + size if end < 0 else end, -1), size - 1)
    return slice(0, 0) if not size else slice(start, None if end < 0 else end, stride)


@op("Pad")
def pad(x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None, *, mode: str = "constant") -> Tensor:
    widths = integers(pads)
    dims = list(range(x.dim())) if axes is None else [a % x.dim() for a in integers(axes)]
    before, after = dict(zip(dims, widths[: len(dims)], strict=True)), dict(zip(dims, widths[len(dims) :], strict=True))
    if mode == "constant":
        flat = [n for d in reversed(range(x.dim())) for n in (before.get(d, 0), after.get(d, 0))]
        return functional.pad(x, flat, value=0 if value is None else value.item())
    for d in dims:
        places = torch.arange(-before[d], x.shape[d] + after[d], device=x.device)
        x = x.index_select(d, _inside(places, x.shape[d], mode))
    return x


def _inside(places: Tensor, size: int, mode: str) -> Tensor:
    if mode == "edge":
        return places.clamp(0, size - 1)
    if mode == "wrap":
        return places % size
    if mode != "reflect":
        raise TargetError(f"the torch executor has no Pad with mode `{mode}`")
    period = max(2 * (size - 1), 1)
    return (size - 1) - ((places % period) - (size - 1)).abs()


# ---- index tensors ------------------------------------------------------------------------------------------------------------------------


@op("Range")
def arange(start: Tensor, limit: Tensor, delta: Tensor, *, stash_type: int = 1) -> Tensor:
    first, step = start.item(), delta.item()
    count = max(math.ceil((limit.item() - first) / step), 0)
    steps = torch.arange(count, dtype=start.dtype if not start.is_floating_point() else torch.float64, device=start.device)
    return (steps * step + first).to(start.dtype)


@op("ConstantOfShape")
def constant_of_shape(sizes: Tensor, *, value: Tensor | None = None) -> Tensor:
    fill = torch.zeros(1) if value is None else value
    return fill.to(sizes.device).reshape(()).expand(integers(sizes)).clone()


@op("EyeLike")
def eye_like(x: Tensor, *, dtype: int | None = None, k: int = 0) -> Tensor:
    ones = torch.ones(x.shape, dtype=x.dtype if dtype is None else dtype_of(dtype), device=x.device)
    return torch.triu(torch.tril(ones, k), k)


@op("OneHot")
def one_hot(indices: Tensor, depth: Tensor, values: Tensor, *, axis: int = -1) -> Tensor:
    count = int(depth.reshape(()))
    places = indices.to(torch.int64).unsqueeze(axis)
    valid = (places >= -count) & (places < count)
    steps = along(torch.arange(count, device=indices.device), axis, places.dim())
    return torch.where((places % count == steps) & valid, values[1], values[0])


@op("TopK")
def top_k(x: Tensor, k: Tensor, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Tensor, Tensor]:
    """Of equal values the one with the lower index comes first, as in the specification; torch.topk does not promise that."""
    count = int(k.reshape(()))
    values, places = torch.sort(x, dim=axis, descending=bool(largest), stable=True)
    return values.narrow(axis, 0, count), places.narrow(axis, 0, count)


@op("Unique")
def unique(x: Tensor, *, axis: int | None = None, sorted: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values, inverse, counts = torch.unique(x, sorted=True, return_inverse=True, return_counts=True, dim=axis)
    inverse = inverse.reshape(-1)
    size = values.shape[axis] if axis is not None else values.numel()
    first = torch.full((size,), inverse.numel(), dtype=torch.int64).scatter_reduce(0, inverse, torch.arange(inverse.numel()), "amin")
    if not sorted:
        order = torch.argsort(first)
        back = torch.argsort(order)
        return values.index_select(axis or 0, order), first[order], back[inverse], counts[order]
    return values, first, inverse, counts


@op("Compress")
def compress(x: Tensor, condition: Tensor, *, axis: int | None = None) -> Tensor:
    x, axis = (x.reshape(-1), 0) if axis is None else (x, axis)
    return x.index_select(axis, torch.nonzero(condition).reshape(-1))


@op("DepthToSpace")
def depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    n, c, h, w = x.shape
    b, depth = blocksize, c // blocksize**2
    if mode == "DCR":
        parts = x.reshape(n, b, b, depth, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        parts = x.reshape(n, depth, b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    return parts.reshape(n, depth, h * b, w * b)


@op("SpaceToDepth")
def space_to_depth(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    n, c, h, w = x.shape
    b = blocksize
    order = (0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4)
    return x.reshape(n, c, h // b, b, w // b, b).permute(order).reshape(n, c * b * b, h // b, w // b)
