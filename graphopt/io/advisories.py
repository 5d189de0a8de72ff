"""What the user should know about a model that was just loaded: randomness, foreign operators, and shapes that the file states wrongly."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence

import onnx
import onnx_ir as ir

from graphopt.core.remarks import Remarks, plural
from graphopt.graph.dims import is_opaque
from graphopt.graph.fold import is_random
from graphopt.graph.opset.node_form import WORKING, schema
from graphopt.graph.opset.versions import WHY
from graphopt.graph.questions import ISLAND, all_nodes
from graphopt.io.order import MOVED

_MADE_UP = 500_000  # the first number of symbols made up here; inference of a whole model counts from 0, of single nodes from 1,000,000


def random_nodes(model: ir.Model, remarks: Remarks) -> None:
    """Warn about nodes that make every run differ, so that no comparison of outputs can be trusted."""
    random = [n for n in all_nodes(model) if n.domain == "" and is_random(n)]
    live = [n.name or "" for n in random if n.op_type == "Dropout"]
    if live:
        text = f"{len(live)} live Dropout nodes: exported in training mode, outputs change from run to run; export the model after model.eval()"
        remarks.warning(live[0], text, nodes=live)
    others = [n.name or "" for n in random if n.op_type != "Dropout"]
    if others:
        remarks.warning(others[0], f"{len(others)} random nodes: outputs change from run to run", nodes=others)


def foreign_nodes(model: ir.Model, remarks: Remarks, reasons: Mapping[ir.Node, str]) -> None:
    """Name each node of a runtime's own domain, and each without schema, behind which shapes are unknown. `reasons`: why one could not be read."""
    for node in all_nodes(model):
        name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        if node.domain == ISLAND:
            text = f"{node.op_type} has no form at opset {WORKING}: {node.meta.get(WHY)}"
            remarks.missed(node.name or "", f"{text}; the file stays at opset {model.opset_imports[ISLAND]}, and no pass reads this node")
        elif not _known(node):
            why = f" ({reasons[node]})" if node in reasons else ""
            text = f"shapes end here: {name} has no schema{why}; the node is left alone, and what depends on it is optimized less"
            remarks.warning(node.name or "", text, outputs=[v.name for v in node.outputs])
        elif not _standard(node):
            why = reasons.get(node, "no pass reads it")
            remarks.missed(node.name or "", f"{name} is kept as it is: it belongs to one runtime, and {why}")


def _standard(node: ir.Node) -> bool:
    if node.domain == ISLAND:
        return True
    return schema(node.op_type, WORKING) is not None if node.domain == "" else onnx.defs.has(node.op_type, node.domain)


def _known(node: ir.Node) -> bool:
    """True if the shapes of its outputs can follow from its inputs: the ONNX standard has it, or shape inference knows it."""
    from onnx_shape_inference import registry

    registry.collect()
    return _standard(node) or registry.get(node.domain, node.op_type, version=1 if node.domain else WORKING) is not None


def take_claims(model: ir.Model) -> dict[ir.Value, ir.Shape]:
    """The shapes that the file states. Of an operator without schema the rank is believed, and no more: nothing may be built on a claim.

    Each of its axes has an unknown size of its own, the same for all that read it.
    """
    declared, serial = {}, itertools.count(_MADE_UP)
    for node in all_nodes(model):
        for value in node.outputs:
            if value.shape is not None:
                declared[value] = value.shape
                if not _known(node) and not value.is_graph_output():
                    value.shape = ir.Shape([f"_d{next(serial)}" for _ in value.shape])
    return declared


def shape_claims(model: ir.Model, declared: dict[ir.Value, ir.Shape], reason: str | None, remarks: Remarks) -> None:
    """Name the shapes that contradict what follows from the inputs, and where inference gave up (`reason`)."""
    if reason is not None:
        remarks.warning("", f"shape inference ended early: {reason}")
    symbols = input_symbols(model)
    for value, claimed in declared.items():
        if value.shape is None or value.producer() is None or _agree(claimed, value.shape, symbols):
            continue
        text = f"the file states the shape {claimed}, but {value.shape} follows from the inputs; "
        if value.is_graph_output():
            remarks.warning(value.name or "", f"{text}it is not believed, and written as it came")
        else:
            remarks.warning(value.name or "", f"{text}the statement is dropped", repaired=True)


def disorder(model: ir.Model, repeated: Sequence[str], remarks: Remarks) -> None:
    """What is wrong about the order and the names of nodes, and mended."""
    if model.graph.meta.pop(MOVED, False):
        remarks.warning("", "the nodes of the file were not in topological order; they are sorted", repaired=True)
    if repeated:
        remarks.warning(repeated[0], f"{plural(len(repeated), 'name')} belonged to several nodes; each has one of its own", repaired=True)


def decided(count: int, remarks: Remarks) -> None:
    verb = "has a condition that is known; the branch that runs stands in its place"
    remarks.warning("", f"{plural(count, 'If')} {verb if count == 1 else verb.replace('has', 'have', 1)}", repaired=True)


def contradicted(dropped: Iterable[tuple[ir.Value, str, str]], remarks: Remarks) -> None:
    """Name the shapes that ONNX's own inference contradicts."""
    for value, ours, theirs in dropped:
        remarks.warning(value.name or "", f"its shape {ours} follows from the inputs, and ONNX says {theirs}; nothing is built on either")


def _agree(claimed: Iterable[object], inferred: Iterable[object], symbols: frozenset[str]) -> bool:
    left, right = list(claimed), list(inferred)
    if len(left) != len(right):
        return False
    for a, b in zip(left, right, strict=True):
        if isinstance(a, int) and isinstance(b, int) and a != b:
            return False
        if str(a) in symbols and not isinstance(b, int) and not is_opaque(b) and str(a) != str(b) and not _capped(str(a), str(b)):
            return False
    return True


def _capped(symbol: str, inferred: str) -> bool:
    """Min(512, s) is s for every size that the model takes."""
    return re.fullmatch(rf"Min\(\d+, {re.escape(symbol)}\)", inferred) is not None


def input_symbols(model: ir.Model) -> frozenset[str]:
    """The names of the symbolic dimensions of the graph inputs."""
    dims = itertools.chain.from_iterable(v.shape for v in model.graph.inputs if v.shape is not None)
    return frozenset(str(d.value) for d in dims if not isinstance(d, int) and d.value is not None)
