"""Evaluate nodes whose inputs are known, one at a time, without letting the model grow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt.core.contract import Array
from graphopt.graph.questions import constant, is_constant, is_graph, is_tensor, scalar, used_once
from graphopt.graph.shapes import contents

_RANDOM = frozenset({"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"})
_COMPRESSED = 8  # bits; a tensor stored in at most this many bits an element is compressed: decoding it would undo that
_SMALL = 1 << 16  # bytes of input up to which a node of unknown result size is worth a try


def is_random(node: ir.Node) -> bool:
    """True for a node that may give other results at every run: a random op, or Dropout in training mode."""
    if node.op_type == "Dropout":
        return len(node.inputs) > 2 and node.inputs[2] is not None and scalar(node.inputs[2]) is not False
    return node.op_type in _RANDOM


def has_subgraph(node: ir.Node) -> bool:
    return any(map(is_graph, node.attributes.values()))


def is_pure(node: ir.Node) -> bool:
    """True if equal inputs always give equal outputs, and nothing else happens: such a node may be folded and merged."""
    return node.domain == "" and not is_random(node) and not has_subgraph(node)


def known_integers(value: ir.Value) -> Array | None:
    """The contents of a small integer value (rank 0 or 1) that shapes decide, as an array of its own dtype."""
    known = contents(value)
    if known is None or value.dtype is None or value.shape is None or not all(isinstance(x, int) for x in known):
        return None
    if len(value.shape) > 1 or (len(value.shape) == 1 and value.shape[0] != len(known)):
        return None
    array: Array = np.array(known, dtype=np.int64).astype(value.dtype.numpy())
    return array.reshape(()) if not len(value.shape) else array


class Folder:
    """Folds while no fold adds more than `grow` bytes to the model, beyond what its inputs, used nowhere else, free.

    A chain of folds counts as one: what a folded constant freed is remembered.
    """

    def __init__(self, opset: int, grow: int) -> None:
        self.opset, self.grow = opset, grow
        self._freed: dict[ir.Value, int] = {}  # folded constant -> bytes of the original weights that it stands for

    def fold(self, node: ir.Node) -> Sequence[Array] | None:
        """The outputs of `node`, or None where it must stay."""
        inputs = [v for v in node.inputs if v is not None]
        if not is_pure(node) or not all(map(is_constant, inputs)) or _decodes(node):
            return None
        if node.op_type in ("Identity", "Constant") or not all(map(_foldable, (*inputs, *node.outputs))):
            return None
        allowed = self._allowance(inputs)
        expected = [_bytes(v) for v in node.outputs]
        if None in expected and sum(stored_bytes(v) for v in inputs) > _SMALL:
            return None
        if sum(e or 0 for e in expected) > allowed:
            return None
        arrays = None if _undefined(node) else evaluate(node, self.opset)
        if arrays is None or sum(a.nbytes for a in arrays) > allowed:
            return None
        return arrays

    def remember(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> None:
        """Note that `outputs` were folded from `inputs` (call it before the inputs lose their uses)."""
        freed = self._allowance(inputs) - self.grow
        for value in outputs:
            self._freed[value] = freed // len(outputs)

    def _allowance(self, inputs: Sequence[ir.Value]) -> int:
        return self.grow + sum(self._freed.get(v, stored_bytes(v)) for v in dict.fromkeys(inputs) if used_once(v))


def _foldable(value: ir.Value) -> bool:
    """A tensor of numbers. Only a tensor can be stored: a sequence or an optional has the dtype of its elements, and is none."""
    return is_tensor(value) and value.dtype not in (None, ir.DataType.STRING)


def _decodes(node: ir.Node) -> bool:
    """A node that turns a compressed weight into floats stays: only the runtime, or a target, should decode."""
    if node.op_type == "DequantizeLinear":
        return True
    source = node.inputs[0] if node.op_type == "Cast" and node.inputs else None
    if source is None or source.dtype is None or source.shape is None or source.dtype == ir.DataType.BOOL:
        return False
    return source.dtype.bitwidth <= _COMPRESSED and len(source.shape) > 1


def _undefined(node: ir.Node) -> bool:
    """ONNX does not say what comes out, so each runtime gives another number: an integer by zero, a float beyond the integers that it becomes."""
    given = [constant(v) for v in node.inputs]
    if node.op_type in ("Div", "Mod"):
        divisor = given[1]
        return divisor is not None and divisor.dtype.kind in "iu" and not divisor.all()
    if node.op_type not in ("Cast", "CastLike") or given[0] is None or node.outputs[0].dtype is None or not node.outputs[0].dtype.is_integer():
        return False
    with np.errstate(all="ignore"):
        numbers = given[0].astype(np.float64)
        return given[0].dtype.kind not in "biu" and not bool(
            ((numbers > node.outputs[0].dtype.min - 1) & (numbers < node.outputs[0].dtype.max + 1)).all()
        )


def stored_bytes(value: ir.Value) -> int:
    """The size of a weight in bytes; 0 for what is none."""
    return 0 if value.const_value is None else value.const_value.nbytes


def _bytes(value: ir.Value) -> int | None:
    """The size of a value in bytes, where its shape is static."""
    if value.dtype is None or value.shape is None or not value.shape.is_static():
        return None
    return math.ceil(math.prod(value.shape.numpy()) * value.dtype.bitwidth / 8)


def evaluate(node: ir.Node, opset: int) -> list[Array] | None:
    """The outputs of a node whose inputs are constant; None where `outputs_at` gives none, or they disagree with the inferred type."""
    arrays = outputs_at(node, opset, list(map(constant, node.inputs)))
    return arrays if arrays is not None and all(map(_fits, arrays, node.outputs)) else None


def outputs_at(node: ir.Node, opset: int, inputs: Sequence[Array | None]) -> list[Array] | None:
    """Run one node by the ONNX reference; None where the reference cannot. An input that the node leaves out is None."""
    from onnx.reference import ReferenceEvaluator

    proto = ir.to_proto(node)
    for index, value in enumerate(node.inputs):
        proto.input[index] = "" if value is None else f"i{index}"
    for index in range(len(node.outputs)):
        proto.output[index] = f"o{index}"
    feeds = {f"i{index}": array for index, array in enumerate(inputs) if node.inputs[index] is not None}
    try:
        with np.errstate(all="ignore"):
            results = ReferenceEvaluator(proto, opsets={"": opset}).run(None, feeds)
    except Exception:  # noqa: BLE001 -- the reference lacks ops and types, and raises anything; the node then stays as it is
        return None
    if any(r is None or isinstance(r, (list, dict)) for r in results):  # a sequence, an optional or a map
        return None
    return [np.asarray(r) for r in results]


def _fits(array: Array, value: ir.Value) -> bool:
    if value.dtype is None or array.dtype != value.dtype.numpy():
        return False
    if value.shape is None:
        return True
    return len(value.shape) == array.ndim and all(not isinstance(d, int) or d == n for d, n in zip(value.shape, array.shape, strict=True))
