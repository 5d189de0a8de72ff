"""Rules that correct and extend those of onnx-shape-inference.

Broadcasting two symbols that are not proved equal gives a symbol of its own instead of one of the two; the shape arithmetic that exporters emit
around Expand (ConstantOfShape, Equal, Where, Div) is followed. Slice, Squeeze, Cast, If and Loop say only what holds for every size.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from graphopt.graph.dims import extent, nonnegative, quotient, rounded
from graphopt.graph.questions import ISLAND

Contents = list[int | ir.SymbolicDim]
_LOSSLESS = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.UINT64, ir.DataType.UINT32)  # hold the length of any axis
INITIAL = "graphopt.initial"  # the value that a stand-in without a shape stands for
_BROADCASTING = (
    "Add", "Sub", "Mul", "Div", "Pow", "Mod", "And", "Or", "Xor", "Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "Where", "Max",
    "Min", "Sum", "Mean", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "PRelu", "Expand",
)  # fmt: skip
_STRIDING = ("Conv", "ConvTranspose", "AveragePool", "MaxPool", "LpPool")


@functools.cache
def register() -> None:
    """Wrap the rules of the library, once per process."""
    from onnx_shape_inference import registry

    registry.collect()
    for op_type in _BROADCASTING:
        rule = registry.get("", op_type, version=23)
        if rule is not None:
            registry.register("", op_type, since_version=23)(_sound(rule))
    for op_type in _STRIDING:
        registry.register("", op_type, since_version=23)(_readable(registry.get("", op_type, version=23)))
    registry.register("", "Slice", since_version=23)(_slice)
    for op_type, ours in {"Squeeze": _squeeze, "Cast": _cast, "If": _if, "Loop": _loop, "Einsum": _einsum, "Unique": _unique}.items():
        registry.register("", op_type, since_version=23)(functools.partial(ours, registry.get("", op_type, version=23)))
    for op_type, extra in {"ConstantOfShape": _constant_of_shape, "Equal": _equal, "Where": _where, "Div": _div}.items():
        registry.register("", op_type, since_version=23)(_then(registry.get("", op_type, version=23), extra))


def register_island(op_type: str, version: int) -> None:
    """The library's rule for a standard operator at an opset, also where its node stands apart (see `questions.ISLAND`)."""
    from onnx_shape_inference import registry

    register()
    rule = registry.get("", op_type, version=version)
    if rule is not None and registry.get(ISLAND, op_type, version=1) is not rule:
        registry.register(ISLAND, op_type, since_version=1)(rule)


def _then(rule: Callable[..., None], extra: Callable[..., Contents | None]) -> Callable[..., None]:
    def both(ctx: Any, node: ir.Node) -> None:
        rule(ctx, node)
        known = extra(ctx, node)
        if known is not None:
            ctx.set_symbolic_value(node.outputs[0], known)

    return both


def _readable(rule: Callable[..., None]) -> Callable[..., None]:
    """Sizes that are rounded up (ceil_mode, SAME_UPPER) in a spelling that the next rule can read."""

    def infer(ctx: Any, node: ir.Node) -> None:
        rule(ctx, node)
        for value in node.outputs:
            if value.shape is not None:
                value.shape = ir.Shape([rounded(d) for d in value.shape])

    return infer


def _sound(rule: Callable[..., None]) -> Callable[..., None]:
    """The library assumes that two different symbols that broadcast are equal; one of them could be 1."""

    def infer(ctx: Any, node: ir.Node) -> None:
        rule(ctx, node)
        out = node.outputs[0]
        shapes = _expanded(ctx, node) if node.op_type == "Expand" else [list(v.shape) for v in node.inputs if v is not None and v.shape is not None]
        if out.shape is None or not shapes or len(out.shape) != max(map(len, shapes)):
            return
        dims = [1] * len(out.shape)
        for shape in shapes:
            for k, dim in enumerate(shape, start=len(dims) - len(shape)):
                dims[k] = _join(dims[k], dim)
        ctx.set_shape(out, ir.Shape(dims))

    return infer


def _einsum(rule: Callable[..., None], ctx: Any, node: ir.Node) -> None:
    """An index of several operands broadcasts; the library takes its size from the first one."""
    rule(ctx, node)
    out = node.outputs[0]
    left, arrow, right = node.attributes["equation"].as_string().replace(" ", "").partition("->")
    if out.shape is None or not arrow or "." in left:
        return
    sizes: dict[str, Any] = {}
    for term, value in zip(left.split(","), node.inputs, strict=True):
        for index, dim in zip(term, value.shape if value is not None and value.shape is not None else (), strict=False):
            sizes[index] = _join(sizes.get(index, dim), dim)
    ctx.set_shape(out, ir.Shape([sizes.get(index, dim) for index, dim in zip(right, out.shape, strict=True)]))


