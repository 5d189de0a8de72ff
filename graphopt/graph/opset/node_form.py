"""How a node is written, and whether that means the same at another opset.

`accepts` is the one question that lifting and lowering ask. The ONNX schemas answer for attributes, arity and types; the few changes of
meaning that a schema cannot show stand in `_MEANING`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx
import onnx_ir as ir

from graphopt.graph.questions import constant, rank

WORKING = 23  # the opset of the normal form


@dataclasses.dataclass
class NodeForm:
    """How one node is written; a node can be judged, and respelled, without touching the graph."""

    op_type: str
    attributes: dict[str, ir.Attr]
    inputs: list[ir.Value | None]
    outputs: Sequence[ir.Value]

    @classmethod
    def of(cls, node: ir.Node) -> NodeForm:
        return cls(node.op_type, dict(node.attributes), list(node.inputs), node.outputs)

    def value(self, name: str, default: Any = None) -> Any:
        found = self.attributes.get(name)
        return default if found is None or found.is_ref() else found.value

    def write(self, node: ir.Node) -> None:
        """Make `node` read like this."""
        node.op_type = self.op_type
        for gone in set(node.attributes) - set(self.attributes):
            del node.attributes[gone]
        for name, attribute in self.attributes.items():
            node.attributes[name] = attribute
        node.resize_inputs(len(self.inputs))
        for index, value in enumerate(self.inputs):
            if node.inputs[index] is not value:
                node.replace_input_with(index, value)


@functools.cache
def schema(op_type: str, version: int) -> onnx.defs.OpSchema | None:
    """The schema of a standard operator at an opset, or None where that opset has no such operator."""
    try:
        found = onnx.defs.get_schema(op_type, version, "")
    except onnx.defs.SchemaError:
        return None
    return None if found.deprecated else found


def accepts(form: NodeForm, version: int, home: int = WORKING) -> str | None:
    """None if `form`, written for opset `home`, is legal and means the same at opset `version`; else the reason.

    An operator that no opset knows (a custom one in the standard domain) is accepted: nothing can be said about it.
    """
    there, here = schema(form.op_type, version), schema(form.op_type, home)
    if there is None:
        return None if _first(form.op_type) is None else f"opset {version} has no `{form.op_type}`"
    if here is not None and here.since_version == there.since_version:
        return None
    low, high = sorted((version, home))
    for since, same in _MEANING.get(form.op_type, ()):
        if low < since <= high and not same(form):
            return f"`{form.op_type}` means something else {'before' if version < since else 'from'} opset {since}"
    if form.op_type == "Split" and version >= 18 and "num_outputs" not in form.attributes and len(form.inputs) < 2:
        return "`Split` needs sizes or num_outputs from opset 18"  # a rule that is in its shape inference only
    return misfit(form, version)


def misfit(form: NodeForm, version: int) -> str | None:
    """Why the schema at opset `version` takes no such attributes, number of operands or types; None if it does, or there is no schema."""
    found = schema(form.op_type, version)
    if found is None:
        return None
    return _structure(form.op_type, found.since_version, _attributes(form), _kinds(form.inputs), _kinds(form.outputs))


def malformed(form: NodeForm, version: int) -> str | None:
    """Likewise but for types, which a file may state wrongly: what no runtime loads, whatever flows through the graph."""
    found = schema(form.op_type, version)
    if found is None:
        return None
    inputs, outputs = (tuple("?" if kind is not None else None for kind in _kinds(values)) for values in (form.inputs, form.outputs))
    return _structure(form.op_type, found.since_version, _attributes(form), inputs, outputs)


def _attributes(form: NodeForm) -> tuple[tuple[str, str], ...]:
    """(name, type) of each."""
    return tuple((name, attribute.type.name) for name, attribute in form.attributes.items())


@functools.lru_cache(maxsize=65536)
def _structure(
    op_type: str, since: int, attributes: tuple[tuple[str, str], ...], inputs: tuple[str | None, ...], outputs: tuple[str | None, ...]
) -> str | None:
    """None if the schema of that version takes these attributes, and inputs and outputs of these types (None absent, "?" unknown)."""
    found = schema(op_type, since)
    assert found is not None
    text = f"`{op_type}` of opset {since}"
    for name, given_as in attributes:
        if name not in found.attributes:
            return f"{text} has no attribute `{name}`"
        wanted = str(found.attributes[name].type).rpartition(".")[2]
        if given_as != wanted:
            return f"{text} wants the attribute `{name}` as {wanted}, found {given_as}"
    given = {name for name, _ in attributes}
    for name, attribute in found.attributes.items():
        if attribute.required and name not in given:
            return f"{text} needs the attribute `{name}`"
    if not found.min_input <= len(inputs) <= found.max_input:
        return f"{text} does not take {len(inputs)} inputs"
    if len(outputs) > found.max_output:
        return f"{text} does not give {len(outputs)} outputs"
    allowed = {t.type_param_str: frozenset(t.allowed_type_strs) for t in found.type_constraints}
    bound: dict[str, str] = {}
    for formals, kinds in ((found.inputs, inputs), (found.outputs, outputs)):
        for index, kind in enumerate(kinds):
            reason = _fits(formals[min(index, len(formals) - 1)], kind, allowed, bound)
            if reason is not None:
                return f"{text} {reason}"
    return None


def _fits(formal: Any, kind: str | None, allowed: Mapping[str, frozenset[str]], bound: dict[str, str]) -> str | None:
    if kind is None:
        required = formal.option == onnx.defs.OpSchema.FormalParameterOption.Single
        return f"needs the input `{formal.name}`" if required else None
    if kind == "?":
        return None
    if kind not in allowed.get(formal.type_str, frozenset((formal.type_str,))):
        return f"takes no {kind} as `{formal.name}`"
    if formal.is_homogeneous and bound.setdefault(formal.type_str, kind) != kind:
        return f"mixes {bound[formal.type_str]} and {kind}"
    return None


def _kinds(values: Sequence[ir.Value | None]) -> tuple[str | None, ...]:
    return tuple(None if v is None or v.name == "" else "?" if v.type is None else _kind(v.type) for v in values)


def _kind(kind: Any) -> str:
    if isinstance(kind, ir.TensorType):
        return f"tensor({kind.dtype.name.lower()})" if kind.dtype != ir.DataType.UNDEFINED else "?"
    if isinstance(kind, ir.SequenceType):
        return f"seq({_kind(kind.elem_type)})"
    return f"optional({_kind(kind.elem_type)})" if isinstance(kind, ir.OptionalType) else "?"


@functools.cache
def _history() -> dict[str, int]:
    first: dict[str, int] = {}
    for found in onnx.defs.get_all_schemas_with_history():
        if found.domain == "":
            first[found.name] = min(found.since_version, first.get(found.name, found.since_version))
    return first


def _first(op_type: str) -> int | None:
    return _history().get(op_type)


# ---- changes of meaning that a schema does not show: op -> (opset of the change, is this spelling the same on both sides?) ----------------


def _never(_: NodeForm) -> bool:
    return False


def _last_axis(s: NodeForm) -> bool:
    """Softmax up to 12 flattens from `axis` on (default 1); from 13 it works on one axis (default -1)."""
    axis, size = s.value("axis"), rank(s.inputs[0])
    return axis == -1 or (axis is not None and size is not None and axis == size - 1)


def _no_negative(s: NodeForm) -> bool:
    axis, axes = s.value("axis", 0), s.value("axes", ())
    return axis >= 0 and all(a >= 0 for a in axes)


def _no_negative_index(s: NodeForm) -> bool:
    """Indices count from the front before opset 11; Gather is left out, since exporters and runtimes never kept to that."""
    indices = constant(s.inputs[1]) if s.inputs[1] is not None and (s.inputs[1].const_value is None or s.inputs[1].const_value.size <= 64) else None
    return indices is None or not (indices < 0).any()


def _one_scale(s: NodeForm) -> bool:
    scale = s.inputs[1]
    return scale is not None and (rank(scale) == 0 or (scale.const_value is not None and scale.const_value.size == 1))


def _is_not(name: str, *values: str) -> Callable[[NodeForm], bool]:
    return lambda s: s.value(name) not in values


_REDUCTIONS = [f"Reduce{kind}" for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")]
_AXIS_OPS = ["Concat", "Flatten", "Split", "Squeeze", "Unsqueeze", "ArgMax", "ArgMin", "Compress", "OneHot", *_REDUCTIONS]
SOFTMAX = ("Softmax", "LogSoftmax", "Hardmax")
ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Pow", "And", "Or", "Xor", "Equal", "Greater", "Less")  # broadcast by an attribute before opset 7
_MEANING: dict[str, tuple[tuple[int, Callable[[NodeForm], bool]], ...]] = {
    **dict.fromkeys(_AXIS_OPS, ((11, _no_negative),)),
    **dict.fromkeys(SOFTMAX, ((11, _no_negative), (13, _last_axis))),
    **dict.fromkeys(("Max", "Min", "Sum", "Mean"), ((8, _never),)),  # no broadcasting before
    **{op: ((11, _no_negative_index), (18, _is_not("reduction", "max", "min"))) for op in ("ScatterElements", "ScatterND")},
    **dict.fromkeys(("GatherElements", "GatherND"), ((11, _no_negative_index),)),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), ((13, _one_scale),)),  # per axis since 13
    "GridSample": ((20, _never),),  # names of the modes
    "GroupNormalization": ((21, _never),),  # scale and bias per group before, per channel since
    "Pad": ((19, _is_not("mode", "wrap")),),
    "Resize": ((11, _never), (19, _is_not("coordinate_transformation_mode", "half_pixel_symmetric"))),
    "RoiAlign": ((16, _never),),  # default of coordinate_transformation_mode
    "Scan": ((9, _never),),  # batched before, with the lengths of the sequences as its first input
}
