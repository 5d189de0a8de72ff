"""Quantized values and the operators that make, read and multiply them.

Where a gradient is asked for, a quantized value stays a float tensor that holds whole numbers, because an integer tensor carries none:
rounding passes the gradient on unchanged (the straight-through estimator, Bengio et al. 2013), clipping to the range of the type passes none.
The scale gets the gradient of the same rule (Esser et al., LSQ, 2020). Without gradients the value is an integer tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import onnx_ir as ir
import torch

from graphopt.run.torch.ops.index import to_float8
from graphopt.run.torch.ops.window import Window, conv, windowed
from graphopt.run.torch.table import op
from graphopt.run.torch.types import DTYPES, FLOAT8, Tensor, along, dtype_of, kind_of


def whole(x: Tensor) -> Tensor:
    """Rounded half to even; the gradient passes. x + (round(x) - x) is exactly round(x): the difference is a multiple of x's last place, below 1."""
    rounded = torch.round(x)
    return x + (rounded - x).detach() if x.requires_grad else rounded


def spread(parameter: Tensor, x: Tensor, axis: int, block: int) -> Tensor:
    """A scale or zero point beside `x`: one for the tensor, one for each place of `axis`, or one for each `block` places of it."""
    if parameter.numel() == 1 and not block:
        return parameter.reshape(())
    if block:
        return parameter.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    return along(parameter, axis, x.dim())


@op("QuantizeLinear")
def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
    saturate: int = 1,
    _dtype: ir.DataType | None = None,
) -> Tensor:
    kind = _kind(zero_point, output_dtype, _dtype)
    width = dtype_of(precision) if precision else torch.promote_types(scale.dtype, torch.float32) if scale.is_floating_point() else torch.float32
    ratio = x.to(width) / spread(scale, x, axis, block_size).to(width)
    if dtype_of(kind) in FLOAT8:
        return _straight_float8(ratio, dtype_of(kind), saturate)
    rounded = whole(ratio)
    if zero_point is not None:
        rounded = rounded + spread(zero_point, x, axis, block_size).to(width)
    clipped = torch.clamp(rounded, *limits(kind))
    return clipped if clipped.requires_grad else clipped.to(dtype_of(kind))


def _kind(zero_point: Tensor | None, output_dtype: int, declared: ir.DataType | None) -> ir.DataType:
    """torch keeps 4 bits in a byte, so the type that the graph declares counts before that of the zero point's tensor."""
    if output_dtype:
        return ir.DataType(output_dtype)
    if zero_point is None:
        return ir.DataType.UINT8
    if declared is not None and DTYPES.get(declared) == zero_point.dtype:
        return declared
    return kind_of(zero_point.dtype)


def limits(kind: ir.DataType) -> tuple[int, int]:
    """The least and the largest whole number of a type."""
    top = 1 << (kind.bitwidth - kind.is_signed())
    return -top if kind.is_signed() else 0, top - 1


def _straight_float8(x: Tensor, dtype: torch.dtype, saturate: int) -> Tensor:
    rounded = to_float8(x, dtype, saturate)
    if not x.requires_grad:
        return rounded
    clipped = x.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    return clipped + (rounded.to(x.dtype) - clipped).detach()


@op("DequantizeLinear")
def dequantize(x: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, axis: int = 1, block_size: int = 0, output_dtype: int = 0) -> Tensor:
    wanted = dtype_of(output_dtype) if output_dtype else scale.dtype
    width = torch.promote_types(scale.dtype, torch.float32)
    wide = x.to(width)
    if zero_point is not None and not _all_zero(zero_point):
        wide = wide - spread(zero_point, x, axis, block_size).to(width)
    return (wide * spread(scale, x, axis, block_size).to(width)).to(wanted)


def _all_zero(zero_point: Tensor) -> bool:
    return zero_point.numel() == 1 and not zero_point.is_floating_point() and int(zero_point) == 0


@op("DynamicQuantizeLinear")
def dynamic_quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """uint8, over the range of `x` and 0."""
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    low, high = (torch.minimum(x.amin(), zero), torch.maximum(x.amax(), zero)) if x.numel() else (zero, zero)
    scale = (high - low) / 255
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero_point = torch.clamp(torch.round(-low / safe), 0, 255).detach().to(torch.uint8)
    return quantize(x, safe, zero_point), scale, zero_point


@op("MatMulInteger")
def matmul_integer(a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None) -> Tensor:
    if a_zero is not None and a_zero.dim() == 1 and a_zero.numel() > 1:
        a_zero = a_zero.unsqueeze(-1)
    return _exact(torch.matmul, a, a_zero, b, b_zero)


def _exact(product: Callable[[Tensor, Tensor], Tensor], a: Tensor, a_zero: Tensor | None, b: Tensor, b_zero: Tensor | None) -> Tensor:
    """In float64, where sums of products of bytes are exact; with a gradient it stays a float."""
    wide_a = a.double() if a_zero is None else a.double() - a_zero.double()
    wide_b = b.double() if b_zero is None else b.double() - b_zero.double()
    result = product(wide_a, wide_b)
    return result.to(torch.float32) if result.requires_grad else result.to(torch.int32)


@windowed("ConvInteger")
def conv_integer(
    x: Tensor, weight: Tensor, x_zero: Tensor | None = None, weight_zero: Tensor | None = None, *, window: Window, group: int = 1
) -> Tensor:
    if weight_zero is not None and weight_zero.dim() == 1 and weight_zero.numel() > 1:
        weight_zero = along(weight_zero, 0, weight.dim())
    return _exact(functools.partial(conv, window=window, group=group), x, x_zero, weight, weight_zero)


@op("QLinearMatMul")
def quantized_matmul(
    a: Tensor, a_scale: Tensor, a_zero: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor, y_scale: Tensor, y_zero: Tensor,
    *, _dtype: ir.DataType | None = None,
) -> Tensor:  # fmt: skip
    if a_scale.numel() > 1 and a_scale.dim() == 1:
        a_scale, a_zero = a_scale.unsqueeze(-1), a_zero.unsqueeze(-1)
    product = torch.matmul((a.double() - a_zero.double()) * a_scale.double(), (b.double() - b_zero.double()) * b_scale.double())
    return _requantized(product, y_scale, y_zero)


@windowed("QLinearConv")
def quantized_conv(
    x: Tensor, x_scale: Tensor, x_zero: Tensor, weight: Tensor, w_scale: Tensor, w_zero: Tensor, y_scale: Tensor, y_zero: Tensor,
    bias: Tensor | None = None, *, window: Window, group: int = 1,
) -> Tensor:  # fmt: skip
    per_channel = functools.partial(along, axis=0, rank=weight.dim())
    w_wide = (weight.double() - per_channel(w_zero.double())) * per_channel(w_scale.double())
    wide = (x.double() - x_zero.double()) * x_scale.double()
    b_wide = None if bias is None else bias.double() * x_scale.double() * w_scale.double().reshape(-1)
    product = conv(wide, w_wide, b_wide, window=window, group=group)
    return _requantized(product, y_scale, y_zero)


def _requantized(product: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    if scale.numel() > 1:
        scale, zero = scale.reshape(-1, 1), zero.reshape(-1, 1)
    clipped = torch.clamp(whole(product / scale.double()) + zero.double(), *limits(kind_of(zero.dtype)))
    return clipped.to(torch.float32) if clipped.requires_grad else clipped.to(zero.dtype)
