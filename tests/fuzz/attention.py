"""Random attention: layouts, scales, masks, groups of heads, caches and rotary embeddings, as exporters write them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from onnx import TensorProto

from fuzz.net import Net  # type: ignore[import-not-found]

WIDTH = 32
_LOW = (-1e4, -1e9, float(np.finfo(np.float32).min), float("-inf"))


def attention(net: Net, x: str) -> str:
    """[B, S, 32] -> [B, S, 32]."""
    heads = net.rng.choice((2, 4, 4, 8))
    groups = net.rng.choice((1, 1, 1, 2)) if heads > 2 else 1
    kv, dim = heads // groups, WIDTH // heads
    if net.opset >= 23 and net.rng.random() < 0.25:
        return _operator(net, x, heads, kv, dim)
    q, k, v = _projections(net, x, heads, kv, dim)
    net.cached = False
    if net.rng.random() < 0.25:
        q, k = _rotary(net, q, k, dim)
    if net.rng.random() < 0.2:
        k, v = _cached(net, k, v, kv, dim)
    k, v = _repeated(net, k, kv, groups, dim), _repeated(net, v, kv, groups, dim)
    scores = _scores(net, q, k, dim)
    if net.rng.random() < 0.08:
        scores = net.op("Mul", net.op("Tanh", net.op("Div", scores, net.const(30.0))), net.const(30.0))
    scores = _masked(net, scores)
    weights = net.op("Softmax", scores, axis=net.rng.choice((-1, 3, -1, -1)))
    if net.rng.random() < 0.1:
        weights = net.op("Where", net.op("IsNaN", weights), net.const(0.0), weights)
    if net.rng.random() < 0.05:
        net.output(weights, "B", heads, "S", None)
    merged = net.op("Reshape", net.op("Transpose", net.op("MatMul", weights, v), perm=[0, 2, 1, 3]), _together(net, x))
    return _biased(net, net.op("MatMul", merged, net.weight(WIDTH, WIDTH)), WIDTH)


def _biased(net: Net, x: str, width: int) -> str:
    return net.either("Add", x, net.weight(width)) if net.rng.random() < 0.6 else x


# ---- operands -----------------------------------------------------------------------------------------------------------------------------


def _apart(net: Net, x: str, heads: int, dim: int) -> str:
    """The shape [B, S, heads, dim] as exporters make it."""
    style = net.rng.random()
    if style < 0.4:
        return net.ints(0, 0, heads, dim)
    if style < 0.6:
        return net.ints(0, -1, heads, dim)
    sizes = [net.op("Gather", net.op("Shape", x), net.const(k, np.int64), axis=0) for k in (0, 1)]
    flat = [net.op("Unsqueeze", size, net.ints(0)) for size in sizes]
    if style < 0.8:
        return str(net.op("Concat", *flat, net.ints(heads), net.ints(dim), axis=0))
    return str(net.op("Concat", flat[0], net.ints(-1), net.ints(heads), net.ints(dim), axis=0))


def _together(net: Net, x: str) -> str:
    if net.rng.random() < 0.6:
        return net.ints(0, 0, WIDTH) if net.rng.random() < 0.5 else net.ints(0, -1, WIDTH)
    sizes = net.op("Slice", net.op("Shape", x), net.ints(0), net.ints(2))
    return str(net.op("Concat", sizes, net.ints(WIDTH), axis=0))


def _projections(net: Net, x: str, heads: int, kv: int, dim: int) -> tuple[str, str, str]:
    """q [B, heads, S, dim]; k and v [B, kv, S, dim]."""
    if kv == heads and net.rng.random() < 0.3:
        return _packed(net, x, heads, dim)
    found = []
    for count in (heads, kv, kv):
        made = _biased(net, net.op("MatMul", x, net.weight(WIDTH, count * dim)), count * dim)
        found.append(net.op("Transpose", net.op("Reshape", made, _apart(net, x, count, dim)), perm=[0, 2, 1, 3]))
    return found[0], found[1], found[2]


def _packed(net: Net, x: str, heads: int, dim: int) -> tuple[str, str, str]:
    made = _biased(net, net.op("MatMul", x, net.weight(WIDTH, 3 * WIDTH)), 3 * WIDTH)
    style = net.rng.random()
    if style < 0.4:
        parts = net.op("Split", made, net.ints(WIDTH, WIDTH, WIDTH), axis=net.rng.choice((-1, 2)), outputs=3)
        apart = _apart(net, x, heads, dim)
        q, k, v = (net.op("Transpose", net.op("Reshape", part, apart), perm=[0, 2, 1, 3]) for part in parts)
    elif style < 0.7:
        five = net.op("Transpose", net.op("Reshape", made, net.ints(0, 0, 3, heads, dim)), perm=[2, 0, 3, 1, 4])
        q, k, v = (net.op("Gather", five, net.const(n, np.int64), axis=0) for n in range(3))
    else:
        whole = net.op("Transpose", net.op("Reshape", made, net.ints(0, 0, heads, 3 * dim)), perm=[0, 2, 1, 3])
        q, k, v = (net.op("Slice", whole, net.ints(n * dim), net.ints((n + 1) * dim), net.ints(3)) for n in range(3))
    return q, k, v


def _rotary(net: Net, q: str, k: str, dim: int) -> tuple[str, str]:
    """Rotate-half with cos and sin of the positions, which a caller gives."""
    positions = net.input("position_ids", TensorProto.INT64, "B", "S")
    table = 1.0 / 10000 ** (np.arange(0, dim, 2) / dim)
    angles = net.op("Mul", net.op("Unsqueeze", net.op("Cast", positions, to=TensorProto.FLOAT), net.ints(2)), net.const(table.reshape(1, 1, -1)))
    both = net.op("Concat", angles, angles, axis=-1)
    cos, sin = (net.op("Unsqueeze", net.op(name, both), net.ints(1)) for name in ("Cos", "Sin"))
    return _turned(net, q, cos, sin, dim), _turned(net, k, cos, sin, dim)


def _turned(net: Net, x: str, cos: str, sin: str, dim: int) -> str:
    half = dim // 2
    if net.rng.random() < 0.5:
        low, high = net.op("Split", x, net.ints(half, half), axis=-1, outputs=2)
    else:
        low = net.op("Slice", x, net.ints(0), net.ints(half), net.ints(3))
        high = net.op("Slice", x, net.ints(half), net.ints(2**62), net.ints(3))
    swapped = net.op("Concat", net.op("Neg", high), low, axis=-1)
    return net.either("Add", net.either("Mul", x, cos), net.either("Mul", swapped, sin))


def _cached(net: Net, k: str, v: str, kv: int, dim: int) -> tuple[str, str]:
    number, net.cached = len(net.inputs), True
    found = []
    for what, new in (("key", k), ("value", v)):
        past = net.input(f"past_{number}_{what}", TensorProto.FLOAT, "B", kv, "P", dim)
        whole = net.op("Concat", past, new, axis=2)
        net.output(whole, "B", kv, None, dim)
        found.append(whole)
    return found[0], found[1]


def _repeated(net: Net, x: str, kv: int, groups: int, dim: int) -> str:
    """Each key and value head once for each query head of its group."""
    if groups == 1:
        return x
    five = net.op("Unsqueeze", x, net.ints(2))
    if net.rng.random() < 0.5:
        wide = net.op("Expand", five, net.ints(1, 1, groups, 1, 1))
    else:
        wide = net.op("Tile", five, net.ints(1, 1, groups, 1, 1))
    if net.rng.random() < 0.1:  # the heads of a group lie apart: repeat, not repeat-interleave
        wide = net.op("Transpose", wide, perm=[0, 2, 1, 3, 4])
    return str(net.op("Reshape", wide, net.ints(0, kv * groups, -1, dim)))


# ---- scores -------------------------------------------------------------------------------------------------------------------------------


def _scores(net: Net, q: str, k: str, dim: int) -> str:
    style, scale = net.rng.random(), 1 / math.sqrt(dim)
    if style < 0.3:
        q = net.scaled(q, scale)
    elif style < 0.5:
        q, k = net.scaled(q, math.sqrt(scale)), net.scaled(k, math.sqrt(scale))
    scores = net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2]))
    return net.scaled(scores, scale) if style >= 0.5 and net.rng.random() < 0.95 else str(scores)


def _masked(net: Net, scores: str) -> str:
    """With masks of callers: additive, 0 and 1 as numbers, boolean; causal; several of them."""
    for _ in range(net.rng.choice((0, 1, 1, 2))):
        scores = net.rng.choice((_additive, _inverted, _boolean, _boolean, _causal))(net, scores)
    return scores


def _keys(net: Net) -> str:
    """The name of the dimension of the keys: with a cache there are more of them than queries."""
    return "P + S" if net.cached else "S"


def _additive(net: Net, scores: str) -> str:
    return net.either("Add", scores, net.input(f"mask_additive_{int(net.cached)}", TensorProto.FLOAT, "B", 1, 1, _keys(net)))


def _flags(net: Net) -> Any:
    flags = net.input(f"attention_mask_{int(net.cached)}", TensorProto.INT64, "B", _keys(net))
    if net.rng.random() < 0.5:
        return net.op("Unsqueeze", flags, net.ints(1, 2))
    return net.op("Unsqueeze", net.op("Unsqueeze", flags, net.ints(1)), net.ints(2))


def _inverted(net: Net, scores: str) -> str:
    numbers = net.op("Cast", _flags(net), to=TensorProto.FLOAT)
    low = net.rng.choice(_LOW[:3])
    return net.either("Add", scores, net.op("Mul", net.op("Sub", net.const(1.0), numbers), net.const(low)))


def _boolean(net: Net, scores: str) -> str:
    kept = net.op("Cast", _flags(net), to=TensorProto.BOOL)
    low = net.const(net.rng.choice(_LOW))
    if net.rng.random() < 0.4:
        return str(net.op("Where", kept, scores, low))
    if net.rng.random() < 0.5:
        return str(net.op("Where", net.op("Not", kept), low, scores))
    return net.either("Add", scores, net.op("Where", kept, net.const(0.0), low))


def _causal(net: Net, scores: str) -> str:
    """By comparing positions, which are counted off the scores themselves."""
    sizes = net.op("Shape", scores)
    rows, keys = (net.op("Squeeze", net.op("Slice", sizes, net.ints(n), net.ints(n + 1)), net.ints(0)) for n in (2, 3))
    zero, one = net.const(0, np.int64), net.const(1, np.int64)
    row = net.op("Unsqueeze", net.op("Add", net.op("Range", zero, rows, one), net.op("Sub", keys, rows)), net.ints(1))
    key = net.op("Unsqueeze", net.op("Range", zero, keys, one), net.ints(0))
    shown = net.op("Not", net.op("Greater", key, row)) if net.rng.random() < 0.5 else net.op("GreaterOrEqual", row, key)
    low = net.const(net.rng.choice(_LOW))
    if net.opset < 16 or net.rng.random() < 0.5:
        return str(net.op("Where", shown, scores, low))
    return net.either("Add", scores, net.op("Where", shown, net.const(0.0), low))


# ---- the operator -------------------------------------------------------------------------------------------------------------------------


def _operator(net: Net, x: str, heads: int, kv: int, dim: int) -> str:
    q, k, v = (net.op("MatMul", x, net.weight(WIDTH, count * dim)) for count in (heads, kv, kv))
    mask = [_mask(net)] if net.rng.random() < 0.6 else []
    given: dict[str, Any] = {"q_num_heads": heads, "kv_num_heads": kv}
    if net.rng.random() < 0.3:
        given["is_causal"] = 1
    if net.rng.random() < 0.3:
        given["scale"] = 0.3
    if net.rng.random() < 0.1:
        given["softcap"] = 20.0
    made = net.op("Attention", q, k, v, *mask, **given)
    return _biased(net, net.op("MatMul", made, net.weight(WIDTH, WIDTH)), WIDTH)


def _mask(net: Net) -> Any:
    style = net.rng.random()
    if style < 0.3:
        return net.input("mask_additive_4", TensorProto.FLOAT, "B", 1, "S", "S")
    kept = net.op("Cast", net.input("attention_mask_Q", TensorProto.INT64, "B", 1, "S", "S"), to=TensorProto.BOOL)
    return kept if style < 0.7 else net.op("Where", kept, net.const(0.0), net.const(net.rng.choice(_LOW)))
