"""Convolution and pooling: what looks at a window of an image or a signal, [batch, channels, *spatial]."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional

from graphopt.run.torch.table import op
from graphopt.run.torch.types import Tensor

Ints = Sequence[int]
_CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_CONV_TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}


def paddings(sizes: Ints, spans: Ints, strides: Ints, pads: Ints | None, auto_pad: str) -> list[tuple[int, int]]:
    """(before, after) of each spatial axis; `span` is the width of a dilated kernel."""
    if auto_pad in ("NOTSET", ""):
        given = list(pads) if pads else [0] * (2 * len(sizes))
        return list(zip(given[: len(sizes)], given[len(sizes) :], strict=True))
    if auto_pad == "VALID":
        return [(0, 0)] * len(sizes)
    found = []
    for size, span, stride in zip(sizes, spans, strides, strict=True):
        total = max((-(-size // stride) - 1) * stride + span - size, 0)
        small, large = total // 2, total - total // 2
        found.append((small, large) if auto_pad == "SAME_UPPER" else (large, small))
    return found


def flat(pads: Sequence[tuple[int, int]]) -> list[int]:
    """As torch.nn.functional.pad takes them: the last axis first."""
    return [n for pair in reversed(pads) for n in pair]


@op("Conv")
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Ints | None = None,
    group: int = 1,
    kernel_shape: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    n = x.dim() - 2
    dilation, stride = tuple(dilations or (1,) * n), tuple(strides or (1,) * n)
    spans = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilation, strict=True)]
    around = paddings(x.shape[2:], spans, stride, pads, auto_pad)
    if all(a == b for a, b in around):
        return _CONV[n](x, weight, bias, stride, tuple(a for a, _ in around), dilation, group)
    return _CONV[n](functional.pad(x, flat(around)), weight, bias, stride, 0, dilation, group)


@op("ConvTranspose")
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Ints | None = None,
    group: int = 1,
    kernel_shape: Ints | None = None,
    output_padding: Ints | None = None,
    output_shape: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    n = x.dim() - 2
    dilation, stride, extra = tuple(dilations or (1,) * n), tuple(strides or (1,) * n), tuple(output_padding or (0,) * n)
    whole = _CONV_TRANSPOSED[n](x, weight, None, stride, 0, 0, group, dilation)
    sizes = [w + e for w, e in zip(whole.shape[2:], extra, strict=True)]  # before anything is cut
    given = list(pads or [0] * (2 * n))
    around = list(zip(given[:n], given[n:], strict=True))
    if output_shape is not None or auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        wanted = list(output_shape)[-n:] if output_shape is not None else [s * t for s, t in zip(x.shape[2:], stride, strict=True)]
        cuts = [s - w for s, w in zip(sizes, wanted, strict=True)]
        around = [(c // 2, c - c // 2) if auto_pad == "SAME_UPPER" else (c - c // 2, c // 2) for c in cuts]
    y = functional.pad(whole, flat([(-a, e - b) for (a, b), e in zip(around, extra, strict=True)]))
    return y if bias is None else y + bias.reshape([1, -1] + [1] * n)


# ---- pooling ------------------------------------------------------------------------------------------------------------------------------


def _widths(sizes: Ints, kernel: Ints, strides: Ints, dilations: Ints, around: Sequence[tuple[int, int]], ceil: int) -> list[tuple[int, int]]:
    """The padding that makes whole windows: with `ceil` the last one may reach further, if it starts inside the input or its left padding."""
    widths = []
    for size, k, stride, dilation, (before, after) in zip(sizes, kernel, strides, dilations, around, strict=True):
        span = (k - 1) * dilation + 1
        room = size + before + after - span
        count = (-(-room // stride) if ceil else room // stride) + 1
        if ceil and (count - 1) * stride >= size + before:
            count -= 1
        widths.append((before, (count - 1) * stride + span - size - before))
    return widths


def _windows(x: Tensor, kernel: Ints, strides: Ints, dilations: Ints, widths: Sequence[tuple[int, int]], fill: float) -> Tensor:
    """[batch, channels, *places, product of kernel]: every window of the input padded by `fill`."""
    x = functional.pad(x, flat(widths), value=fill)
    for axis, (k, stride, dilation) in enumerate(zip(kernel, strides, dilations, strict=True)):
        x = x.unfold(2 + axis, (k - 1) * dilation + 1, stride)
    return x[(..., *[slice(None, None, d) for d in dilations])].flatten(-len(kernel))


@op("MaxPool")
def max_pool(
    x: Tensor,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Ints | None = None,
    kernel_shape: Ints,
    pads: Ints | None = None,
    storage_order: int = 0,
    strides: Ints | None = None,
    _outputs: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    n = len(kernel_shape)
    dilation, stride = tuple(dilations or (1,) * n), tuple(strides or (1,) * n)
    spans = [(k - 1) * d + 1 for k, d in zip(kernel_shape, dilation, strict=True)]
    around = paddings(x.shape[2:], spans, stride, pads, auto_pad)
    low: float = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    found = _windows(x, kernel_shape, stride, dilation, _widths(x.shape[2:], kernel_shape, stride, dilation, around, ceil_mode), low)
    if _outputs == 1:
        return found.amax(-1)
    values, inside = found.max(-1)
    return values, _places(x, inside, kernel_shape, stride, dilation, around, storage_order)


def _places(x: Tensor, inside: Tensor, kernel: Ints, stride: Ints, dilation: Ints, around: Sequence[tuple[int, int]], column_major: int) -> Tensor:
    """Where each maximum stands in the flattened input."""
    sizes = x.shape[2:]
    coordinates: list[Tensor] = []
    for axis in reversed(range(len(kernel))):
        step = inside % kernel[axis]
        inside = inside // kernel[axis]
        start = (
            torch.arange(inside.shape[2 + axis], device=x.device).reshape([-1 if d == 2 + axis else 1 for d in range(inside.dim())]) * stride[axis]
        )
        coordinates.insert(0, start + step * dilation[axis] - around[axis][0])
    order = list(range(len(sizes)))
    place = torch.zeros_like(inside)
    for axis in order[::-1] if column_major else order:
        place = place * sizes[axis] + coordinates[axis]
    planes = torch.arange(x.shape[0] * x.shape[1], device=x.device).reshape(x.shape[0], x.shape[1], *[1] * len(sizes))
    return place + planes * math.prod(sizes)


@op("AveragePool")
def average_pool(
    x: Tensor,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Ints | None = None,
    kernel_shape: Ints,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    """The part of a window that lies beyond the padding (`ceil_mode`) never counts."""
    n = len(kernel_shape)
    dilation, stride = tuple(dilations or (1,) * n), tuple(strides or (1,) * n)
    spans = [(k - 1) * d + 1 for k, d in zip(kernel_shape, dilation, strict=True)]
    around = paddings(x.shape[2:], spans, stride, pads, auto_pad)
    widths = _widths(x.shape[2:], kernel_shape, stride, dilation, around, ceil_mode)
    total = _windows(x, kernel_shape, stride, dilation, widths, 0).sum(-1)
    ones = torch.ones([1, 1, *x.shape[2:]], dtype=x.dtype, device=x.device)
    if count_include_pad:
        inside = [(a, min(b, w)) for (a, b), (_, w) in zip(around, widths, strict=True)]
        ones, widths = functional.pad(ones, flat(inside), value=1), [(0, w - b) for (_, b), (_, w) in zip(inside, widths, strict=True)]
    return total / _windows(ones, kernel_shape, stride, dilation, widths, 0).sum(-1)


@op("LpPool")
def lp_pool(
    x: Tensor,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Ints | None = None,
    kernel_shape: Ints,
    p: int = 2,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    n = len(kernel_shape)
    dilation, stride = tuple(dilations or (1,) * n), tuple(strides or (1,) * n)
    spans = [(k - 1) * d + 1 for k, d in zip(kernel_shape, dilation, strict=True)]
    around = paddings(x.shape[2:], spans, stride, pads, auto_pad)
    widths = _widths(x.shape[2:], kernel_shape, stride, dilation, around, ceil_mode)
    return (_windows(x, kernel_shape, stride, dilation, widths, 0).abs() ** p).sum(-1) ** (1 / p)


@op("GlobalAveragePool")
def global_average_pool(x: Tensor) -> Tensor:
    return x.mean(list(range(2, x.dim())), keepdim=True)


@op("GlobalMaxPool")
def global_max_pool(x: Tensor) -> Tensor:
    return x.amax(list(range(2, x.dim())), keepdim=True)
