"""Bodies that become part of the graph around them: model-local functions, and branches of an If whose condition is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.core.contract import Array
from graphopt.core.errors import LoadError
from graphopt.graph.fold import is_pure, outputs_at
from graphopt.graph.opset.node_form import WORKING
from graphopt.graph.questions import ORIGINS, all_nodes, bodies, closed_nodes, constant, is_constant, open_nodes, origins, within
from graphopt.graph.shapes import contents
from graphopt.rewrite.dead import detach

_SMALL = 64  # elements of a value that is worth evaluating
_MOST = 250_000  # nodes that functions may unfold to; the largest models have a tenth
_DEEP = 100  # nodes on the way to a condition


# ---- functions ----------------------------------------------------------------------------------------------------------------------------


def functions(model: ir.Model) -> None:
    """Replace every call of a model-local function by a copy of its body, nested calls included; only what closed bodies call stays afterwards.

    A function may import another opset than the model: its nodes remember theirs in `node.version`.

    Raises:
        LoadError: a function calls itself, or a call does not fit it.
    """
    for function in model.functions.values():
        for node in open_nodes(function):
            node.version = function.opset_imports.get("", model.opset_imports.get(""))
        for domain, version in function.opset_imports.items():
            model.opset_imports.setdefault(domain, version)
    _check_size(model)
    calls = [n for n in all_nodes(model) if n.op_identifier() in model.functions]
    while calls:
        call = calls.pop()
        inner = _instantiate(call, model.functions[call.op_identifier()])
        calls += [n for n in inner if n.op_identifier() in model.functions]
    kept = _called_inside(model)
    for identifier in [key for key in model.functions if key not in kept]:
        del model.functions[identifier]


def _check_size(model: ir.Model) -> None:
    """Refuse functions that call themselves, and those that unfold to far more nodes than any model has."""
    sizes: dict[Any, int] = {}
    todo = list(model.functions)
    inside = set[Any]()
    while todo:
        key = todo[-1]
        nodes = list(open_nodes(model.functions[key]))
        called = {n.op_identifier() for n in nodes} & set(model.functions)
        missing = called - set(sizes)
        inside.add(key)
        if missing & inside:
            raise LoadError(f"invalid model: the function `{key[1]}` calls itself")
        todo += missing
        if not missing:
            todo.pop()
            inside.discard(key)
            sizes[key] = sum(sizes.get(n.op_identifier(), 1) for n in nodes)
    total = sum(sizes.get(n.op_identifier(), 1) for n in all_nodes(model))
    if sizes and total > _MOST:
        raise LoadError(f"the functions of the model unfold to {total:,} nodes, more than {_MOST:,}; export it without functions")


def _called_inside(model: ir.Model) -> set[tuple[str, str, str]]:
    """The functions that closed bodies call, by themselves or through another; they stay."""
    nodes = [n for node in closed_nodes(model) for n in within(node)]
    found: set[tuple[str, str, str]] = set()
    while nodes:
        called = {n.op_identifier() for n in nodes if n.op_identifier() in model.functions} - found
        found |= called
        nodes = [n for key in called for n in model.functions[key].all_nodes()]
    return found


def _instantiate(call: ir.Node, function: ir.Function) -> list[ir.Node]:
    """Put a copy of the body in the place of the call; returns all its nodes, those of subgraphs too."""
    if len(call.inputs) > len(function.inputs) or len(call.outputs) > len(function.outputs):
        raise LoadError(f"invalid model: node `{call.name}` gives the function `{call.op_type}` more inputs or outputs than it has")
    body = function.clone()
    nodes = list(open_nodes(body))
    given = {a.name: a for a in function.attributes.values() if a.value is not None} | dict(call.attributes)
    prefix = call.name or call.outputs[0].name or call.op_type
    for node in nodes:
        _resolve(node, given)
        node.name = f"{prefix}/{node.name or node.op_type}"
        node.metadata_props.update({k: v for k, v in call.metadata_props.items() if k not in node.metadata_props})
        for value in node.outputs:
            value.name = f"{prefix}/{value.name}" if value.name else value.name
    for index, formal in enumerate(list(body.inputs)):
        actual = call.inputs[index] if index < len(call.inputs) else None
        _replace(formal, actual, body.graph)
    call.resize_outputs(len(function.outputs))
    _splice(call, body.graph)
    return nodes


def _resolve(node: ir.Node, given: dict[str, ir.Attr]) -> None:
    """Fill in attributes that refer to an attribute of the function; one that the call does not give, and that has no default, goes."""
    for name, attribute in list(node.attributes.items()):
        if not attribute.is_ref():
            continue
        actual = given.get(attribute.ref_attr_name or "")
        if actual is None:
            del node.attributes[name]
        else:
            node.attributes[name] = ir.Attr(name, actual.type, actual.value)


def _replace(formal: ir.Value, actual: ir.Value | None, body: ir.Graph) -> None:
    for use in formal.uses():
        use.node.replace_input_with(use.idx, actual)
    for index, output in enumerate(body.outputs):
        if output is formal:
            if actual is None:
                raise LoadError(f"invalid model: a function returns its input `{formal.name}`, which the call does not give")
            node = ir.node("Identity", [actual], name="Identity")
            body.append(node)
            body.outputs[index] = node.outputs[0]


def _splice(node: ir.Node, body: ir.Graph) -> None:
    """Move the nodes of `body` in front of `node`, let the body's outputs stand for the node's, and remove the node."""
    parent, inner, results = node.graph, list(body), list(body.outputs)
    assert parent is not None
    body.outputs.clear()
    body.remove(inner)
    parent.insert_before(node, inner)
    mine, seen = set(inner), set()
    for old, new in zip(node.outputs, results, strict=True):
        if old.is_graph_output() and (new.producer() not in mine or new in seen):
            copy = ir.node("Identity", [new])  # an output of the graph needs a value, and a name, of its own
            copy.meta[ORIGINS] = origins(node)
            parent.insert_before(node, copy)
            new = copy.outputs[0]
        seen.add(new)
        if old.is_graph_output():
            new.name, old.name = old.name, None
            new.type, new.shape = old.type or new.type, old.shape or new.shape
            new.doc_string = old.doc_string
            new.metadata_props.update(old.metadata_props)
            new.meta.update(old.meta)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    detach(node)
    parent.remove(node)


# ---- If -----------------------------------------------------------------------------------------------------------------------------------


def decided_ifs(model: ir.Model) -> int:
    """Replace every If whose condition is known (a constant, or made from static shapes) by the branch that runs; returns how many."""
    done, waiting = 0, list(model.graph)
    while waiting:
        node = waiting.pop()
        taken = _taken_branch(node) if node.op_type == "If" and node.domain == "" else None
        if taken is None:
            waiting += [n for body in bodies(node) for n in body]
            continue
        waiting += list(taken)
        _splice(node, taken)
        done += 1
    return done


def _taken_branch(node: ir.Node) -> ir.Graph | None:
    condition = node.inputs[0]
    known = None if condition is None else evaluate(condition)
    if known is None or known.size != 1:
        return None
    return node.attributes["then_branch" if known.reshape(-1)[0] else "else_branch"].as_graph()


def evaluate(value: ir.Value, depth: int = 0) -> Array | None:
    """The contents of a small value, where constants and static shapes decide them; else None."""
    if is_constant(value):
        return constant(value) if value.const_value is not None and value.const_value.size <= _SMALL else None
    known = contents(value)
    if known is not None and all(isinstance(x, int) for x in known) and value.dtype is not None and value.shape is not None:
        return np.array(known, value.dtype.numpy()).reshape((-1,) if len(value.shape) else ())
    node = value.producer()
    if node is None or depth > _DEEP or not is_pure(node) or len(node.outputs) != 1:
        return None
    inputs = [None if item is None else evaluate(item, depth + 1) for item in node.inputs]
    if any(item is not None and array is None for item, array in zip(node.inputs, inputs, strict=True)):
        return None
    made = outputs_at(node, WORKING, inputs)
    return made[0] if made is not None and made[0].size <= _SMALL else None
