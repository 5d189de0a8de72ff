"""How a removal along an axis passes each operator: which axes of operands and results are one and the same thing.

A rule reads the masks at a node's slots and marks what they entail; it is called until nothing changes, and once more with `final=True`,
when what is left ragged must be refused. An operator without a rule refuses every removal that reaches it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analysis.layout import Atom, Group, regroup
from graphopt.core import Array
from graphopt.graph import attr, constant, static_dim
from graphopt.shapes import contents
from graphopt.slicing import Refusal, Slicing, Slot, factor, is_ragged, spread

Rule = Callable[[ir.Node, Slicing, bool], None]


def link(node: ir.Node, s: Slicing, final: bool = False) -> None:
    """Apply the rule of `node`.

    Raises:
        Refusal: there is none, or it forbids what is marked.
    """
    rule = RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if rule is None:
        raise Refusal(f"{node.domain and node.domain + '::'}{node.op_type} `{node.name}` has no rule for removing entries")
    rule(node, s, final)


def slots(node: ir.Node) -> list[Slot]:
    return [*(Slot(node, k) for k, v in enumerate(node.inputs) if v is not None), *(Slot(node, k, True) for k, v in enumerate(node.outputs) if v.name)]


def rank(slot: Slot) -> int:
    value = slot.value
    if value is None or value.shape is None:
        raise Refusal(f"{slot.node.op_type} `{slot.node.name}`: the shape of `{'?' if value is None else value.name}` is unknown")
    return len(value.shape)


def same(s: Slicing, places: Sequence[tuple[Slot, int]]) -> None:
    """These axes are one: what goes along one goes along all. Axes of size 1 broadcast, and stay."""
    wide = [(slot, axis) for slot, axis in places if static_dim(slot.value, axis) != 1]
    for slot, axis in wide:
        mask = s.mask(slot, axis)
        for other, other_axis in wide:
            if mask is not None and other != slot:
                s.mark(other, other_axis, mask)


def forbid(node: ir.Node, s: Slicing, slot: Slot, axes: Sequence[int], why: str) -> None:
    for axis in axes:
        if s.mask(slot, axis) is not None:
            raise Refusal(f"{node.op_type} `{node.name}` {why}")


def _elementwise(node: ir.Node, s: Slicing, final: bool) -> None:
    _aligned(s, slots(node))


def _aligned(s: Slicing, parts: Sequence[Slot]) -> None:
    """Axes aligned from the last one, as broadcasting does."""
    ranks = {slot: rank(slot) for slot in parts}
    for back in range(1, max(ranks.values(), default=0) + 1):
        same(s, [(slot, r - back) for slot, r in ranks.items() if r >= back])


def _along(default: int, why: str) -> Rule:
    """Elementwise but for the axis of attribute `axis`, along which it looks."""

    def rule(node: ir.Node, s: Slicing, final: bool) -> None:
        whole = slots(node)
        axis = int(attr(node, "axis", default)) % rank(Slot(node, 0))
        for slot in whole:
            forbid(node, s, slot, [axis], why)
        _aligned(s, whole)

    return rule


def _normalization(node: ir.Node, s: Slicing, final: bool) -> None:
    x, y = Slot(node, 0), Slot(node, 0, True)
    axis = int(attr(node, "axis", -1)) % rank(x)
    _aligned(s, [x, y, *(Slot(node, k) for k in (1, 2) if Slot(node, k).value is not None)])
    for k in range(1, len(node.outputs)):  # mean and deviation: size 1 along what is normalized
        if node.outputs[k].name:
            _aligned(s, [x, Slot(node, k, True)])
    if any(s.mask(x, k) is not None for k in range(axis, rank(x))):
        s.note(node, "normalizes over the features that are left")


def _lp(node: ir.Node, s: Slicing, final: bool) -> None:
    axis = int(attr(node, "axis", -1)) % rank(Slot(node, 0))
    _elementwise(node, s, final)
    if s.mask(Slot(node, 0), axis) is not None:
        s.note(node, "normalizes over the features that are left")


def _reduction(node: ir.Node, s: Slicing, final: bool) -> None:
    x, y = Slot(node, 0), Slot(node, 0, True)
    given = contents(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else attr(node, "axes")
    size = rank(x)
    if given is None and (len(node.inputs) > 1 and node.inputs[1] is not None):
        raise Refusal(f"{node.op_type} `{node.name}` reduces along axes that are computed")
    axes = {int(a) % size for a in given} if given is not None else set() if attr(node, "noop_with_empty_axes", 0) else set(range(size))
    stays = [k for k in range(size) if k not in axes]
    places = stays if attr(node, "keepdims", 1) else range(len(stays))
    for k, place in zip(stays, places, strict=True):
        same(s, [(x, k), (y, place)])
    if node.op_type in ("ReduceMean", "ReduceL2", "ReduceMax", "ReduceMin") and any(s.mask(x, k) is not None for k in axes):
        s.note(node, "reduces over the features that are left")


def _matmul(node: ir.Node, s: Slicing, final: bool) -> None:
    a, b, y = Slot(node, 0), Slot(node, 1), Slot(node, 0, True)
    ra, rb = rank(a), rank(b)
    if min(ra, rb) < 2:
        raise Refusal(f"MatMul `{node.name}` has an operand with one axis")
    same(s, [(a, ra - 1), (b, rb - 2)])
    same(s, [(a, ra - 2), (y, rank(y) - 2)])
    same(s, [(b, rb - 1), (y, rank(y) - 1)])
    for back in range(3, rank(y) + 1):
        same(s, [(slot, rank(slot) - back) for slot in (a, b, y) if rank(slot) >= back])


def _gemm(node: ir.Node, s: Slicing, final: bool) -> None:
    a, b, c, y = Slot(node, 0), Slot(node, 1), Slot(node, 2), Slot(node, 0, True)
    ta, tb = bool(attr(node, "transA", 0)), bool(attr(node, "transB", 0))
    same(s, [(a, 0 if ta else 1), (b, 1 if tb else 0)])
    same(s, [(a, 1 if ta else 0), (y, 0)])
    same(s, [(b, 0 if tb else 1), (y, 1)])
    if c.value is not None:
        _aligned(s, [c, y])


def _einsum(node: ir.Node, s: Slicing, final: bool) -> None:
    equation = str(attr(node, "equation", "")).replace(" ", "")
    left, _, right = equation.partition("->")
    terms = [*left.split(","), right]
    if "." in equation or "->" not in equation:
        raise Refusal(f"Einsum `{node.name}` is not spelled out: `{equation}`")
    parts = [*(Slot(node, k) for k in range(len(node.inputs))), Slot(node, 0, True)]
    for letter in dict.fromkeys("".join(terms)):
        same(s, [(slot, k) for slot, term in zip(parts, terms, strict=True) for k, x in enumerate(term) if x == letter])


def _transpose(node: ir.Node, s: Slicing, final: bool) -> None:
    x, y = Slot(node, 0), Slot(node, 0, True)
    for k, source in enumerate(attr(node, "perm") or range(rank(x))[::-1]):
        same(s, [(x, source), (y, k)])


def _regrouped(node: ir.Node, s: Slicing, final: bool) -> None:
    """Reshape and its kin keep the order of elements: axes are pieces (atoms) of the operand's axes, regrouped."""
    x, y = Slot(node, 0), Slot(node, 0, True)
    if all(s.mask(x, k) is None for k in range(rank(x))) and all(s.mask(y, k) is None for k in range(rank(y))):
        return
    assert x.value is not None
    assert x.value.shape is not None
    assert y.value is not None
    assert y.value.shape is not None
    whole = tuple(() if d == 1 else (Atom(k, 1, d),) for k, d in enumerate(x.value.shape))
    groups = regroup(whole, list(y.value.shape))
    if groups is None:
        raise Refusal(f"it is not known how {node.op_type} `{node.name}` distributes its axes")
    pieces = [_pieces(groups, k) for k in range(rank(x))]
    sides: list[tuple[Slot, int, Group]] = [(x, k, p) for k, p in enumerate(pieces)] + [(y, k, g) for k, g in enumerate(groups)]
    gone: dict[Atom, Array] = {}
    for slot, axis, group in sides:
        mask = s.mask(slot, axis)
        if mask is None:
            continue
        sizes = _inner(node, group, mask)
        if final and is_ragged(mask, [int(a.size) for a in sizes]):  # type: ignore[arg-type]
            raise Refusal(f"{node.op_type} `{node.name}`: what is left of `{'' if slot.value is None else slot.value.name}` would be ragged")
        for atom, part in zip(sizes, factor(mask, [int(a.size) for a in sizes]), strict=True):  # type: ignore[arg-type]
            gone[atom] = part if atom not in gone else gone[atom] | part
    for slot, axis, group in sides:
        marked = [a for a in group if a in gone and gone[a].any()]
        if marked:
            tail = group[group.index(marked[0]) :]
            if not all(isinstance(a.size, int) for a in tail):
                raise Refusal(f"{node.op_type} `{node.name}` joins what is to be cut with an axis of unknown size")
            s.mark(slot, axis, spread([gone.get(a, np.zeros(int(a.size), bool)) for a in tail]))  # type: ignore[arg-type]


