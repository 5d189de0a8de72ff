"""Symbolic shapes, dtypes and the contents of small integer tensors, recomputed from the graph's inputs and weights.

The work is done by onnx-shape-inference. What this file adds: nothing that a file merely *claims* (value_info, output shapes) is believed;
broadcasting two symbols that are not proved equal gives a symbol of its own instead of one of the two; and the shape arithmetic that
exporters emit around Expand (ConstantOfShape, Equal, Where) is followed.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import onnx_ir as ir

Contents = list[int | ir.SymbolicDim]
_CONTENTS, _DECLARED = "graphopt.contents", "graphopt.declared"
_OPAQUE = re.compile(r"\b(_d\d+|join_\w+)\b")  # symbols that inference made up
_SERIAL = itertools.count(1_000_000, 1_000)  # numbers for symbols made up outside of a whole-model run; never used twice in one process

_BROADCASTING = [
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Pow",
    "Mod",
    "And",
    "Or",
    "Xor",
    "Equal",
    "Less",
    "Greater",
    "LessOrEqual",
    "GreaterOrEqual",
    "Where",
    "Max",
    "Min",
    "Sum",
    "Mean",
    "BitwiseAnd",
    "BitwiseOr",
    "BitwiseXor",
    "PRelu",
    "Expand",
]


def infer_shapes(model: ir.Model) -> str | None:
    """Write shape and dtype to every value of the model, in place.

    The declared shapes of graph outputs are kept aside (see `declared_shape`): they belong to the interface, not to the facts.

    Returns:
        None, or the reason why inference ended early; the values behind that place have no shape then.
    """
    from onnx_shape_inference import infer_symbolic_shapes

    _register_rules()
    for value in model.graph.outputs:
        value.meta.setdefault(_DECLARED, value.shape)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain in ("", "ai.onnx"):
            for value in node.outputs:
                value.shape = None
                value.meta.pop(_CONTENTS, None)
    try:
        with _defaults_hidden(model):
            infer_symbolic_shapes(model, policy="override", warn_on_missing=False, adopt_declared_symbols=False)
    except Exception as error:  # noqa: BLE001 -- the library raises many kinds; the reason goes into a remark, and every fact not set stays unknown
        return str(error).splitlines()[0]
    finally:
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            _tidy(node.outputs)
    return None


def infer_nodes(model: ir.Model, nodes: Iterable[ir.Node]) -> None:
    """Write shapes and dtypes to the outputs of new nodes, in order, from the facts on their inputs."""
    from onnx_shape_inference import ShapeInferenceContext, registry

    _register_rules()
    ctx = ShapeInferenceContext(model.opset_imports, policy="override")
    ctx._allocator.counter = next(_SERIAL)  # two runs never make up the same symbol for different dimensions
    registry.collect()
    for node in nodes:
        for value in node.inputs:
            if value is not None and (known := value.meta.get(_CONTENTS)) is not None:
                ctx._symbolic_values[value] = known
        rule = registry.get(node.domain, node.op_type, version=ctx.get_opset_version(node.domain))
        if rule is not None:
            rule(ctx, node)
        _tidy(node.outputs)


def contents(value: ir.Value | None) -> Contents | None:
    """The elements of a small integer tensor (rank 0 or 1) as ints and symbolic expressions, where known."""
    if value is None or value.is_graph_input():
        return None
    known: Contents | None = value.meta.get(_CONTENTS)
    if known is not None:
        return known
    tensor = value.const_value
    if tensor is None or len(tensor.shape) > 1 or tensor.size > 64 or not tensor.dtype.is_integer():
        return None
    return [int(x) for x in tensor.numpy().reshape(-1)]


def declared_shape(value: ir.Value) -> ir.Shape | None:
    """The shape that the model's author wrote at a graph output."""
    shape: ir.Shape | None = value.meta.get(_DECLARED, value.shape)
    return shape


def is_opaque(dim: object) -> bool:
    """True for a dimension that inference could not express in the symbols of the graph inputs."""
    return not isinstance(dim, int) and (getattr(dim, "value", None) is None or bool(_OPAQUE.search(str(dim))))


def nonnegative(dim: int | ir.SymbolicDim) -> bool:
    """True if the value of a dimension expression is proved >= 0 (dimension symbols are)."""
    if isinstance(dim, int):
        return dim >= 0
    text = str(dim.value)
    return dim.value is not None and "-" not in text


@contextlib.contextmanager
def _defaults_hidden(model: ir.Model) -> Iterator[None]:
    """An overridable initializer has only a default: the library must not take it for a constant."""
    hidden = {v: v.const_value for v in model.graph.inputs if v.const_value is not None}
    for value in hidden:
        value.const_value = None
    try:
        yield
    finally:
        for value, tensor in hidden.items():
            value.const_value = tensor


