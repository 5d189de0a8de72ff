"""Which values of two models stand for the same place: the end of a block, by its name, which rewrites keep."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graphopt.analysis.structure import AttentionBlock, Structure
from graphopt.graph.questions import all_nodes, consumers
from graphopt.report.recognized import FUSE, RECOGNIZE, read_behind


def block_ends(graph: ir.Model, other: ir.Model, a: ir.Model, b: ir.Model, plugins: Sequence[str] = ()) -> tuple[dict[str, list[str]], str]:
    """For each block, the values that both models have and that blocks behind it read; or why there are none.

    Args:
        graph, other: the normal forms of `a` and `b`; the one that shows layers first is fused in place to read its blocks.
    """
    shared = _floats(a) & _floats(b)
    reason = "neither model shows layers of attention or FFN"
    for model in (graph, other):
        labels, names = _labels(model, plugins)
        if len(names) <= 2:  # embeddings and head alone
            continue
        ends: dict[str, list[str]] = {name: [] for name in names}
        inner: dict[str, list[str]] = {name: [] for name in names}
        for node, label in labels.items():
            for value in (v for v in node.outputs if v.name in shared):
                inner[names[label]].append(str(value.name))
                if value.is_graph_output() or any(labels.get(reader, label) != label for reader in consumers(value)):
                    ends[names[label]].append(str(value.name))
        found = {name: ends[name] or inner[name][-1:] for name in names}
        found = {name: values for name, values in found.items() if values}
        public = {str(v.name) for v in a.graph.outputs}
        if any(name.startswith("layer") and not public.issuperset(values) for name, values in found.items()):
            return found, ""
        reason = "no value inside has the same name in both models"
    return {}, reason


def _labels(model: ir.Model, plugins: Sequence[str]) -> tuple[dict[ir.Node, int], list[str]]:
    """For each node the block that it belongs to, an index into their names: the last block that it stands in or depends on."""
    structure = read_behind(f"{RECOGNIZE}, {FUSE}", model, plugins).get(Structure())
    names, own = ["embeddings"], dict.fromkeys(structure.before, 0)
    for number, layer in enumerate(structure.layers):
        for block in layer.blocks:
            kind = ("attention" if block.kind == "self" else f"{block.kind} attention") if isinstance(block, AttentionBlock) else "ffn"
            name = f"layer {number} {kind}"
            if names[-1] != name:
                names.append(name)
            own.update(dict.fromkeys(block.nodes, len(names) - 1))
    names.append("head")
    own.update(dict.fromkeys(structure.behind, len(names) - 1))
    labels: dict[ir.Node, int] = {}
    for node in all_nodes(model):
        before = (labels[p] for v in node.inputs if v is not None and (p := v.producer()) in labels)
        labels[node] = own[node] if node in own else max(before, default=0)
    return labels, names


def _floats(model: ir.Model) -> set[str]:
    """Names of what the nodes of the main graph make, but integers and booleans (types that are not declared count as floats)."""
    values = (v for node in model.graph for v in node.outputs if v.name)
    return {str(v.name) for v in values if v.dtype is None or v.dtype.is_floating_point()}