def _pieces(groups: Sequence[Group], axis: int) -> Group:
    """The atoms of one axis of the operand, outer first: they stand in this order in the result too."""
    return tuple(a for g in groups for a in g if a.axis == axis)


def _inner(node: ir.Node, group: Group, mask: Array) -> list[Atom]:
    """The innermost pieces that make up the period of a mask."""
    found: list[Atom] = []
    size = 1
    for atom in reversed(group):
        if size == len(mask):
            break
        if not isinstance(atom.size, int):
            break
        found.insert(0, atom)
        size *= atom.size
    if size != len(mask):
        raise Refusal(f"{node.op_type} `{node.name}` splits an axis where {len(mask)} entries repeat")
    return found


def _concat(node: ir.Node, s: Slicing, final: bool) -> None:
    y = Slot(node, 0, True)
    axis = int(attr(node, "axis", 0)) % rank(y)
    _parts(node, s, y, [Slot(node, k) for k in range(len(node.inputs))], axis)


def _split(node: ir.Node, s: Slicing, final: bool) -> None:
    x = Slot(node, 0)
    axis = int(attr(node, "axis", 0)) % rank(x)
    _parts(node, s, x, [Slot(node, k, True) for k in range(len(node.outputs))], axis)


def _parts(node: ir.Node, s: Slicing, whole: Slot, parts: Sequence[Slot], axis: int) -> None:
    """`whole` is the `parts` one after another along `axis`."""
    for k in range(rank(whole)):
        if k != axis:
            same(s, [(slot, k) for slot in (whole, *parts)])
    if all(s.mask(slot, axis) is None for slot in (whole, *parts)):
        return
    sizes = [static_dim(p.value, axis) for p in parts]
    if None in sizes:
        raise Refusal(f"{node.op_type} `{node.name}` joins parts of unknown size")
    borders = np.cumsum([0, *(n for n in sizes if n is not None)])
    everything = np.zeros(borders[-1], bool)
    given = s.mask(whole, axis)
    if given is not None:
        everything |= given
    for part, start, end in zip(parts, borders, borders[1:], strict=False):
        own = s.mask(part, axis)
        if own is not None:
            everything[start:end] |= own
    s.mark(whole, axis, everything)
    for part, start, end in zip(parts, borders, borders[1:], strict=False):
        s.mark(part, axis, everything[start:end])


