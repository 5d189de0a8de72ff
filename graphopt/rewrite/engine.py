"""The one rewrite driver: match everything on an untouched graph, then splice.

A pass author writes `match` (pure) and `build`. The driver owns the rest: the leak check, the dtype and shape guard, names, provenance,
remarks, fuel, and the remapping of values that an earlier splice replaced inside matches that are not applied yet.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from graphopt.core.contract import Context
from graphopt.core.remarks import plural
from graphopt.graph import dims, shapes
from graphopt.graph.opset.node_form import WORKING, NodeForm, misfit
from graphopt.graph.questions import all_nodes, graphs, is_constant, shape_text
from graphopt.rewrite.builder import _SMALL, Builder
from graphopt.rewrite.dead import detach, remove_dead
from graphopt.rewrite.insert import Inserter
from graphopt.rewrite.match import Match, Miss

if TYPE_CHECKING:
    from graphopt.rewrite.rules import RewritePass


class Driver(Inserter):
    """The one place where a graph changes: guard, fuel, names, provenance. Rewrites and canonical spelling both go through `apply`."""

    def __init__(self, model: ir.Model, ctx: Context) -> None:
        super().__init__(model)
        self.ctx, self.memo = ctx, self._stored()

    def round(self, rule: RewritePass[Any]) -> tuple[int, list[Miss]]:
        """Match everything, then splice what does not overlap."""
        found: list[tuple[ir.Node, Any]] = []
        misses: list[Miss] = []
        for node in all_nodes(self.model):
            if _anchor(node) not in rule.anchors or (self.ctx.choices is not None and not self.ctx.choices.allows(rule, node)):
                continue
            got = rule.match(node, self.ctx)
            if isinstance(got, Match):
                reason = _border(got) or _leak(got)
                got = got if reason is None else Miss(node, reason)
            if isinstance(got, Miss):
                misses.append(got)
            elif got is not None:
                found.append((node, got))
        taken: set[ir.Node] = set()
        replaced: dict[ir.Value, ir.Value] = {}
        applied = 0
        for node, match in found:
            if not taken.isdisjoint(match.nodes):
                continue
            op, name = self.builder(match.nodes[-1].graph), match.outputs[0].name or ""
            current = remap(match, replaced)
            outcome = self.apply(op, list(rule.build(op, current)), current, node, replaced)
            if isinstance(outcome, Miss):
                misses.append(outcome)
                continue
            if outcome is None:
                break  # out of fuel
            self.ctx.remarks.applied(name, rule_text(match, outcome), **dict(match.facts))
            taken.update(match.nodes)
            applied += 1
        return applied, misses

    def apply(
        self, op: Builder, new: Sequence[ir.Value], match: Match, anchor: ir.Node, replaced: dict[ir.Value, ir.Value]
    ) -> Sequence[ir.Node] | Miss | None:
        """Guard what was built (`new` stands for `match.outputs`) and put it in place.

        Returns:
            the new nodes; a Miss if the guard refuses; None if out of fuel. In the last two cases nothing changed.
        """
        shapes.infer_nodes(self.model, op.nodes)
        complaint = self._illegal(op) or _mismatch(match.outputs, new) or _reads_itself(op, match)
        fuel = self.ctx.fuel
        if complaint is not None or not fuel.burn((self.ctx.remarks.current, anchor.name)):  # names of nodes stay, those of values may move
            for node in op.nodes:  # what is not put in place must not count as a reader of what it names
                detach(node)
            return None if complaint is None and fuel.empty else Miss(anchor, complaint or fuel.why)
        graph = match.nodes[-1].graph
        assert graph is not None
        names = [v.name for v in match.outputs]
        base = anchor.name or match.outputs[0].name or "node"
        self.adopt(op, base, match.nodes)
        if self.ctx.choices is not None:
            self.ctx.choices.carry(match.nodes, op.nodes)
        graph.insert_after(match.nodes[-1], op.nodes)
        for old, value, name in zip(match.outputs, new, names, strict=True):
            made_here = value.producer() in op.nodes and value not in replaced.values()
            if not made_here and not (old.is_graph_output() and can_rename(value, graph)):
                if not old.is_graph_output():
                    old.replace_all_uses_with(value)
                    replaced[old] = value
                    continue
                value = self._second(value, str(name), match, op)
            _carry(old, value)
            old.replace_all_uses_with(value, replace_graph_outputs=True)
            old.name, value.name = None, name
            replaced[old] = value
        graph.remove(match.nodes, safe=True)
        return op.nodes

    def _second(self, value: ir.Value, name: str, match: Match, op: Builder) -> ir.Value:
        """Another value of the same contents behind what was put in place, where both names are public."""
        last, keep = op.nodes[-1] if op.nodes else match.nodes[-1], self.builder(match.nodes[-1].graph)
        same = keep.Identity(value)
        self.adopt(keep, name, match.nodes)
        assert last.graph is not None
        last.graph.insert_after(last, keep.nodes)
        return same

    def _illegal(self, op: Builder) -> str | None:
        """A standard node that its schema does not take so: RotaryEmbedding of doubles, say."""
        version = self.model.opset_imports.get("", WORKING)
        reasons = (misfit(NodeForm.of(node), version) for node in op.nodes if node.domain in ("", "ai.onnx"))
        return next((f"its replacement is not legal: {reason}" for reason in reasons if reason is not None), None)

    def clean(self) -> None:
        """Dead nodes and weights out, topological order back. What the memo holds may be dead now."""
        remove_dead(self.model)
        self.memo = self._stored()
        for graph in graphs(self.model):
            graph.sort()

    def _stored(self) -> dict[Any, list[ir.Value]]:
        """The small constants that the graph has already, as `Builder.const` asks for them."""
        found: dict[Any, list[ir.Value]] = {}
        for value in self.model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes > _SMALL or not is_constant(value) or value.is_graph_output() or tensor.dtype == ir.DataType.STRING:
                continue
            array = tensor.numpy()
            if array.dtype.kind != "V":  # types that numpy lacks share one code
                found.setdefault((array.dtype.str, array.shape, array.tobytes()), []).append(value)
        return found


def can_rename(value: ir.Value, graph: ir.Graph | ir.Function) -> bool:
    """True if `value` may take the name of an output of `graph`: made in the same graph, and not public itself."""
    node = value.producer()
    return node is not None and node.graph is graph and not value.is_graph_output()


def rule_text(match: Match, new: Sequence[ir.Node]) -> str:
    made = ", ".join(n.op_type for n in new) or "nothing"
    return f"{plural(len(match.nodes), 'node')} -> {made}"


def remap(thing: Any, replaced: Mapping[ir.Value, ir.Value]) -> Any:
    """`thing` with every replaced value in it exchanged, through tuples, lists, dicts and dataclasses."""
    if not replaced:
        return thing
    if isinstance(thing, ir.Value):
        while thing in replaced:
            thing = replaced[thing]
        return thing
    if isinstance(thing, (tuple, list)):
        return type(thing)(remap(x, replaced) for x in thing)
    if isinstance(thing, dict):
        return {k: remap(x, replaced) for k, x in thing.items()}
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        fields = {f.name: remap(getattr(thing, f.name), replaced) for f in dataclasses.fields(thing) if f.init}
        return dataclasses.replace(thing, **fields)
    return thing


def _anchor(node: ir.Node) -> str:
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"


def _border(match: Match) -> str | None:
    """A match stands in one graph; what a subgraph computes cannot be moved out of it, nor into it."""
    graph = match.nodes[0].graph
    return next((f"`{n.name}` stands in another graph, outside or inside a subgraph" for n in match.nodes if n.graph is not graph), None)


def _leak(match: Match) -> str | None:
    """A value inside the match that something outside reads; a graph output and a capture by a subgraph count."""
    inside = set(match.nodes)
    for node in match.nodes:
        for value in node.outputs:
            if value in match.outputs:
                continue
            if value.is_graph_output() or any(u.node not in inside for u in value.uses()):
                return f"`{value.name}` inside the match is also used outside"
    return None


def _reads_itself(op: Builder, match: Match) -> str | None:
    gone = set(match.nodes)
    for node in op.nodes:
        for value in node.inputs:
            if value is not None and value.producer() in gone:
                return f"its replacement would read `{value.name}`, which it replaces"
    return None


def _mismatch(old: Sequence[ir.Value], new: Sequence[ir.Value]) -> str | None:
    for a, b in zip(old, new, strict=True):
        wrong = a.dtype is not None and b.dtype is not None and a.dtype != b.dtype
        if a.shape is not None and b.shape is not None:
            wrong |= len(a.shape) != len(b.shape) or any(map(_clash, a.shape, b.shape))
        if wrong:
            return f"`{a.name}` is {shape_text(a)} but its replacement is {shape_text(b)}"
    return None


def _clash(x: object, y: object) -> bool:
    """True unless two dimensions are equal or one of them is unknown."""
    return not (x == y or dims.is_opaque(x) or dims.is_opaque(y))


def _carry(old: ir.Value, new: ir.Value) -> None:
    """The replacement keeps what the graph knows and its author said about the old value."""
    new.type = old.type if old.type is not None else new.type
    if old.shape is not None:
        new.shape = old.shape
    new.doc_string = old.doc_string
    new.metadata_props.update(old.metadata_props)
    new.meta.update(old.meta)
