"""Operators of ONNX Runtime in the input, read as standard operators where these mean exactly the same.

So a model that was optimized for the runtime is fused, pruned and quantized like any other, and other runtimes can run it. What has no exact
form stays an island, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from graphopt.core.contract import Context
from graphopt.core.remarks import Remarks
from graphopt.graph.questions import all_nodes, is_read
from graphopt.graph.shapes import infer_shapes
from graphopt.io.runtime_ops import attention, simple
from graphopt.io.runtime_ops.unread import Reader, Unread
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.dead import detach
from graphopt.rewrite.engine import Driver
from graphopt.rewrite.match import Match, Miss

_DOMAIN = "com.microsoft"  # named here and in targets/ only: nothing between the door and a target knows it
READ_HERE = "graphopt.read_here"  # graph.meta: the domain whose operators in the input became standard ones
_READERS: Mapping[str, Reader] = {**simple.READERS, **attention.READERS}
_UNDER_STANDARD = ("SimplifiedLayerNormalization",)  # the runtime has it in the standard's domain, and no schema does


def read(model: ir.Model, remarks: Remarks) -> dict[ir.Node, str]:
    """Rewrite them in place, shapes included; returns the nodes that stay, and why."""
    left: dict[ir.Node, str] = {}
    ctx = Context(model, remarks=remarks)
    for _ in range(2):  # what stands behind an operator without shapes is known the second time
        found = [node for node in all_nodes(model) if _known(node)]
        driver = Driver(model, ctx) if found else None
        left = {node: reason for node in found if driver is not None and (reason := _reason(node, driver))}
        if driver is None or len(left) == len(found):
            return left
        model.graph.meta[READ_HERE] = _DOMAIN
        driver.clean()
        infer_shapes(model)
        if not any(node.domain == _DOMAIN for node in all_nodes(model)):
            model.opset_imports.pop(_DOMAIN, None)
    return left


def _known(node: ir.Node) -> bool:
    return (node.domain == _DOMAIN and node.op_type in _READERS) or (node.domain == "" and node.op_type in _UNDER_STANDARD)


def _reason(node: ir.Node, driver: Driver) -> str:
    """Why it stays; empty if it was read."""
    op = driver.builder(node.graph)
    try:
        new = _READERS[node.op_type](node, op)
        used = [k for k, value in enumerate(node.outputs) if is_read(value)]
        if any(k >= len(new) for k in used):
            raise Unread("one of its outputs has no form in standard operators")
        return _put(node, op, {node.outputs[k]: new[k] for k in used}, driver)
    except Unread as reason:
        for made in op.nodes:
            detach(made)
        return str(reason)


def _put(node: ir.Node, op: Builder, pairs: Mapping[ir.Value, ir.Value], driver: Driver) -> str:
    name, kind = node.name or "", node.op_type
    outcome = driver.apply(op, list(pairs.values()), Match((node,), tuple(pairs)), node, {})
    if isinstance(outcome, Miss) or outcome is None:
        return "" if outcome is None else outcome.reason
    driver.ctx.remarks.applied(name, f"{kind} of the runtime is read as {', '.join(dict.fromkeys(n.op_type for n in op.nodes))}")
    return ""