def _expanded(ctx: Any, node: ir.Node) -> list[list[Any]]:
    """The shapes that Expand broadcasts. Where the target's contents are unknown but not its length, at least the rank of the result is set."""
    data, target = node.inputs[0], node.inputs[1]
    if data is None or data.shape is None or target is None:
        return []
    known = ctx.get_symbolic_value(target)
    if known is not None:
        return [list(data.shape), list(known)]
    if node.outputs[0].shape is None and target.shape is not None and len(target.shape) == 1 and isinstance(target.shape[0], int):
        rank = max(len(data.shape), target.shape[0])
        ctx.set_shape_and_dtype(node.outputs[0], ir.Shape([ctx.new_symbolic_dim() for _ in range(rank)]), data.dtype)
    return []


def _join(a: Any, b: Any) -> Any:
    """The dimension that two broadcasting dimensions give."""
    if isinstance(a, int) or isinstance(b, int):
        sizes = [d for d in (a, b) if isinstance(d, int)]
        other = b if isinstance(a, int) else a
        return next((s for s in sizes if s != 1), other if len(sizes) == 1 else 1)
    if a == b:
        return a
    for bounded, full in ((a, b), (b, a)):  # Min(512, s) beside s: equal, or the sizes clash at run time, since 512 > 1
        if re.fullmatch(rf"Min\((?!1,)\d+, {re.escape(str(full))}\)", str(bounded)):
            return full
        if str(bounded) == f"Max(0, {full})":  # a dimension is not negative
            return full
    parts = sorted(_parts(a) | _parts(b))
    name = "join_" + "_".join(re.sub(r"\W+", "_", p) for p in parts)
    if len(name) > _LONG or (name in _JOINS and _JOINS[name] != frozenset(parts)):
        name = "join_" + hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    _JOINS[name] = frozenset(parts)
    return ir.SymbolicDim(name)


_LONG = 64  # characters of a join that still spells its parts
_JOINS: dict[str, frozenset[str]] = {}  # join -> what it joins: it is as long as one of these, which is not 1; the same set always has the same name


def _parts(dim: ir.SymbolicDim) -> frozenset[str]:
    """A join of joins is the join of all their parts."""
    return _JOINS.get(str(dim), frozenset((str(dim),)))


def _constant_of_shape(ctx: Any, node: ir.Node) -> Contents | None:
    shape = ctx.get_symbolic_value(node.inputs[0])
    fill = node.attributes.get("value")
    if shape is not None:
        ctx.set_shape(node.outputs[0], ir.Shape(shape))
    if shape is None or len(shape) > 1 or not all(isinstance(d, int) and d <= 64 for d in shape):
        return None
    tensor = None if fill is None else fill.as_tensor()
    if tensor is None or not tensor.dtype.is_integer():
        return None
    return [int(tensor.numpy().reshape(-1)[0])] * (shape[0] if shape else 1)


def _slice(ctx: Any, node: ir.Node) -> None:
    """Shape, dtype and, for a vector, contents. Axes that are not cut stay as they are, also where the cut is not known."""
    x, out = node.inputs[0], node.outputs[0]
    if x is None:
        return
    ctx.set_shape_and_dtype(out, None, x.dtype)
    if x.shape is None:
        return
    rank = len(x.shape)
    starts, ends, axes, steps = (_bounds(ctx, node, k) for k in range(1, 5))
    count = next((len(b) for b in (starts, ends, axes, steps) if b is not None), None)
    if len(node.inputs) < 4 or node.inputs[3] is None:
        axes = None if count is None else list(range(count))
    if len(node.inputs) < 5 or node.inputs[4] is None:
        steps = None if count is None else [1] * count
    if axes is None or not all(isinstance(a, int) for a in axes):
        ctx.set_shape(out, ir.Shape([ctx.new_symbolic_dim() for _ in x.shape]))
        return
    dims: Contents = list(x.shape)
    for k, axis in enumerate(int(a) % rank for a in axes):  # type: ignore[arg-type]
        cut = None if starts is None or ends is None or steps is None else extent(dims[axis], starts[k], ends[k], steps[k])
        dims[axis] = ctx.new_symbolic_dim() if cut is None else cut
    ctx.set_shape(out, ir.Shape(dims))
    known = ctx.get_symbolic_value(x)
    if known is not None and rank == 1 and len(axes) == 1 and isinstance(dims[0], int) and starts and ends and steps:
        bounds = (starts[0], ends[0], steps[0])
        if all(isinstance(b, int) for b in bounds):
            ctx.set_symbolic_value(out, known[slice(*bounds)])


def _bounds(ctx: Any, node: ir.Node, index: int) -> Contents | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is not None:
        return [int(b) for b in tensor.numpy().reshape(-1)]
    known: Contents | None = ctx.get_symbolic_value(value)
    return known


def _squeeze(rule: Callable[..., None], ctx: Any, node: ir.Node) -> None:
    """Without known axes every axis of length 1 goes, which a symbol may turn out to be: the rank is unknown then."""
    rule(ctx, node)
    x, axes = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
    if x is None or x.shape is None or (axes is not None and ir.convenience.get_const_tensor(axes) is not None):
        return
    if axes is not None or not all(isinstance(d, int) for d in x.shape):
        node.outputs[0].shape = None


