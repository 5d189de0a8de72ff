"""Which parts of a float32 graph must stay float32 when the rest becomes a 16-bit type, and why.

float16 ends at 65504 and has nothing between 0 and 6e-8: mask fills, squares and small epsilons leave that range. bfloat16 has the range of
float32 but 8 bits of precision, so that positions and angles are lost. Micikevicius et al., Mixed Precision Training (2018).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from graphopt.graph.opset.node_form import schema
from graphopt.graph.questions import all_nodes, constant, consumers, is_tensor, producer, scalar

FLOAT = ir.DataType.FLOAT
_WORKING = 23
_LAYOUT = {"Reshape", "Transpose", "Unsqueeze", "Squeeze", "Expand", "Slice", "Concat", "Gather", "Cast", "Identity", "Tile", "Trilu", "ScatterND"}
_FLOW = _LAYOUT | {"Add", "Sub", "Sum", "Mul", "Where", "Max", "Min", "Clip", "Neg", "Softmax", "LogSoftmax", "ReduceMax"}  # of masks
_TESTS = {"Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal", "IsInf", "IsNaN"}
_SQUARES = {"ReduceSumSquare", "ReduceL2", "ReduceLogSumExp", "ReduceLogSum", "CumSum", "Exp"}
_AFTER_SQUARE = {"ReduceMean", "ReduceSum", "Add", "Max", "Clip", "Sqrt", "Reciprocal", "Pow", "Log"}
_ANGLES = {"Cos", "Sin"}
_MASKS_BELOW = -1e6  # an array whose numbers outside the range are all below this is a mask
_SMALLEST = 2.0**-14  # the least normal float16; scales below lose digits


@dataclasses.dataclass(frozen=True)
class Hidden:
    """A value that holds numbers which hide others: the lowest finite one, whether two were added up, whether there is -inf."""

    fill: float
    twice: bool = False
    infinite: bool = False


class Precision:
    """The plan for one graph: `wide` maps the nodes that stay float32 to the reason, `hidden` the values that carry masks beyond the range."""

    def __init__(self, model: ir.Model, to: ir.DataType) -> None:
        self.to, self.wide, self.hidden = to, dict[ir.Node, str](), dict[ir.Value, Hidden]()
        self._kind = f"tensor({to.name.lower()})"
        self._limit = largest(to)
        self._inside = {n for graph in model.graph.subgraphs() for n in graph}
        nodes = list(all_nodes(model))
        for node in nodes:
            self._visit(node)
        for node in nodes:
            if node.op_type in _ANGLES and node.outputs[0].dtype == FLOAT:
                self._angles(node)
        for node in reversed(nodes):
            if node.op_type == "Cast" and node not in self.wide and _floats(node):
                self._cast(node)

    def changes(self, node: ir.Node) -> bool:
        """Whether anything about a node becomes 16 bits wide."""
        if node in self.wide:
            return False
        read = any(v is not None and v.dtype == FLOAT and self.half_input(node, i) for i, v in enumerate(node.inputs))
        return read or any(v.dtype == FLOAT and self.half_output(node, i) for i, v in enumerate(node.outputs))

    def half_input(self, node: ir.Node, index: int) -> bool:
        """Whether a float32 input becomes 16 bits wide."""
        return node not in self.wide and self._takes(node, index, inputs=True)

    def half_output(self, node: ir.Node, index: int) -> bool:
        return node not in self.wide and self._takes(node, index, inputs=False)

    def _takes(self, node: ir.Node, index: int, *, inputs: bool) -> bool:
        found = schema(node.op_type, node.version or _WORKING)
        if found is None:
            return False
        formals = found.inputs if inputs else found.outputs
        kind = formals[min(index, len(formals) - 1)].type_str
        return any(self._kind in t.allowed_type_strs for t in found.type_constraints if t.type_param_str == kind)

    def _cast(self, node: ir.Node) -> None:
        """A number that only float32 nodes read is not made in 16 bits first; a Cast at the border of a float32 part stays one."""
        source, out = node.inputs[0], node.outputs[0]
        readers = consumers(out)
        kinds = (None if source is None else source.dtype, out.dtype)
        if kinds == (FLOAT, self.to) or (kinds == (self.to, FLOAT) and (out.is_graph_output() or not readers)):
            self.wide[node] = "it is a border already"
        elif readers and all(r in self.wide for r in readers) and not out.is_graph_output():
            self.wide[node] = "only float32 nodes read it"

    def _visit(self, node: ir.Node) -> None:
        if not _floats(node):
            return
        reason = self._own_reason(node)
        if reason is None and self.to == ir.DataType.FLOAT16:
            reason = self._range_reason(node)
        if reason is not None:
            self.wide[node] = reason

    def _own_reason(self, node: ir.Node) -> str | None:
        if node.domain not in ("", "ai.onnx"):
            return f"{node.domain}::{node.op_type} is not known to take {self.to.name.lower()}"
        if not all(is_tensor(v) for v in (*node.inputs, *node.outputs) if v is not None):
            return "it holds a sequence or an optional, whose elements keep their type"
        if node in self._inside or any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            return "it belongs to a subgraph"
        if node.op_type in ("LayerNormalization", "GroupNormalization") and any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
            return "its mean or deviation is read"
        if not any(self._takes(node, i, inputs=True) for i, v in enumerate(node.inputs) if v is not None and v.dtype == FLOAT):
            free = node.outputs and node.outputs[0].dtype == FLOAT and self._takes(node, 0, inputs=False)
            if not free or any(v is not None and v.dtype == FLOAT for v in node.inputs):
                return f"{node.op_type} takes no {self.to.name.lower()}"
        return None

    # ---- what leaves the range of float16 -------------------------------------------------------------------------------------------------

    def _range_reason(self, node: ir.Node) -> str | None:
        carried = [h for h in (self._hides(v) for v in node.inputs) if h is not None]
        if carried and node.op_type in _FLOW | _TESTS:
            if node.op_type not in ("Softmax", "LogSoftmax", *_TESTS):
                self.hidden[node.outputs[0]] = _merged(node, carried)
            return "it carries a mask that float16 cannot hold"
        if any(self._vanishes(v) for v in node.inputs):
            return "a constant of it would become 0"
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale = constant(node.inputs[1])
            return "its scales are too small" if scale is None or bool((np.abs(scale) < _SMALLEST).any()) else None
        if node.op_type in _SQUARES or _is_square(node):
            return "squares and sums leave the range"
        return self._after_square(node)

    def _after_square(self, node: ir.Node) -> str | None:
        """What is computed from a square stays wide up to the quotient."""
        below = [n for n in (producer(v) for v in node.inputs) if n is not None and n in self.wide]
        numbers = [n for n in below if n.op_type in (_SQUARES | _AFTER_SQUARE | {"Mul"}) and not any(v in self.hidden for v in n.outputs)]
        if not numbers:
            return None
        if node.op_type in _AFTER_SQUARE and (node.op_type != "Add" or any(scalar(v) is not None for v in node.inputs)):
            return "it is computed from a square"
        ends = node.op_type == "Div" or (node.op_type == "Mul" and any(n.op_type in ("Reciprocal", "Pow") and not _is_square(n) for n in numbers))
        return "it divides by the root of a square" if ends else None

    def _hides(self, value: ir.Value | None) -> Hidden | None:
        if value is None or value.dtype != FLOAT:
            return None
        if value in self.hidden:
            return self.hidden[value]
        array = constant(value)
        if array is None or not array.size:
            return None
        finite = array[np.isfinite(array)]
        over = finite[np.abs(finite) > self._limit]
        if not over.size or not (array.size == 1 or bool((over <= _MASKS_BELOW).all())):
            return None
        return Hidden(-float(np.abs(over).max()), infinite=bool(np.isneginf(array).any()))

    def _vanishes(self, value: ir.Value | None) -> bool:
        number = scalar(value) if value is not None and value.dtype == FLOAT else None
        return number is not None and number != 0 and abs(number) < 2.0**-20

    def _angles(self, node: ir.Node) -> None:
        """Positions times frequencies, back to where they come from: an angle of 1000 has no digit behind the point in float16."""
        todo = [node]
        while todo:
            step = todo.pop()
            if step in self.wide and step is not node:
                continue
            self.wide.setdefault(step, "it computes angles")
            todo += [n for n in (producer(v) for v in step.inputs if v is not None and v.dtype == FLOAT) if n is not None]


def largest(dtype: ir.DataType) -> float:
    """The largest finite number of a type."""
    return float(ml_dtypes.finfo(dtype.numpy()).max)  # type: ignore[no-untyped-call]


def _floats(node: ir.Node) -> bool:
    return any(v is not None and v.dtype == FLOAT for v in (*node.inputs, *node.outputs))


def _is_square(node: ir.Node) -> bool:
    if node.op_type == "Pow":
        exponent = scalar(node.inputs[1])
        return exponent is not None and exponent >= 2
    return node.op_type == "Mul" and node.inputs[0] is node.inputs[1]


def _merged(node: ir.Node, carried: list[Hidden]) -> Hidden:
    fill, summed = min(h.fill for h in carried), node.op_type in ("Add", "Sum") and len(carried) > 1
    if node.op_type == "Max":
        floors = [float(c) for c in map(scalar, node.inputs) if c is not None]
        return Hidden(max([fill, *floors]), any(h.twice for h in carried), False) if floors else carried[0]
    infinite = any(h.infinite for h in carried) or (summed and 2 * fill < float(np.finfo(np.float32).min))
    return Hidden(fill, summed or any(h.twice for h in carried), infinite)


def tensor_attributes(node: ir.Node) -> Iterator[tuple[str, Any]]:
    """The attributes that name float32, or hold a float32 tensor."""
    for name, attribute in node.attributes.items():
        names = name in ("to", "dtype", "output_dtype") and attribute.value == onnx.TensorProto.FLOAT
        if names or (attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == FLOAT):
            yield name, attribute
