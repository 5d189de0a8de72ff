"""The card of a graph: embeddings, N x layer of attention, FFN and norms, and the rest, with parameters and FLOPs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import onnx_ir as ir

from graphopt.analysis.attention import Attentions
from graphopt.analysis.linear import stored
from graphopt.analysis.structure import AttentionBlock, FfnBlock, Layer, ModelStructure, Structure
from graphopt.core.contract import Context
from graphopt.graph.questions import is_constant, static_dim
from graphopt.graph.size import node_flops
from graphopt.report.document import Document
from graphopt.report.elements import Table

_KINDS = {"self": "self-attention", "cross": "cross-attention"}


@dataclasses.dataclass(frozen=True)
class CardLine:
    """One line of the card: what it is, how often it follows itself, parameters (stored elements) of one, and FLOPs of one."""

    part: str
    what: str
    count: int
    parameters: int
    flops: int


@dataclasses.dataclass(frozen=True)
class Card(Document):
    """`sizes`: the bindings at which FLOPs are counted; `declined`: every Softmax that is not part of an attention, with the reason."""

    title: ClassVar[str] = "graphopt card"

    parts: tuple[CardLine, ...]
    sizes: Mapping[str, int]
    declined: tuple[tuple[str, str], ...]

    def as_dict(self) -> dict[str, Any]:
        return {"parts": [dataclasses.asdict(part) for part in self.parts], "sizes": dict(self.sizes)}

    def elements(self) -> Sequence[Table]:
        """Layers that follow each other and are alike are one line."""
        rows = [
            (f"{p.count} x" if p.count > 1 else "", p.part, p.what, f"{p.parameters:,}", f"{p.flops / 1e6:,.1f}" if p.flops else "")
            for p in self.parts
        ]
        sizes = ", ".join(f"{name}={size}" for name, size in self.sizes.items()) or "static sizes"
        title = f"blocks (parameters and MFLOPs of one, at {sizes})"
        return [Table(("", "block", "what", "parameters", "MFLOPs"), rows, title, "lllrr")]


def card(model: ir.Model, ctx: Context, sizes: Mapping[str, int]) -> Card:
    """The card of a fused graph at the given sizes of its dynamic dimensions."""
    found = ctx.get(Structure())
    parts = [CardLine("embedding", f"{rows} x {width}", 1, rows * width, 0) for rows, width in found.embeddings]
    parts += [_rest("input", node, sizes) for node in found.before]
    for _, run in itertools.groupby(found.layers, _describe):
        alike = list(run)
        parts += _layer(alike[0], len(alike), sizes)
    parts += [CardLine("norm", what, count, parameters, 0) for what, count, parameters in _norms(found)]
    parts += [_rest("head", node, sizes) for node in found.behind]
    declined = tuple((n.name or "", f) for n, f in ctx.get(Attentions()).items() if isinstance(f, str) and n.op_type == "Softmax")
    return Card(tuple(parts), dict(sizes), declined)


def _describe(layer: Layer) -> tuple[str, ...]:
    return (*(_attention_text(a) for a in layer.attention), *(_ffn_text(f) for f in layer.ffn))


def _layer(layer: Layer, count: int, sizes: Mapping[str, int]) -> list[CardLine]:
    parts = [CardLine("attention", _attention_text(a), count, _parameters(a), _flops(a.nodes, sizes)) for a in layer.attention]
    parts += [CardLine("FFN", _ffn_text(f), count, _parameters(f), _flops(f.nodes, sizes)) for f in layer.ffn]
    if layer.norms:
        kinds = sorted({n.op_type for n in layer.norms})
        stored = sum(_stored(n.inputs[1:]) for n in layer.norms)
        parts.append(CardLine("norms", f"{len(layer.norms)} x {' and '.join(kinds)}", count, stored, 0))
    return parts


def _attention_text(a: AttentionBlock) -> str:
    shared = "" if a.heads == a.kv_heads else f" ({a.kv_heads} for key and value)"
    values = "" if a.value_dim == a.head_dim else f", values of {a.value_dim}"
    rotary = ", rotary" if a.rotary else ""
    return f"{_KINDS[a.kind]}, {a.heads} heads{shared} of {a.head_dim}{values}{rotary}, mask: {a.mask}"


def _ffn_text(f: FfnBlock) -> str:
    gate = " gated" if f.gated else ""
    return f"{f.up[0].in_features} -> {f.down.in_features} ({f.activation}{gate}) -> {f.down.out_features}"


def _norms(found: ModelStructure) -> list[tuple[str, int, int]]:
    counts: dict[str, list[int]] = {}
    for norm in found.norms:
        counts.setdefault(f"{norm.op_type} of {static_dim(norm.inputs[0], -1)}", []).append(_stored(norm.inputs[1:]))
    return [(what, len(stored), sum(stored) // len(stored)) for what, stored in counts.items()]


def _rest(part: str, node: ir.Node, sizes: Mapping[str, int]) -> CardLine:
    weight = next((v for v in node.inputs[1:] if v is not None and v.shape is not None), None)
    dims = " x ".join(str(d) for d in weight.shape) if weight is not None and weight.shape is not None else "?"
    behind = [found.value if (found := stored(v, casts=True)) is not None else v for v in node.inputs]  # a weight may be quantized or cast
    return CardLine(part, f"{node.op_type} {dims}", 1, _stored(behind), _flops([node], sizes))


def _parameters(block: AttentionBlock | FfnBlock) -> int:
    linears = block.projections if isinstance(block, AttentionBlock) else (*block.up, block.down)
    return sum(_stored([x.weight, x.bias]) for x in linears)


def _stored(values: Iterable[ir.Value | None]) -> int:
    return sum(v.const_value.size for v in values if v is not None and is_constant(v) and v.const_value is not None)


def _flops(nodes: Iterable[ir.Node], sizes: Mapping[str, int]) -> int:
    return sum(node_flops(node, sizes) or 0 for node in nodes)