def _cast(rule: Callable[..., None], ctx: Any, node: ir.Node) -> None:
    """Contents survive only where no length of an axis can wrap around."""
    x, out, to = node.inputs[0], node.outputs[0], ir.DataType(node.attributes["to"].as_int())
    known = None if x is None else ctx.get_symbolic_value(x)
    if known is None or (to in _LOSSLESS and all(_fits(k, to) for k in known)):
        rule(ctx, node)
    elif x is not None:
        ctx.set_shape_and_dtype(out, x.shape, to)


def _fits(number: int | ir.SymbolicDim, to: ir.DataType) -> bool:
    if not isinstance(number, int):
        return to in _LOSSLESS[:2] or nonnegative(number)
    return int(to.min) <= number <= int(to.max)


def _unique(rule: Callable[..., None], ctx: Any, node: ir.Node) -> None:
    """With an axis, whole slices are compared; the library takes the elements of all of them where they are not known."""
    rule(ctx, node)
    x, axis = node.inputs[0], node.attributes.get("axis")
    if axis is None or x is None or x.shape is None or node.outputs[0].shape is None or len(node.outputs[0].shape) == len(x.shape):
        return
    dims = list(x.shape)
    dims[axis.as_int()] = node.outputs[0].shape[0]
    ctx.set_shape(node.outputs[0], ir.Shape(dims))
    if len(node.outputs) > 2:
        ctx.set_shape(node.outputs[2], ir.Shape([x.shape[axis.as_int()]]))


def _if(rule: Callable[..., None], ctx: Any, node: ir.Node) -> None:
    """Where one branch has no shape, the result has none; the library takes that of the other branch."""
    rule(ctx, node)
    branches = [node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
    for k, out in enumerate(node.outputs):
        if any(k < len(branch.outputs) and branch.outputs[k].shape is None for branch in branches):
            out.shape = None


def _loop(rule: Callable[..., None], ctx: Any, node: ir.Node) -> None:
    """A state that no iteration changed is the initial one, and a condition may end the loop before its trip count."""
    rule(ctx, node)
    body, states = node.attributes["body"].as_graph(), len(node.inputs) - 2
    for k, out in enumerate(node.outputs):
        if out.shape is None:
            continue
        if k >= states:
            ctx.set_shape(out, ir.Shape([ctx.new_symbolic_dim(), *out.shape[1:]]))
            continue
        initial, made = node.inputs[k + 2], body.outputs[k + 1].shape
        first = None if initial is None else initial.meta.get(INITIAL, initial).shape
        if first is None or made is None or len(first) != len(made):
            out.shape = None
        else:
            ctx.set_shape(out, ir.Shape([a if _same(a, b) else ctx.new_symbolic_dim() for a, b in zip(first, made, strict=True)]))


def _div(ctx: Any, node: ir.Node) -> Contents | None:
    """Integer division: exact, such as (4 * batch) / 4, or rounded down, as lengths are (no length is negative)."""
    pairs = _pairs(ctx, node)
    if pairs is None or node.outputs[0].dtype is None or not node.outputs[0].dtype.is_integer():
        return None
    found = [f for x, y in pairs if (f := quotient(x, y)) is not None]
    return found if len(found) == len(pairs) else None


def _equal(ctx: Any, node: ir.Node) -> Contents | None:
    pairs = _pairs(ctx, node)
    verdicts = None if pairs is None else [_same(x, y) for x, y in pairs]
    return None if verdicts is None or None in verdicts else [int(bool(v)) for v in verdicts]


def _pairs(ctx: Any, node: ir.Node) -> list[tuple[int | ir.SymbolicDim, int | ir.SymbolicDim]] | None:
    """The known contents of two operands, broadcast; None where they are not known."""
    a, b = (ctx.get_symbolic_value(v) for v in node.inputs)
    if a is None or b is None or (len(a) != len(b) and 1 not in (len(a), len(b))):
        return None
    size = max(len(a), len(b))
    return list(zip(a * (size // len(a)), b * (size // len(b)), strict=True))


def _same(x: int | ir.SymbolicDim, y: int | ir.SymbolicDim) -> bool | None:
    if isinstance(x, int) and isinstance(y, int):
        return x == y
    if not isinstance(x, int) and x == y:
        return True
    number, dim = (x, y) if isinstance(x, int) else (y, x)
    if isinstance(number, int) and number < 0 and nonnegative(dim):
        return False
    return None


def _where(ctx: Any, node: ir.Node) -> Contents | None:
    cond, x, y = (ctx.get_symbolic_value(v) for v in node.inputs)
    flags = node.inputs[0].const_value if node.inputs[0] is not None else None
    if cond is None and flags is not None and flags.size <= 64 and len(flags.shape) <= 1:  # the library reads no booleans
        cond = [int(c) for c in flags.numpy().reshape(-1)]
    if cond is None or x is None or y is None or not all(isinstance(c, int) for c in cond):
        return None
    size = max(len(cond), len(x), len(y))
    if any(len(v) not in (1, size) for v in (cond, x, y)):
        return None
    rows = zip(*(v * (size // len(v)) for v in (cond, x, y)), strict=True)
    return [a if c else b for c, a, b in rows]
