"""fuse-norm: LayerNorm and RMSNorm written out in elementwise nodes become the standard operators."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.core.contract import Context
from graphopt.graph.questions import attr, constant, enclosed, is_constant, producer, rank, scalar
from graphopt.graph.shapes import contents
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.match import Match, Miss
from graphopt.rewrite.rules import RewritePass

_SINCE = {"LayerNormalization": 17, "RMSNormalization": 23}
_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_TYPES = (ir.DataType.FLOAT, *_HALF)  # both operators compute in float32: double would lose digits


@dataclasses.dataclass(frozen=True)
class NormMatch(Match):
    op_type: str
    x: ir.Value
    epsilon: float
    sizes: tuple[int, ...]  # of the normalized axes, the last of x
    gamma: ir.Value | None
    beta: ir.Value | None

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"op": self.op_type, "epsilon": self.epsilon, "gamma": self.gamma is not None, "beta": self.beta is not None}


@dataclasses.dataclass(frozen=True)
class FuseNorm(RewritePass[NormMatch]):
    """(x - mean) / sqrt(var + eps) * gamma + beta -> LayerNormalization; x / sqrt(mean(x^2) + eps) * gamma -> RMSNormalization.

    Ba et al., Layer Normalization (2016); Zhang and Sennrich, Root Mean Square Layer Normalization (2019). A residual sum before the norm
    stays an Add: it is a fact (analysis/analysis/stream.py) that targets spell.
    """

    anchors: ClassVar[frozenset[str]] = frozenset({"ReduceMean"})

    def match(self, node: ir.Node, ctx: Context) -> NormMatch | Miss | None:
        square = _square(node)
        core = None if square is None else _quotient(node, square.inputs[0])
        if square is None or core is None:
            return None
        op_type = "LayerNormalization" if core.centered else "RMSNormalization"
        sizes = _sizes(node, core.x)
        reason = _unfit(node, square, core) or _unfit_opset(op_type, ctx)
        if reason is not None or isinstance(sizes, str):
            return Miss(node, reason or str(sizes))
        path, side, x = list(core.path), {square, *core.side}, core.x
        narrow = producer(x, "Cast")
        if narrow is not None and narrow.inputs[0] is not None and (back := _cast_back(path[-1].outputs[0], x, narrow.inputs[0])) is not None:
            path.append(back)  # the operators cast to float32 and back before they scale, like this
            side.add(narrow)
            x = narrow.inputs[0]
        gamma = _take(path, "Mul", x, sizes)
        beta = _take(path, "Add", x, sizes) if core.centered else None
        return NormMatch(enclosed(path, side), (path[-1].outputs[0],), op_type, x, float(core.epsilon or 0), sizes, gamma, beta)

    def build(self, op: Builder, m: NormMatch) -> Sequence[ir.Value]:
        assert m.x.dtype is not None
        gamma = op.const(np.ones(m.sizes, m.x.dtype.numpy()), "ones") if m.gamma is None else _flat(op, m.gamma, m.sizes)
        affine = [gamma] if m.beta is None else [gamma, _flat(op, m.beta, m.sizes)]
        return [op.node(m.op_type, (m.x, *affine), axis=-len(m.sizes), epsilon=m.epsilon)]


@dataclasses.dataclass(frozen=True)
class _Core:
    """numerator / sqrt(mean(numerator^2) + epsilon): `path` computes it from the mean on, `side` the numerator from x."""

    x: ir.Value
    centered: bool  # the numerator is x - mean(x), and not x itself
    epsilon: float | None
    epsilon_name: str
    path: tuple[ir.Node, ...]
    side: tuple[ir.Node, ...]


def _square(node: ir.Node) -> ir.Node | None:
    """The node that squares (or raises to another constant power) what `node` averages."""
    square = producer(node.inputs[0], "Mul", "Pow")
    if square is None:
        return None
    if square.op_type == "Mul":
        return square if square.inputs[0] is square.inputs[1] else None
    return square if scalar(square.inputs[1]) is not None else None


def _quotient(mean: ir.Node, numerator: ir.Value | None) -> _Core | None:
    """Follow mean -> Add epsilon -> Sqrt (or Pow, Reciprocal, 1 / ..) -> the quotient with the numerator."""
    add = _reader(mean, "Add")
    root = None if add is None else _reader(add, "Sqrt", "Pow")
    if numerator is None or add is None or root is None:
        return None
    exponent = 0.5 if root.op_type == "Sqrt" else scalar(root.inputs[1])
    inverse = None if exponent == -0.5 else _reader(root, "Reciprocal", "Div")
    if inverse is not None and inverse.op_type == "Div" and scalar(inverse.inputs[0]) != 1:
        inverse = None
    if exponent not in (0.5, -0.5):
        return None
    last = inverse or root
    multiply = exponent == -0.5 or inverse is not None
    final = _reader(last, "Mul" if multiply else "Div")
    if final is None or (not multiply and final.inputs[1] is not last.outputs[0]):
        return None
    divided = _other(final, last.outputs[0])
    if divided is None or not (divided is numerator or _same_difference(divided, numerator)):
        return None
    epsilon = _other(add, mean.outputs[0])
    number = scalar(epsilon)
    path = [mean, add, root, *([inverse] if inverse is not None else []), final]
    x, centered, side = _centered(numerator)
    twin = divided.producer()
    side = (*side, *([twin] if divided is not numerator and twin is not None else []))
    return _Core(x, centered, None if number is None else float(number), "" if epsilon is None else str(epsilon.name), tuple(path), side)


def _reader(node: ir.Node, *op_types: str) -> ir.Node | None:
    """The only node that reads the output of `node`, in the same graph, if it is one of `op_types`. (The driver sees to public outputs.)"""
    uses = list(node.outputs[0].uses())
    reader = uses[0].node if len(uses) == 1 else None
    return reader if reader is not None and reader.graph is node.graph and reader.domain == "" and reader.op_type in op_types else None


def _other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def _same_difference(a: ir.Value, b: ir.Value) -> bool:
    first, second = producer(a, "Sub"), producer(b, "Sub")
    return first is not None and second is not None and list(first.inputs) == list(second.inputs)


def _centered(numerator: ir.Value) -> tuple[ir.Value, bool, tuple[ir.Node, ...]]:
    """(x, True, nodes) if the numerator is x minus a mean of x; else (the numerator, False, ())."""
    difference = producer(numerator, "Sub")
    mean = None if difference is None else producer(difference.inputs[1], "ReduceMean")
    if difference is None or mean is None or mean.inputs[0] is not difference.inputs[0] or difference.inputs[0] is None:
        return numerator, False, ()
    return difference.inputs[0], True, (difference, mean)


def _unfit(node: ir.Node, square: ir.Node, core: _Core) -> str | None:
    """Why the operators would compute something else."""
    if square.op_type == "Pow" and (power := scalar(square.inputs[1])) != 2:
        return f"the exponent is {power:g}, a variance has 2"
    means = [node, *(n for n in core.side if n.op_type == "ReduceMean")]
    if any(attr(n, "keepdims", 1) != 1 for n in means):
        return "a mean has keepdims=0, so that it is subtracted along another axis"
    if any(_axes(n) != _axes(node) for n in means):
        return f"the mean is over axes {_axes(means[-1])}, the variance over {_axes(node)}"
    if core.epsilon is None:
        return f"the epsilon `{core.epsilon_name}` is not one constant number"
    if core.epsilon < 0:
        return f"the epsilon is negative ({core.epsilon:g})"
    if core.x.dtype not in _TYPES:
        return f"`{core.x.name}` is {'of unknown type' if core.x.dtype is None else core.x.dtype.name.lower()}; the operators compute in float32"
    return None


def _unfit_opset(op_type: str, ctx: Context) -> str | None:
    opset = ctx.model.opset_imports.get("", 1)
    return None if opset >= _SINCE[op_type] else f"{op_type} needs opset {_SINCE[op_type]}, the graph has {opset}"


def _axes(node: ir.Node) -> list[int] | None:
    """The reduced axes, counted from the front and sorted; None if unknown."""
    ndim = rank(node.inputs[0])
    given = attr(node, "axes")
    if given is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        given = contents(node.inputs[1])
        if given is None or not all(isinstance(a, int) for a in given):
            return None
    if ndim is None:
        return None
    if not given:
        return [] if attr(node, "noop_with_empty_axes", 0) else list(range(ndim))
    return sorted(int(a) % ndim for a in given)


def _sizes(node: ir.Node, x: ir.Value) -> tuple[int, ...] | str:
    """The sizes of the normalized axes, or why the operators cannot normalize them."""
    axes = _axes(node)
    if axes is None or x.shape is None or not axes:
        return "the axes or the rank are not known"
    if axes != list(range(len(x.shape) - len(axes), len(x.shape))):
        return f"the mean is over axes {axes} of {len(x.shape)}, not over the last ones"
    sizes = tuple(d for d in x.shape[axes[0] :] if isinstance(d, int))
    if len(sizes) < len(axes):
        return f"`{x.name}` is {list(map(str, x.shape))}: a normalized axis has no fixed size, so that the shape of gamma is not known"
    return sizes


def _cast_back(value: ir.Value, wide: ir.Value, narrow: ir.Value) -> ir.Node | None:
    """The Cast of the quotient back to the 16-bit type that x came from."""
    if wide.dtype != ir.DataType.FLOAT or narrow.dtype not in _HALF:
        return None
    node = value.producer()
    back = None if node is None else _reader(node, "Cast")
    return back if back is not None and back.outputs[0].dtype == narrow.dtype else None


def _take(path: list[ir.Node], op_type: str, x: ir.Value, sizes: tuple[int, ...]) -> ir.Value | None:
    """gamma or beta: the other operand of the next node, if it fits the normalized axes; the node then joins the path."""
    value = path[-1].outputs[0]
    reader = None if value.is_graph_output() else _reader(path[-1], op_type)
    operand = None if reader is None else _other(reader, value)
    if reader is None or operand is None or operand is value or operand.dtype != x.dtype or not _fits(operand, x, sizes):
        return None
    path.append(reader)
    return operand


def _fits(operand: ir.Value, x: ir.Value, sizes: tuple[int, ...]) -> bool:
    """True if broadcasting with `operand` neither grows the normalized axes nor touches the others."""
    if operand.shape is None or x.shape is None or len(operand.shape) > len(x.shape) or not operand.shape.is_static():
        return False
    dims = _stripped(operand.shape.numpy(), len(sizes))
    if not is_constant(operand):
        return operand.is_initializer() and operand.shape.numpy() == sizes
    tail = sizes[len(sizes) - len(dims) :]
    return len(dims) <= len(sizes) and all(d in (1, n) for d, n in zip(dims, tail, strict=True))


def _stripped(dims: Sequence[int], keep: int) -> tuple[int, ...]:
    """`dims` without those leading ones that reach beyond the last `keep` axes."""
    start = 0
    while len(dims) - start > keep and dims[start] == 1:
        start += 1
    return tuple(dims[start:])


def _flat(op: Builder, value: ir.Value, sizes: tuple[int, ...]) -> ir.Value:
    """gamma or beta in exactly the normalized shape."""
    array = constant(value)
    if array is None or array.shape == sizes:
        return value
    return op.const(np.ascontiguousarray(np.broadcast_to(array.reshape(_stripped(array.shape, len(sizes))), sizes)), value.name or "scale")
