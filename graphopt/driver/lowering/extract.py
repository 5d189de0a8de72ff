"""A piece of a model as a small model of its own: same operators, shapes and types, made-up weights; and its signature."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from graphopt.core.contract import Array, Piece
from graphopt.graph.dims import Bindings, size_of
from graphopt.graph.questions import constant, is_constant, is_graph

STANDS_FOR = "graphopt.stands_for"  # value.meta: what an input of a small model is in the whole one
_KEPT = 64  # elements up to which a constant keeps its contents: scales, zero points, axes, epsilons
_LARGEST = 256 * 2**20  # bytes of weights of a piece that is worth timing apart


def extract(piece: Piece, model: ir.Model) -> ir.Model | None:
    """The piece alone; its inputs keep their symbolic shapes. None where an input has no known type or shape, or the weights are too large."""
    made = {v for node in piece.nodes for v in node.outputs}
    values: dict[ir.Value, ir.Value] = {}
    inputs, weights = list[ir.Value](), list[ir.Value]()
    size = 0
    for value in dict.fromkeys(v for node in piece.nodes for v in node.inputs if v is not None and v not in made):
        name = f"v{len(values)}"
        if is_constant(value):
            assert value.const_value is not None
            size += value.const_value.nbytes
            if size > _LARGEST or value.dtype == ir.DataType.STRING:
                return None
            values[value] = _weight(value, name)
            weights.append(values[value])
        elif value.dtype is None or value.shape is None:
            return None
        else:
            values[value] = ir.Value(name=name, type=value.type, shape=value.shape.copy())
            values[value].meta[STANDS_FOR] = value
            inputs.append(values[value])
    nodes = [_copy(node, values) for node in piece.nodes]
    inside = set(piece.nodes)
    outputs = [values[v] for v in made if v.name and (v.is_graph_output() or any(u.node not in inside for u in v.uses()))]
    if not inputs or not outputs or any(n.attributes and any(is_graph(a) for a in n.attributes.values()) for n in nodes):
        return None
    outputs.sort(key=lambda v: str(v.name))
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=weights, opset_imports=dict(model.opset_imports), name="piece")
    return ir.Model(graph, ir_version=model.ir_version)


def whole(value: ir.Value | None) -> ir.Value | None:
    """The value of the whole model that an input of a piece stands for; a value of no piece is itself."""
    return value if value is None else value.meta.get(STANDS_FOR, value)


def _copy(node: ir.Node, values: dict[ir.Value, ir.Value]) -> ir.Node:
    inputs = [None if v is None else values[v] for v in node.inputs]
    copy = ir.Node(node.domain, node.op_type, inputs, list(node.attributes.values()), num_outputs=len(node.outputs), name=f"n{len(values)}")
    for old, new in zip(node.outputs, copy.outputs, strict=True):
        new.name = f"v{len(values)}" if old.name else ""
        new.type, new.shape = old.type, None if old.shape is None else old.shape.copy()
        values[old] = new
    return copy


def _weight(value: ir.Value, name: str) -> ir.Value:
    tensor = value.const_value
    assert tensor is not None
    array = constant(value) if tensor.size <= _KEPT else _made_up(tuple(tensor.shape.numpy()), tensor.dtype)
    if array is None or tensor.dtype.numpy() != array.dtype:
        array = np.asarray(constant(value))
    stored = ir.Tensor(array, dtype=tensor.dtype, shape=ir.Shape(array.shape), name=name)
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=stored)


def _made_up(shape: tuple[int, ...], dtype: ir.DataType) -> Array | None:
    """Seeded numbers, repeated: cheap for a large weight, and as good as others for the clock. None = take those of the model."""
    kind, rng = dtype.numpy(), np.random.default_rng(0)
    if kind.kind == "f":
        block = (0.05 * np.abs(rng.standard_normal(4099)) + 0.01).astype(kind)
    elif kind in (np.dtype(np.int8), np.dtype(np.uint8)) and not dtype.name.endswith("4"):
        block = rng.integers(np.iinfo(kind).min, np.iinfo(kind).max, 4099).astype(kind)
    else:
        return None
    return np.resize(block, shape)


def cost(model: ir.Model, bindings: Bindings) -> int | None:
    """Bytes that the values of a small model have at these sizes; None where a size is not decided."""
    values = [*model.graph.inputs, *(v for node in model.graph for v in node.outputs if v.shape is not None)]
    shapes = [dims(value, bindings) for value in values]
    return None if None in shapes else sum(math.prod(shape) * 4 for shape in shapes if shape is not None)


def dims(value: ir.Value, bindings: Bindings) -> tuple[int, ...] | None:
    sizes = [size_of(d, bindings) for d in value.shape or ()]
    return None if None in sizes else tuple(s for s in sizes if s is not None)


def signature(model: ir.Model, bindings: Bindings | None) -> str:
    """Equal texts = equal work: operators, attributes, types, sizes, constants' shapes, and what small ones say of sizes and axes. Without
    `bindings` dimensions stand by name."""
    place: dict[ir.Value, str] = {}
    lines = [f"opset {sorted(model.opset_imports.items())}"]
    for kind, values in (("in", model.graph.inputs), ("const", model.graph.initializers.values())):
        for value in values:
            place[value] = f"{kind}{len(place)}"
            shape: Iterable[object] = value.shape or () if bindings is None else dims(value, bindings) or ()
            lines.append(f"{place[value]} {value.dtype} {[str(d) for d in shape]}{_said(value)}")
    for node in model.graph:
        for value in node.outputs:
            place[value] = f"v{len(place)}"
        attributes = sorted(f"{a.name}={a.value}" for a in node.attributes.values())
        read = ["" if v is None else place[v] for v in node.inputs]
        lines.append(f"{node.domain}::{node.op_type} {attributes} {read} -> {[place[v] for v in node.outputs]}")
    lines.append(f"out {[place[v] for v in model.graph.outputs]}")
    return "\n".join(lines)


def _said(value: ir.Value) -> str:
    """The contents of a small int64 constant: how a Split or a Reshape divides, which axes. Other numbers make no other work."""
    array = constant(value) if value.dtype == ir.DataType.INT64 and value.const_value is not None and value.const_value.size <= _KEPT else None
    return "" if array is None else f" {array.tolist()}"


def fingerprint(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def describe(model: ir.Model, bindings: Bindings) -> str:
    """One line for people: `Add Sum LayerNormalization of float[8,64,384]`."""
    ops = " ".join(node.op_type for node in model.graph)
    first = model.graph.inputs[0]
    kind = "?" if first.dtype is None else first.dtype.name.lower()
    return f"{ops} of {kind}[{','.join(map(str, dims(first, bindings) or ()))}]"