def selection(node: ir.Node, axis: int, size: int | None) -> Array | None:
    """The indices that a Slice with known bounds takes along `axis` of `size` entries; None where it does not cut."""
    starts, ends = contents(node.inputs[1]), contents(node.inputs[2])
    more = [contents(v) if v is not None else None for v in node.inputs[3:5]]
    given = [int(a) for a in more[0]] if more and more[0] is not None else list(range(len(starts or ())))
    r = 0 if node.inputs[0] is None or node.inputs[0].shape is None else len(node.inputs[0].shape)
    steps = more[1] if len(more) > 1 and more[1] is not None else [1] * len(given)
    places = [k for k, a in enumerate(given) if a % r == axis]
    if not places:
        return None
    bounds = (starts or [None])[places[0]], (ends or [None])[places[0]], steps[places[0]]
    if size is None or not all(isinstance(b, int) for b in bounds):
        raise Refusal(f"Slice `{node.name}` cuts at a place that is computed")
    start, end, step = (int(b) for b in bounds)  # type: ignore[arg-type]
    if step < 0 and end < -size:
        return np.arange(size)[start::step]
    return np.arange(size)[start:end:step]


def _slice(node: ir.Node, s: Slicing, final: bool) -> None:
    x, y = Slot(node, 0), Slot(node, 0, True)
    for k in range(rank(x)):
        if s.mask(x, k) is None and s.mask(y, k) is None:
            continue
        size = static_dim(x.value, k)
        chosen = selection(node, k, size)
        if chosen is None:
            same(s, [(x, k), (y, k)])
        elif size is not None:
            _chosen(s, (x, k), (y, k), chosen, size)


