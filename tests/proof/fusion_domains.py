"""Random spellings of what fusions recognize, and spellings that are nearly that."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from equivalence import Array, Graph  # type: ignore[import-not-found]
from onnx import helper

# ---- norms ----------------------------------------------------------------------------------------------------------------------------


def norm(g: Graph) -> None:
    """LayerNorm and RMSNorm over some axes, mostly the last ones, in every spelling; gamma and beta that fit, or broadcast otherwise."""
    shape = (*g.pick(("a",), ("a", "b"), (2, "a")), *g.pick((4,), (4,), (3, 4), (1, 4)))
    last = int(g.rng.integers(1, 3)) if len(shape) > 2 and isinstance(shape[-2], int) else 1
    axes = [k - len(shape) if g.chance() else k for k in range(len(shape) - last, len(shape))]
    if g.chance(0.1):
        axes = [g.pick(0, 1)]
    x = g.input(*shape)

    def mean(value: str) -> str:
        return str(g.add("ReduceMean", value, g.ints(*axes)))

    centered = g.add("Sub", x, mean(x)) if g.chance(0.6) else x
    power = 3.0 if g.chance(0.05) else 2.0
    square = g.add("Mul", centered, centered) if g.chance() else g.add("Pow", centered, g.const(power))
    epsilon = g.const(np.full([1] * int(g.rng.integers(0, 2)), g.pick(1e-5, 1e-6, 0.1, 1e-12)))
    total = g.add("Add", *((mean(square), epsilon) if g.chance(0.8) else (epsilon, mean(square))))
    out = _quotient(g, centered, total)
    if g.chance(0.8):
        out = _beside(g, "Mul", out, shape)
    if g.chance(0.6):
        out = _beside(g, "Add", out, shape)
    g.output(g.add("Neg", out))


def _quotient(g: Graph, x: str, total: str) -> str:
    root = g.add("Sqrt", total) if g.chance(0.6) else g.add("Pow", total, g.const(g.pick(0.5, -0.5, 0.5, -0.5, 0.25)))
    match g.pick("Div", "Reciprocal", "one over", "Mul"):
        case "Div":
            return str(g.add("Div", x, root))
        case "Reciprocal":
            return str(g.add("Mul", x, g.add("Reciprocal", root)))
        case "one over":
            return str(g.add("Mul", g.add("Div", g.const(1.0), root), x))
    return str(g.add("Mul", x, root))


def _beside(g: Graph, op: str, value: str, shape: tuple[int | str, ...]) -> str:
    last = [int(d) for d in shape[-2:] if isinstance(d, int)]
    sizes = g.pick(
        last[-1:], last[-1:], last, [1, *last[-1:]], [1], [], [1, 1, *last], [2, 1, *last[-1:]] if len(last) == 1 and g.chance(0.2) else last
    )
    other = g.const(g.rng.standard_normal(sizes))
    return str(g.add(op, *((value, other) if g.chance() else (other, value))))


# ---- activations ----------------------------------------------------------------------------------------------------------------------


def gelu(g: Graph, rounding: float = 0.0) -> None:
    """The GELU with Erf or Tanh: the factors x, 1/2 and 1 + e in every order; constants off by `rounding`, or by far too much."""

    def number(value: float) -> str:
        far = g.pick(1.02, 0.9, 1.0, -1.0) if g.chance(0.06) else 1.0
        return str(g.const(np.full([1] * int(g.rng.integers(0, 2)), value * far * (1 + rounding * g.rng.uniform(-1, 1)))))

    def times(a: str, b: str) -> str:
        return str(g.add("Mul", *((a, b) if g.chance() else (b, a))))

    x = g.input("a", g.pick(3, "b"))
    if g.chance():
        inner = g.add("Erf", times(x, number(math.sqrt(0.5))) if g.chance() else g.add("Div", x, number(math.sqrt(2))))
    else:
        slope, cubic = math.sqrt(2 / math.pi), 0.044715
        cube = times(times(x, x), x) if g.chance() else g.add("Pow", x, g.const(3.0))
        if g.chance():
            argument = times(g.add("Add", x, times(cube, number(cubic))), number(slope))
        else:
            argument = times(x, times(g.add("Add", times(times(x, x), number(cubic)), g.const(1.0)), number(slope)))
        inner = g.add("Tanh", argument)
    one_more = g.add("Add", *((inner, g.const(1.0)) if g.chance() else (g.const(1.0), inner)))
    match g.pick(0, 1, 2, 3, 4):
        case 0:
            out = times(times(x, one_more), g.const(0.5))
        case 1:
            out = times(times(x, g.const(0.5)), one_more)
        case 2:
            out = times(x, times(one_more, g.const(0.5)))
        case 3:
            out = times(x, g.add("Add", times(inner, g.const(0.5)), g.const(0.5)))
        case _:
            out = times(g.add("Div", x, g.const(2.0)), one_more)
    if g.chance(0.1):
        g.output(one_more)
    g.output(g.add("Neg", out))


# ---- rotary ---------------------------------------------------------------------------------------------------------------------------


def rotary(g: Graph) -> None:
    """Half-split or interleaved pairs, heads before or behind the rows, one cache for the batch or one for each text, doubled as it must be, or not."""
    dim, heads_first = g.pick(4, 6), g.chance(0.7)
    x = g.input(*(("a", 2, "b", dim) if heads_first else ("a", "b", 2, dim)))
    angles = g.input(*g.pick(("a", "b"), ("b",)), dim // 2)
    per_text = len(g.inputs[angles][1]) == 3
    interleaved = g.chance()
    doubled = _doubled(g, angles, interleaved if g.chance(0.9) else not interleaved, dim, per_text)
    cos, sin = (g.add("Unsqueeze", g.add(f, doubled), g.ints(_head_axis(heads_first, per_text))) for f in ("Cos", "Sin"))

    def part(start: int, end: int, step: int = 1) -> str:
        return str(g.add("Slice", x, g.ints(start), g.ints(end), g.ints(-1), g.ints(step)))

    if interleaved:
        a, b = part(0, dim, 2), part(1, dim, 2)
        pair = [g.add("Unsqueeze", v, g.ints(-1)) for v in (g.add("Neg", b), a)]
        turned = g.add("Reshape", g.add("Concat", *pair, axis=-1), g.ints(0, 0, 0, dim))
    else:
        a, b = part(0, dim // 2), part(dim // 2, dim)
        turned = g.add("Concat", *((g.add("Neg", b), a) if g.chance(0.9) else (b, g.add("Neg", a))), axis=-1)
    both = [g.add("Mul", x, cos), g.add("Mul", sin, turned)]
    g.output(g.add("Tanh", g.add("Add", *(both if g.chance() else both[::-1]))))


def _head_axis(heads_first: bool, per_text: bool) -> int:
    return (1 if per_text else 0) if heads_first else (2 if per_text else 1)


def _doubled(g: Graph, angles: str, interleaved: bool, dim: int, per_text: bool) -> str:
    if not interleaved:
        return str(g.add("Concat", angles, angles, axis=-1))
    lifted = g.add("Unsqueeze", angles, g.ints(-1))
    return str(g.add("Reshape", g.add("Concat", lifted, lifted, axis=-1), g.ints(*(0, 0)[: 1 + per_text], dim)))


# ---- masks ----------------------------------------------------------------------------------------------------------------------------


def mask(g: Graph) -> None:
    """Conjunctions of padding, causal and a window, and of comparisons that are none of these; chosen between 0 and a very low number."""
    attention_mask, scores = g.input("a", "b", dtype=np.int64), g.input("a", 2, "b", "b")
    length = g.add("Gather", g.add("Shape", attention_mask), g.const(1, np.int64))
    index = g.add("Range", g.const(0, np.int64), length, g.const(1, np.int64))
    key, row = g.add("Unsqueeze", index, g.ints(0, 1, 2)), g.add("Unsqueeze", index, g.ints(0, 1, 3))
    flags = g.add("Cast", attention_mask, to=9) if g.chance(0.9) else g.add("Not", g.add("Equal", attention_mask, g.const(0, np.int64)))
    parts = [g.add("Unsqueeze", flags, g.ints(1, 2))]
    parts += [_comparison(g, key, row) for _ in range(int(g.rng.integers(1, 4)))]
    parts += [g.const(np.ones((1, 1, 1, 1)), bool)] * int(g.rng.integers(2, 5))
    keep = parts[0]
    for other in (parts[k] for k in 1 + g.rng.permutation(len(parts) - 1)):
        keep = g.add("And", *((keep, other) if g.chance() else (other, keep)))
    hidden = g.add("Where", keep, g.const(0.0), g.const(-1e9))
    g.output(g.add("Softmax", g.add("Add", scores, hidden), axis=-1))


def _comparison(g: Graph, key: str, row: str) -> str:
    """key <= row and key > row - w, each in several spellings; one in four is a near miss."""
    near = g.chance(0.25)
    left, right = (row, key) if near and g.chance() else (key, row)
    off = g.const(int(g.rng.integers(-2, 1) if near else g.rng.integers(1, 4)), np.int64)
    match g.pick(0, 1, 2, 3, 4 if near else 2):
        case 0:
            return str(g.add("LessOrEqual", left, right))
        case 1:
            return str(g.add("GreaterOrEqual", right, left))
        case 2:
            return str(g.add("Less", g.add("Sub", row, key), off))
        case 3:
            return str(g.add("Greater", key, g.add("Sub", row, off)))
    return str(g.add("Not", g.add("Greater", left, right)))


def masks_with_every_padding(batch: int, length: int) -> list[Mapping[str, Array]]:
    """Feeds for `mask`: all 2^length paddings of a text, holes and left padding and nothing among them."""
    every = (np.arange(2**length)[:, None] >> np.arange(length)) & 1
    rng = np.random.default_rng(0)
    return [{"x0": every[k : k + batch].astype(np.int64), "x1": rng.standard_normal((batch, 2, length, length))} for k in range(0, 2**length, batch)]


# ---- standard operators, for their portable spellings ------------------------------------------------------------------------------------


def norm_operator(g: Graph) -> None:
    shape = ("a", g.pick("b", 3), 4)
    op, axis = g.pick("LayerNormalization", "RMSNormalization"), g.pick(-1, 2, -2, 1) if isinstance(shape[1], int) else -1
    sizes = [int(d) for d in shape[axis:]]
    affine = [g.const(g.rng.standard_normal(sizes)) for _ in range(2 if op == "LayerNormalization" and g.chance() else 1)]
    g.output(g.add(op, g.input(*shape), *affine, axis=axis, epsilon=g.pick(1e-5, 0.01)))


def gelu_operator(g: Graph) -> None:
    g.output(g.add("Gelu", g.input("a", 3), **g.pick({}, {"approximate": "none"}, {"approximate": "tanh"})))


def rotary_operator(g: Graph) -> None:
    dim, packed, turned = g.pick(4, 8), g.chance(), g.pick(0, 0, 4, 2)
    x = g.input("a", "b", 2 * dim) if packed else g.input("a", 2, "b", dim)
    half, attributes = (turned or dim) // 2, {"num_heads": 2} if packed else {}
    if g.chance(0.4):
        caches = [g.const(g.rng.standard_normal((5, half))) for _ in range(2)]
        positions = [g.input("a", "b", dtype=np.int64)]
    else:
        caches, positions = [g.input("a", "b", half) for _ in range(2)], []
    g.output(g.add("RotaryEmbedding", x, *caches, *positions, interleaved=g.pick(0, 1), rotary_embedding_dim=turned, **attributes))


def attention_operator(g: Graph) -> None:
    """Packed or not, groups, masks of both kinds and of every rank, causal, a past, a soft cap; rows that may read nothing.

    No mask of the lowest float: there the spelling has the numbers of ONNX Runtime's kernel, which are not those of the reference. No causal
    mask beside one of a single row: the reference takes every row for the first one there.
    """
    heads, kv_heads, dim, packed = *g.pick((4, 4), (4, 2), (2, 1)), 3, g.chance()
    attributes = {"is_causal": g.pick(0, 0, 1), "softcap": g.pick(0.0, 0.0, 5.0)}
    attributes |= {"scale": 0.25} if g.chance() else {}
    if packed:
        attributes |= {"q_num_heads": heads, "kv_num_heads": kv_heads}
        q, k, v = (g.input("a", rows, n * dim) for rows, n in (("b", heads), ("c", kv_heads), ("c", kv_heads)))
    else:
        q, k, v = (g.input("a", n, rows, dim) for rows, n in (("b", heads), ("c", kv_heads), ("c", kv_heads)))
    past = [g.input("a", kv_heads, 2, dim) for _ in range(2)] if g.chance(0.3) else []
    keys = g.add("Add", size(g, k, 1 if packed else 2), g.ints(2 if past else 0))
    masks = [""]
    if g.chance(0.7):
        rows = size(g, q, 1 if packed else 2) if attributes["is_causal"] or g.chance() else g.ints(1)
        lead = g.pick([], [g.ints(1)], [size(g, q, 0), g.ints(1)], [g.ints(1), g.ints(heads)])
        ones = g.add("ConstantOfShape", g.add("Concat", *lead, rows, keys, axis=0), value=helper.make_tensor("one", 7, [1], [1]))
        index = g.add("CumSum", ones, g.const(-1, np.int64))
        wave = g.add("Sin", g.add("Mul", g.add("Cast", index, to=11), g.const(g.pick(1.0, 2.0, 3.1))))
        seen = g.add("Greater", wave, g.const(g.pick(0.0, -0.5, 2.0)))
        masks = [seen if g.chance() else g.add("Where", seen, wave, g.const(g.pick(-np.inf, -3.0)))]
    outs = g.several("Attention", 3 if past else 1, q, k, v, *masks, *past, **attributes)
    g.output(*outs)


def size(g: Graph, x: str, axis: int) -> str:
    return str(g.add("Shape", x, start=axis, end=axis + 1))
