"""Multi-head attention becomes grouped-query attention: more query heads share a key and value head."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analysis.linear import Linear
from graphopt.analysis.operands import HeadOperand, HeadOperands
from graphopt.analysis.units import Heads, Units
from graphopt.core import Array, Context
from graphopt.graph import rank, static_dim, used_once
from graphopt.interface import RESIZED
from graphopt.run.observe import observable
from graphopt.shapes import declared_shape, infer_shapes

from ._aligning import balanced, planes_of, scores, values
from ._projecting import Averages, Editor, centered, moments
from ._refit import bias_of, fit_behind, unfit

_DECLARED = "graphopt.declared"  # what the model says of an output


@dataclasses.dataclass(frozen=True)
class Caches:
    """Values of the model's interface with a key or value head on axis 1."""

    values: tuple[ir.Value, ...]
    reason: str = ""


def pool(model: ir.Model, ctx: Context, kv_heads: int, *, rows: int, refits: bool, resize: Sequence[str]) -> int:
    """Leave `kv_heads` key and value heads in every attention whose number of them is a multiple; see MergeHeads."""
    averages, todo, operands = Averages(), list[_Pooling](), ctx.get(HeadOperands())
    for unit in ctx.get(Units()).attention:
        caches = _caches(unit, resize)
        reason = _unfit(model, unit, operands.get(unit), kv_heads) or caches.reason
        if reason:
            ctx.remarks.missed(unit.node.name or "", f"key heads not pooled: {reason}")
        else:
            todo.append(_Pooling(unit, operands[unit], kv_heads, caches, averages))
    if not todo:
        return 0
    averages.run(model, ctx.require_samples(), rows)
    teacher, editor, outputs = model.clone() if refits else model, Editor(model), list[str]()
    for p in todo:
        if not ctx.fuel.burn():
            break
        groups = p.groups(averages)
        p.write(averages, editor, groups)
        listed, unit = [[int(h) for h in g] for g in groups], p.unit
        text = ", ".join("+".join(map(str, g)) for g in listed)
        told = {"layer": unit.index, "groups": listed, "before": unit.kv_heads, "after": kv_heads}
        ctx.remarks.applied(unit.node.name or "", f"layer {unit.index}: key and value heads {text} pooled", **told)
        outputs += [str(unit.output.node.name)] if unit.output is not None else []
    if not outputs:
        return 0
    editor.flush()
    for p in todo[: len(outputs)]:
        p.resize(model)
    infer_shapes(model)
    ported = sorted({str(v.name) for p in todo[: len(outputs)] for v in p.caches.values})
    if ported:
        model.graph.meta[RESIZED] = frozenset({*model.graph.meta.get(RESIZED, ()), *ported})
        ctx.remarks.warning("", f"{', '.join(f'`{n}`' for n in ported)} changed in size with the heads; feed back what the model gives")
    if refits:
        fit_behind(model, teacher, outputs, ctx, rows)
    return len(outputs)


def _unfit(model: ir.Model, unit: Heads, operands: tuple[HeadOperand, HeadOperand, HeadOperand] | None, kv_heads: int) -> str | None:
    if unit.node.op_type != "Attention":
        return "it is spelled out in primitive operators; run fuse-attention first"
    if operands is None or unit.output is None:
        return "its heads or its output projection are not known"
    if unit.kv_heads <= kv_heads or unit.kv_heads % kv_heads:
        return f"it has {unit.kv_heads} of them, which is no multiple of {kv_heads} above it"
    node = unit.node
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    if mask is not None and (rank(mask) or 0) >= 3 and static_dim(mask, -3) != 1:
        return f"its mask `{mask.name}` differs from head to head"
    if len(node.outputs) > 3 and node.outputs[3].name:
        return "the model returns its attention weights"
    for o, what in zip(operands, ("query", "key", "value"), strict=True):
        if o.linear is None:
            return f"the {what}: {o.reason}"
        if o.linear.out_features != o.columns.size or o.heads != len(o.columns):
            return f"the {what} is a part of `{o.linear.node.name}`, which makes more; the three need projections of their own"
        if not o.flat or (o.value if o.rotary is None else o.rotary.inputs[0]) is not o.linear.output:
            return f"the {what} is laid out between projection and product; it must come as [batch, rows, heads * head_dim]"
        if not observable(model, o.linear.output):
            return f"`{o.linear.output.name}` is computed inside a subgraph"
    q, k, v = operands
    if (q.rotary is None) != (k.rotary is None) or v.rotary is not None:
        return "query and key are not turned alike"
    shared = next((o.linear.bias for o in (k, v) if o.linear is not None and o.linear.bias is not None and not used_once(o.linear.bias)), None)
    if shared is not None:
        return f"the bias `{shared.name}` is shared"
    return next((r for x in (q.linear, k.linear, v.linear, unit.output) if (r := unfit(x)) is not None), None)


