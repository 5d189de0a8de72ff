"""Opset and IR versions: everything works at one opset inside, and leaves with the smallest one that says the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from graphopt.core.errors import LoadError, TargetError
from graphopt.graph.opset.newer import Converter
from graphopt.graph.opset.node_form import ARITHMETIC, SOFTMAX, WORKING, NodeForm, accepts
from graphopt.graph.opset.older import respell
from graphopt.graph.questions import ISLAND, all_nodes, closed_nodes, graphs, within
from graphopt.graph.shape_rules import register_island
from graphopt.graph.shapes import infer_shapes

OLDEST = 7  # the first opset with numpy broadcasting; nothing is written below it
NEWEST = onnx.defs.onnx_opset_version()  # that the installed onnx knows
ORIGIN = "graphopt.opset"  # model.meta and graph.meta: the input's opset
WHY = "graphopt.why"  # node.meta of an island: why it has no form at the working opset
ORIGIN_IR = "graphopt.ir_version"  # likewise: the input's IR version
_STANDARD = ("", "ai.onnx")
_IR_OF_DTYPE = {"FLOAT8": 9, "INT4": 10, "UINT4": 10, "FLOAT4": 11, "FLOAT8E8M0": 12, "INT2": 13, "UINT2": 13, "FLOAT6": 14}


@dataclasses.dataclass(frozen=True)
class Rise:
    """A version that the output needs and the input did not: `what` is `opset` or `ir_version`."""

    what: str
    before: int
    after: int
    reason: str

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


# ---- up (and down from a newer file) to the working opset ---------------------------------------------------------------------------------


def lift(model: ir.Model, to: int = WORKING) -> int:
    """Spell every standard node for opset `to`, in place; returns how many were respelled.

    A node is written for `node.version` where that is set (nodes of an inlined function), else for the model's opset. Nodes that mean the
    same stay as they are. The others go, one by one, as a model of a single node, through the ONNX version converter: no weight travels.

    A node of a newer file that has no form there stays as it is, an island that no pass reads; the file keeps its opset then, and the rest is
    written so that it means the same at both.

    Raises:
        LoadError: an older node cannot be written at `to`; it names the node and why.
    """
    source, converter, changed = model.opset_imports.get("", to), Converter(model, to), 0
    _find_ranks(model, source)
    for node in list(all_nodes(model)):
        if node.domain not in _STANDARD:
            continue
        home, node.version = node.version or source, None
        reason = None if home == to else accepts(NodeForm.of(node), to, home)
        if reason is None:
            continue
        try:
            converter.convert(node, home)
        except ValueError as error:
            if home > to:
                node.domain, node.meta[WHY] = ISLAND, str(error)
                register_island(node.op_type, home)
                model.graph.opset_imports[ISLAND] = max(home, model.graph.opset_imports.get(ISLAND, home))
                continue
            where = f"node `{node.name or node.outputs[0].name}` ({node.op_type}, opset {home})"
            raise LoadError(f"{where} cannot be written at opset {to}: {error}") from None
        changed += 1
    model.graph.opset_imports[""] = to
    return changed


def _find_ranks(model: ir.Model, source: int) -> None:
    """Softmax before opset 13, and arithmetic before opset 7, depend on the ranks of their inputs, which a file may state wrongly. Our own
    inference first; it knows few operators as they were then, so that of ONNX has to help (on a copy without weights)."""
    ranked = (*(SOFTMAX if source < 13 else ()), *(ARITHMETIC if source < 7 else ()))
    inputs = [v for n in all_nodes(model) if n.op_type in ranked for v in n.inputs[:2]]
    if inputs:
        infer_shapes(model)
    if any(v is not None and v.shape is None for v in inputs):
        ShapeInferencePass(check_type=False, strict_mode=False)(model)


# ---- down to the smallest opset -----------------------------------------------------------------------------------------------------------


def lower(model: ir.Model, floor: int, *, ceiling: int | None = None, ir_floor: int | None = None) -> list[Rise]:
    """Write the model at the smallest opset, not below `floor`, at which every node means the same; in place.

    Also sets the IR version (not below `ir_floor`) and the imports of all domains: those used, and no other.

    Args:
        floor: the input's opset.
        ceiling: an opset that must not be exceeded (a user's option); it wins over `floor`, and its IR version over `ir_floor`.

    Returns:
        What rose above the input, and because of what.

    Raises:
        TargetError: `ceiling` cannot hold; it names the first node that needs more.
    """
    home = model.opset_imports.get("", WORKING)
    top = max(floor, home) if ceiling is None else ceiling
    if top < OLDEST and ceiling is None:
        return []  # an input as it came, not lifted, and so not to be written anew
    if top < OLDEST:
        raise TargetError(f"opset {top} is too old: the oldest that graphopt writes is {OLDEST}")
    nodes = [n for n in all_nodes(model) if n.domain in _STANDARD]
    blame = f"graphopt writes nothing below opset {OLDEST}"
    held, islands = foreign_nodes(model), [n for n in all_nodes(model) if n.domain == ISLAND]
    for version in range(max(OLDEST, min(floor, top)), top + 1):
        plan, refused = _plan(nodes, version, home)
        refused = refused or _held(held, version, floor) or _sunk(islands, version, floor)
        if refused is None:
            break
        blame = refused
    else:
        if ceiling is not None or _held(held, home, floor) or islands:
            ceiling = top if ceiling is None else ceiling
            raise TargetError(f"cannot write opset {ceiling}: {blame}; allow a newer opset, or leave out the pass that made this node")
        version, plan = home, []
    for node, form in plan:
        form.write(node)
    for node in islands:
        node.domain = ""
    _set_imports(model, version)
    _drop_unused(model)
    rises = [Rise("opset", floor, version, blame)] if version > floor or (ceiling is None and version < floor) else []
    before = model.ir_version if ir_floor is None else ir_floor
    return rises + _raise_ir(model, before if ceiling is None else min(before, _ir_of_opset(ceiling)))


def _sunk(islands: Sequence[ir.Node], version: int, floor: int) -> str | None:
    """Why nodes of opset `floor`, which have no form at the working one, cannot stand in a file of opset `version`."""
    reasons = ((node, accepts(NodeForm.of(node), version, floor)) for node in islands)
    return next((f"node `{node.name}`: {reason}" for node, reason in reasons if reason is not None), None)


def ceiling(model: ir.Model, floor: int | None = None) -> int | None:
    """The newest opset that the file can have, as operators of other domains hold bodies that are written for opset `floor` (by default that of
    the input) and stay as they are; None where it can have any."""
    floor = origin(model)[0] if floor is None else floor
    held = foreign_nodes(model)
    if _held(held, WORKING, floor) is None:
        return None
    return next((version for version in range(WORKING, floor, -1) if _held(held, version, floor) is None), floor)


def foreign_nodes(model: ir.Model) -> list[ir.Node]:
    """The standard nodes in bodies under operators of other domains."""
    return [inner for node in closed_nodes(model) if node.domain not in _STANDARD for inner in within(node) if inner.domain in _STANDARD]


def _held(nodes: Sequence[ir.Node], version: int, floor: int) -> str | None:
    """Why bodies that were written for opset `floor`, and stay as they are, cannot stand in a file of opset `version`."""
    reasons = (accepts(NodeForm.of(node), version, floor) for node in nodes) if version != floor else ()
    return next((f"a body that is left as it is: {reason}" for reason in reasons if reason is not None), None)


def _plan(nodes: Sequence[ir.Node], version: int, home: int) -> tuple[list[tuple[ir.Node, NodeForm]], str | None]:
    """The nodes to respell for `version`, or the first node that cannot be written there."""
    plan = []
    for node in nodes:
        form = NodeForm.of(node)
        reason = accepts(form, version, home)
        if reason is None:
            continue
        older = respell(form, version) if version < home else None
        if older is None or accepts(older, version, home) is not None:
            return [], f"node `{node.name}`: {reason}"
        plan.append((node, older))
    return plan, None


def _set_imports(model: ir.Model, version: int) -> None:
    imports, old = model.graph.opset_imports, dict(model.graph.opset_imports)
    imports.clear()
    imports[""] = version
    for node in (*ir.traversal.RecursiveGraphIterator(model.graph), *(n for f in model.functions.values() for n in f.all_nodes())):
        if node.domain not in _STANDARD and node.domain not in imports:
            imports[node.domain] = old.get(node.domain, 1)


def _drop_unused(model: ir.Model) -> None:
    for name, value in list(model.graph.initializers.items()):
        if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
            del model.graph.initializers[name]


def _ir_of_opset(version: int) -> int:
    """The IR version that came with an opset: what a runtime of its time loads."""
    found: int = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", version)], ignore_unknown=True)
    return found


def _raise_ir(model: ir.Model, floor: int) -> list[Rise]:
    need, reason = 3, ""
    if any(not v.is_graph_input() for g in graphs(model) for v in g.initializers.values()):
        need, reason = 4, "initializers that are not graph inputs"
    if model.functions and need < 8:
        need, reason = 8, "model-local functions"
    for kind in {v.dtype for v in _values(model) if v.dtype is not None}:
        version = max((v for prefix, v in _IR_OF_DTYPE.items() if kind.name.startswith(prefix)), default=3)
        if version > need:
            need, reason = version, f"the type {kind.name.lower()}"
    model.ir_version = max(floor, need)
    return [Rise("ir_version", floor, need, reason)] if need > floor else []


def _values(model: ir.Model) -> list[ir.Value]:
    out = [v for g in graphs(model) for v in (*g.inputs, *g.initializers.values())]
    return out + [v for n in all_nodes(model) for v in n.outputs]


def origin(model: ir.Model) -> tuple[int, int]:
    """Opset and IR version of the input that this model was loaded from (its own, for a model made by hand)."""
    meta = model.graph.meta  # survives ir.Model.clone, unlike model.meta
    return meta.get(ORIGIN, model.opset_imports.get("", WORKING)), meta.get(ORIGIN_IR, model.ir_version)