def _chosen(s: Slicing, source: tuple[Slot, int], result: tuple[Slot, int], chosen: Array, size: int) -> None:
    """`result` holds the entries `chosen` of `source`."""
    whole = np.zeros(size, bool)
    for mask, where in ((s.mask(*source), slice(None)), (s.mask(*result), chosen)):
        if mask is not None:
            whole[where] |= mask
    s.mark(*source, whole)
    s.mark(*result, whole[chosen])


def _gather(node: ir.Node, s: Slicing, final: bool) -> None:
    x, ids, y = Slot(node, 0), Slot(node, 1), Slot(node, 0, True)
    axis = int(attr(node, "axis", 0)) % rank(x)
    extra = rank(ids)
    for k in range(rank(x)):
        if k != axis:
            same(s, [(x, k), (y, k if k < axis else k + extra - 1)])
    index = constant(node.inputs[1])
    if index is None and s.mask(x, axis) is not None:
        raise Refusal(f"Gather `{node.name}` looks up entries that may go")
    if index is None or extra > 1:
        for k in range(extra):
            same(s, [(ids, k), (y, axis + k)])
        return
    size = static_dim(x.value, axis)
    if size is None:
        return
    chosen = index.reshape(-1) % size
    if extra == 1:
        _chosen(s, (x, axis), (y, axis), chosen, size)
    elif s.mask(x, axis) is not None and (mask := s.mask(x, axis)) is not None and mask[chosen].any():
        raise Refusal(f"Gather `{node.name}` takes an entry that is to go")


def _expand(node: ir.Node, s: Slicing, final: bool) -> None:
    _aligned(s, [Slot(node, 0), Slot(node, 0, True)])


def _made(node: ir.Node, s: Slicing, final: bool) -> None:
    """ConstantOfShape: equal entries, as many as are left."""


def _nothing(node: ir.Node, s: Slicing, final: bool) -> None:
    """Shape: reads sizes only; what it tells about removed entries is frozen when the removal is carried out."""


def _quantization(node: ir.Node, s: Slicing, final: bool) -> None:
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


def _blocks(node: ir.Node, s: Slicing, x: Slot, scale: Slot, axis: int, block: int, final: bool) -> None:
    for k in range(rank(x)):
        if k != axis:
            same(s, [(x, k), (scale, k)])
            continue
        mask, count = s.mask(x, k), static_dim(scale.value, k)
        if mask is None or count is None:
            continue
        if len(mask) != count * block:
            raise Refusal(f"{node.op_type} `{node.name}`: its last block is not whole")
        if final and is_ragged(mask, [count, block]) or mask.reshape(count, block).all(axis=0).any():
            raise Refusal(f"{node.op_type} `{node.name}`: whole blocks of {block} weights share a scale; remove whole blocks, or prune before quantizing")
        s.mark(scale, k, mask.reshape(count, block).all(axis=1))


def _dynamic_quantization(node: ir.Node, s: Slicing, final: bool) -> None:
    _aligned(s, [Slot(node, 0), Slot(node, 0, True)])


