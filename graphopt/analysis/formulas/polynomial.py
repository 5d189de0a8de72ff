"""Read elementwise arithmetic on one value as a polynomial: a recognizer then asks for coefficients, not for an order of nodes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import onnx_ir as ir

from graphopt.graph.questions import consumers, enclosed, producer, scalar

Polynomial = dict[int, float]  # power -> coefficient
_OPS = ("Add", "Sub", "Mul", "Div", "Pow", "Neg")
_DEEP = 8  # nodes between a value and its root
_DEGREE = 8


def roots(value: ir.Value) -> Iterator[ir.Value]:
    """The values that `value` may be a polynomial of, nearest first."""
    layer, seen = [value], {value}
    for _ in range(_DEEP):
        yield from layer
        above = [v for item in layer if (node := producer(item, *_OPS)) is not None for v in node.inputs]
        layer = [v for v in dict.fromkeys(above) if v is not None and v not in seen and scalar(v) is None]
        seen.update(layer)


def polynomial(value: ir.Value | None, root: ir.Value, depth: int = 0) -> tuple[Polynomial, frozenset[ir.Node]] | None:
    """`value` as a polynomial of `root` with the nodes that compute it, or None. Constants of any shape with one element count as numbers."""
    if value is root:
        return {1: 1.0}, frozenset()
    number = scalar(value)
    if number is not None:
        return {0: float(number)}, frozenset()
    node = producer(value, *_OPS)
    if node is None or depth > _DEEP:
        return None
    parts = [polynomial(v, root, depth + 1) for v in node.inputs]
    known = [p for p in parts if p is not None]
    if len(known) < len(parts):
        return None
    result = _combine(node.op_type, [p for p, _ in known])
    return None if result is None else (result, frozenset().union(*(n for _, n in known)) | {node})


def _combine(op_type: str, parts: list[Polynomial]) -> Polynomial | None:
    a, b = parts[0], parts[-1]
    match op_type:
        case "Neg":
            return {k: -c for k, c in a.items()}
        case "Add" | "Sub":
            sign = 1 if op_type == "Add" else -1
            return {k: a.get(k, 0.0) + sign * b.get(k, 0.0) for k in {*a, *b}}
        case "Mul":
            return _product(a, b)
        case "Div":
            divisor = b.get(0, 0.0) if set(b) == {0} else 0.0
            return {k: c / divisor for k, c in a.items()} if divisor else None
    exponent = b.get(0, 0.0) if set(b) == {0} else 0.0
    if exponent not in (1, 2, 3):
        return None
    result: Polynomial | None = a
    for _ in range(int(exponent) - 1):
        result = None if result is None else _product(result, a)
    return result


def _product(a: Polynomial, b: Polynomial) -> Polynomial | None:
    result: Polynomial = {}
    for j, x in a.items():
        for k, y in b.items():
            result[j + k] = result.get(j + k, 0.0) + x * y
    return result if max(result, default=0) <= _DEGREE else None


def close(found: Polynomial, wanted: Polynomial, tolerance: float) -> bool:
    """True if every coefficient agrees within the relative tolerance."""
    return all(math.isclose(found.get(k, 0.0), wanted.get(k, 0.0), rel_tol=tolerance, abs_tol=1e-12) for k in {*found, *wanted})


@dataclasses.dataclass(frozen=True)
class Gate:
    """`output` = x * sigmoid(alpha * x). `nodes`: what computes it and nothing else, the last one makes `output`."""

    x: ir.Value
    alpha: float
    output: ir.Value
    nodes: tuple[ir.Node, ...]


def gate_of(node: ir.Node) -> Gate | None:
    """The gate of a Sigmoid, if its alpha is a constant number."""
    gated = node.outputs[0]
    readers = consumers(gated)
    if len(readers) != 1 or gated.is_graph_output() or readers[0].graph is not node.graph or producer(readers[0].outputs[0], "Mul") is None:
        return None
    product, argument = readers[0], node.inputs[0]
    x = product.inputs[1] if product.inputs[0] is gated else product.inputs[0]
    if argument is None or x is None or x is gated or x not in roots(argument):
        return None
    read = polynomial(argument, x)
    if read is None or {k for k, c in read[0].items() if c} != {1}:
        return None
    return Gate(x, read[0][1], product.outputs[0], enclosed((node, product), read[1]))
