"""canonicalize: one spelling of a graph, so that recognizers stay small."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.core.contract import Context, Pass
from graphopt.graph.fold import Folder, known_integers
from graphopt.graph.questions import all_nodes, graphs, is_constant, is_read
from graphopt.graph.shapes import infer_shapes
from graphopt.io.inline import decided_ifs
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.dead import detach, remove_dead
from graphopt.rewrite.engine import Driver
from graphopt.rewrite.match import Match, Miss

from . import _algebra, _einsum, _layout, _merge
from ._algebra import Rewritten

_SWEEPS = 12  # rules that undo each other from sweep to sweep stop here,
_PER_NODE = 16  # and within one sweep here: so many changes for each node of the graph
_SHOWN = 5  # names in one remark

_ARITHMETIC = (_algebra.constant_on_the_right, _algebra.neutral_element, _layout.unexpanded)
_RULES: Mapping[str, Sequence[Callable[[ir.Node, Builder], Rewritten]]] = {
    "Add": (*_ARITHMETIC, _layout.bias_before_split),
    "Mul": (*_ARITHMETIC, _algebra.chained_scales),
    "Sub": (_algebra.neutral_element, _algebra.subtraction, _layout.unexpanded),
    "Div": (_algebra.neutral_element, _algebra.division, _layout.unexpanded),
    "Pow": (_algebra.power,),
    "Not": (_algebra.logic,),
    **dict.fromkeys(("And", "Or", "Where"), (_algebra.logic, _layout.unexpanded)),
    **dict.fromkeys(("Identity", "Cast", "CastLike", "Tile", "Split", "Dropout"), (_layout.identity,)),
    "Einsum": (_einsum.einsum,),
    "Concat": (_layout.identity, _layout.concat),
    "Expand": (_layout.identity, _layout.expand),
    "Slice": (_layout.identity, _layout.slice_ends),
    "Transpose": (_layout.transpose,),
    "Reshape": (_layout.same_elements, _layout.batched_transpose, _layout.reshape),
    **dict.fromkeys(("Squeeze", "Unsqueeze", "Flatten"), (_layout.same_elements,)),
}


@dataclasses.dataclass(frozen=True)
class Canonicalize(Pass):
    """Rewrite a graph into one spelling, exactly.

    Nodes that do nothing go; what is fully known is folded; targets of Reshape, Expand and Slice become constants where the symbolic shapes
    prove them; scales become products with the constant on the right; equal nodes and equal weights are kept once. Public names, random
    nodes, compressed weights (8 bits or fewer, decoded in the graph) and defaults of overridable inputs are left alone.

    Attributes:
        grow: bytes that one fold may add to the model, beyond the weights that it frees.
    """

    grow: int = 1024

    def run(self, model: ir.Model, ctx: Context) -> int:
        work = _Work(model, ctx, self.grow)
        for _ in range(_SWEEPS):
            if not work.sweep():
                break
            infer_shapes(model)
            ctx.invalidate()
            if work.endless:
                break
        else:
            work.endless = True
        if work.endless:
            ctx.remarks.warning("", f"{self.name} still changes the graph after {work.total} changes; stopped there")
        work.report()
        return work.total


class _Work:
    """One run over one model: forward sweeps, each in topological order, so that a chain of any length takes one sweep."""

    def __init__(self, model: ir.Model, ctx: Context, grow: int) -> None:
        self.model, self.ctx = model, ctx
        self.driver = Driver(model, ctx)
        self.folder = Folder(model.opset_imports.get("", 1), grow)
        self.done: dict[str, list[str]] = {}  # rule -> the nodes that it replaced
        self.left: dict[ir.Node, str] = {}  # what a rule knows and leaves, and why
        self.seen: dict[Hashable, Sequence[ir.Value]] = {}
        self.total = 0
        self.dry = False  # out of fuel
        self.endless = False  # rules undo each other

    def sweep(self) -> bool:
        """True if something changed."""
        before = self.total
        limit = before + _PER_NODE * (1 + sum(1 for _ in all_nodes(self.model)))
        dead = 0 if self.ctx.fuel.empty else remove_dead(self.model)
        for _ in range(dead):
            self.ctx.fuel.burn()
        self.note("dead nodes removed", dead)
        self.merge_initializers()
        for graph in list(graphs(self.model)):
            self.seen = {}
            for node in graph:  # new nodes stand behind the one that they replace, and are visited next
                self.endless = self.endless or self.total > limit
                if not self.dry and not self.endless:
                    self.visit(node)
        decided = any(n.op_type == "If" and n.domain == "" and is_constant(n.inputs[0]) for n in all_nodes(self.model))
        if decided and not self.dry and self.ctx.fuel.burn(decided_ifs):
            self.note("decided Ifs replaced by the branch that runs", decided_ifs(self.model))
        if self.total == before:
            return False
        self.driver.clean()
        return True

    def visit(self, node: ir.Node) -> None:
        if node.domain != "":
            return
        self.left.pop(node, None)
        for rule in (self.fold, *_RULES.get(node.op_type, ()), self.seen_before):
            op = self.driver.builder(node.graph)
            got = rule(node, op)
            if isinstance(got, Miss):
                self.left[node] = got.reason
                for made in op.nodes:  # it must not count as a reader of what it names
                    detach(made)
            if got is None or isinstance(got, Miss):
                continue
            replaced = self.replace(node, op, [got] if isinstance(got, ir.Value) else got)
            if replaced or self.dry:
                if replaced:
                    self.note(rule.__name__.replace("_", " "), 1, node)
                return

    def replace(self, node: ir.Node, op: Builder, new: Sequence[ir.Value | None]) -> bool:
        """Put `new` in place of the used outputs of `node`; False if the driver refuses, or is out of fuel."""
        pairs = [(old, value) for old, value in zip(node.outputs, new, strict=False) if value is not None]
        inputs = [v for v in node.inputs if v is not None]
        folded = [v for _, v in pairs if v in op.initializers]
        if folded and all(map(is_constant, inputs)):
            self.folder.remember(inputs, folded)
        outcome = self.driver.apply(op, [v for _, v in pairs], Match((node,), tuple(old for old, _ in pairs)), node, {})
        self.dry = self.dry or outcome is None
        return outcome is not None and not isinstance(outcome, Miss)

    def fold(self, node: ir.Node, op: Builder) -> Rewritten:
        """What is fully known becomes a constant: by its shapes, or by evaluating it."""
        if node.op_type == "Identity" or not any(map(is_read, node.outputs)):
            return None
        known = known_integers(node.outputs[0]) if len(node.outputs) == 1 else None
        arrays = [known] if known is not None else self.folder.fold(node)
        if arrays is None:
            return None
        return [op.const(np.asarray(a), v.name or "folded") for a, v in zip(arrays, node.outputs, strict=True)]

    def seen_before(self, node: ir.Node, op: Builder) -> Rewritten:
        """An equal node, or a value with provably equal numbers, stands earlier in the graph."""
        keys = [_merge.node_key(node)]
        if len(node.outputs) == 1 and node.op_type != "Identity":
            keys.append(_merge.contents_key(node.outputs[0]))
        known = [k for k in keys if k is not None]
        first = next((self.seen[k] for k in known if k in self.seen), None)
        if first is not None:
            return self.merged(node, first, op)
        self.seen.update(dict.fromkeys(known, node.outputs))
        return None

    def merged(self, node: ir.Node, first: Sequence[ir.Value], op: Builder) -> Rewritten:
        if len(first) == 1:
            return _algebra.stand_in(node, first[0], op)
        public = any(v.is_graph_output() for v in node.outputs)
        return None if public else list(first)

    def merge_initializers(self) -> None:
        for copy, original in _merge.equal_initializers(self.model.graph):
            if not self.ctx.fuel.burn(str(copy.name)):
                continue
            copy.replace_all_uses_with(original)
            del self.model.graph.initializers[str(copy.name)]
            self.note("equal weights merged", 1, name=str(copy.name))

    def note(self, what: str, count: int, node: ir.Node | None = None, name: str = "") -> None:
        self.total += count
        if count:
            self.done.setdefault(what, []).extend([name or str(node.name if node else "")] * count)

    def report(self) -> None:
        for what, names in self.done.items():
            shown = [n for n in names[:_SHOWN] if n]
            self.ctx.remarks.applied(shown[0] if shown else "", f"{what}: {len(names)}", rule=what, count=len(names), nodes=shown)
        for node, reason in self.left.items():
            if node.graph is not None:
                self.ctx.remarks.missed(node.name or "", reason)
