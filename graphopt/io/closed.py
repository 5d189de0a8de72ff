"""Bodies that nothing looks into (`questions.is_closed`): those under an operator of somebody else, and those that can never run."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir

from graphopt.core.contract import Target
from graphopt.core.remarks import Remarks
from graphopt.graph.opset import versions
from graphopt.graph.questions import CLOSED, Names, all_nodes, bodies, captured, closed_nodes, is_graph, within
from graphopt.graph.serialize import light
from graphopt.graph.shapes import contents

_CAPTURED = "graphopt.captured"  # node.meta: the names that its closed bodies read, as `captured` lists them
_ROUNDS = 16


# ---- under an operator of somebody else ---------------------------------------------------------------------------------------------------


def keep_names(model: ir.Model) -> None:
    """Note the names by which closed bodies read what stands around them, for `restore_names`."""
    for node in closed_nodes(model):
        node.meta.setdefault(_CAPTURED, tuple(str(v.name) for v in captured(node)))


def restore_names(model: ir.Model) -> None:
    """Let closed bodies read by the names that their author wrote, in place, whatever the passes made of the values around them."""
    names: Names | None = None
    for node in closed_nodes(model):
        wanted = dict(zip(captured(node), node.meta.get(_CAPTURED, ()), strict=False))
        for value, name in wanted.items():
            if value.name == name:
                continue
            names = names or Names(model)
            for other in _values(model):
                if other.name == name:
                    other.name = names.fresh(name)
            same = ir.node("Identity", [value], name=names.fresh(f"{name}_kept"))
            same.outputs[0].name, same.outputs[0].type, same.outputs[0].shape = name, value.type, value.shape
            assert node.graph is not None
            node.graph.insert_before(node, same)
            _read_instead(node, value, same.outputs[0])


def _values(model: ir.Model) -> list[ir.Value]:
    """Every value that may have another name: not those of the interface."""
    own = [v for n in all_nodes(model) for v in n.outputs] + list(model.graph.initializers.values())
    return [v for v in own if not (v.is_graph_output() or v.is_graph_input())]


def _read_instead(node: ir.Node, old: ir.Value, new: ir.Value) -> None:
    for inner in within(node):
        for index, value in enumerate(inner.inputs):
            if value is old:
                inner.replace_input_with(index, new)
    for attribute in node.attributes.values():
        for graph in ([attribute.as_graph()] if attribute.type == ir.AttributeType.GRAPH else attribute.as_graphs()) if is_graph(attribute) else ():
            for index, output in enumerate(graph.outputs):
                if output is old:
                    graph.outputs[index] = new


def held(target: Target, model: ir.Model, remarks: Remarks) -> Target:
    """With a limit to the opset where bodies that nobody may change hold the file at an old one."""
    limit = versions.ceiling(model)
    if limit is None or (target.opset is not None and target.opset <= limit) or all(f.name != "opset" for f in dataclasses.fields(target)):  # type: ignore[arg-type]
        return target
    remarks.warning("", f"the output stays at opset {limit}: bodies under operators of other domains are written for it, and left as they are")
    return dataclasses.replace(target, opset=limit)  # type: ignore[type-var]


# ---- what can never run -------------------------------------------------------------------------------------------------------------------


def close_impossible(model: ir.Model, remarks: Remarks) -> None:
    """Close the bodies that ONNX finds illegal once the sizes are put in that follow from the inputs: branches for other sizes than those.

    They are legal as they stand, since the sizes are computed; what is folded in them would make a file that no runtime loads.
    """
    for _ in range(_ROUNDS):
        if not any(bodies(node) for node in model.graph):
            return
        culprit = _impossible(model)
        if culprit is None:
            return
        culprit.meta[CLOSED] = "impossible"
        text = f"a body of this {culprit.op_type} is not legal for the shapes of the inputs, and can never run; it is left as it is"
        remarks.warning(culprit.name or "", text)


def open_again(model: ir.Model) -> None:
    """For what concerns the file as a whole, such as its opset, nothing is closed but what belongs to others."""
    for node in closed_nodes(model):
        node.meta.pop(CLOSED, None)


def _impossible(model: ir.Model) -> ir.Node | None:
    """The node of the main graph whose body is not legal, if ONNX names one."""
    proto = light(_sized(model))
    del proto.graph.output[:]
    try:
        onnx.shape_inference.infer_shapes(proto, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        named = re.findall(r"node name: ([^)]*)\)", str(error))
        holders = {n.name: n for n in model.graph if bodies(n)}
        return next((holders[name] for name in named if name in holders), None)
    return None


def _sized(model: ir.Model) -> ir.Model:
    """A copy in which the integers that follow from the shapes of the inputs, and small weights, are weights of the bodies that read them."""
    copy = model.clone()
    names = Names(copy)
    for node in _inner(copy):
        for index, value in enumerate(node.inputs):
            known = contents(value)
            if value is None or known is None or value.shape is None or value.dtype is None or not all(isinstance(x, int) for x in known):
                continue
            array = np.array(known, value.dtype.numpy()).reshape((-1,) if len(value.shape) else ())
            name = names.fresh(f"{value.name}_known")
            stored = ir.Value(name=name, type=value.type, shape=ir.Shape(array.shape), const_value=ir.tensor(array, name=name))
            assert node.graph is not None
            node.graph.register_initializer(stored)  # here, and not in the main graph: ONNX looks no further for contents
            node.replace_input_with(index, stored)
    return copy


def _inner(model: ir.Model) -> Iterator[ir.Node]:
    return (node for node in list(all_nodes(model)) if node.graph is not model.graph)
