"""Older spellings of nodes: operands that were attributes once, defaults that can be left out, axes that had to count from the front."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from graphopt.graph.opset.node_form import SOFTMAX, WORKING, NodeForm, schema
from graphopt.graph.questions import constant, rank, scalar, static_dim


def respell(form: NodeForm, version: int) -> NodeForm | None:
    """The same node written for opset `version`, older than the working one; None where no rule applies.

    The caller judges the result with `accepts`: a rule only has to keep the meaning.
    """
    new = NodeForm(form.op_type, dict(form.attributes), list(form.inputs), form.outputs)
    if not all(rule(new) for since, rule in _RULES.get(form.op_type, ()) if version < since):
        return None
    while new.inputs and new.inputs[-1] is None:
        new.inputs.pop()
    _count_from_front(new, version)
    _leave_out_defaults(new, version)
    return new


def _leave_out_defaults(s: NodeForm, version: int) -> None:
    """An attribute that did not exist yet may go where it states the default."""
    old, new = schema(s.op_type, version), schema(s.op_type, WORKING)
    if old is None or new is None:
        return
    for name in [n for n in s.attributes if n not in old.attributes and n in new.attributes]:
        default = new.attributes[name].default_value
        if default.name and s.value(name) == ir.serde.deserialize_attribute(default).value:
            del s.attributes[name]


def _count_from_front(s: NodeForm, version: int) -> None:
    """Most operators take a negative axis since opset 11 only."""
    size = rank(s.outputs[0] if s.op_type == "Unsqueeze" else s.inputs[0])
    if version >= 11 or size is None:
        return
    axis, axes = s.value("axis"), s.value("axes")
    if isinstance(axis, int) and axis < 0:
        s.attributes["axis"] = ir.AttrInt64("axis", axis + size)
    if axes is not None:
        s.attributes["axes"] = ir.AttrInt64s("axes", [a % size for a in axes])


def _given(s: NodeForm, index: int) -> bool:
    return index < len(s.inputs) and s.inputs[index] is not None


def _numbers_to_attribute(s: NodeForm, index: int, name: str) -> bool:
    """Move a constant operand of integers into an attribute; an absent one stays absent. False where it is computed."""
    if not _given(s, index):
        return True
    array = constant(s.inputs[index])
    if array is None:
        return False
    s.attributes[name] = ir.AttrInt64s(name, [int(x) for x in array.reshape(-1)])
    s.inputs[index] = None
    return True


def _number_to_attribute(s: NodeForm, index: int, name: str) -> bool:
    """The same for one float."""
    if not _given(s, index):
        return True
    array = constant(s.inputs[index])
    if array is None or array.size != 1 or array.dtype.kind != "f":
        return False
    s.attributes[name] = ir.AttrFloat32(name, float(array.reshape(())))
    s.inputs[index] = None
    return True


def _axes(s: NodeForm) -> bool:
    if not _numbers_to_attribute(s, 1, "axes"):
        return False
    if not s.value("axes"):
        if s.value("noop_with_empty_axes", 0):
            return False  # nothing is reduced; the old operator reduces everything
        s.attributes.pop("axes", None)
    s.attributes.pop("noop_with_empty_axes", None)
    return True


def _parts(s: NodeForm) -> bool:
    if "num_outputs" not in s.attributes:
        return True
    size = static_dim(s.inputs[0], s.value("axis", 0))
    del s.attributes["num_outputs"]
    return size is not None and size % len(s.outputs) == 0  # since opset 18 the last part may be smaller


def _dropout(s: NodeForm) -> bool:
    if _given(s, 2) and scalar(s.inputs[2]) is not False:
        return False
    del s.inputs[2:]
    s.attributes.pop("seed", None)  # only used when training
    return _number_to_attribute(s, 1, "ratio")


def _pad(s: NodeForm) -> bool:
    return _given(s, 1) and not _given(s, 3) and _numbers_to_attribute(s, 1, "pads") and _number_to_attribute(s, 2, "value")


def _slice(s: NodeForm) -> bool:
    if not _numbers_to_attribute(s, 4, "steps") or set(s.value("steps", ())) - {1}:
        return False
    s.attributes.pop("steps", None)
    return _given(s, 1) and _given(s, 2) and all(_numbers_to_attribute(s, k, name) for k, name in ((1, "starts"), (2, "ends"), (3, "axes")))


def _topk(s: NodeForm) -> bool:
    if not _given(s, 1) or not _numbers_to_attribute(s, 1, "k"):
        return False
    s.attributes["k"] = ir.AttrInt64("k", s.value("k")[0])
    return True


def _softmax(s: NodeForm) -> bool:
    """The default axis was 1 before opset 13, so the axis has to be spelled."""
    s.attributes.setdefault("axis", ir.AttrInt64("axis", -1))
    return True


_RULES: dict[str, tuple[tuple[int, Callable[[NodeForm], bool]], ...]] = {  # (the opset before which it holds, how a node is written there)
    **{f"Reduce{kind}": ((18, _axes),) for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")},
    **dict.fromkeys(("ReduceSum", "Squeeze", "Unsqueeze"), ((13, _axes),)),
    **dict.fromkeys(SOFTMAX, ((13, _softmax),)),
    "Clip": ((11, lambda s: _number_to_attribute(s, 1, "min") and _number_to_attribute(s, 2, "max")),),
    "Dropout": ((12, _dropout),),
    "Pad": ((11, _pad),),
    "Slice": ((10, _slice),),
    "Split": ((18, _parts), (13, lambda s: _numbers_to_attribute(s, 1, "split"))),
    "TopK": ((10, _topk),),
}
