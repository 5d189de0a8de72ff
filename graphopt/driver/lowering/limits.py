"""What a limit on the opset, or on operators that are not standard, means for every target that writes ONNX."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt.core.contract import Artifact, Context, Pass
from graphopt.core.errors import TargetError
from graphopt.graph.opset import versions
from graphopt.graph.questions import all_nodes
from graphopt.io.runtime_ops.read import READ_HERE


@dataclasses.dataclass(frozen=True)
class KeepWithin(Pass):
    """Makes the limits hold for a model that no other pass changes, too: it is written anew, and not as the bytes that it came as.

    Args:
        opset: what the artifact must not exceed.
        without: a domain whose operators it must not have.
    """

    opset: int | None = None
    without: str = ""

    @property
    def binding(self) -> bool:
        return True

    def run(self, model: ir.Model, ctx: Context) -> int:
        meta, (floor, _) = model.graph.meta, versions.origin(model)
        changes = 0
        if self.opset is not None and floor > self.opset:
            ctx.remarks.applied("", f"the artifact is written for opset {self.opset}; the input has {floor}", before=floor, after=self.opset)
            meta[versions.ORIGIN] = self.opset
            changes += 1
        found = foreign_node(model, self.without)
        if found is not None and not meta.get(_TOLD):
            ctx.remarks.warning(found.name or "", f"{found.domain}::{found.op_type} came with the input; with vendor=false it cannot be saved")
            meta[_TOLD] = True
            changes += 1
        if self.without and found is None and meta.pop(READ_HERE, "") == self.without:
            ctx.remarks.applied("", f"the input's operators of {self.without} are written as standard ones")
            changes += 1
        return changes


_TOLD = "graphopt.vendor_told"  # graph.meta: the warning was given


def save_within(model: ir.Model, path: Path, opset: int | None, without: str = "") -> Artifact:
    """Write the artifact, at no newer opset than `opset`, and without operators of the domain `without`.

    Raises:
        TargetError: a node needs more; it is named.
        SaveError: the file cannot be written.
    """
    from graphopt.io.save import save

    found = foreign_node(model, without)
    if found is not None:
        where = f"node `{found.name}` is {found.domain}::{found.op_type}"
        raise TargetError(f"cannot write the artifact without vendor operators: {where}, and came with the input; leave out vendor=false")
    return save(model, path, opset=opset)


def foreign_node(model: ir.Model, domain: str) -> ir.Node | None:
    """The first node of that domain, if one is given."""
    return next((n for n in all_nodes(model) if domain and n.domain == domain), None)


def vendor_report(model: ir.Model, domain: str) -> dict[str, Any]:
    """`vendor_ops`: how many nodes of each of the runtime's own operators there are; such an artifact runs on that runtime only."""
    return {"vendor_ops": dict(Counter(node.op_type for node in all_nodes(model) if domain and node.domain == domain))}
