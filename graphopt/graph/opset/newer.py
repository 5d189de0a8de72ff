"""Up-conversion of single nodes: each goes as a model of one node, without weights, through the ONNX version converter.

One node at a time, because the C++ converter drops metadata and doc strings, knows no sequences, custom operators or functions, and has to
serialize what it is given. Equal nodes are converted once.
"""

from __future__ import annotations

import onnx
import onnx.version_converter
import onnx_ir as ir

from graphopt.graph.opset.node_form import SOFTMAX
from graphopt.graph.questions import ORIGINS, Names, is_constant, origins

_SMALL = 1024  # elements of a constant input that the converter may see
_AS_BEFORE_11 = (  # Resize before opset 11 had no such attributes; the converter leaves the new defaults, which mean something else
    ir.AttrString("coordinate_transformation_mode", "asymmetric"),
    ir.AttrString("nearest_mode", "floor"),
)


class Converter:
    """Rewrites nodes of one model for opset `to`."""

    def __init__(self, model: ir.Model, to: int) -> None:
        self.model, self.to = model, to
        self._names: Names | None = None
        self._done: dict[bytes, onnx.GraphProto] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def convert(self, node: ir.Node, home: int) -> None:
        """Replace `node`, written for opset `home`, by its spelling at `to`; the names of its outputs stay.

        Raises:
            ValueError: there is none; the text says why.
        """
        if node.op_type == "GroupNormalization" and home < 21 <= self.to:
            raise ValueError("scale and bias are per group before opset 21 and per channel since")
        if node.op_type in SOFTMAX and home < 13 and (node.inputs[0] is None or node.inputs[0].shape is None):
            raise ValueError("before opset 13 its meaning depends on the rank of its input, which is unknown")
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            raise ValueError("it has a body that the ONNX version converter does not take")
        spelled = self._converted(_model_of(node, home))
        values: dict[str, ir.Value | None] = {"": None, **{f"i{k}": v for k, v in enumerate(node.inputs)}}
        for tensor in spelled.initializer:
            if tensor.name not in values:
                values[tensor.name] = self._constant(ir.from_proto(tensor), node)
        new = []
        for proto in spelled.node:
            if proto.op_type == "Constant":
                values[proto.output[0]] = self._constant(ir.from_proto(proto.attribute[0].t), node)
            else:
                new.append(self._node(proto, values, node, home))
        self._splice(node, new, values)

    def _converted(self, proto: onnx.ModelProto) -> onnx.GraphProto:
        key = proto.SerializeToString(deterministic=True)
        if key not in self._done:
            try:
                self._done[key] = onnx.version_converter.convert_version(proto, self.to).graph
            except Exception as error:  # noqa: BLE001 -- the C++ converter raises several kinds; the reason goes on
                raise ValueError(str(error).rsplit(": ", 1)[-1].strip() or "the ONNX version converter declined") from None
        return self._done[key]

    def _constant(self, tensor: ir.TensorProtocol, node: ir.Node) -> ir.Value:
        key = (tensor.dtype.name, tuple(tensor.shape.numpy()), tensor.tobytes())
        if key not in self._constants:
            name = self._fresh(f"{node.outputs[0].name}_const")
            value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(key[1]), const_value=ir.tensor(tensor.numpy(), name=name))
            self.model.graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]

    def _node(self, proto: onnx.NodeProto, values: dict[str, ir.Value | None], old: ir.Node, home: int) -> ir.Node:
        attributes = [ir.from_proto(a) for a in proto.attribute]
        if proto.op_type == "Resize" and home < 11:
            attributes += [a for a in _AS_BEFORE_11 if a.name not in {x.name for x in attributes}]
        new = ir.Node(
            "",
            proto.op_type,
            [values[name] for name in proto.input],
            attributes,
            num_outputs=len(proto.output),
            name=old.name,
            doc_string=old.doc_string,
            metadata_props=dict(old.metadata_props),
        )
        for name, value in zip(proto.output, new.outputs, strict=True):
            values[name], value.name = value, self._fresh(f"{old.outputs[0].name}_{name.strip('_')}")
        return new

    def _splice(self, node: ir.Node, new: list[ir.Node], values: dict[str, ir.Value | None]) -> None:
        assert node.graph is not None
        for k, old in enumerate(node.outputs):
            value = values.get(f"o{k}")
            if value is None:
                if old.uses() or old.is_graph_output():
                    raise ValueError(f"its output {k} has no counterpart")
                continue
            name, value.type, value.shape = old.name, old.type, old.shape
            value.doc_string, old.name = old.doc_string, None
            value.metadata_props.update(old.metadata_props)
            value.meta.update(old.meta)
            old.replace_all_uses_with(value, replace_graph_outputs=True)
            value.name = name
        for extra in new[:-1]:
            extra.name = self._fresh(f"{node.name}_{extra.op_type}") if node.name else None
            extra.meta[ORIGINS] = origins(node)
        node.graph.insert_before(node, new)
        node.graph.remove(node, safe=True)

    def _fresh(self, hint: str) -> str:
        if self._names is None:
            self._names = Names(self.model)
        return self._names.fresh(hint)


def _model_of(node: ir.Node, home: int) -> onnx.ModelProto:
    """A model of one node; its inputs are `i0, i1, ...`, its outputs `o0, o1, ...`; small constant inputs come with their contents."""
    proto = ir.to_proto(node)
    for field in ("name", "doc_string", "metadata_props", "domain"):
        proto.ClearField(field)
    graph = onnx.GraphProto(name="g")
    for k, value in enumerate(node.inputs):
        if value is None:
            continue
        proto.input[k] = f"i{k}"
        if is_constant(value) and value.const_value is not None and value.const_value.size <= _SMALL:
            graph.initializer.append(onnx.numpy_helper.from_array(value.const_value.numpy(), f"i{k}"))
        else:
            graph.input.append(_info(f"i{k}", value))
    for k, value in enumerate(node.outputs):
        if k < len(proto.output) and proto.output[k]:
            proto.output[k] = f"o{k}"
            graph.output.append(_info(f"o{k}", value, shaped=False))
    graph.node.append(proto)
    return onnx.ModelProto(ir_version=8, graph=graph, opset_import=[onnx.helper.make_opsetid("", home)])


def _info(name: str, value: ir.Value, shaped: bool = True) -> onnx.ValueInfoProto:
    kind = ir.DataType.FLOAT if value.dtype is None else value.dtype
    shape = None
    if shaped and value.shape is not None:  # the rank is all that matters, and equal nodes shall look equal
        shape = [d if isinstance(d, int) else f"d{k}" for k, d in enumerate(value.shape)]
    return onnx.helper.make_tensor_value_info(name, kind.value, shape)
