"""How a removal along an axis passes each operator: which axes of operands and results are one and the same thing.

A rule reads the masks at a node's slots and marks what they entail; it is called until nothing changes, and once more with `final=True`,
when what is left ragged must be refused. An operator without a rule refuses every removal that reaches it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from graphopt.graph.questions import attr, static_dim
from graphopt.graph.shapes import contents
from graphopt.rewrite.slicing import heads, moves
from graphopt.rewrite.slicing.places import aligned, forbid, integers, rank, same, slots
from graphopt.rewrite.slicing.plan import Refusal, Removals, Slot, is_ragged


def link(node: ir.Node, s: Removals, final: bool = False) -> None:
    """Apply the rule of `node`.

    Raises:
        Refusal: there is none, or it forbids what is marked.
    """
    rule = RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if rule is None:
        raise Refusal(f"{node.domain and node.domain + '::'}{node.op_type} `{node.name}` has no rule for removing entries")
    rule(node, s, final)


def _elementwise(node: ir.Node, s: Removals, final: bool) -> None:
    aligned(s, slots(node))


def _cumulative(node: ir.Node, s: Removals, final: bool) -> None:
    x, y = Slot(node, 0), Slot(node, 0, True)
    axis = integers(contents(node.inputs[1]))
    for slot in (x, y):
        forbid(node, s, slot, range(rank(x)) if axis is None else [axis[0] % rank(x)], "sums along what is to go")
    aligned(s, [x, y])


def _normalization(node: ir.Node, s: Removals, final: bool) -> None:
    x, y = Slot(node, 0), Slot(node, 0, True)
    axis = int(attr(node, "axis", -1)) % rank(x)
    aligned(s, [x, y, *(Slot(node, k) for k in (1, 2) if Slot(node, k).value is not None)])
    for k in range(1, len(node.outputs)):  # mean and deviation: size 1 along what is normalized
        if node.outputs[k].name:
            aligned(s, [x, Slot(node, k, True)])
    if any(s.mask(x, k) is not None for k in range(axis, rank(x))):
        s.note(node, "normalizes over the features that are left")


def _lp(node: ir.Node, s: Removals, final: bool) -> None:
    axis = int(attr(node, "axis", -1)) % rank(Slot(node, 0))
    _elementwise(node, s, final)
    if s.mask(Slot(node, 0), axis) is not None:
        s.note(node, "normalizes over the features that are left")


def _reduction(node: ir.Node, s: Removals, final: bool) -> None:
    x, y = Slot(node, 0), Slot(node, 0, True)
    computed = Slot(node, 1).value
    given = integers(contents(computed)) if computed is not None else attr(node, "axes")
    size = rank(x)
    if given is None and computed is not None:
        raise Refusal(f"{node.op_type} `{node.name}` reduces along axes that are computed")
    axes = {a % size for a in given} if given else set() if attr(node, "noop_with_empty_axes", 0) else set(range(size))
    stays = [k for k in range(size) if k not in axes]
    places = stays if attr(node, "keepdims", 1) else range(len(stays))
    for k, place in zip(stays, places, strict=True):
        same(s, [(x, k), (y, place)])
    if node.op_type in ("ReduceSum", "ReduceL1", "ReduceSumSquare"):
        s.contract(node, [(x, k) for k in axes])
    elif any(s.mask(x, k) is not None for k in axes):
        s.note(node, "reduces over the features that are left")


def _matmul(node: ir.Node, s: Removals, final: bool) -> None:
    a, b, y = Slot(node, 0), Slot(node, 1), Slot(node, 0, True)
    ra, rb = rank(a), rank(b)
    if min(ra, rb) < 2:
        raise Refusal(f"MatMul `{node.name}` has an operand with one axis")
    same(s, [(a, ra - 1), (b, rb - 2)])
    s.contract(node, [(a, ra - 1), (b, rb - 2)])
    same(s, [(a, ra - 2), (y, rank(y) - 2)])
    same(s, [(b, rb - 1), (y, rank(y) - 1)])
    for back in range(3, rank(y) + 1):
        same(s, [(slot, rank(slot) - back) for slot in (a, b, y) if rank(slot) >= back])


def _gemm(node: ir.Node, s: Removals, final: bool) -> None:
    a, b, c, y = Slot(node, 0), Slot(node, 1), Slot(node, 2), Slot(node, 0, True)
    ta, tb = bool(attr(node, "transA", 0)), bool(attr(node, "transB", 0))
    same(s, [(a, 0 if ta else 1), (b, 1 if tb else 0)])
    s.contract(node, [(a, 0 if ta else 1), (b, 1 if tb else 0)])
    same(s, [(a, 1 if ta else 0), (y, 0)])
    same(s, [(b, 0 if tb else 1), (y, 1)])
    if c.value is not None:
        aligned(s, [c, y])


def _einsum(node: ir.Node, s: Removals, final: bool) -> None:
    equation = str(attr(node, "equation", "")).replace(" ", "")
    left, _, right = equation.partition("->")
    terms = [*left.split(","), right]
    if "." in equation or "->" not in equation:
        raise Refusal(f"Einsum `{node.name}` is not spelled out: `{equation}`")
    parts = [*(Slot(node, k) for k in range(len(node.inputs))), Slot(node, 0, True)]
    for letter in dict.fromkeys("".join(terms)):
        places = [(slot, k) for slot, term in zip(parts, terms, strict=True) for k, x in enumerate(term) if x == letter]
        same(s, places)
        if letter not in right:
            s.contract(node, places)


def _expand(node: ir.Node, s: Removals, final: bool) -> None:
    if final:
        moves.check_target(node, s, 1)
    aligned(s, [Slot(node, 0), Slot(node, 0, True)])


def _made(node: ir.Node, s: Removals, final: bool) -> None:
    """ConstantOfShape: equal entries, as many as are left."""
    if final:
        moves.check_target(node, s, 0)


def _nothing(node: ir.Node, s: Removals, final: bool) -> None:
    """Shape: reads sizes only; what it tells about removed entries is frozen when the removal is carried out."""
    if final:
        moves.check_frozen(node, s)


def _quantization(node: ir.Node, s: Removals, final: bool) -> None:
    x, y = Slot(node, 0), Slot(node, 0, True)
    size = rank(x)
    for k in range(size):
        same(s, [(x, k), (y, k)])
    axis, block = int(attr(node, "axis", 1)), int(attr(node, "block_size", 0))
    for slot in (p for p in (Slot(node, 1), Slot(node, 2)) if p.value is not None):
        if block:
            _blocks(node, s, x, slot, axis % size, block, final)
        elif rank(slot) == 1:
            same(s, [(x, axis % size), (slot, 0)])


def _blocks(node: ir.Node, s: Removals, x: Slot, scale: Slot, axis: int, block: int, final: bool) -> None:
    for k in range(rank(x)):
        if k != axis:
            same(s, [(x, k), (scale, k)])
            continue
        mask, count = s.mask(x, k), static_dim(scale.value, k)
        if mask is None or count is None:
            continue
        if len(mask) != count * block:
            raise Refusal(f"{node.op_type} `{node.name}`: its last block is not whole")
        if (final and is_ragged(mask, [count, block])) or mask.reshape(count, block).all(axis=0).any():
            raise Refusal(
                f"{node.op_type} `{node.name}`: whole blocks of {block} weights share a scale; remove whole blocks, or prune before quantizing"
            )
        s.mark(scale, k, np.all(mask.reshape(count, block), axis=1))


def _dynamic_quantization(node: ir.Node, s: Removals, final: bool) -> None:
    aligned(s, [Slot(node, 0), Slot(node, 0, True)])


def _conv(node: ir.Node, s: Removals, final: bool) -> None:
    x, w, b, y = Slot(node, 0), Slot(node, 1), Slot(node, 2), Slot(node, 0, True)
    groups, channels = int(attr(node, "group", 1)), static_dim(x.value, 1)
    same(s, [(x, 0), (y, 0)])
    for slot in (x, y):
        forbid(node, s, slot, range(2, rank(x)), "slides over positions that are to go")
    if groups == 1:
        same(s, [(x, 1), (w, 1)])
        s.contract(node, [(x, 1), (w, 1)])
    elif groups == channels == static_dim(y.value, 1):
        same(s, [(x, 1), (y, 1)])
    elif s.mask(x, 1) is not None or s.mask(y, 1) is not None:
        raise Refusal(f"Conv `{node.name}` has {groups} groups of channels")
    same(s, [(y, 1), (w, 0), *([(b, 0)] if b.value is not None else [])])


def _softmaxed(node: ir.Node, s: Removals, final: bool) -> None:
    axis = int(attr(node, "axis", -1)) % rank(Slot(node, 0))
    for slot in slots(node):
        forbid(node, s, slot, [axis], "shares its sum among the entries that are to go")
    aligned(s, slots(node))


_ELEMENTWISE = (
    "Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil Celu Clip Cos Cosh Div "
    "Dropout Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean "
    "Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Swish Tan Tanh "
    "ThresholdedRelu Where Xor"
)
RULES: dict[str, Callable[[ir.Node, Removals, bool], None]] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceSumSquare", "ReduceL1"), _reduction),
    **dict.fromkeys(("Reshape", "Squeeze", "Unsqueeze", "Flatten"), moves.regrouped),
    **dict.fromkeys(("Softmax", "LogSoftmax"), _softmaxed),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _normalization),
    "LpNormalization": _lp, "MatMul": _matmul, "Gemm": _gemm, "Einsum": _einsum, "Transpose": moves.transpose, "Concat": moves.concat,
    "Split": moves.split,
    "Slice": moves.cut, "Gather": moves.gather, "Expand": _expand, "ConstantOfShape": _made, "Shape": _nothing, "QuantizeLinear": _quantization,
    "DequantizeLinear": _quantization, "DynamicQuantizeLinear": _dynamic_quantization, "Attention": heads.attention, "RotaryEmbedding": heads.rotary,
    "Conv": _conv, "CumSum": _cumulative,
}  # fmt: skip
