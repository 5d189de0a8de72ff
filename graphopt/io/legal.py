"""Is every node what its operator allows? Code behind the door reads attributes and inputs without asking again."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.core.errors import LoadError
from graphopt.graph.opset.node_form import WORKING, NodeForm, malformed
from graphopt.graph.questions import all_nodes, attr, bodies

_TYPES = frozenset(int(kind) for kind in ir.DataType)  # 0: as the operator has it


def check_nodes(model: ir.Model) -> None:
    """Attributes and their types, the number of inputs and outputs, and the bodies. Types of values are not looked at: a file may state them wrongly.

    Raises:
        LoadError: names the first node that no runtime takes.
    """
    source = model.opset_imports.get("", WORKING)
    for node in all_nodes(model):
        version = node.version or source
        reason = (malformed(NodeForm.of(node), version) or _unknown_type(node) or _unfit_body(node, version)) if node.domain == "" else None
        if reason is not None:
            raise LoadError(f"invalid graph: node `{node.name or ', '.join(str(v.name) for v in node.outputs)}`: {reason}; export the model again")


def _unknown_type(node: ir.Node) -> str | None:
    """Why an attribute that is an element type is none."""
    for name in ("to", "dtype", "output_dtype"):
        number = attr(node, name)
        if isinstance(number, int) and number not in _TYPES:
            return f"its attribute `{name}` is {number}, and no element type"
    return None


def _unfit_body(node: ir.Node, version: int) -> str | None:
    """Why a body takes or gives another number of values than its node has for it."""
    count, given = len(node.inputs), len(node.outputs)
    wanted = {"If": (0, given), "Loop": (count, given + 1), "Scan": (count if version > 8 else count - 1, given)}.get(node.op_type)
    if wanted is None:
        return None
    for body in bodies(node):
        found = len(body.inputs), len(body.outputs)
        if found != wanted:
            return f"the body `{body.name}` of `{node.op_type}` has {found[0]} inputs and {found[1]} outputs instead of {wanted[0]} and {wanted[1]}"
    return None
