"""Processor time of -O1 against the number of nodes: plain, unfused encoder layers. The timing of the artifact itself (`promise`) and of
spellings (`tune`) depends on the model's speed, not on its nodes, and is left out.

Usage: python benchmarks/scaling.py [LAYERS ...]     (default 48 192, which are 2,400 and 9,600 nodes)
"""

from __future__ import annotations

import sys
import time

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import graphopt

HIDDEN, HEADS, INNER = 64, 4, 128


def encoder(layers: int) -> onnx.ModelProto:
    """`layers` encoder layers in primitives (LayerNormalization, GELU and attention spelled out), 50 nodes a layer."""
    rng = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def weight(name: str, array: np.ndarray) -> str:
        weights.append(numpy_helper.from_array(array, name))
        return name

    def op(kind: str, *inputs: str, **attributes: object) -> str:
        out = f"v{len(nodes)}"
        nodes.append(helper.make_node(kind, list(inputs), [out], name=f"n{len(nodes)}", **attributes))
        return out

    def linear(x: str, name: str, rows: int, columns: int) -> str:
        w = weight(f"{name}.w", rng.standard_normal((rows, columns), dtype=np.float32) / 8)
        return op("Add", op("MatMul", x, w), weight(f"{name}.b", np.zeros(columns, np.float32)))

    def norm(x: str, name: str) -> str:
        centred = op("Sub", x, op("ReduceMean", x, axes=[-1]))
        variance = op("ReduceMean", op("Pow", centred, "two"), axes=[-1])
        scaled = op("Div", centred, op("Sqrt", op("Add", variance, "eps")))
        return op("Add", op("Mul", scaled, weight(f"{name}.g", np.ones(HIDDEN, np.float32))), weight(f"{name}.h", np.zeros(HIDDEN, np.float32)))

    def heads(x: str, perm: list[int]) -> str:
        shape = op("Concat", op("Unsqueeze", op("Gather", op("Shape", x), "i0", axis=0), "a0"), "tail", axis=0)
        return op("Transpose", op("Reshape", x, shape), perm=perm)

    for name, array in (
        ("two", np.float32(2)), ("eps", np.float32(1e-5)), ("half", np.float32(0.5)), ("one", np.float32(1)), ("root2", np.float32(2**0.5)),
        ("scale", np.float32((HIDDEN // HEADS) ** 0.5)),
    ):  # fmt: skip
        weight(name, np.asarray(array))
    for name, array in (("i0", np.int64(0)), ("a0", [0]), ("tail", [-1, HEADS, HIDDEN // HEADS]), ("flat", [0, 0, HIDDEN])):
        weight(name, np.asarray(array, np.int64))
    x = "x"
    for k in range(layers):
        q, key, v = (linear(x, f"{k}.{p}", HIDDEN, HIDDEN) for p in "qkv")
        scores = op("Div", op("MatMul", heads(q, [0, 2, 1, 3]), heads(key, [0, 2, 3, 1])), "scale")
        context = op("MatMul", op("Softmax", op("Add", scores, "mask"), axis=-1), heads(v, [0, 2, 1, 3]))
        out = op("Reshape", op("Transpose", context, perm=[0, 2, 1, 3]), "flat")
        x = norm(op("Add", linear(out, f"{k}.o", HIDDEN, HIDDEN), x), f"{k}.n1")
        inner = linear(x, f"{k}.up", HIDDEN, INNER)
        gelu = op("Mul", op("Mul", inner, op("Add", op("Erf", op("Div", inner, "root2")), "one")), "half")
        x = norm(op("Add", linear(gelu, f"{k}.down", INNER, HIDDEN), x), f"{k}.n2")
    nodes.append(helper.make_node("Identity", [x], ["y"], name="last"))
    graph = helper.make_graph(
        nodes, "encoder",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "s", HIDDEN]), helper.make_tensor_value_info("mask", 1, ["b", 1, 1, "s"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", "s", HIDDEN])], weights,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def main() -> None:
    first = 0.0
    for layers in [int(a) for a in sys.argv[1:]] or [48, 192]:
        model = encoder(layers)
        start = time.process_time()
        result = graphopt.optimize(model, level=1, target="cpu{tune=off}", promise=False)
        seconds = time.process_time() - start
        first = first or seconds
        fused = sum(n.op_type == "Attention" for n in result.graph.graph)
        slowest = sorted(result.report.as_dict()["passes"], key=lambda p: -p["seconds"])[:4]
        print(f"{len(model.graph.node):6d} nodes  {seconds:6.2f} s  {seconds / first:5.2f}x  {fused}/{layers} attention blocks", end="  ")
        print(", ".join(f"{p['name']} {p['seconds']:.2f}" for p in slowest))


if __name__ == "__main__":
    main()
