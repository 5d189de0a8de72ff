"""fuse-norm: LayerNorm and RMSNorm written out in elementwise nodes become the standard operators."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.formulas.norms import NormFormula, norm_of, only_reader, other_operand, square_of
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

    The variance may be mean(x^2) - mean^2, whose last digits differ where the mean is large beside the deviation: the operators compute it
    as well as float32 can, or better. gamma may be folded into the root, and the mean into the shift.
    Ba et al., Layer Normalization (2016); Zhang and Sennrich, Root Mean Square Layer Normalization (2019). A residual sum before the norm
    stays an Add: it is a fact (analysis/analysis/stream.py) that targets spell.
    """

    anchors: ClassVar[frozenset[str]] = frozenset({"ReduceMean"})

    def match(self, node: ir.Node, ctx: Context) -> NormMatch | Miss | None:
        square = square_of(node)
        core = None if square is None else norm_of(node, square)
        if square is None or core is None:
            return None
        op_type = "LayerNormalization" if core.centered else "RMSNormalization"
        sizes = _sizes(node, core.x)
        reason = _unfit(node, square, core) or _unfit_opset(op_type, ctx)
        if reason is not None or isinstance(sizes, str):
            return Miss(node, reason or str(sizes))
        unfit = next((v for v in (core.gamma, core.beta) if v is not None and (v.dtype != core.x.dtype or not _fits(v, core.x, sizes))), None)
        if unfit is not None:
            return Miss(node, f"`{unfit.name}`, which scales or shifts inside of the quotient, is no constant along the normalized axes")
        path, side, x = list(core.path), {square, *core.side}, core.x
        narrow = producer(x, "Cast") if core.gamma is None else None  # a folded gamma scales in float32
        if narrow is not None and narrow.inputs[0] is not None and (back := _cast_back(path[-1].outputs[0], x, narrow.inputs[0])) is not None:
            path.append(back)  # the operators cast to float32 and back before they scale, like this
            side.add(narrow)
            x = narrow.inputs[0]
        gamma = core.gamma or (_take(path, "Mul", x, sizes) if core.beta is None else None)
        beta = core.beta or (_take(path, "Add", x, sizes) if core.centered else None)
        return NormMatch(enclosed(path, side), (path[-1].outputs[0],), op_type, x, float(core.epsilon or 0), sizes, gamma, beta)

    def build(self, op: Builder, m: NormMatch) -> Sequence[ir.Value]:
        assert m.x.dtype is not None
        gamma = op.const(np.ones(m.sizes, m.x.dtype.numpy()), "ones") if m.gamma is None else _flat(op, m.gamma, m.sizes)
        affine = [gamma] if m.beta is None else [gamma, _flat(op, m.beta, m.sizes)]
        return [op.node(m.op_type, (m.x, *affine), axis=-len(m.sizes), epsilon=m.epsilon)]


def _unfit(node: ir.Node, square: ir.Node, core: NormFormula) -> str | None:
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
    back = None if node is None else only_reader(node, "Cast")
    return back if back is not None and back.outputs[0].dtype == narrow.dtype else None


def _take(path: list[ir.Node], op_type: str, x: ir.Value, sizes: tuple[int, ...]) -> ir.Value | None:
    """gamma or beta: the other operand of the next node, if it fits the normalized axes; the node then joins the path."""
    value = path[-1].outputs[0]
    reader = None if value.is_graph_output() else only_reader(path[-1], op_type)
    operand = None if reader is None else other_operand(reader, value)
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