def _attention(node: ir.Node, s: Slicing, final: bool) -> None:
    """Query heads go by whole groups with their key and value head, or evenly in every group; features go from query and key together."""
    q, k, v, y = Slot(node, 0), Slot(node, 1), Slot(node, 2), Slot(node, 0, True)
    heads = int(attr(node, "q_num_heads", 0) or static_dim(q.value, 1) or 0)
    kv_heads = int(attr(node, "kv_num_heads", 0) or static_dim(k.value, 1) or 0)
    if not heads or not kv_heads:
        raise Refusal(f"Attention `{node.name}`: its number of heads is unknown")
    present = [Slot(node, n, True) for n in (1, 2) if n < len(node.outputs) and node.outputs[n].name]
    past = [Slot(node, n) for n in (4, 5) if Slot(node, n).value is not None]
    keys = [k, *(p for p in (*past, *present) if p.index in ((4,) if not p.output else (1,)))]
    values = [v, *(p for p in (*past, *present) if p.index in ((5,) if not p.output else (2,)))]
    counts = {slot: heads if slot in (q, y) else kv_heads for slot in (q, y, *keys, *values)}
    read = {slot: _heads_and_dims(node, s, slot, n, final) for slot, n in counts.items()}
    gone = _any([read[q][0], read[y][0]], heads)
    gone_kv = _any([read[p][0] for p in (*keys, *values)], kv_heads)
    extra = [Slot(node, 3)] if Slot(node, 3).value is not None else []
    extra += [Slot(node, 3, True)] if len(node.outputs) > 3 and node.outputs[3].name else []
    for slot in extra:
        if rank(slot) >= 3 and static_dim(slot.value, rank(slot) - 3) != 1:
            gone = _any([gone, s.mask(slot, rank(slot) - 3)], heads)
    group = heads // kv_heads
    gone |= np.repeat(gone_kv, group)
    gone_kv = gone_kv | gone.reshape(kv_heads, group).all(axis=1)
    left = (~gone).reshape(kv_heads, group).sum(axis=1)[~gone_kv]
    if final and len(set(left.tolist())) > 1:
        raise Refusal(f"Attention `{node.name}`: {heads} query heads share {kv_heads} key heads; whole groups of {group} must go, or as many of each")
    shared, own = _any([read[p][1] for p in (q, *keys)]), _any([read[p][1] for p in (y, *values)])
    for slot, n in counts.items():
        dims = shared if slot in (q, *keys) else own
        _mark_heads(s, slot, gone if n == heads and slot in (q, y) else gone_kv, dims, _head_dim(slot, n))
    for slot in extra:
        if rank(slot) >= 3 and static_dim(slot.value, rank(slot) - 3) != 1:
            s.mark(slot, rank(slot) - 3, gone)


def _any(masks: Sequence[Array | None], size: int | None = None) -> Array:
    found = [m for m in masks if m is not None and m.any()]
    if found:
        either: Array = np.any(found, axis=0)
        return either
    return np.zeros(size or 0, bool)


def _head_dim(slot: Slot, heads: int) -> int:
    width = static_dim(slot.value, rank(slot) - 1)
    if width is None:
        raise Refusal(f"Attention `{slot.node.name}`: the size of its heads is unknown")
    return width if rank(slot) == 4 else width // heads


def _heads_and_dims(node: ir.Node, s: Slicing, slot: Slot, heads: int, final: bool) -> tuple[Array | None, Array | None]:
    if rank(slot) == 4:
        return s.mask(slot, 1), s.mask(slot, 3)
    mask = s.mask(slot, rank(slot) - 1)
    if mask is None:
        return None, None
    sizes = [heads, _head_dim(slot, heads)]
    if final and is_ragged(mask, sizes):
        raise Refusal(f"Attention `{node.name}`: its heads would have different sizes")
    whole, dims = factor(mask, sizes)
    return whole, dims


def _mark_heads(s: Slicing, slot: Slot, heads: Array, dims: Array, head_dim: int) -> None:
    if rank(slot) == 4:
        s.mark(slot, 1, heads)
        s.mark(slot, 3, dims if len(dims) else None)
        return
    s.mark(slot, rank(slot) - 1, spread([heads, dims if len(dims) else np.zeros(head_dim, bool)]))


