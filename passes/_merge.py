"""Find what is there twice: equal initializers and equal nodes."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import numpy as np
import onnx_ir as ir

from graphopt.core.contract import Array
from graphopt.graph.fold import is_pure
from graphopt.graph.questions import is_constant
from graphopt.graph.shapes import contents

_SAMPLE = 512  # bytes at each end that decide whether two initializers are compared in full
_COMMUTATIVE = frozenset({"Add", "Mul", "And", "Or", "Xor", "Equal"})


def equal_initializers(graph: ir.Graph) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Pairs (copy, original) of constants of one type and shape with the same bytes."""
    groups: dict[Hashable, list[ir.Value]] = {}
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or not is_constant(value) or value.is_graph_output() or tensor.dtype == ir.DataType.STRING:
            continue
        flat = _bytes(tensor)
        key = (tensor.dtype, tuple(tensor.shape), flat[:_SAMPLE].tobytes(), flat[-_SAMPLE:].tobytes())
        originals = groups.setdefault(key, [])
        same = next((o for o in originals if o.const_value is not None and np.array_equal(_bytes(o.const_value), flat)), None)
        if same is None:
            originals.append(value)
        else:
            yield value, same


def _bytes(tensor: ir.TensorProtocol) -> Array:
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)


def node_key(node: ir.Node) -> Hashable | None:
    """Equal keys = equal results. None for a node that must not be merged."""
    if not is_pure(node) or node.op_type == "Identity":
        return None
    inputs: Hashable = tuple(node.inputs)  # the values themselves: an id may be used again
    if node.op_type in _COMMUTATIVE:
        inputs = frozenset(node.inputs)
    attributes = tuple(sorted((a.name, str(a.type), _frozen(a)) for a in node.attributes.values()))
    return node.op_type, inputs, attributes, len(node.outputs)


def _frozen(attribute: ir.Attr) -> str:
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return f"{tensor.dtype} {tensor.shape} {tensor.tobytes().hex()}"
    return repr(attribute.value)


def contents_key(value: ir.Value) -> Hashable | None:
    """Equal keys = equal numbers, for the small integer values that shapes decide (at least one element is a symbol)."""
    known = contents(value)
    if known is None or value.dtype is None or value.shape is None or not value.shape.is_static() or all(isinstance(x, int) for x in known):
        return None
    if any(getattr(x, "value", x) is None for x in known):
        return None
    return value.dtype, tuple(value.shape), tuple(map(str, known))
