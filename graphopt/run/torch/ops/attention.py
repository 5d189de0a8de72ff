"""Attention and rotary position embedding."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from graphopt.run.torch.table import op
from graphopt.run.torch.types import Tensor, dtype_of

_RAW, _CAPPED, _BIASED, _PROBABILITIES = range(4)  # qk_matmul_output_mode


@op("Attention")
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int = 0,
    q_num_heads: int = 0,
    qk_matmul_output_mode: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
    left_window_size: int = -1,
    right_window_size: int = -1,
    _outputs: int = 1,
) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """softmax(scale * q k' + mask) v for [batch, heads, rows, head_dim], or [batch, rows, heads * head_dim] with the numbers of heads.

    A row whose mask hides every key gives 0, also if it hides them by the lowest float (as the kernel of ONNX Runtime does, and the specification
    for -inf). There its gradient is 0, too, not NaN.
    """
    packed = q.dim() == 3
    if packed:
        q, k, v = (x.unflatten(-1, (n, -1)).transpose(1, 2) for x, n in ((q, q_num_heads), (k, kv_num_heads), (v, kv_num_heads)))
    if past_key is not None:
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    present = (k, v)
    if q.shape[1] != k.shape[1]:  # each key head serves several query heads in a row (GQA)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    factor = scale or 1 / math.sqrt(q.shape[-1])
    bias, visible = _bias(q, k, mask, lengths, 0 if past_key is None else past_key.shape[2], is_causal, left_window_size, right_window_size)
    if softcap or softmax_precision is not None or _outputs > 3:
        y, scores = _explicit(q, k, v, bias, visible, factor, softcap, softmax_precision, qk_matmul_output_mode)
    else:
        y, scores = _shown(functional.scaled_dot_product_attention(q, k, v, bias, scale=factor), visible), None
    y = y.transpose(1, 2).flatten(2) if packed else y
    return y if _outputs == 1 else (y, *present, scores)


def _bias(
    q: Tensor, k: Tensor, mask: Tensor | None, lengths: Tensor | None, past: int, is_causal: int, left: int, right: int
) -> tuple[Tensor | None, Tensor | None]:
    """What is added to the scores, broadcastable to [batch, heads, rows, keys], and which rows see a key (None: all do).

    Rows that see none get a bias of 0, so that no NaN arises in them, neither forward nor backward; the caller puts 0 in their place.
    """
    rows, keys = q.shape[2], k.shape[2]
    hidden = _hidden(q, rows, keys, lengths, past, is_causal, left, right)
    if mask is not None and mask.shape[-1] < keys:
        mask = functional.pad(mask, (0, keys - mask.shape[-1]), value=False if mask.dtype == torch.bool else -math.inf)
    if mask is None and hidden is None:
        return None, None
    if mask is not None and mask.dtype == torch.bool:
        hidden = ~mask if hidden is None else hidden | ~mask
        mask = None
    zero = torch.zeros((), dtype=q.dtype, device=q.device)
    bias = zero if mask is None else mask.to(q.dtype)
    if hidden is not None:
        bias = torch.where(hidden, torch.full_like(zero, -math.inf), bias)
    bias = bias.reshape([1] * (4 - bias.dim()) + list(bias.shape))
    visible = (bias > torch.finfo(q.dtype).min).any(-1, keepdim=True)
    if bool(visible.all()):
        return bias, None
    return torch.where(visible, bias, zero), visible


def _hidden(q: Tensor, rows: int, keys: int, lengths: Tensor | None, past: int, is_causal: int, left: int, right: int) -> Tensor | None:
    """True where a row must not see a key, by its position or beyond the filled part of a static cache; None if nothing is hidden."""
    if lengths is None and not is_causal and left < 0 and right < 0:
        return None
    key = torch.arange(keys, device=q.device)
    offset = past if lengths is None else lengths.reshape(-1, 1, 1, 1) - rows
    distance = torch.arange(rows, device=q.device)[:, None] + offset - key
    hidden = torch.zeros((), dtype=torch.bool, device=q.device)
    if lengths is not None:
        hidden = key >= lengths.reshape(-1, 1, 1, 1)
    if is_causal:
        hidden = hidden | (distance < 0)
    if left >= 0:
        hidden = hidden | (distance > left)
    if right >= 0:
        hidden = hidden | (-distance > right)
    return hidden


def _shown(rows: Tensor, visible: Tensor | None, other: float = 0) -> Tensor:
    """`other` in the place of rows that see no key."""
    return rows if visible is None else torch.where(visible, rows, torch.full_like(rows, other))


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, visible: Tensor | None, factor: float, cap: float, precision: int | None, mode: int
) -> tuple[Tensor, Tensor]:
    """Step by step, for what torch's own kernel does not have; with the scores of `mode`."""
    root = math.sqrt(factor)
    scores = torch.matmul(q * root, (k * root).transpose(2, 3))
    shown = scores
    if cap:
        scores = cap * torch.tanh(scores / cap)
    if mode == _CAPPED:
        shown = scores
    if bias is not None:
        scores = scores + bias
    if mode == _BIASED:
        shown = _shown(scores, visible, -math.inf)
    wide = scores if precision is None else scores.to(dtype_of(precision))
    probabilities = _shown(torch.softmax(wide, -1).to(q.dtype), visible)
    return torch.matmul(probabilities, v), probabilities if mode == _PROBABILITIES else shown


@op("RotaryEmbedding")
def rotary_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    """[batch, heads, rows, head_dim], or [batch, rows, heads * head_dim]; the tables are [positions, dim / 2], or [batch, rows, dim / 2]."""
    packed = x.dim() == 3
    heads = x.unflatten(-1, (num_heads, -1)) if packed else x.transpose(1, 2)  # [batch, rows, heads, head_dim]
    dim = rotary_embedding_dim or heads.shape[-1]
    if positions is not None:
        cos, sin = cos[positions.long()], sin[positions.long()]
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    turned, kept = heads[..., :dim], heads[..., dim:]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    real, imaginary = cos * a - sin * b, sin * a + cos * b
    both = torch.stack([real, imaginary], -1).flatten(-2) if interleaved else torch.cat([real, imaginary], -1)
    y = torch.cat([both, kept], -1) if kept.shape[-1] else both
    return y.flatten(2) if packed else y.transpose(1, 2)
