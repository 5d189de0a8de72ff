"""The model as blocks: embeddings, layers of attention, FFN and norms, and what stands before and behind them.

Read off the fused graph. An attention owns the projections that its query, key and value come from and the one that its result goes to; an FFN
is a projection whose input is an elementwise function of other projections. Layers follow the order of the graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import onnx_ir as ir

from graphopt.analysis.formulas.masks import MaskReader, MeaningReader
from graphopt.analysis.linear import Embeddings, Linear, Linears
from graphopt.analysis.projections import Made, ahead, behind, made_by
from graphopt.core.contract import Analysis, Context
from graphopt.graph.attention_node import AttentionNode
from graphopt.graph.questions import all_nodes, consumers, is_constant, producer, scalar

_LAYOUT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Split", "Slice", "Gather", "Expand", "Flatten", "Cast")
_ACTIVATIONS = ("Gelu", "Relu", "Sigmoid", "Tanh", "Elu", "Softplus", "HardSwish", "HardSigmoid", "LeakyRelu", "Mish", "Selu", "Erf", "Clip", "PRelu")
_CODES = ("QuantizeLinear", "DynamicQuantizeLinear", "DequantizeLinear")
_ARITHMETIC = ("Mul", "Add", "Sub", "Div", "Pow", "Dropout", *_CODES)
_NORMS = ("LayerNormalization", "RMSNormalization")
_DEPTH = 16


@dataclasses.dataclass(frozen=True)
class AttentionBlock:
    """`kind`: self or cross; `mask`: what is known of it; `projections`: query, key, value and output, as far as they were found."""

    node: ir.Node
    kind: str
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    rotary: bool
    mask: str
    projections: tuple[Linear, ...]

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        return (self.node, *(x.node for x in self.projections))


@dataclasses.dataclass(frozen=True)
class FfnBlock:
    """up (and gate), an elementwise function, down: [.., width] -> [.., inner] -> [.., out]."""

    up: tuple[Linear, ...]
    down: Linear
    activation: str

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        return (*(x.node for x in self.up), self.down.node)

    @property
    def gated(self) -> bool:
        return self.down.in_features < sum(x.out_features for x in self.up)


@dataclasses.dataclass
class Layer:
    attention: list[AttentionBlock] = dataclasses.field(default_factory=list)
    ffn: list[FfnBlock] = dataclasses.field(default_factory=list)
    norms: list[ir.Node] = dataclasses.field(default_factory=list)

    @property
    def blocks(self) -> list[AttentionBlock | FfnBlock]:
        return [*self.attention, *self.ffn]


@dataclasses.dataclass(frozen=True)
class ModelStructure:
    """`before` and `behind`: projections (and convolutions) in front of the first layer and after the last one: input projection, head."""

    embeddings: tuple[tuple[int, int], ...]
    tables: tuple[ir.Value, ...]
    layers: tuple[Layer, ...]
    before: tuple[ir.Node, ...]
    behind: tuple[ir.Node, ...]
    norms: tuple[ir.Node, ...]


@dataclasses.dataclass(frozen=True)
class Structure(Analysis[ModelStructure]):
    """The blocks of a fused graph (canonicalize, the fuse passes)."""

    def compute(self, model: ir.Model, ctx: Context) -> ModelStructure:
        order = {node: k for k, node in enumerate(all_nodes(model))}
        linears = ctx.get(Linears(casts=True))
        made = made_by(linears)
        masks = ctx.get(MaskReader())
        attention = [block for node in order if (block := _attention(node, made, masks)) is not None]
        owned = {x.node for block in attention for x in block.projections}
        ffn: list[FfnBlock] = []
        for down in linears:
            found = None if down.node in owned else _ffn(down, made, owned)
            if found is not None:
                ffn.append(found)
                owned.update(found.nodes)
        layers, first, last = _layers(attention, ffn, order)
        rest = [n for n in order if n not in owned and (n in {x.node for x in linears} or n.op_type == "Conv") and n.domain == ""]
        norms = [n for n in order if n.domain == "" and n.op_type in _NORMS]
        outer = _place_norms(norms, layers, order)
        lookups = ctx.get(Embeddings(casts=True))
        tables = tuple(dict.fromkeys(e.table for e in lookups))
        sizes = {e.table: (e.rows, e.width) for e in lookups}
        return ModelStructure(
            tuple(sizes[t] for t in tables), tables, tuple(layers),
            tuple(n for n in rest if order[n] < first), tuple(n for n in rest if order[n] > last), tuple(outer),
        )  # fmt: skip


def _attention(node: ir.Node, made: Made, masks: MeaningReader) -> AttentionBlock | None:
    a = AttentionNode.of(node)
    if a is None:
        return None
    q, k, v = (next(iter(behind((value,), made)), None) for value in a.operands)
    out = ahead(a.result, made, (*_LAYOUT, "Mul", *_NORMS, *_CODES), alone=False)
    kind = "cross" if q is not None and k is not None and q.x is not k.x else "self"
    rotary = producer(_skip_layout(a.q), "RotaryEmbedding") is not None
    projections = tuple(dict.fromkeys(x for x in (q, k, v, out) if x is not None))
    return AttentionBlock(node, kind, a.heads, a.kv_heads, a.head_dim, a.value_dim, rotary, _mask_text(a.mask, masks), projections)


def _mask_text(mask: ir.Value | None, masks: MeaningReader) -> str:
    if mask is None:
        return "none"
    expand = producer(mask, "Expand")
    for value in (mask, expand.inputs[0] if expand is not None else None):
        where = producer(value, "Where")
        keep = value if value is not None and value.dtype == ir.DataType.BOOL else where.inputs[0] if where is not None else None
        if where is not None and scalar(where.inputs[1]) != 0.0:
            keep = None
        facts = None if keep is None else masks.facts(keep)
        if facts is not None:
            window = f" {facts.window}" if facts.window is not None else ""
            return " + ".join(facts.kinds) + window if facts.kinds else "none"
    return "bias" if is_constant(mask) else "additive"


def _skip_layout(value: ir.Value | None) -> ir.Value | None:
    node = producer(value, *_LAYOUT)
    return value if node is None else _skip_layout(node.inputs[0])


def _ffn(down: Linear, made: Made, owned: set[ir.Node]) -> FfnBlock | None:
    ups: dict[Linear, None] = {}
    activations: set[str] = set()
    todo = [down.x]
    seen: set[ir.Value] = set()
    while todo and len(seen) < 4 * _DEPTH:
        value = todo.pop()
        if value in seen or is_constant(value):
            continue
        seen.add(value)
        up = made.get(value)
        if up is not None:
            if up.node in owned:
                return None
            ups[up] = None
            continue
        node = producer(value, *_ACTIVATIONS, *_LAYOUT, *_NORMS, *_ARITHMETIC)
        if node is None:
            return None
        activations |= {node.op_type} & set(_ACTIVATIONS)
        todo += [v for v in (node.inputs[:1] if node.op_type in _LAYOUT else node.inputs) if v is not None]
    if not ups or not activations:
        return None
    return FfnBlock(tuple(reversed(ups)), down, _name(activations))


def unread(model: ir.Model, ctx: Context) -> list[tuple[ir.Node, str]]:
    """The activations that belong to no FFN because something else than elementwise operators and layout stands between them and a projection."""
    linears = ctx.get(Linears(casts=True))
    made, readers = made_by(linears), {x.node for x in linears}
    seen_through = {*_ACTIVATIONS, *_LAYOUT, *_NORMS, *_ARITHMETIC}
    found: list[tuple[ir.Node, str]] = []
    for node in (n for n in all_nodes(model) if n.op_type in _ACTIVATIONS and n.domain == ""):
        before = _barrier(node, lambda n: [v.producer() for v in n.inputs if v is not None and v not in made], seen_through)
        behind = _barrier(node, lambda n: [r for v in n.outputs for r in consumers(v) if r not in readers], seen_through)
        for barrier, place in ((before, "before"), (behind, "behind")):
            if barrier is not None:
                what = f"{barrier.op_type} `{barrier.name}` {place} it is neither elementwise nor a MatMul or Gemm with a stored weight"
                found.append((node, f"its neurons are not known: {what}"))
                break
    return found


def _barrier(start: ir.Node, following: Callable[[ir.Node], Iterable[ir.Node | None]], seen_through: Collection[str]) -> ir.Node | None:
    """The first node in one direction that is not seen through."""
    todo, seen = [start], {start}
    while todo:
        for node in following(todo.pop(0)):
            if node is None or node in seen or (node.op_type == "Constant" and not node.domain):
                continue
            if node.domain or node.op_type not in seen_through:
                return node
            seen.add(node)
            todo.append(node)
    return None


def _name(activations: set[str]) -> str:
    if activations == {"Sigmoid"}:
        return "SiLU"
    return " ".join(sorted(activations))


def _layers(attention: Sequence[AttentionBlock], ffn: Sequence[FfnBlock], order: Mapping[ir.Node, int]) -> tuple[list[Layer], int, int]:
    """A new layer starts at an attention behind an FFN, or at one of the kind that the layer has already."""
    blocks: list[tuple[int, AttentionBlock | FfnBlock]] = [(order[b.node], b) for b in attention]
    blocks += [(order[b.down.node], b) for b in ffn]
    layers: list[Layer] = []
    for _, block in sorted(blocks, key=lambda b: b[0]):
        if not layers or (isinstance(block, AttentionBlock) and (layers[-1].ffn or block.kind in {a.kind for a in layers[-1].attention})):
            layers.append(Layer())
        if isinstance(block, AttentionBlock):
            layers[-1].attention.append(block)
        else:
            layers[-1].ffn.append(block)
    places = [order[n] for _, b in blocks for n in b.nodes]
    return layers, min(places, default=len(order)), max(places, default=len(order))


def _place_norms(norms: Iterable[ir.Node], layers: Sequence[Layer], order: Mapping[ir.Node, int]) -> list[ir.Node]:
    """A norm belongs to the layer whose blocks stand around it, or next behind it (before the first block) or before it."""
    spans = [(min(places), max(places), layer) for layer in layers if (places := [order[n] for b in layer.blocks for n in b.nodes])]
    outer: list[ir.Node] = []
    for norm in norms:
        reads = {order.get(n, -1) for v in norm.outputs for n in consumers(v)}
        inside = next((layer for low, high, layer in spans if low <= order[norm] <= high or any(low <= r <= high for r in reads)), None)
        after = max((s for s in spans if s[1] < order[norm]), key=lambda s: s[1], default=None)
        if inside is not None:
            inside.norms.append(norm)
        elif after is not None and after[2] is not spans[-1][2]:
            after[2].norms.append(norm)
        else:
            outer.append(norm)
    return outer
