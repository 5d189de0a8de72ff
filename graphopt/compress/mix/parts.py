"""Parts of a graph that several quantized versions of it make differently: which belong together, and how one of each is put in place."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar

import onnx_ir as ir

from graphopt.analysis.linear import Embedding, Linear, StoredOperands
from graphopt.calibration.effects import recipes
from graphopt.core.contract import Context
from graphopt.graph.questions import is_constant
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.match import Match
from graphopt.rewrite.rules import RewritePass
from graphopt.run.segments import Change, Recipe

_LARGE = 1024  # bytes; smaller constants are shared by chance, and tie nothing together


@dataclasses.dataclass(frozen=True)
class PrecisionPart:
    """Nodes that read one weight, or belong together for another reason, and so get one setting.

    Attributes:
        key: stays the same if the graph is split or quantized again.
        nodes: of the graph as it is.
        changes: label of a version -> how it makes the values of these nodes.
        nbytes: label -> bytes of all constants that are then read; "" for the graph as it is.
        cost: label -> what is to become small, in `unit`: the same bytes, or another measure.
    """

    key: Hashable
    nodes: tuple[ir.Node, ...]
    weight: str
    changes: Mapping[str, Change]
    nbytes: Mapping[str, int]
    cost: Mapping[str, float]
    unit: str = "bytes"

    @property
    def name(self) -> str:
        return self.nodes[0].name or ""


def parts_of(model: ir.Model, versions: Mapping[str, ir.Model], owner: Callable[[str], Hashable | None] = lambda weight: None) -> list[PrecisionPart]:
    """What the versions (changed clones of `model`, by label) make differently, in the order of the graph.

    Args:
        owner: names what a weight belongs to; weights of one owner are one part, whose key that is.
    """
    operands = Context(model).get(StoredOperands(casts=True))
    found = {label: recipes(model, other, label) for label, other in versions.items()}
    nodes = {str(v.name): node for node in model.graph for v in node.outputs if any(v.name in own for own in found.values())}
    groups = _TokenSets()
    keys: dict[str, Hashable] = {}
    for name, node in nodes.items():
        weight = _weight(operands.get(node))
        own = None if weight is None else owner(str(weight.name))
        keys[name] = own
        constants = [(label, v) for label, those in found.items() if name in those for v in those[name].constants if _nbytes(v) > _LARGE]
        groups.join(name, weight if own is None else own, *(constants if own is None else ()))
    result = []
    for names in groups.sets(list(nodes)):
        members = [nodes[name] for name in names]
        changes = {label: {name: those[name] for name in names if name in those} for label, those in found.items()}
        changes = {label: change for label, change in changes.items() if change}
        read = [(node, operands.get(node)) for node in members]
        sizes = {label: _size(names, read, change) for label, change in {"": {}, **changes}.items()}
        weight = _weight(read[0][1])
        key = keys[names[0]] if keys[names[0]] is not None else names[0]
        result.append(PrecisionPart(key, tuple(dict.fromkeys(members)), "" if weight is None else str(weight.name), changes, sizes, sizes))
    return result


def merged(parts: Sequence[PrecisionPart], labels: Sequence[str]) -> dict[str, Recipe]:
    """All of a graph's changes, one label for each part; "" changes nothing."""
    return {name: recipe for part, label in zip(parts, labels, strict=True) for name, recipe in part.changes.get(label, {}).items()}


class _TokenSets:
    """Sets of names that share a token."""

    def __init__(self) -> None:
        self._set: dict[str, set[str]] = {}
        self._owner: dict[Hashable, str] = {}

    def join(self, name: str, *tokens: Hashable) -> None:
        mine = self._set.setdefault(name, {name})
        for token in tokens:
            other = self._set[self._owner.setdefault(token, name)] if token is not None else mine
            if other is not mine:
                other |= mine
                self._set.update(dict.fromkeys(mine, other))
                mine = other

    def sets(self, order: Sequence[str]) -> list[list[str]]:
        groups: dict[int, list[str]] = {}
        for name in order:
            groups.setdefault(id(self._set[name]), []).append(name)
        return list(groups.values())


def _size(names: Sequence[str], operands: Sequence[tuple[ir.Node, Linear | Embedding | None]], change: Change) -> int:
    """Bytes of the constants, each once; those of nodes that stay are the weight, its scales and what the node reads itself."""
    stored: dict[ir.Value, None] = {}
    for name, (node, operand) in zip(names, operands, strict=True):
        grid = None if operand is None else operand.grid
        own = [_weight(operand), *((grid.scale, grid.zero_point) if grid is not None else ()), *node.inputs]
        stored.update(dict.fromkeys(change[name].constants if name in change else (v for v in own if v is not None and is_constant(v))))
    return sum(map(_nbytes, stored))


def _weight(operand: Linear | Embedding | None) -> ir.Value | None:
    return None if operand is None else operand.table if isinstance(operand, Embedding) else operand.weight


def _nbytes(value: ir.Value) -> int:
    assert value.const_value is not None
    return value.const_value.nbytes


@dataclasses.dataclass(frozen=True)
class RecipeMatch(Match):
    """`reads`: the values of the graph that the recipe starts from, in its order."""

    recipe: Recipe
    reads: tuple[ir.Value, ...]


class Assemble(RewritePass[RecipeMatch]):
    """Puts recipes in place; what recipes of one version have in common is made once."""

    exact: ClassVar[bool] = False

    def __init__(self, model: ir.Model, change: Change) -> None:
        values = {str(v.name): v for v in (*model.graph.inputs, *(v for node in model.graph for v in node.outputs)) if v.name}
        self.matches: dict[ir.Node, RecipeMatch] = {}
        for name, recipe in change.items():
            node = values[name].producer() if name in values else None
            if node is None or not values.keys() >= set(recipe.reads):  # out of fuel, a step before did not make it
                continue
            self.matches[node] = RecipeMatch((node,), (values[name],), recipe, tuple(values[read] for read in recipe.reads))
        self.anchors = frozenset(node.op_type for node in self.matches)  # type: ignore[misc]

    def match(self, node: ir.Node, ctx: Context) -> RecipeMatch | None:
        return self.matches.get(node)

    def build(self, op: Builder, m: RecipeMatch) -> Sequence[ir.Value]:
        label, graph, last = m.recipe.label, m.nodes[0].graph, m.recipe.nodes[-1]
        made: dict[ir.Value, ir.Value] = {}
        reads = dict(zip(m.recipe.reads, m.reads, strict=True))

        def value(v: ir.Value | None) -> ir.Value | None:
            if v is None or v in made:
                return None if v is None else made[v]
            if is_constant(v):
                return op.shared((label, v.name), lambda: _constant(op, v))
            return reads[str(v.name)]

        def first_of(old: ir.Node) -> ir.Value:
            new: Any = op.node(old.op_type, [value(v) for v in old.inputs], _domain=old.domain, _outputs=len(old.outputs), **_attributes(old))
            found: ir.Value = new if len(old.outputs) == 1 else new[0]
            return found

        for old in m.recipe.nodes:
            inner = old is not last
            first = op.shared((label, old.outputs[0].name, graph), functools.partial(first_of, old)) if inner else first_of(old)
            source = first.producer()
            assert source is not None
            made.update(zip(old.outputs, source.outputs, strict=True))
        return [made[v] for v in last.outputs]


def _constant(op: Builder, v: ir.Value) -> ir.Value:
    assert v.const_value is not None
    return op.const(v.const_value.numpy(), v.name or "const")


def _attributes(node: ir.Node) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items()}
