"""Older spellings of nodes: operands that were attributes once, defaults that can be left out, axes that had to count from the front."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.graph.opset.node_form import SOFTMAX, WORKING, Spelling, schema
from graphopt.graph.questions import constant, rank, static_dim


def respell(spelling: Spelling, version: int) -> Spelling | None:
    """The same node written for opset `version`, older than the working one; None where no rule applies.

    The caller judges the result with `accepts`: a rule only has to keep the meaning.
    """
    new = Spelling(spelling.op_type, dict(spelling.attributes), list(spelling.inputs), spelling.outputs)
    rule = _RULES.get(spelling.op_type)
    if rule is not None and not rule(new, version):
        return None
    while new.inputs and new.inputs[-1] is None:
        new.inputs.pop()
    _count_from_front(new, version)
    _leave_out_defaults(new, version)
    return new


def _leave_out_defaults(s: Spelling, version: int) -> None:
    """An attribute that did not exist yet may go where it states the default."""
    old, new = schema(s.op_type, version), schema(s.op_type, WORKING)
    if old is None or new is None:
        return
    for name in [n for n in s.attributes if n not in old.attributes and n in new.attributes]:
        default = new.attributes[name].default_value
        if default.name and s.value(name) == ir.serde.deserialize_attribute(default).value:
            del s.attributes[name]


def _count_from_front(s: Spelling, version: int) -> None:
    """Most operators take a negative axis since opset 11 only."""
    size = rank(s.outputs[0] if s.op_type == "Unsqueeze" else s.inputs[0])
    if version >= 11 or size is None:
        return
    axis, axes = s.value("axis"), s.value("axes")
    if isinstance(axis, int) and axis < 0:
        s.attributes["axis"] = ir.AttrInt64("axis", axis + size)
    if axes is not None:
        s.attributes["axes"] = ir.AttrInt64s("axes", [a % size for a in axes])


def _ints(s: Spelling, index: int) -> list[int] | None:
    array = _array(s, index)
    return None if array is None else [int(x) for x in array.reshape(-1)]


def _array(s: Spelling, index: int) -> np.ndarray[Any, Any] | None:
    return constant(s.inputs[index]) if index < len(s.inputs) else None


def _given(s: Spelling, index: int) -> bool:
    return index < len(s.inputs) and s.inputs[index] is not None


def _axes_attribute(since: int) -> Callable[[Spelling, int], bool]:
    """`axes` was an attribute before `since`."""

    def rule(s: Spelling, version: int) -> bool:
        if version >= since:
            return True
        axes = _ints(s, 1)
        if _given(s, 1) and axes is None:
            return False
        if s.value("noop_with_empty_axes", 0) and not axes:
            return False  # nothing is reduced; the old operator reduces everything
        s.attributes.pop("noop_with_empty_axes", None)
        del s.inputs[1:]
        if axes:
            s.attributes["axes"] = ir.AttrInt64s("axes", axes)
        return True

    return rule


def _split(s: Spelling, version: int) -> bool:
    if version < 18 and "num_outputs" in s.attributes:
        size = static_dim(s.inputs[0], s.value("axis", 0))
        if size is None or size % len(s.outputs):
            return False  # since opset 18 the last part may be smaller
        del s.attributes["num_outputs"]
    if version < 13 and _given(s, 1):
        sizes = _ints(s, 1)
        if sizes is None:
            return False
        s.attributes["split"] = ir.AttrInt64s("split", sizes)
        del s.inputs[1:]
    return True


def _number_to_attribute(s: Spelling, index: int, name: str) -> bool:
    """Move a constant float operand into an attribute; an absent one stays absent."""
    if not _given(s, index):
        return True
    array = _array(s, index)
    if array is None or array.size != 1 or array.dtype.kind != "f":
        return False
    s.attributes[name] = ir.AttrFloat32(name, float(array.reshape(())))
    s.inputs[index] = None
    return True


def _clip(s: Spelling, version: int) -> bool:
    return version >= 11 or (_number_to_attribute(s, 1, "min") and _number_to_attribute(s, 2, "max"))


def _dropout(s: Spelling, version: int) -> bool:
    if version >= 12:
        return True
    training = _array(s, 2)
    if _given(s, 2) and (training is None or bool(training)):
        return False
    del s.inputs[2:]
    s.attributes.pop("seed", None)  # only used when training
    return _number_to_attribute(s, 1, "ratio")


def _pad(s: Spelling, version: int) -> bool:
    if version >= 11:
        return True
    pads = _ints(s, 1)
    if pads is None or _given(s, 3) or not _number_to_attribute(s, 2, "value"):
        return False
    s.attributes["pads"] = ir.AttrInt64s("pads", pads)
    s.inputs[1] = None
    return True


def _slice(s: Spelling, version: int) -> bool:
    if version >= 10:
        return True
    starts, ends, axes, steps = (_ints(s, k) for k in range(1, 5))
    if starts is None or ends is None or (_given(s, 3) and axes is None) or (_given(s, 4) and (steps is None or set(steps) != {1})):
        return False
    s.attributes["starts"], s.attributes["ends"] = ir.AttrInt64s("starts", starts), ir.AttrInt64s("ends", ends)
    if axes is not None:
        s.attributes["axes"] = ir.AttrInt64s("axes", axes)
    del s.inputs[1:]
    return True


def _topk(s: Spelling, version: int) -> bool:
    k = _ints(s, 1)
    if version >= 10:
        return True
    if k is None:
        return False
    s.attributes["k"] = ir.AttrInt64("k", k[0])
    del s.inputs[1:]
    return True


def _softmax(s: Spelling, version: int) -> bool:
    """The default axis was 1 before opset 13, so the axis has to be spelled."""
    if version < 13 and "axis" not in s.attributes:
        s.attributes["axis"] = ir.AttrInt64("axis", -1)
    return True


_RULES: dict[str, Callable[[Spelling, int], bool]] = {
    **{f"Reduce{kind}": _axes_attribute(18) for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")},
    **{op: _axes_attribute(13) for op in ("ReduceSum", "Squeeze", "Unsqueeze")},
    **dict.fromkeys(SOFTMAX, _softmax),
    "Clip": _clip,
    "Dropout": _dropout,
    "Pad": _pad,
    "Slice": _slice,
    "Split": _split,
    "TopK": _topk,
}