def _caches(unit: Heads, resize: Sequence[str]) -> Caches:
    node, found = unit.node, list[ir.Value]()
    for value in [*node.inputs[4:6], *(v for v in node.outputs[1:3] if v.name)]:
        if value is None:
            continue
        if not (value.is_graph_input() or value.is_graph_output()) or (value.is_graph_output() and value.uses()):
            return Caches((), f"its cache `{value.name}` is not read from or written to the outside directly")
        if value.name not in resize:
            what = "an output" if value.is_graph_output() else "an input"
            return Caches((), f"`{value.name}` is {what} of the model, and would change its size; name it in resize")
        found.append(value)
    return Caches(tuple(found))


class _Pooling:
    """One attention whose key and value heads are pooled."""

    def __init__(
        self, unit: Heads, operands: tuple[HeadOperand, HeadOperand, HeadOperand], kv_heads: int, caches: Caches, averages: Averages
    ) -> None:
        self.unit, self.operands, self.kv_heads, self.caches = unit, operands, kv_heads, caches
        q, k, v = operands
        assert q.linear is not None
        assert k.linear is not None
        assert v.linear is not None
        self.asked = (
            averages.ask(q.linear.output, "moments of heads", moments(q.columns)),
            averages.ask(k.linear.output, f"moments {k.rotary is None}", moments(k.columns.reshape(1, -1), means=k.rotary is None)),
            averages.ask(v.linear.output, "moments of all", moments(v.columns.reshape(1, -1))),
        )

    def _moments(self, a: Averages) -> tuple[Array, Array, Array]:
        """Q [kv_heads, d, d], of the queries that share a key; K [kv_heads * d]^2; V [kv_heads * value_dim]^2."""
        query, key, value = (a[handle] for handle in self.asked)
        u = self.unit
        queries = query.reshape(u.kv_heads, u.group, u.head_dim, u.head_dim).sum(1)
        return queries, key[0] if self.operands[1].rotary is not None else centered(key[0]), value[0]

    def _reads(self) -> Array:
        """W W^T of the output projection for each value head, [kv_heads, value_dim, value_dim]."""
        u = self.unit
        assert u.output is not None
        weight = u.output.matrix().astype(np.float64).reshape(u.kv_heads, u.group, u.value_dim, -1)
        return np.asarray(np.einsum("kgio,kgjo->kij", weight, weight))

    def groups(self, a: Averages) -> list[list[int]]:
        """Heads that are pooled, by what pooling two of them would lose of their scores and of what they add."""
        (queries, keys, moment), reads, u = self._moments(a), self._reads(), self.unit
        n, size = u.kv_heads, u.kv_heads // self.kv_heads
        cost = np.zeros((n, n))
        for i in range(n):
            for j in range(i):
                cost[i, j] = cost[j, i] = (
                    self._lost_scores(queries, keys, [i, j]) + values(*_chosen(moment, reads, [i, j], u.value_dim), u.value_dim)[2]
                )
        return balanced(cost, self.kv_heads) if size < n else [list(range(n))]

    def _lost_scores(self, queries: Array, keys: Array, group: Sequence[int]) -> float:
        query, key = self._scores_of(queries, keys, group)
        turn_q, turn_k = scores(query, key, planes_of(self.operands[1].rotary, self.unit.head_dim), self.unit.head_dim)
        rest = np.eye(len(query)) - turn_q @ turn_k.T
        return float(np.trace(rest.T @ query @ rest @ key) / max(float(np.trace(query @ key)), 1e-300))

    def _scores_of(self, queries: Array, keys: Array, group: Sequence[int]) -> tuple[Array, Array]:
        d = self.unit.head_dim
        places = _places(group, d)
        query = np.zeros((len(places), len(places)))
        for k, head in enumerate(group):
            query[k * d : k * d + d, k * d : k * d + d] = queries[head]
        return query, keys[np.ix_(places, places)]

    def write(self, a: Averages, editor: Editor, groups: Sequence[Sequence[int]]) -> None:
        """Draft the weights: query heads in the order of their groups, and a common key and value in the first places of each projection."""
        (queries, keys, moment), reads, u = self._moments(a), self._reads(), self.unit
        q, k, v = self.operands
        out = u.output
        assert q.linear is not None
        assert k.linear is not None
        assert v.linear is not None
        assert out is not None
        weight = out.matrix().astype(np.float64).reshape(u.heads, u.value_dim, -1)
        rows, to = np.arange(u.heads * u.value_dim).reshape(u.heads, -1), 0
        for n, group in enumerate(groups):
            turn_q, turn_k = scores(*self._scores_of(queries, keys, group), planes_of(k.rotary, u.head_dim), u.head_dim)
            turn_v, back, _ = values(*_chosen(moment, reads, group, u.value_dim), u.value_dim)
            editor.columns(k.linear, k.columns[list(group)].reshape(-1), turn_k, k.columns[n])
            editor.columns(v.linear, v.columns[list(group)].reshape(-1), turn_v, v.columns[n])
            for place, head in enumerate(group):
                for query in range(head * u.group, (head + 1) * u.group):
                    editor.columns(q.linear, q.columns[query], turn_q[place * u.head_dim : (place + 1) * u.head_dim], q.columns[to])
                    editor.rows(out, rows[to], back[:, place * u.value_dim : (place + 1) * u.value_dim] @ weight[query])
                    to += 1

    def resize(self, model: ir.Model) -> None:
        """Keep the first heads of key and value projections, and say how many there are."""
        node = self.unit.node
        for o in self.operands[1:]:
            assert o.linear is not None
            _cut(o.linear, o.columns[: self.kv_heads].reshape(-1))
            if o.rotary is not None:
                o.rotary.attributes["num_heads"] = ir.AttrInt64("num_heads", self.kv_heads)
        node.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", self.kv_heads)
        for value in self.caches.values:
            shape = value.shape if value.is_graph_input() else declared_shape(value)
            if shape is None or not isinstance(shape[1], int):
                continue
            sizes = ir.Shape([self.kv_heads if k == 1 else n for k, n in enumerate(shape)])
            if value.is_graph_input():
                value.shape = sizes
            else:
                value.meta[_DECLARED] = sizes


