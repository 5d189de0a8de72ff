"""The standard operator Attention: what a node of it says, and the numbers that hide keys in its mask.

ONNX adds a float mask to the scores, so a row whose keys are all at -FLT_MAX averages; runtimes take numbers near -FLT_MAX for "no key" and give
zero. A mask that is not below `LOWEST` is read alike by all, and hides as well.
"""

from __future__ import annotations

import dataclasses
from typing import Self

import numpy as np
import onnx_ir as ir

from graphopt.graph.questions import attr, constant, is_read, producer, rank, scalar, static_dim

LOWEST = -1e30
SCORES, PROBABILITIES = 0, 3  # qk_matmul_output_mode: the product of query and key, and what meets the value
_ARRANGING = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Flatten", "Expand", "Cast", "Slice")
_MIXING = ("Add", "Sub", "Mul", "Div", "Where", "Min", "Max", "Neg")


@dataclasses.dataclass(frozen=True)
class AttentionNode:
    """One Attention node (opset 23 and later). Sizes that neither the node nor the shapes tell are 0; what is left out is None.

    Attributes:
        q, k, v: [batch, rows, heads * head_dim] where `packed`, [batch, heads, rows, head_dim] else.
        mask: boolean (true: may be read), or a summand of the scores.
        past: key and value of a cache, [batch, kv_heads, rows, head_dim]; `present`: what the node gives of them, None where nothing reads it.
        lengths: how many keys count in each sequence.
        shown: the scores in between (`shows`: at which step), None where nothing reads them.
        value_dim: features of a value head, and of the result for each query head.
        scale: of the scores; 1 / sqrt(head_dim) where the node does not spell it.
        precision: the type that the softmax is computed in; None: that of the query.
        window: keys that a row may read to its left and right; -1: all.
    """

    node: ir.Node
    q: ir.Value
    k: ir.Value
    v: ir.Value
    mask: ir.Value | None
    past: tuple[ir.Value | None, ir.Value | None]
    lengths: ir.Value | None
    present: tuple[ir.Value | None, ir.Value | None]
    shown: ir.Value | None
    packed: bool
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    causal: bool
    softcap: float
    precision: int | None
    window: tuple[int, int]
    shows: int

    @classmethod
    def of(cls, node: ir.Node) -> Self | None:
        """What the node says; None for any other operator, and for one that breaks the specification (heads that do not divide its features)."""
        if node.op_type != "Attention" or node.domain not in ("", "ai.onnx"):
            return None
        q, k, v, mask, past_key, past_value, lengths = (*node.inputs, *(None,) * 7)[:7]
        if q is None or k is None or v is None:
            return None
        ranks = {rank(x) for x in (q, k, v)} - {None}
        counts = attr(node, "q_num_heads", 0), attr(node, "kv_num_heads", 0)
        packed = ranks == {3} or (not ranks and all(counts))
        if ranks - {3 if packed else 4} or (packed and not all(counts)):
            return None
        heads, kv_heads = counts if packed else (static_dim(x, 1) or n for x, n in zip((q, k), counts, strict=True))
        sizes = [static_dim(x, -1) or 0 for x in (q, k, v)]
        if packed:
            if any(size % n for size, n in zip(sizes, (heads, kv_heads, kv_heads), strict=True)):
                return None
            sizes = [size // n for size, n in zip(sizes, (heads, kv_heads, kv_heads), strict=True)]
        if heads and kv_heads and heads % kv_heads:
            return None
        head_dim = sizes[0] or sizes[1]
        present_key, present_value, shown = (*(v if is_read(v) else None for v in node.outputs[1:]), None, None, None)[:3]
        return cls(
            node, q, k, v, mask, (past_key, past_value), lengths, (present_key, present_value), shown, packed, heads, kv_heads, head_dim, sizes[2],
            attr(node, "scale") or (head_dim**-0.5 if head_dim else 0.0), bool(attr(node, "is_causal", 0)), attr(node, "softcap", 0.0),
            attr(node, "softmax_precision") or None, (attr(node, "left_window_size", -1), attr(node, "right_window_size", -1)),
            attr(node, "qk_matmul_output_mode", SCORES),
        )  # fmt: skip

    @property
    def result(self) -> ir.Value:
        """Laid out as the query, with `value_dim` features for each head."""
        return self.node.outputs[0]

    @property
    def operands(self) -> tuple[ir.Value, ir.Value, ir.Value]:
        return self.q, self.k, self.v

    @property
    def group(self) -> int:
        """Query heads that share one key and value head."""
        return self.heads // self.kv_heads

    @property
    def cached(self) -> bool:
        """It reads or gives keys and values of other calls, or counts the keys that it may read."""
        return any(v is not None for v in (*self.past, *self.present, self.lengths))

    @property
    def plain(self) -> bool:
        """Softmax of the scaled scores and a mask, of which only the result is read: no cache, window, causal mask, soft cap or type of its own."""
        return not (self.cached or self.shown is not None or self.causal or self.softcap or self.precision or self.window != (-1, -1))

    @property
    def mask_differs(self) -> bool:
        """False if the mask is shown to be the same for all heads."""
        axes = rank(self.mask)
        return self.mask is not None and (axes is None or (axes > 2 and static_dim(self.mask, -3) != 1))


def head_counts(heads: int, kv_heads: int, *, causal: bool = False) -> dict[str, int]:
    """The attributes of a packed node."""
    return {"q_num_heads": heads, "kv_num_heads": kv_heads} | ({"is_causal": 1} if causal else {})


def before_rotary(value: ir.Value) -> ir.Value:
    """What an operand was before its rotary embedding."""
    rotary = producer(value, "RotaryEmbedding")
    return value if rotary is None or rotary.inputs[0] is None else rotary.inputs[0]


def fills(mask: ir.Value, factor: float = 1.0) -> tuple[list[float], bool]:
    """The lowest numbers that `factor` * `mask` may hold, as far as constants tell, and whether a caller feeds it."""
    array = constant(mask)
    if array is not None:
        return [float(np.min(array * factor)) if array.size else 0.0], False
    return _behind(mask, 8)


def may_be_too_low(mask: ir.Value, factor: float = 1.0) -> bool:
    """True if the mask may hold finite numbers below `LOWEST`; one that holds -inf means "no key" and is left alone."""
    found, fed = fills(mask, factor)
    return not any(np.isneginf(c) for c in found) and (fed or any(is_too_low(c) for c in found))


def is_raised(value: ir.Value) -> bool:
    """It holds no finite number below `LOWEST`: Where(Less(x, least), x, Max(x, LOWEST)), in which only -inf is below `least`."""
    node = producer(value, "Where")
    less, raised = (None, None) if node is None else (producer(node.inputs[0], "Less"), producer(node.inputs[2], "Max"))
    if node is None or less is None or raised is None or len(raised.inputs) != 2:
        return False
    x, least, lowest = node.inputs[1], scalar(less.inputs[1]), scalar(raised.inputs[1])
    if least is None or less.inputs[0] is not x or raised.inputs[0] is not x:
        return False
    return bool(least <= np.finfo(np.float32).min and _not_too_low(lowest))


def _not_too_low(number: float | None) -> bool:
    return number is not None and not is_too_low(float(number))


def is_too_low(number: float) -> bool:
    """Below `LOWEST`, which half and single precision round."""
    return number < 1.01 * LOWEST


def _behind(value: ir.Value, depth: int) -> tuple[list[float], bool]:
    """The scalar constants that elementwise and layout operators mixed into a value, as negative numbers."""
    c = scalar(value)
    if c is not None:
        return [-abs(float(c))], False
    if value.is_graph_input():
        return [], value.dtype is not None and value.dtype.is_floating_point()
    node = producer(value)
    if node is not None and node.op_type == "ConstantOfShape":
        filled = attr(node, "value", None)
        return [0.0 if filled is None else -abs(float(filled.numpy().reshape(-1)[0]))], False
    if node is None or depth == 0 or node.op_type not in (*_ARRANGING, *_MIXING):
        return [], False
    if is_raised(value) or (node.op_type == "Max" and any(_not_too_low(scalar(v)) for v in node.inputs)):
        return [LOWEST], False
    sources = node.inputs[:1] if node.op_type in _ARRANGING else node.inputs  # a shape is no number of the mask
    found = [_behind(v, depth - 1) for v in sources if v is not None]
    return [c for constants, _ in found for c in constants], any(fed for _, fed in found)
