"""Stored weights read and written: why one cannot be changed, and edits that are made together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from graphopt.analysis.linear import Embedding, Linear, StoredOperands, bias_of
from graphopt.core.contract import Array, Context
from graphopt.graph.questions import Names, constant, is_constant, used_once
from graphopt.rewrite.insert import add_constant


def tied_table(linear: Linear, ctx: Context, unfit: Callable[[Embedding], str | None]) -> Embedding | None:
    """An embedding that will be quantized (`unfit` gives no reason) and whose table is the transpose of this weight, as another constant."""
    if linear.transposed or linear.batch:
        return None
    tables = (e for e in ctx.get(StoredOperands(casts=True)).values() if isinstance(e, Embedding) and not e.quantized)
    fitting = (e for e in tables if (e.rows, e.width) == (linear.out_features, linear.in_features) and unfit(e) is None)
    return next((e for e in fitting if np.array_equal(numbers(e.table).T, numbers(linear.weight))), None)


def not_finite(value: ir.Value) -> str | None:
    return None if np.isfinite(numbers(value)).all() else f"`{value.name}` holds numbers that are not finite"


def numbers(value: ir.Value) -> Array:
    array = constant(value)
    assert array is not None, f"`{value.name}` is not a constant"
    return array


def why_no_linear(node: ir.Node) -> str:
    left, right = node.inputs[0], node.inputs[1]
    if right is not None and right.const_value is not None:
        return "a caller may override its weight" if right.is_graph_input() else "its weight is a vector"
    if is_constant(left):
        return "its stored operand stands on the left"
    return "both operands are computed at run time"


def known(linear: Linear | None) -> Linear:
    """One that was found to be there."""
    assert linear is not None
    return linear


def unfit(linear: Linear | None) -> str | None:
    """Why the columns or rows of a projection cannot be rewritten."""
    if linear is None:
        return "there is no projection"
    if linear.quantized:
        return f"the weight of `{linear.node.name}` is quantized; do this before quantizing"
    for what, value in (("weight", linear.weight), ("input", linear.x)):
        if value.dtype != ir.DataType.FLOAT:
            return f"the {what} of `{linear.node.name}` is {value.dtype and value.dtype.name.lower()}, and only float32 is rewritten"
    if linear.batch or linear.trans_x or linear.alpha != 1 or linear.beta != 1 or linear.addend is not None:
        return f"`{linear.node.name}` is not x @ W + b"
    if linear.bias is not None and linear.bias.const_value is not None and linear.bias.const_value.size != linear.out_features:
        return f"the bias of `{linear.node.name}` is one number for all outputs"
    if not used_once(linear.weight) or not all(used_once(n.outputs[0]) for n in linear.path):
        return f"the weight of `{linear.node.name}` is shared"
    return None


def store(model: ir.Model, names: Names, linear: Linear, weight: Array, bias: Array | None) -> None:
    """New contents for the weight; for the bias too, which is forked where others read it."""
    laid = weight.T if linear.transposed else weight
    linear.weight.const_value = ir.tensor(np.ascontiguousarray(laid, np.float32), name=linear.weight.name)
    old = linear.bias
    if bias is None or old is None or old.const_value is None:
        return
    array = np.ascontiguousarray(bias, np.float32).reshape(tuple(old.const_value.shape.numpy()))
    if used_once(old):
        old.const_value = ir.tensor(array, name=old.name)
        return
    new = add_constant(model, names, array, f"{old.name}_refit")
    reader = linear.bias_node or linear.node
    reader.replace_input_with(next(k for k, v in enumerate(reader.inputs) if v is old), new)


@dataclasses.dataclass(frozen=True)
class _Draft:
    """What a projection was, and what it becomes: W [in, out] and b [out] or None, float64."""

    linear: Linear
    weight: Array
    bias: Array | None
    new_weight: Array
    new_bias: Array | None


class Editor:
    """Stored projections that get new columns and rows; nothing changes before `flush`."""

    def __init__(self, model: ir.Model) -> None:
        self.model, self.names = model, Names(model)
        self._drafts: dict[ir.Value, _Draft] = {}

    def _of(self, linear: Linear) -> _Draft:
        if linear.weight not in self._drafts:
            weight, bias = linear.matrix().astype(np.float64), bias_of(linear)
            self._drafts[linear.weight] = _Draft(linear, weight, bias, weight.copy(), None if bias is None else bias.copy())
        return self._drafts[linear.weight]

    def columns(self, linear: Linear, old: Array, turn: Array, new: Array) -> None:
        """Output features `new` [m] become features `old` [n], as they are stored in the graph, times `turn` [n, m]."""
        draft = self._of(linear)
        draft.new_weight[:, new] = draft.weight[:, old] @ turn
        if draft.bias is not None and draft.new_bias is not None:
            draft.new_bias[new] = draft.bias[old] @ turn

    def rows(self, linear: Linear, new: Array, contents: Array) -> None:
        """Input features `new` get these rows of the weight."""
        self._of(linear).new_weight[new] = contents

    def flush(self) -> None:
        for draft in self._drafts.values():
            store(self.model, self.names, draft.linear, draft.new_weight, draft.new_bias)
