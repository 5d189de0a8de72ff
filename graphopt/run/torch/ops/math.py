"""Arithmetic: element by element, reductions, products."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch.nn import functional

from graphopt.run.torch.table import enter, op
from graphopt.run.torch.types import Tensor, integers

enter({
    "Abs": torch.abs, "Acos": torch.acos, "Acosh": torch.acosh, "Asin": torch.asin, "Asinh": torch.asinh, "Atan": torch.atan, "Atanh": torch.atanh,
    "BitwiseNot": torch.bitwise_not, "Ceil": torch.ceil, "Cos": torch.cos, "Cosh": torch.cosh, "Erf": torch.erf, "Exp": torch.exp,
    "Floor": torch.floor, "IsNaN": torch.isnan, "Log": torch.log, "Neg": torch.neg, "Not": torch.logical_not, "Reciprocal": torch.reciprocal,
    "Round": torch.round, "Sign": torch.sign, "Sin": torch.sin, "Sinh": torch.sinh, "Sqrt": torch.sqrt, "Tan": torch.tan, "Tanh": torch.tanh,
    "Det": torch.det,
    "Add": torch.add, "And": torch.logical_and, "BitwiseAnd": torch.bitwise_and, "BitwiseOr": torch.bitwise_or, "BitwiseXor": torch.bitwise_xor,
    "Equal": torch.eq, "Greater": torch.gt, "GreaterOrEqual": torch.ge, "Less": torch.lt, "LessOrEqual": torch.le, "Mul": torch.mul,
    "Or": torch.logical_or, "Sub": torch.sub, "Xor": torch.logical_xor, "MatMul": torch.matmul, "Where": torch.where,
    "Div": lambda a, b: torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc"),
    "Mod": lambda a, b, *, fmod=0: torch.fmod(a, b) if fmod else torch.remainder(a, b),
    "BitShift": lambda a, b, *, direction: torch.bitwise_left_shift(a, b) if direction == "LEFT" else torch.bitwise_right_shift(a, b),
    "Sum": lambda *terms: functools.reduce(torch.add, terms),
    "Mean": lambda *terms: functools.reduce(torch.add, terms) / len(terms),
    "Max": lambda *terms: functools.reduce(torch.maximum, terms),
    "Min": lambda *terms: functools.reduce(torch.minimum, terms),
    "Clip": lambda x, low=None, high=None: x if low is None and high is None else torch.clamp(x, low, high),
    "Trilu": lambda x, k=None, *, upper=1: (torch.triu if upper else torch.tril)(x, 0 if k is None else int(k)),
    "Einsum": lambda *terms, equation: torch.einsum(equation, *terms),
})  # fmt: skip


@op("Pow")
def power(a: Tensor, b: Tensor) -> Tensor:
    """The type is that of the base. One constant exponent is read as a number: squares and roots are cheaper so, and cheaper to derive."""
    if b.numel() == 1 and b.dim() <= a.dim() and not b.requires_grad:
        exponent = b.item()
        exact = a.is_floating_point() or (isinstance(exponent, int) and exponent >= 0)
        return torch.pow(a, exponent) if exact else torch.pow(a.double(), exponent).to(a.dtype)
    if a.is_floating_point():
        return torch.pow(a, b.to(a.dtype))
    return torch.pow(a, b) if not b.is_floating_point() else torch.pow(a.double(), b.double()).to(a.dtype)


@op("BitShift")
def bit_shift(a: Tensor, b: Tensor, *, direction: str) -> Tensor:
    return torch.bitwise_left_shift(a, b) if direction == "LEFT" else torch.bitwise_right_shift(a, b)


@op("IsInf")
def is_inf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    if detect_negative and detect_positive:
        return torch.isinf(x)
    if detect_negative:
        return torch.isneginf(x)
    return torch.isposinf(x) if detect_positive else torch.zeros_like(x, dtype=torch.bool)


def _cumulate(function: Callable[..., Tensor], start: int, x: Tensor, axis: Tensor, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """`exclusive`: one place later (earlier, if reversed), beginning with `start`."""
    dim = int(axis)
    total = function(x.flip(dim), dim, dtype=x.dtype).flip(dim) if reverse else function(x, dim, dtype=x.dtype)
    if not exclusive or not x.numel():
        return total
    first = torch.full_like(total.narrow(dim, 0, 1), start)
    kept = total.narrow(dim, 1 if reverse else 0, x.shape[dim] - 1)
    return torch.cat([kept, first] if reverse else [first, kept], dim)


enter({"CumSum": functools.partial(_cumulate, torch.cumsum, 0), "CumProd": functools.partial(_cumulate, torch.cumprod, 1)})


# ---- reductions ---------------------------------------------------------------------------------------------------------------------------


def _reduce(
    function: Callable[[Tensor, list[int], bool], Tensor],
    single: Callable[[Tensor], Tensor],
    x: Tensor,
    axes: Tensor | None = None,
    *,
    keepdims: int = 1,
    noop_with_empty_axes: int = 0,
) -> Tensor:
    """`single`: what the operator makes of one element, where no axis is reduced."""
    dims = [] if axes is None else integers(axes)
    if not dims and (noop_with_empty_axes or not x.dim()):
        return single(x)
    return function(x, dims or list(range(x.dim())), bool(keepdims))


def _sum(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    return torch.sum(x, dims, keep, dtype=x.dtype)


def _mean(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    if x.is_floating_point():
        return torch.mean(x, dims, keep)
    return torch.div(_sum(x, dims, keep), math.prod(x.shape[d] for d in dims), rounding_mode="trunc").to(x.dtype)


def _extreme(function: Callable[..., Tensor], highest: bool, x: Tensor, dims: list[int], keep: bool) -> Tensor:
    """Of an empty set: the end of the type's range."""
    if all(x.shape[d] for d in dims):
        return function(x, dims, keep)
    shape = [1 if d in {d % x.dim() for d in dims} else n for d, n in enumerate(x.shape)]
    if x.is_floating_point():
        end: float = math.inf if highest else -math.inf
    else:
        end = highest if x.dtype == torch.bool else torch.iinfo(x.dtype).max if highest else torch.iinfo(x.dtype).min
    full = torch.full(shape, end, dtype=x.dtype, device=x.device)
    return full if keep else full.squeeze(tuple(dims))


