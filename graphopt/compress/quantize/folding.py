"""A factor for each channel of an activation, moved from where it is made into the weights that read it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.analysis.linear import Linear
from graphopt.compress.quantize.smoothing import Group
from graphopt.compress.weights import numbers
from graphopt.core.contract import Array
from graphopt.graph.questions import Names, initializer


def fold(model: ir.Model, names: Names, group: Group, s: Array, tag: str) -> None:
    """x of the group is divided by `s` [channels] where it is made, and the weights that read it are multiplied by it.

    Args:
        tag: ends the names of the new constants.
    """
    if group.source is None:
        _multiply(model, names, group, 1 / s, tag)
    elif isinstance(group.source, Linear):
        _rescale(model, names, tag, group.source, 1 / s, axis=1)
        _divide_bias(model, names, tag, group.source, s)
    else:
        for k in range(1, len(group.source.inputs)):
            value = group.source.inputs[k]
            if value is not None:
                _exchange(model, names, tag, value, group.source, numbers(value) / s)
    for reader in group.readers:
        _rescale(model, names, tag, reader, s, axis=0)


def _multiply(model: ir.Model, names: Names, group: Group, factor: Array, tag: str) -> None:
    """The readers of a group read x * factor; others go on reading x."""
    stored = initializer(factor.astype(np.float32), names.fresh(f"{group.x.name}_{tag}_factor"))
    model.graph.register_initializer(stored)
    node = ir.node("Mul", [group.x, stored], name=names.fresh(f"{group.x.name}_{tag}"))
    scaled = node.outputs[0]
    scaled.name, scaled.shape, scaled.type = names.fresh(f"{group.x.name}_{tag}_scaled"), group.x.shape, group.x.type
    first = min((reader.node for reader in group.readers), key=list(model.graph).index)
    model.graph.insert_before(first, node)
    for reader in group.readers:
        reader.node.replace_input_with(next(k for k, v in enumerate(reader.node.inputs) if v is group.x), scaled)


def _rescale(model: ir.Model, names: Names, tag: str, linear: Linear, factor: Array, axis: int) -> None:
    """Rows (axis 0, input features) or columns (axis 1) of W times `factor`; the constant keeps its layout."""
    along = 1 - axis if linear.transposed else axis
    spread = factor[:, None] if along == 0 else factor[None, :]
    reader = linear.path[0] if linear.path else linear.node
    now = reader.inputs[0 if linear.path else 1]  # `linear.weight`, unless the group before this one has exchanged it
    assert now is not None
    _exchange(model, names, tag, now, reader, numbers(now) * spread)


def _divide_bias(model: ir.Model, names: Names, tag: str, linear: Linear, s: Array) -> None:
    if linear.bias is not None:
        reader = linear.bias_node or linear.node
        old = numbers(linear.bias)
        _exchange(model, names, tag, linear.bias, reader, old / s.reshape([1] * (old.ndim - 1) + [-1]))


def _exchange(model: ir.Model, names: Names, tag: str, old: ir.Value, reader: ir.Node, array: Array) -> None:
    """`reader` reads `array` instead of the constant `old`, which goes if nothing else reads it."""
    value = initializer(array.astype(np.float32, copy=False), names.fresh(f"{old.name}_{tag}"))
    model.graph.register_initializer(value)
    for k in range(len(reader.inputs)):
        if reader.inputs[k] is old:
            reader.replace_input_with(k, value)
    name = str(old.name)
    if not old.uses() and not old.is_graph_output() and name in model.graph.initializers:
        del model.graph.initializers[name]