def _tidy(values: Sequence[ir.Value]) -> None:
    """Symbols that are numbers become numbers; known contents move from the (serialized) metadata to `value.meta`."""
    from onnx_shape_inference import SYM_DATA_KEY

    for value in values:
        value.const_value = None  # the library leaves known integers there; in the normal form only initializers have a const_value
        if value.shape is not None and any(_is_number(d) for d in value.shape):
            value.shape = ir.Shape([int(str(d)) if _is_number(d) else d for d in value.shape])
        text = value.metadata_props.pop(SYM_DATA_KEY, None)
        if text is not None:
            import json

            value.meta[_CONTENTS] = [int(x) if isinstance(x, int) or x.lstrip("-").isdigit() else ir.SymbolicDim(x) for x in json.loads(text)]


def _is_number(dim: int | ir.SymbolicDim) -> bool:
    return not isinstance(dim, int) and dim.value is not None and dim.value.isdigit()


@functools.cache
def _register_rules() -> None:
    """Wrap the library's rules once per process."""
    from onnx_shape_inference import registry

    registry.collect()
    for op_type in _BROADCASTING:
        rule = registry.get("", op_type, version=23)
        if rule is not None:
            registry.register("", op_type, since_version=23)(_sound(rule))
    for op_type, extra in {"ConstantOfShape": _constant_of_shape, "Equal": _equal, "Where": _where, "Div": _div}.items():
        registry.register("", op_type, since_version=23)(_then(registry.get("", op_type, version=23), extra))


def _then(rule: Callable[..., None], extra: Callable[..., Contents | None]) -> Callable[..., None]:
    def both(ctx: Any, node: ir.Node) -> None:
        rule(ctx, node)
        known = extra(ctx, node)
        if known is not None:
            ctx.set_symbolic_value(node.outputs[0], known)

    return both


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
    parts = sorted({str(a), str(b)})
    return ir.SymbolicDim("join_" + "_".join(re.sub(r"\W+", "_", p) for p in parts))


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


def _div(ctx: Any, node: ir.Node) -> Contents | None:
    """Integer division that is proved to leave no rest, such as (4 * batch) / 4."""
    a, b = (ctx.get_symbolic_value(v) for v in node.inputs)
    if a is None or b is None or node.outputs[0].dtype is None or not node.outputs[0].dtype.is_integer():
        return None
    if len(a) != len(b) and 1 not in (len(a), len(b)):
        return None
    size = max(len(a), len(b))
    found = [divide(x, y) for x, y in zip(a * (size // len(a)), b * (size // len(b)), strict=True)]
    return None if any(f is None for f in found) else [f for f in found if f is not None]


def _equal(ctx: Any, node: ir.Node) -> Contents | None:
    a, b = (ctx.get_symbolic_value(v) for v in node.inputs)
    if a is None or b is None or (len(a) != len(b) and 1 not in (len(a), len(b))):
        return None
    size = max(len(a), len(b))
    verdicts = [_same(x, y) for x, y in zip(a * (size // len(a)), b * (size // len(b)), strict=True)]
    return None if None in verdicts else [int(bool(v)) for v in verdicts]


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


def multiply(a: int | ir.SymbolicDim, b: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
    """The product of two dimensions."""
    if a == 1:
        return b
    if b == 1:
        return a
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    return _multiply(a, b)


def divide(a: int | ir.SymbolicDim, b: int | ir.SymbolicDim) -> int | ir.SymbolicDim | None:
    """a / b where it is proved to leave no rest (as polynomials in the dimension symbols), else None."""
    if a == b:
        return 1
    if b == 1:
        return a
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    return None if isinstance(a, int) else _divide(a, b)


@functools.lru_cache(maxsize=4096)
def _multiply(a: int | ir.SymbolicDim, b: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
    return a * b


@functools.lru_cache(maxsize=4096)
def _divide(a: ir.SymbolicDim, b: int | ir.SymbolicDim) -> int | ir.SymbolicDim | None:
    import sympy

    if a._expr is None or (isinstance(b, ir.SymbolicDim) and b._expr is None):
        return None
    over = sympy.cancel(a._expr / (b if isinstance(b, int) else b._expr))
    if over.is_Integer:
        return int(over)
    symbols = sorted(over.free_symbols, key=str)
    if not symbols or not over.is_polynomial(*symbols):
        return None
    return ir.SymbolicDim(over) if all(c.is_integer for c in sympy.Poly(over, *symbols).coeffs()) else None