def _product(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    for dim in sorted((d % x.dim() for d in dims), reverse=True):
        x = torch.prod(x, dim, keep, dtype=x.dtype)
    return x


def _root(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    if x.is_floating_point():
        return torch.linalg.vector_norm(x, 2, dims, keep)
    return torch.sqrt(_sum(x.double() ** 2, dims, keep)).to(x.dtype)


def _itself(x: Tensor) -> Tensor:
    return x


_REDUCTIONS: dict[str, tuple[Callable[[Tensor, list[int], bool], Tensor], Callable[[Tensor], Tensor]]] = {
    "ReduceSum": (_sum, _itself),
    "ReduceMean": (_mean, _itself),
    "ReduceMax": (functools.partial(_extreme, torch.amax, False), _itself),
    "ReduceMin": (functools.partial(_extreme, torch.amin, True), _itself),
    "ReduceProd": (_product, _itself),
    "ReduceL1": (lambda x, dims, keep: _sum(x.abs(), dims, keep), torch.abs),
    "ReduceL2": (_root, torch.abs),
    "ReduceSumSquare": (lambda x, dims, keep: _sum(x * x, dims, keep), torch.square),
    "ReduceLogSum": (lambda x, dims, keep: torch.log(_sum(x, dims, keep)), torch.log),
    "ReduceLogSumExp": (torch.logsumexp, _itself),
}
enter({name: functools.partial(_reduce, *functions) for name, functions in _REDUCTIONS.items()})


def _place(function: Callable[..., Tensor], x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    if not select_last_index:
        return function(x, axis, bool(keepdims))
    return x.shape[axis] - 1 - function(x.flip(axis), axis, bool(keepdims))


enter({"ArgMax": functools.partial(_place, torch.argmax), "ArgMin": functools.partial(_place, torch.argmin)})


# ---- products -----------------------------------------------------------------------------------------------------------------------------


@op("Gemm")
def gemm(a: Tensor, b: Tensor, c: Tensor | None = None, *, alpha: float = 1.0, beta: float = 1.0, transA: int = 0, transB: int = 0) -> Tensor:
    a, b = a.t() if transA else a, b.t() if transB else b
    if a.is_floating_point():
        return torch.addmm(c, a, b, beta=beta, alpha=alpha) if c is not None else torch.mm(a, b) if alpha == 1 else torch.mm(a, b) * alpha
    product = (torch.mm(a, b) * alpha).to(a.dtype)
    return product if c is None else product + (c * beta).to(a.dtype)


# ---- activations --------------------------------------------------------------------------------------------------------------------------


enter({
    "Relu": torch.relu, "Sigmoid": torch.sigmoid, "Mish": functional.mish, "Softsign": functional.softsign, "HardSwish": functional.hardswish,
    "Gelu": lambda x, *, approximate="none": functional.gelu(x, approximate=approximate),
    "LogSoftmax": lambda x, *, axis=-1: torch.log_softmax(x, axis),
    "Hardmax": lambda x, *, axis=-1: torch.zeros_like(x).scatter(axis, torch.argmax(x, axis, keepdim=True), 1),
    "LeakyRelu": lambda x, *, alpha=0.01: functional.leaky_relu(x, alpha),
    "PRelu": lambda x, slope: torch.where(x >= 0, x, slope * x),
    "Elu": lambda x, *, alpha=1.0: functional.elu(x, alpha),
    "Celu": lambda x, *, alpha=1.0: functional.celu(x, alpha),
    "Selu": lambda x, *, alpha=1.67326319217681884765625, gamma=1.05070102214813232421875: gamma * functional.elu(x, alpha),
    "HardSigmoid": lambda x, *, alpha=0.2, beta=0.5: torch.clamp(alpha * x + beta, 0, 1),
    "Swish": lambda x, *, alpha=1.0: functional.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x),
    "Softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "ThresholdedRelu": lambda x, *, alpha=1.0: torch.where(x > alpha, x, torch.zeros_like(x)),
})  # fmt: skip


@op("Softmax")
def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """A row of -inf alone gives NaN, which graphs then replace (Where(IsNaN(y), 0, y)); its gradient is 0, where torch's own would be NaN."""
    y = torch.softmax(x, axis)
    if not y.requires_grad or not bool(y.detach().sum().isnan()):
        return y
    dead = (x == -math.inf).all(axis, keepdim=True)
    return torch.where(dead, torch.full_like(y, math.nan), torch.softmax(x.masked_fill(dead, 0), axis))


@op("Shrink")
def shrink(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    zero = torch.zeros_like(x)
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, zero)).to(x.dtype)
