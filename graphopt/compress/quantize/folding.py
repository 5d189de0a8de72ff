"""A factor for each channel of an activation, moved from where it is made into the weights that read it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.analysis.linear import Linear
from graphopt.compress.quantize.smoothing import ChannelGroup
from graphopt.compress.weights import numbers
from graphopt.core.contract import Array
from graphopt.rewrite.insert import Inserter


def fold(inserter: Inserter, group: ChannelGroup, s: Array, tag: str) -> None:
    """x of the group is divided by `s` [channels] where it is made, and the weights that read it are multiplied by it.

    Args:
        tag: ends the names of the new constants.
    """
    if group.source is None:
        _multiply(inserter, group, 1 / s, tag)
    elif isinstance(group.source, Linear):
        _rescale(inserter, tag, group.source, 1 / s, axis=1)
        _divide_bias(inserter, tag, group.source, s)
    else:
        for k in range(1, len(group.source.inputs)):
            value = group.source.inputs[k]
            if value is not None:
                _exchange(inserter, tag, value, group.source, numbers(value) / s)
    for reader in group.readers:
        _rescale(inserter, tag, reader, s, axis=0)


def _multiply(inserter: Inserter, group: ChannelGroup, factor: Array, tag: str) -> None:
    """The readers of a group read x * factor; others go on reading x."""
    readers = [reader.node for reader in group.readers]
    op = inserter.builder()
    scaled = op.Mul(group.x, inserter.constant(factor.astype(np.float32), f"{group.x.name}_{tag}_factor"))
    inserter.before(next(node for node in inserter.model.graph if node in readers), op, readers)
    for reader in readers:
        reader.replace_input_with(next(k for k, v in enumerate(reader.inputs) if v is group.x), scaled)


def _rescale(inserter: Inserter, tag: str, linear: Linear, factor: Array, axis: int) -> None:
    """Rows (axis 0, input features) or columns (axis 1) of W times `factor`; the constant keeps its layout."""
    along = 1 - axis if linear.transposed else axis
    spread = factor[:, None] if along == 0 else factor[None, :]
    reader = linear.path[0] if linear.path else linear.node
    now = reader.inputs[0 if linear.path else 1]  # `linear.weight`, unless the group before this one has exchanged it
    assert now is not None
    _exchange(inserter, tag, now, reader, numbers(now) * spread)


def _divide_bias(inserter: Inserter, tag: str, linear: Linear, s: Array) -> None:
    if linear.bias is not None:
        reader = linear.bias_node or linear.node
        old = numbers(linear.bias)
        _exchange(inserter, tag, linear.bias, reader, old / s.reshape([1] * (old.ndim - 1) + [-1]))


def _exchange(inserter: Inserter, tag: str, old: ir.Value, reader: ir.Node, array: Array) -> None:
    """`reader` reads `array` instead of the constant `old`, which goes if nothing else reads it."""
    value, weights = inserter.constant(array.astype(np.float32, copy=False), f"{old.name}_{tag}"), inserter.model.graph.initializers
    for k in range(len(reader.inputs)):
        if reader.inputs[k] is old:
            reader.replace_input_with(k, value)
    name = str(old.name)
    if not old.uses() and not old.is_graph_output() and name in weights:
        del weights[name]