def _places(group: Sequence[int], width: int) -> Array:
    return np.asarray((np.array(group)[:, None] * width + np.arange(width)).reshape(-1))


def _chosen(moment: Array, reads: Array, group: Sequence[int], width: int) -> tuple[Array, Array]:
    """E[v v^T] of these heads, and W W^T in blocks: each reads its own values alone."""
    places = _places(group, width)
    squares = np.zeros((len(places), len(places)))
    for k, head in enumerate(group):
        squares[k * width : (k + 1) * width, k * width : (k + 1) * width] = reads[head]
    return moment[np.ix_(places, places)], squares


def _cut(linear: Linear, columns: Array) -> None:
    """Keep these output features of a stored projection, after its weight and bias were rewritten in place."""
    weight, bias = linear.matrix()[:, columns], bias_of(linear)
    pairs = [(linear.weight, weight.T if linear.transposed else weight)]
    if bias is not None and linear.bias is not None and linear.bias.const_value is not None:
        shape = tuple(linear.bias.const_value.shape.numpy())
        pairs.append((linear.bias, bias[columns].astype(np.float32).reshape((*shape[:-1], -1))))
    for value, array in pairs:
        value.const_value, value.shape = ir.tensor(np.ascontiguousarray(array, np.float32), name=value.name), ir.Shape(array.shape)