def _rotary(node: ir.Node, s: Slicing, final: bool) -> None:
    """Features go in pairs that are rotated together, with their angle; whole heads pass."""
    x, y = Slot(node, 0), Slot(node, 0, True)
    if rank(x) == 4:
        for k in (0, 1, 2):
            same(s, [(x, k), (y, k)])
        head_dim, heads = static_dim(x.value, 3), 1
    else:
        same(s, [(x, 0), (y, 0)])
        heads = int(attr(node, "num_heads", 0))
        width = static_dim(x.value, 2)
        head_dim = None if not heads or width is None else width // heads
    if head_dim is None:
        raise Refusal(f"RotaryEmbedding `{node.name}`: the size of its heads is unknown")
    last = rank(x) - 1
    either = _any([s.mask(x, last), s.mask(y, last)], heads * head_dim)
    if not either.any() and all(s.mask(Slot(node, n), rank(Slot(node, n)) - 1) is None for n in (1, 2)):
        return
    if final and is_ragged(either, [heads, head_dim]):
        raise Refusal(f"RotaryEmbedding `{node.name}`: its heads would have different sizes")
    gone, dims = factor(either, [heads, head_dim])
    size = int(attr(node, "rotary_embedding_dim", 0)) or head_dim
    pairs = dims[:size].reshape(-1, 2).T if attr(node, "interleaved", 0) else dims[:size].reshape(2, -1)
    angles = pairs.any(axis=0)
    for n in (1, 2):
        cached = s.mask(Slot(node, n), rank(Slot(node, n)) - 1)
        angles = angles if cached is None else angles | cached
    turned = np.repeat(angles, 2) if attr(node, "interleaved", 0) else np.tile(angles, 2)
    dims = np.concatenate([turned, dims[size:]])
    for slot in (x, y):
        s.mark(slot, last, spread([gone, dims]) if heads > 1 else dims)
    for n in (1, 2):
        s.mark(Slot(node, n), rank(Slot(node, n)) - 1, angles)


def _conv(node: ir.Node, s: Slicing, final: bool) -> None:
    x, w, b, y = Slot(node, 0), Slot(node, 1), Slot(node, 2), Slot(node, 0, True)
    groups, channels = int(attr(node, "group", 1)), static_dim(x.value, 1)
    same(s, [(x, 0), (y, 0)])
    for k in range(2, rank(x)):
        forbid(node, s, x, [k], "slides over positions that are to go")
    if groups == 1:
        same(s, [(x, 1), (w, 1)])
    elif groups == channels == static_dim(y.value, 1):
        same(s, [(x, 1), (y, 1)])
    elif s.mask(x, 1) is not None or s.mask(y, 1) is not None:
        raise Refusal(f"Conv `{node.name}` has {groups} groups of channels")
    same(s, [(y, 1), (w, 0), *([(b, 0)] if b.value is not None else [])])


def _softmaxed(node: ir.Node, s: Slicing, final: bool) -> None:
    axis = int(attr(node, "axis", -1)) % rank(Slot(node, 0))
    for slot in slots(node):
        forbid(node, s, slot, [axis], "shares its sum among the entries that are to go")
    _aligned(s, slots(node))


_ELEMENTWISE = (
    "Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil Celu Clip Cos Cosh Div "
    "Dropout Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean "
    "Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Swish Tan Tanh "
    "ThresholdedRelu Where Xor"
)
RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceSumSquare", "ReduceL1"), _reduction),
    **dict.fromkeys(("Reshape", "Squeeze", "Unsqueeze", "Flatten"), _regrouped),
    **dict.fromkeys(("Softmax", "LogSoftmax"), _softmaxed),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _normalization),
    "LpNormalization": _lp, "MatMul": _matmul, "Gemm": _gemm, "Einsum": _einsum, "Transpose": _transpose, "Concat": _concat, "Split": _split,
    "Slice": _slice, "Gather": _gather, "Expand": _expand, "ConstantOfShape": _made, "Shape": _nothing, "QuantizeLinear": _quantization,
    "DequantizeLinear": _quantization, "DynamicQuantizeLinear": _dynamic_quantization, "Attention": _attention, "RotaryEmbedding": _rotary,
    "Conv": _conv, "CumSum": _along(0, "sums along what is to go"),
}  # fmt: skip
