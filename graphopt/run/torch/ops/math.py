"""Arithmetic: element by element, reductions, products."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch.nn import functional

from graphopt.run.torch.table import op
from graphopt.run.torch.types import Tensor, integers

_DIRECT: dict[str, Callable[..., Tensor]] = {
    "Abs": torch.abs, "Acos": torch.acos, "Acosh": torch.acosh, "Asin": torch.asin, "Asinh": torch.asinh, "Atan": torch.atan, "Atanh": torch.atanh,
    "BitwiseNot": torch.bitwise_not, "Ceil": torch.ceil, "Cos": torch.cos, "Cosh": torch.cosh, "Erf": torch.erf, "Exp": torch.exp,
    "Floor": torch.floor, "IsNaN": torch.isnan, "Log": torch.log, "Neg": torch.neg, "Not": torch.logical_not, "Reciprocal": torch.reciprocal,
    "Round": torch.round, "Sign": torch.sign, "Sin": torch.sin, "Sinh": torch.sinh, "Sqrt": torch.sqrt, "Tan": torch.tan, "Tanh": torch.tanh,
    "Det": torch.det, "Relu": torch.relu, "Sigmoid": torch.sigmoid, "Mish": functional.mish, "Softsign": functional.softsign,
    "Add": torch.add, "And": torch.logical_and, "BitwiseAnd": torch.bitwise_and, "BitwiseOr": torch.bitwise_or, "BitwiseXor": torch.bitwise_xor,
    "Equal": torch.eq, "Greater": torch.gt, "GreaterOrEqual": torch.ge, "Less": torch.lt, "LessOrEqual": torch.le, "Mul": torch.mul,
    "Or": torch.logical_or, "Sub": torch.sub, "Xor": torch.logical_xor, "MatMul": torch.matmul, "Where": torch.where,
}  # fmt: skip
for _name, _function in _DIRECT.items():
    op(_name)(_function)


@op("Div")
def div(a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


@op("Mod")
def mod(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


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


@op("Sum")
def add_up(*terms: Tensor) -> Tensor:
    return functools.reduce(torch.add, terms)


@op("Mean")
def mean(*terms: Tensor) -> Tensor:
    return functools.reduce(torch.add, terms) / len(terms)


@op("Max")
def maximum(*terms: Tensor) -> Tensor:
    return functools.reduce(torch.maximum, terms)


@op("Min")
def minimum(*terms: Tensor) -> Tensor:
    return functools.reduce(torch.minimum, terms)


@op("Clip")
def clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    return x if low is None and high is None else torch.clamp(x, low, high)


@op("IsInf")
def is_inf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    if detect_negative and detect_positive:
        return torch.isinf(x)
    if detect_negative:
        return torch.isneginf(x)
    return torch.isposinf(x) if detect_positive else torch.zeros_like(x, dtype=torch.bool)


@op("Trilu")
def trilu(x: Tensor, k: Tensor | None = None, *, upper: int = 1) -> Tensor:
    diagonal = 0 if k is None else int(k)
    return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)


@op("CumSum")
def cumulative_sum(x: Tensor, axis: Tensor, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    total = _cumulate(lambda t, dim: torch.cumsum(t, dim, dtype=t.dtype), x, int(axis), reverse)
    return total - x if exclusive and not x.is_floating_point() else _shifted(total, int(axis), reverse, 0) if exclusive else total


@op("CumProd")
def cumulative_product(x: Tensor, axis: Tensor, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    total = _cumulate(lambda t, dim: torch.cumprod(t, dim, dtype=t.dtype), x, int(axis), reverse)
    return _shifted(total, int(axis), reverse, 1) if exclusive else total


def _cumulate(function: Callable[[Tensor, int], Tensor], x: Tensor, axis: int, reverse: int) -> Tensor:
    return function(x.flip(axis), axis).flip(axis) if reverse else function(x, axis)


def _shifted(x: Tensor, axis: int, reverse: int, start: int) -> Tensor:
    """One place later (earlier, if reversed), beginning with `start`."""
    first = torch.full_like(x.narrow(axis, 0, 1), start)
    kept = x.narrow(axis, 1 if reverse else 0, x.shape[axis] - 1)
    return torch.cat([kept, first] if reverse else [first, kept], axis)


# ---- reductions ---------------------------------------------------------------------------------------------------------------------------


def _reduction(name: str, function: Callable[[Tensor, list[int], bool], Tensor], single: Callable[[Tensor], Tensor] = lambda x: x) -> None:
    """`single`: what the operator makes of one element, where no axis is reduced."""

    def reduce(x: Tensor, axes: Tensor | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
        dims = [] if axes is None else integers(axes)
        if not dims and (noop_with_empty_axes or not x.dim()):
            return single(x)
        return function(x, dims or list(range(x.dim())), bool(keepdims))

    op(name)(reduce)


def _sum(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    return torch.sum(x, dims, keep, dtype=x.dtype)


def _mean(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    if x.is_floating_point():
        return torch.mean(x, dims, keep)
    return torch.div(_sum(x, dims, keep), math.prod(x.shape[d] for d in dims), rounding_mode="trunc").to(x.dtype)


def _largest(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    return _extreme(x, dims, keep, torch.amax, highest=False)


def _least(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    return _extreme(x, dims, keep, torch.amin, highest=True)


def _extreme(x: Tensor, dims: list[int], keep: bool, function: Callable[..., Tensor], highest: bool) -> Tensor:
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


_reduction("ReduceSum", _sum)
_reduction("ReduceMean", _mean)
_reduction("ReduceMax", _largest)
_reduction("ReduceMin", _least)
_reduction("ReduceProd", _product)
_reduction("ReduceL1", lambda x, dims, keep: _sum(x.abs(), dims, keep), torch.abs)
_reduction("ReduceL2", lambda x, dims, keep: torch.linalg.vector_norm(x, 2, dims, keep) if x.is_floating_point() else _root(x, dims, keep), torch.abs)
_reduction("ReduceSumSquare", lambda x, dims, keep: _sum(x * x, dims, keep), torch.square)
_reduction("ReduceLogSum", lambda x, dims, keep: torch.log(_sum(x, dims, keep)), torch.log)
_reduction("ReduceLogSumExp", lambda x, dims, keep: torch.logsumexp(x, dims, keep))


def _root(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    return torch.sqrt(_sum(x.double() ** 2, dims, keep)).to(x.dtype)


@op("ArgMax")
def arg_max(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    return _where_extreme(torch.argmax, x, axis, keepdims, select_last_index)


@op("ArgMin")
def arg_min(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    return _where_extreme(torch.argmin, x, axis, keepdims, select_last_index)


def _where_extreme(function: Callable[..., Tensor], x: Tensor, axis: int, keepdims: int, last: int) -> Tensor:
    if not last:
        return function(x, axis, bool(keepdims))
    return x.shape[axis] - 1 - function(x.flip(axis), axis, bool(keepdims))


# ---- products -----------------------------------------------------------------------------------------------------------------------------


@op("Gemm")
def gemm(a: Tensor, b: Tensor, c: Tensor | None = None, *, alpha: float = 1.0, beta: float = 1.0, transA: int = 0, transB: int = 0) -> Tensor:
    a, b = a.t() if transA else a, b.t() if transB else b
    if a.is_floating_point():
        return torch.addmm(c, a, b, beta=beta, alpha=alpha) if c is not None else torch.mm(a, b) if alpha == 1 else torch.mm(a, b) * alpha
    product = (torch.mm(a, b) * alpha).to(a.dtype)
    return product if c is None else product + (c * beta).to(a.dtype)


@op("Einsum")
def einsum(*terms: Tensor, equation: str) -> Tensor:
    return torch.einsum(equation, *terms)


# ---- activations --------------------------------------------------------------------------------------------------------------------------


@op("Gelu")
def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return functional.gelu(x, approximate=approximate)


@op("Softmax")
def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """A row of -inf alone gives NaN, which graphs then replace (Where(IsNaN(y), 0, y)); its gradient is 0, where torch's own would be NaN."""
    y = torch.softmax(x, axis)
    if not y.requires_grad or not bool(y.detach().sum().isnan()):
        return y
    dead = (x == -math.inf).all(axis, keepdim=True)
    return torch.where(dead, torch.full_like(y, math.nan), torch.softmax(x.masked_fill(dead, 0), axis))


@op("LogSoftmax")
def log_softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return torch.log_softmax(x, axis)


@op("Hardmax")
def hardmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return torch.zeros_like(x).scatter(axis, torch.argmax(x, axis, keepdim=True), 1)


@op("LeakyRelu")
def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    return functional.leaky_relu(x, alpha)


@op("PRelu")
def parametric_relu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x >= 0, x, slope * x)


@op("Elu")
def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return functional.elu(x, alpha)


@op("Celu")
def celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return functional.celu(x, alpha)


@op("Selu")
def selu(x: Tensor, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> Tensor:
    return gamma * functional.elu(x, alpha)


@op("HardSigmoid")
def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    return torch.clamp(alpha * x + beta, 0, 1)


@op("HardSwish")
def hard_swish(x: Tensor) -> Tensor:
    return functional.hardswish(x)


@op("Swish")
def swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return functional.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


@op("Softplus")
def softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


@op("ThresholdedRelu")
def thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return torch.where(x > alpha, x, torch.zeros_like(x))


@op("Shrink")
def shrink(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    zero = torch.zeros_like(x)
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, zero)).to(x.dtype)
