"""Convolution and pooling: what looks at a window of an image or a signal, [batch, channels, *spatial]."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from graphopt.run.torch.table import F, enter, op
from graphopt.run.torch.types import Ints, Tensor, along


@dataclasses.dataclass(frozen=True)
class Axis:
    """A window on one spatial axis: the size of the input there, and the padding around it."""

    size: int
    kernel: int
    stride: int
    dilation: int
    before: int = 0
    after: int = 0

    @property
    def span(self) -> int:
        """The width of the dilated kernel."""
        return (self.kernel - 1) * self.dilation + 1

    def padded(self, before: int, after: int) -> Axis:
        return dataclasses.replace(self, before=before, after=after)

    def same(self, upper: bool) -> Axis:
        """With the padding that gives a place for each stride of the input; an odd element goes to the end, with `upper`."""
        total = max((-(-self.size // self.stride) - 1) * self.stride + self.span - self.size, 0)
        return self.padded(*halves(total, upper))

    def whole(self, ceil: int) -> Axis:
        """With the padding that makes whole windows; with `ceil` the last one may reach further, if it starts in the input or its left padding."""
        room = self.size + self.before + self.after - self.span
        count = (-(-room // self.stride) if ceil else room // self.stride) + 1
        if ceil and (count - 1) * self.stride >= self.size + self.before:
            count -= 1
        return self.padded(self.before, (count - 1) * self.stride + self.span - self.size - self.before)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    """The attributes that all these operators have; see `over`."""

    auto_pad: str = "NOTSET"
    dilations: Ints | None = None
    kernel_shape: Ints | None = None
    pads: Ints | None = None
    strides: Ints | None = None

    def over(self, x: Tensor, kernel: Ints | None = None) -> list[Axis]:
        """The spatial axes of `x`, with the padding that is asked for."""
        kernel = kernel or self.kernel_shape or ()
        ones = (1,) * len(kernel)
        axes = [Axis(*each) for each in zip(x.shape[2:], kernel, self.strides or ones, self.dilations or ones, strict=True)]
        if self.auto_pad in ("NOTSET", ""):
            given = list(self.pads or (0,) * 2 * len(axes))
            return [axis.padded(a, b) for axis, a, b in zip(axes, given[: len(axes)], given[len(axes) :], strict=True)]
        return axes if self.auto_pad == "VALID" else [axis.same(self.auto_pad == "SAME_UPPER") for axis in axes]


def windowed(name: str) -> Callable[[F], F]:
    """Enter a function with an argument `window` for an operator that has the attributes of a Window beside those of the function."""

    def entered(function: F) -> F:
        shared = inspect.signature(Window).parameters

        @functools.wraps(function)
        def run(*inputs: Any, **attributes: Any) -> Any:
            window = Window(**{key: attributes.pop(key) for key in shared if key in attributes})
            return function(*inputs, **attributes, window=window)

        own = [p for p in inspect.signature(function).parameters.values() if p.name != "window"]
        run.__signature__ = inspect.Signature([*own, *shared.values()])  # type: ignore[attr-defined]
        op(name)(run)
        return function

    return entered


def halves(total: int, upper: bool) -> tuple[int, int]:
    """(before, after); an odd element goes to the end, with `upper`."""
    small, large = total // 2, total - total // 2
    return (small, large) if upper else (large, small)


def flat(pads: Sequence[tuple[int, int]]) -> list[int]:
    """As torch.nn.functional.pad takes them: the last axis first."""
    return [n for pair in reversed(pads) for n in pair]


@windowed("Conv")
def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, window: Window, group: int = 1) -> Tensor:
    axes = window.over(x, weight.shape[2:])
    stride, dilation, none = [a.stride for a in axes], [a.dilation for a in axes], [0] * len(axes)
    if all(a.before == a.after for a in axes):
        return torch.convolution(x, weight, bias, stride, [a.before for a in axes], dilation, False, none, group)
    padded = functional.pad(x, flat([(a.before, a.after) for a in axes]))
    return torch.convolution(padded, weight, bias, stride, none, dilation, False, none, group)


@windowed("ConvTranspose")
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    window: Window,
    group: int = 1,
    output_padding: Ints | None = None,
    output_shape: Ints | None = None,
) -> Tensor:
    n = x.dim() - 2
    same = window.auto_pad in ("SAME_UPPER", "SAME_LOWER")
    axes = dataclasses.replace(window, auto_pad="NOTSET").over(x, weight.shape[2:])
    stride, extra = [a.stride for a in axes], output_padding or (0,) * n
    whole = torch.convolution(x, weight, None, stride, [0] * n, [a.dilation for a in axes], True, [0] * n, group)
    around = [(a.before, a.after) for a in axes]
    if output_shape is not None or same:
        wanted = list(output_shape)[-n:] if output_shape is not None else [a.size * a.stride for a in axes]
        sizes = [w + e for w, e in zip(whole.shape[2:], extra, strict=True)]  # before anything is cut
        around = [halves(size - w, window.auto_pad == "SAME_UPPER") for size, w in zip(sizes, wanted, strict=True)]
    y = functional.pad(whole, flat([(-a, e - b) for (a, b), e in zip(around, extra, strict=True)]))
    return y if bias is None else y + along(bias, 1, x.dim())


# ---- pooling ------------------------------------------------------------------------------------------------------------------------------


def _windows(x: Tensor, axes: Sequence[Axis], fill: float) -> Tensor:
    """[batch, channels, *places, product of kernel]: every window of the input padded by `fill`."""
    x = functional.pad(x, flat([(a.before, a.after) for a in axes]), value=fill)
    for d, a in enumerate(axes, start=2):
        x = x.unfold(d, a.span, a.stride)
    return x[(..., *[slice(None, None, a.dilation) for a in axes])].flatten(-len(axes))


@windowed("MaxPool")
def max_pool(x: Tensor, *, window: Window, ceil_mode: int = 0, storage_order: int = 0, _outputs: int = 1) -> Tensor | tuple[Tensor, Tensor]:
    axes = window.over(x)
    low: float = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    found = _windows(x, [a.whole(ceil_mode) for a in axes], low)
    if _outputs == 1:
        return found.amax(-1)
    values, inside = found.max(-1)
    return values, _places(x, inside, axes, storage_order)


def _places(x: Tensor, inside: Tensor, axes: Sequence[Axis], column_major: int) -> Tensor:
    """Where each maximum stands in the flattened input."""
    coordinates: list[Tensor] = []
    for d, a in reversed(list(enumerate(axes, start=2))):
        start = along(torch.arange(inside.shape[d], device=x.device) * a.stride, d, inside.dim())
        coordinates.insert(0, start + inside % a.kernel * a.dilation - a.before)
        inside = inside // a.kernel
    pairs = list(zip(axes, coordinates, strict=True))
    place = torch.zeros_like(inside)
    for a, at in reversed(pairs) if column_major else pairs:
        place = place * a.size + at
    planes = torch.arange(x.shape[0] * x.shape[1], device=x.device).reshape(x.shape[0], x.shape[1], *[1] * len(axes))
    return place + planes * math.prod(x.shape[2:])


@windowed("AveragePool")
def average_pool(x: Tensor, *, window: Window, ceil_mode: int = 0, count_include_pad: int = 0) -> Tensor:
    """The part of a window that lies beyond the padding (`ceil_mode`) never counts."""
    axes = window.over(x)
    whole = [a.whole(ceil_mode) for a in axes]
    total = _windows(x, whole, 0).sum(-1)
    ones = torch.ones([1, 1, *x.shape[2:]], dtype=x.dtype, device=x.device)
    if count_include_pad:
        inside = [(a.before, min(a.after, w.after)) for a, w in zip(axes, whole, strict=True)]
        ones = functional.pad(ones, flat(inside), value=1)
        whole = [w.padded(0, w.after - after) for (_, after), w in zip(inside, whole, strict=True)]
    return total / _windows(ones, whole, 0).sum(-1)


@windowed("LpPool")
def lp_pool(x: Tensor, *, window: Window, ceil_mode: int = 0, p: int = 2) -> Tensor:
    return (_windows(x, [a.whole(ceil_mode) for a in window.over(x)], 0).abs() ** p).sum(-1) ** (1 / p)


enter({
    "GlobalAveragePool": lambda x: x.mean(list(range(2, x.dim())), keepdim=True),
    "GlobalMaxPool": lambda x: x.amax(list(range(2, x.dim())), keepdim=True),
})  # fmt: skip
