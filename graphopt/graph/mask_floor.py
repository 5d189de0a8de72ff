"""The numbers that hide keys in an additive mask.

ONNX adds a mask to the scores, so a row whose keys are all at -FLT_MAX averages; runtimes take numbers near -FLT_MAX for "no key" and give zero.
A mask that is not below `LOWEST` is read alike by all, and hides as well.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.graph.questions import constant, producer, scalar

LOWEST = -1e30
_MIXING = (
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Flatten", "Add", "Sub", "Mul", "Div", "Where", "Expand", "Cast", "Slice", "Min",
    "Max", "Neg",
)  # fmt: skip


def fills(mask: ir.Value, factor: float = 1.0) -> tuple[list[float], bool]:
    """The lowest numbers that `factor` * `mask` may hold, as far as constants tell, and whether a caller feeds it."""
    array = constant(mask)
    if array is not None:
        return [float(np.min(array * factor)) if array.size else 0.0], False
    return _behind(mask, 8)


def may_be_too_low(mask: ir.Value, factor: float = 1.0) -> bool:
    """True if the mask may hold finite numbers below `LOWEST`; one that holds -inf means "no key" and is left alone."""
    found, fed = fills(mask, factor)
    return not any(np.isneginf(c) for c in found) and (fed or any(is_too_low(c) for c in found))


def is_too_low(number: float) -> bool:
    """Below `LOWEST`, which half and single precision round."""
    return number < 1.01 * LOWEST


def _behind(value: ir.Value, depth: int) -> tuple[list[float], bool]:
    """The scalar constants that elementwise and layout operators mixed into a value, as negative numbers."""
    c = scalar(value)
    if c is not None:
        return [-abs(float(c))], False
    if value.is_graph_input():
        return [], value.dtype is not None and value.dtype.is_floating_point()
    node = producer(value)
    if node is None or depth == 0 or node.op_type not in _MIXING:
        return [], False
    found = [_behind(v, depth - 1) for v in node.inputs if v is not None]
    return [c for constants, _ in found for c in constants], any(fed for _, fed in found)
