"""What a model is: its size, operators, interface, and every attention in it with its facts, or the reason why it is none."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Unpack

import onnx_ir as ir

from graphopt.analysis.attention import AttentionFacts, Attentions
from graphopt.core.remarks import Remarks
from graphopt.graph.attention_node import AttentionNode
from graphopt.graph.questions import all_nodes, shape_text
from graphopt.graph.serialize import model_bytes
from graphopt.graph.size import Size, size
from graphopt.io import load
from graphopt.report.card import Card, card
from graphopt.report.document import Document
from graphopt.report.elements import Element, Line, Table
from graphopt.report.recognized import FUSE, RECOGNIZE, decode, read_behind
from graphopt.report.words import called, head, megabytes
from graphopt.run.race import sizes_for

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Inspection(Document):
    """Sizes and operators are those of the model as it came; `blocks` and `declined` come from its normal form, canonicalized."""

    title: ClassVar[str] = "graphopt inspect"

    source: str
    size: Size
    producer: str
    ops: Counter[str]
    inputs: list[tuple[str, str]]
    outputs: list[tuple[str, str]]
    blocks: list[Json]
    declined: list[Json]
    remarks: list[Json]
    card: Card

    def as_dict(self) -> Json:
        out = dataclasses.asdict(self.size)
        for field in dataclasses.fields(self):
            if field.name != "size":
                out[field.name] = getattr(self, field.name)
        return out | {"ops": dict(self.ops), "inputs": _ports(self.inputs), "outputs": _ports(self.outputs), "card": self.card.as_dict()}

    def elements(self) -> Sequence[Element]:
        """What it is, its interface, its card, its operators, and every attention or why it is none."""
        known = dataclasses.asdict(self.size)
        rows = [
            (key.replace("_", " "), megabytes(known[key]) if key in ("bytes", "metadata") else f"{known[key]:,}")
            for key in ("nodes", "parameters", "bytes", "metadata", "opset", "ir_version")
        ]
        ports = [("in", *p) for p in self.inputs] + [("out", *p) for p in self.outputs]
        counts = sorted(self.ops.items(), key=lambda item: (-item[1], item[0]))
        found = [
            head(),
            Table(("model", self.source), [*rows, ("producer", self.producer or "not named")]),
            Table(("", "name", "type"), ports, "inputs and outputs"),
            *self.card.elements(),
            Table(("operator", "count"), counts, "operators", "lr"),
        ]
        if self.blocks:
            columns = ("node", "heads", "kv_heads", "head_dim", "scale", "mask")
            found.append(Table(columns, [[_cell(block[c]) for c in columns] for block in self.blocks], "attention", "lrrrrl"))
        if self.declined:
            found.append(Table(("node", "reason"), [(d["node"], d["reason"]) for d in self.declined], "not attention"))
        return found if self.blocks or self.declined else [*found, Line("no attention found")]


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else "" if value is None else str(value)


def inspect(source: Any, *, plugins: Sequence[str] = (), **options: Unpack[load.LoadOptions]) -> Inspection:
    """Look at a model; nothing is changed.

    Args:
        source: what `graphopt.load` takes, with its `options`.

    Raises:
        LoadError: it cannot be read.
    """
    remarks = Remarks()
    original, model = load.load_both(source, remarks=remarks, **options)
    decode(model)
    is_file = isinstance(source, (str, os.PathLike)) and Path(source).is_file()
    blocks, declined = attention(model, tuple(plugins))
    return Inspection(
        source=called(source),
        size=Size.of(original, size(source) if is_file else model_bytes(original)),
        producer=" ".join(filter(None, (original.producer_name, original.producer_version))),
        ops=Counter(f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in all_nodes(original)),
        inputs=[(str(v.name), shape_text(v)) for v in original.graph.inputs],
        outputs=[(str(v.name), shape_text(v)) for v in original.graph.outputs],
        blocks=blocks,
        declined=declined,
        remarks=[remark.as_dict() for remark in remarks if remark.kind == "warning"],
        card=_card(model, tuple(plugins)),
    )


def _card(model: ir.Model, plugins: tuple[str, ...]) -> Card:
    """The card of a canonicalized model, which is fused for it; FLOPs for one sequence of 128, or what the model has instead."""
    return card(model, read_behind(FUSE, model, plugins), list(sizes_for(model).values())[:2][-1])


def attention(model: ir.Model, plugins: tuple[str, ...] = ()) -> tuple[list[Json], list[Json]]:
    """The attentions of a model in normal form, and the candidates that are none, in the order of the graph; `model` is canonicalized."""
    ctx = read_behind(RECOGNIZE, model, plugins)
    blocks, declined = [], []
    for node, facts in ctx.get(Attentions()).items():
        if not isinstance(facts, str):
            blocks.append({"node": node.name, "op": node.op_type} | facts.summary | {"scale": _scale(facts)})
        elif (known := _operator(node)) is not None:
            blocks.append(known)
        else:
            declined.append({"node": node.name, "reason": facts})
    return blocks, declined


def _scale(facts: AttentionFacts) -> float:
    """The scale of the scores, with what an exporter multiplied into query and key beforehand."""
    scale = facts.scale
    for operand in (facts.q, facts.k):
        choice = operand.packed() or operand.split()
        scale *= choice.step.scale if choice is not None else 1.0
    return scale


def _operator(node: ir.Node) -> Json | None:
    """The facts that an Attention operator states itself."""
    a = AttentionNode.of(node)
    if a is None or not a.heads or not a.kv_heads:
        return None
    return {
        "node": node.name,
        "op": "Attention",
        "heads": a.heads,
        "kv_heads": a.kv_heads,
        "head_dim": a.head_dim or None,
        "value_dim": a.value_dim or None,
        "scale": a.scale or None,
        "mask": [] if a.mask is None else [a.mask.name],
    }


def _ports(ports: list[tuple[str, str]]) -> list[Json]:
    return [{"name": name, "type": kind} for name, kind in ports]
