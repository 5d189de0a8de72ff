"""Every matrix multiply with a stored weight, and every lookup in a stored table, whatever spells it.

The weight may be float, or quantized (DequantizeLinear, or a codebook), and may stand behind Transpose and Identity: the facts name the constant
itself and how it lies, so that pruning, factorizing, merging and quantizing read the same thing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from graphopt.analysis.codebook import Codebook, read_codebook
from graphopt.core.contract import Analysis, Array, Context
from graphopt.graph.questions import all_nodes, attr, constant, is_constant, producer, static_dim, used_once


@dataclasses.dataclass(frozen=True)
class Grid:
    """How a quantized constant is read: (stored - zero_point) * scale, the scale along `axis` of the stored constant.

    `axis` is None for one scale for all. `block` > 0: one scale for `block` neighbours along `axis`.
    """

    node: ir.Node
    scale: ir.Value
    zero_point: ir.Value | None
    axis: int | None
    block: int = 0


@dataclasses.dataclass(frozen=True)
class Stored:
    """A constant behind layout nodes. `path`: those nodes, from the constant on; `swapped`: its last two axes are exchanged on the way."""

    value: ir.Value
    path: tuple[ir.Node, ...]
    swapped: bool
    grid: Grid | None
    codebook: Codebook | None = None


@dataclasses.dataclass(frozen=True)
class Linear:
    """alpha * x @ W + beta * bias, x [..., in], W [in, out] (or batched [..., in, out]), bias [out], [1, .., out] or of one element.

    Attributes:
        node: the MatMul or Gemm.
        weight: the stored constant, float or integer: [..., in, out], or [..., out, in] if `transposed`.
        path: what stands between `weight` and `node`.
        bias: a constant, added by `bias_node` or, where that is None, by the Gemm itself.
        addend: what a Gemm adds that is no such bias (scaled by `beta` too).
        trans_x: the Gemm reads x as [in, rows].
        grid: how `weight` is quantized by DequantizeLinear; None if it is not.
        codebook: how it is looked up, if it holds the codes of a codebook.
    """

    node: ir.Node
    x: ir.Value
    weight: ir.Value
    path: tuple[ir.Node, ...]
    transposed: bool
    in_features: int
    out_features: int
    batch: tuple[int, ...] = ()
    bias: ir.Value | None = None
    bias_node: ir.Node | None = None
    addend: ir.Value | None = None
    alpha: float = 1.0
    beta: float = 1.0
    trans_x: bool = False
    grid: Grid | None = None
    codebook: Codebook | None = None

    @property
    def quantized(self) -> bool:
        return self.grid is not None or self.codebook is not None

    @property
    def channel_axis(self) -> int:
        """The axis of the stored `weight` that runs along the output features."""
        return len(self.batch) + (0 if self.transposed else 1)

    @property
    def output(self) -> ir.Value:
        """The result, after the bias."""
        return (self.bias_node or self.node).outputs[0]

    def matrix(self) -> Array:
        """W as [..., in, out], dequantized; `alpha` is not in it."""
        array = dequantize(self.weight, self.grid) if self.codebook is None else self.codebook.decode()
        return np.swapaxes(array, -1, -2) if self.transposed else array


@dataclasses.dataclass(frozen=True)
class Embedding:
    """table[ids]: the Gather `node` takes rows of width `width` from a stored table [rows, width]; `path` leads from the table to it."""

    node: ir.Node
    ids: ir.Value
    table: ir.Value
    path: tuple[ir.Node, ...]
    rows: int
    width: int
    grid: Grid | None = None
    codebook: Codebook | None = None

    @property
    def quantized(self) -> bool:
        return self.grid is not None or self.codebook is not None


@dataclasses.dataclass(frozen=True)
class Linears(Analysis[tuple[Linear, ...]]):
    """Every MatMul and Gemm whose second operand is stored, in graph order, outer graphs before inner ones.

    `casts`: also those whose weight is stored in another float type and cast; `weight` is then of that type, and the Cast on the `path`.
    """

    casts: bool = False

    def compute(self, model: ir.Model, ctx: Context) -> tuple[Linear, ...]:
        found = (_linear(node, self.casts) for node in all_nodes(model) if node.domain == "" and node.op_type in ("MatMul", "Gemm"))
        return tuple(linear for linear in found if linear is not None)


@dataclasses.dataclass(frozen=True)
class Embeddings(Analysis[tuple[Embedding, ...]]):
    """Every Gather of rows from a stored two-dimensional float table, in graph order; `casts` as for Linears."""

    casts: bool = False

    def compute(self, model: ir.Model, ctx: Context) -> tuple[Embedding, ...]:
        found = (_embedding(node, self.casts) for node in all_nodes(model) if node.domain == "" and node.op_type == "Gather")
        return tuple(embedding for embedding in found if embedding is not None)


@dataclasses.dataclass(frozen=True)
class StoredOperands(Analysis[Mapping[ir.Node, Linear | Embedding]]):
    """Both of them, by node."""

    casts: bool = False

    def compute(self, model: ir.Model, ctx: Context) -> Mapping[ir.Node, Linear | Embedding]:
        found: list[Linear | Embedding] = [*ctx.get(Linears(self.casts)), *ctx.get(Embeddings(self.casts))]
        return {x.node: x for x in found}


def stored(value: ir.Value | None, casts: bool = False) -> Stored | None:
    """The constant that `value` is a re-laid or dequantized (or, with `casts`, cast) view of, or None."""
    views = ("Identity", "Transpose", "DequantizeLinear", *(("Cast",) if casts else ()))
    path: list[ir.Node] = []
    swapped, grid = False, None
    while value is not None and not is_constant(value):
        node = producer(value, *views)
        if node is None and grid is None and (found := read_codebook(value)) is not None:
            return Stored(found.codes, (*found.path, *reversed(path)), swapped, None, found)
        if node is None or grid is not None:  # nothing but the constant itself may stand behind a DequantizeLinear
            return None
        if node.op_type == "Transpose":
            if not _swaps_last_two(node):
                return None
            swapped = not swapped
        elif node.op_type == "DequantizeLinear":
            grid = _grid(node)
            if grid is None:
                return None
        elif node.op_type == "Cast" and not _is_float(node.inputs[0]):
            return None
        path.append(node)
        value = node.inputs[0]
    return None if value is None else Stored(value, tuple(reversed(path)), swapped, grid)


def dequantize(value: ir.Value, grid: Grid | None) -> Array:
    """The contents of a stored constant as numbers; float weights come as they are."""
    array = constant(value)
    assert array is not None, f"`{value.name}` is not a constant"
    if grid is None:
        return array
    scale = _spread(constant(grid.scale), grid, array.shape)
    zero = _spread(constant(grid.zero_point), grid, array.shape) if grid.zero_point is not None else 0
    shifted = array.astype(np.float32) - np.asarray(zero, np.float32)
    return (shifted * scale).astype(scale.dtype)


def _spread(array: Array | None, grid: Grid, shape: tuple[int, ...]) -> Array:
    """Scales or zero points in the shape in which they broadcast to the stored constant."""
    assert array is not None
    if grid.axis is None:
        return array.reshape(())
    if grid.block:
        spread = np.repeat(array, grid.block, axis=grid.axis)
        return spread.take(range(shape[grid.axis]), axis=grid.axis)  # the last block may be shorter
    return array.reshape([-1 if k == grid.axis else 1 for k in range(len(shape))])


def _grid(node: ir.Node) -> Grid | None:
    """Reads a DequantizeLinear whose scale and zero point are constants."""
    data, scale = node.inputs[0], node.inputs[1]
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if data is None or scale is None or data.shape is None or not is_constant(data) or not is_constant(scale):
        return None
    if zero is not None and not is_constant(zero):
        return None
    assert scale.const_value is not None
    if len(scale.const_value.shape) == 0 or (scale.const_value.size == 1 and not attr(node, "block_size", 0)):
        return Grid(node, scale, zero, None)
    axis = attr(node, "axis", 1) % len(data.shape)
    return Grid(node, scale, zero, axis, attr(node, "block_size", 0))


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype is not None and value.dtype.is_floating_point()


def _swaps_last_two(node: ir.Node) -> bool:
    source = node.inputs[0]
    size = None if source is None or source.shape is None else len(source.shape)
    if size is None or size < 2:
        return False
    perm = list(attr(node, "perm", range(size)[::-1]))
    return perm == [*range(size - 2), size - 1, size - 2]


def _linear(node: ir.Node, casts: bool) -> Linear | None:
    weight, x = stored(node.inputs[1], casts), node.inputs[0]
    if weight is None or x is None or weight.value.const_value is None:
        return None
    shape = tuple(weight.value.const_value.shape.numpy())
    if len(shape) < 2:
        return None
    transposed = weight.swapped != bool(attr(node, "transB", 0))
    rows, columns = shape[-2:]
    wide, narrow = (columns, rows) if transposed else (rows, columns)
    base = Linear(node, x, weight.value, weight.path, transposed, wide, narrow, shape[:-2], grid=weight.grid, codebook=weight.codebook)
    return _with_gemm(base) if node.op_type == "Gemm" else _with_add(base)


def _with_gemm(linear: Linear) -> Linear:
    node = linear.node
    third = node.inputs[2] if len(node.inputs) > 2 else None
    is_bias = third is not None and is_constant(third) and _is_vector(third, linear.out_features, 2)
    return dataclasses.replace(
        linear,
        bias=third if is_bias else None,
        addend=None if is_bias else third,
        alpha=attr(node, "alpha", 1.0),
        beta=attr(node, "beta", 1.0),
        trans_x=bool(attr(node, "transA", 0)),
    )


def _with_add(linear: Linear) -> Linear:
    """A constant that the only reader adds, and that cannot change the shape, is the bias."""
    out = linear.node.outputs[0]
    if not used_once(out):
        return linear
    add = next(iter(out.uses())).node
    if add.domain != "" or add.op_type != "Add" or add.graph is not linear.node.graph:
        return linear
    other = add.inputs[1] if add.inputs[0] is out else add.inputs[0]
    rank = 1 if out.shape is None else len(out.shape)
    if other is None or not is_constant(other) or not _is_vector(other, linear.out_features, rank):
        return linear
    return dataclasses.replace(linear, bias=other, bias_node=add)


def _is_vector(value: ir.Value, width: int, rank: int) -> bool:
    """One number for each output feature, or one for all, in a shape that adds no axis to a result of `rank` axes."""
    assert value.const_value is not None
    shape = tuple(value.const_value.shape.numpy())
    return len(shape) <= rank and all(d == 1 for d in shape[:-1]) and (not shape or shape[-1] in (1, width))


def _embedding(node: ir.Node, casts: bool) -> Embedding | None:
    table = stored(node.inputs[0], casts)
    ids = node.inputs[1]
    if table is None or ids is None or table.swapped or attr(node, "axis", 0) != 0 or table.value.const_value is None:
        return None
    rows, width = static_dim(table.value, 0), static_dim(table.value, 1)
    if rows is None or width is None or table.value.shape is None or len(table.value.shape) != 2 or not _is_float(node.outputs[0]):
        return None
    return Embedding(node, ids, table.value, table.path, rows, width, table.grid, table.codebook)


def bias_of(linear: Linear) -> Array | None:
    """[out], float64; a copy."""
    if linear.bias is None or linear.bias.const_value is None:
        return None
    return np.broadcast_to(linear.bias.const_value.numpy().reshape(-1), (linear.out_features,)).astype(np.float64)
