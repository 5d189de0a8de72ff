"""What the builders of blocks share: a graph that grows node by node, with seeded weights."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]


class Net:
    """A graph under construction; values are names."""

    def __init__(self, rng: Random, opset: int) -> None:
        self.rng, self.opset = rng, opset
        self.data = np.random.default_rng(rng.randrange(1 << 30))
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.count = 0
        self.cached = False  # the attention that is made reads keys of earlier calls

    def name(self, stem: str) -> str:
        self.count += 1
        return f"{stem}_{self.count}"

    def op(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """The name of the output, or a list of them."""
        names = [self.name(op_type.lower()) for _ in range(outputs)]
        self.nodes.append(helper.make_node(op_type, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names

    def const(self, value: Any, kind: Any = np.float32) -> str:
        array = np.asarray(value, kind)
        name = self.name("c")
        if self.rng.random() < 0.15:  # as exporters do
            self.nodes.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array)))
        else:
            self.weights.append(numpy_helper.from_array(array, name))
        return name

    def ints(self, *numbers: int) -> str:
        return self.const(list(numbers), np.int64)

    def weight(self, *shape: int) -> str:
        """Seeded, of a size that keeps activations near 1."""
        scale = 1 / np.sqrt(max(shape[0], 1)) if len(shape) > 1 else 0.2
        name = self.name("w")
        self.weights.append(numpy_helper.from_array(np.asarray(self.data.standard_normal(shape) * scale, np.float32), name))
        return name

    def input(self, name: str, kind: int, *dims: int | str) -> str:
        if name not in {v.name for v in self.inputs}:
            self.inputs.append(helper.make_tensor_value_info(name, kind, list(dims)))
        return name

    def output(self, name: str, *dims: int | str | None, kind: int = TensorProto.FLOAT) -> None:
        if name not in {v.name for v in self.outputs}:
            self.outputs.append(helper.make_tensor_value_info(name, kind, list(dims)))

    def reduce(self, op_type: str, x: str, axis: int = -1, keepdims: int = 1) -> str:
        """The axes are an attribute before opset 18."""
        if self.opset < 18 and op_type != "ReduceSum":
            return str(self.op(op_type, x, axes=[axis], keepdims=keepdims))
        return str(self.op(op_type, x, self.ints(axis), keepdims=keepdims))

    def either(self, op_type: str, a: str, b: str) -> str:
        """A commutative operator, its operands in one order or the other."""
        return str(self.op(op_type, *((a, b) if self.rng.random() < 0.6 else (b, a))))

    def scaled(self, x: str, factor: float) -> str:
        return str(self.op("Div", x, self.const(1 / factor)) if self.rng.random() < 0.5 else self.either("Mul", x, self.const(factor)))

    def made(self) -> bytes:
        graph = helper.make_graph(self.nodes, "blocks", self.inputs, self.outputs, self.weights)
        version = 8 if self.opset < 19 else 10
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=version)
        return bytes(model.SerializeToString())
