"""Multi-head attention becomes grouped-query attention: more query heads share a key and value head."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analysis.heads import Heads, Units
from graphopt.calibration.averages import Averages, centered, moments
from graphopt.compress.prune.align import balanced, planes_of, scores, values
from graphopt.compress.prune.refit import fit_behind
from graphopt.compress.prune.units import carry_out
from graphopt.compress.weights import Editor, known, unfit
from graphopt.core.contract import Array, Context
from graphopt.graph.attention_node import AttentionNode
from graphopt.graph.layout import Tracer
from graphopt.rewrite.slicing.close import Slicing
from graphopt.rewrite.slicing.plan import Refusal, Remedy
from graphopt.run.observe import observable


def pool(model: ir.Model, ctx: Context, kv_heads: int, *, rows: int, refits: bool, resize: Sequence[str]) -> int:
    """Leave `kv_heads` key and value heads in every attention whose number of them is a multiple; see MergeHeads."""
    averages, plan = Averages(), Slicing(model, resize=resize)
    wanted, todo = list[_Pooling](), list[_Pooling]()
    for unit in ctx.get(Units()).attention:
        reason = _unfit(model, unit, kv_heads)
        if reason is None:
            wanted.append(_Pooling(unit, kv_heads, averages))
        else:
            ctx.remarks.missed(unit.node.name or "", f"key heads not pooled: {reason}")
    averages.run(ctx, rows)
    for p in wanted:
        reason = averages.too_few(*p.asked)
        try:
            if reason is None:
                _remove(plan, ctx, p.unit, kv_heads)
                todo.append(p)
        except Refusal as refusal:
            reason = f"{refusal}; name it in resize" if refusal.remedy is Remedy.PORT else str(refusal)
        if reason is not None:
            ctx.remarks.missed(p.unit.node.name or "", f"key heads not pooled: {reason}")
    if not todo:
        return 0
    teacher, editor = model.clone() if refits else model, Editor(model)
    for p in todo:
        groups = p.groups(averages)
        p.write(averages, editor, groups)
        listed, unit = [[int(h) for h in g] for g in groups], p.unit
        text = ", ".join("+".join(map(str, g)) for g in listed)
        told = {"layer": unit.index, "groups": listed, "before": unit.kv_heads, "after": kv_heads}
        ctx.remarks.applied(unit.node.name or "", f"layer {unit.index}: key and value heads {text} pooled", **told)
    editor.flush()
    carry_out(plan, ctx, caches=True)
    if refits:
        fit_behind(model, teacher, [str(p.unit.output.node.name) for p in todo if p.unit.output is not None], ctx, rows)
    return len(todo)


def _remove(plan: Slicing, ctx: Context, unit: Heads, kv_heads: int) -> None:
    """Plan that key heads from `kv_heads` on go, and their value heads with them, while all query heads stay.

    Raises:
        Refusal: it cannot be done, or must not for want of fuel; nothing is planned.
    """
    gone, (_, key, _) = np.arange(unit.kv_heads) >= kv_heads, unit.operands
    plan.regrouped.add(unit.node)
    try:
        with plan.together():
            axis, mask = (key.dim_axis, np.repeat(gone, key.dim)) if key.flat else (1, gone)
            plan.remove(key.value, axis, mask, inside=unit.inside)
            if not ctx.fuel.burn():
                raise Refusal(ctx.fuel.why)
    except Refusal:
        plan.regrouped.discard(unit.node)
        raise


def _unfit(model: ir.Model, unit: Heads, kv_heads: int) -> str | None:
    a = AttentionNode.of(unit.node)
    if a is None:
        return "it is spelled out in primitive operators; run fuse-attention first"
    if unit.output is None:
        return "its output projection is not known"
    if unit.kv_heads <= kv_heads or unit.kv_heads % kv_heads:
        return f"it has {unit.kv_heads} of them, which is no multiple of {kv_heads} above it"
    if a.mask is not None and a.mask_differs and not _is_repeated(a.mask):
        return f"its mask `{a.mask.name}` differs from head to head"
    if a.shown is not None:
        return "the model returns its attention weights"
    for o, what in zip(unit.operands, ("query", "key", "value"), strict=True):
        if o.linear is None:
            return f"the {what}: {o.reason}"
        if o.heads != len(o.columns):
            return f"the {what} has {o.heads} heads, and its projection makes {len(o.columns)}"
        if not observable(model, o.linear.output):
            return f"`{o.linear.output.name}` is computed inside a subgraph"
    q, k, v = unit.operands
    if (q.rotary is None) != (k.rotary is None) or v.rotary is not None:
        return "query and key are not turned alike"
    made = [(o.linear.weight, int(c)) for o in unit.operands if o.linear is not None for c in o.columns.reshape(-1)]
    if len(set(made)) < len(made):
        return "query, key and value have features in common"
    return next((r for x in (q.linear, k.linear, v.linear, unit.output) if (r := unfit(x)) is not None), None)


def _is_repeated(mask: ir.Value) -> bool:
    """True for a mask that is repeated along its axis of heads."""
    view = Tracer().view(mask)
    return view is not None and len(view.axes) > 2 and all(atom.axis == -1 for atom in view.axes[-3])


class _Pooling:
    """One attention whose key and value heads are pooled."""

    def __init__(self, unit: Heads, kv_heads: int, averages: Averages) -> None:
        self.unit, self.kv_heads = unit, kv_heads
        q, k, v = unit.operands
        self.asked = (
            averages.ask(known(q.linear).output, "moments of heads", moments(q.columns)),
            averages.ask(known(k.linear).output, f"moments {k.rotary is None}", moments(k.columns.reshape(1, -1), means=k.rotary is None)),
            averages.ask(known(v.linear).output, "moments of all", moments(v.columns.reshape(1, -1))),
        )

    def _moments(self, a: Averages) -> tuple[Array, Array, Array]:
        """Q [kv_heads, d, d], of the queries that share a key; K [kv_heads * d]^2; V [kv_heads * value_dim]^2."""
        query, key, value = (a[handle] for handle in self.asked)
        u = self.unit
        queries = query.reshape(u.kv_heads, u.group, u.head_dim, u.head_dim).sum(1)
        return queries, key[0] if self.unit.operands[1].rotary is not None else centered(key[0]), value[0]

    def _reads(self) -> Array:
        """W W^T of the output projection for each value head, [kv_heads, value_dim, value_dim]."""
        u = self.unit
        weight = known(u.output).matrix().astype(np.float64).reshape(u.kv_heads, u.group, u.value_dim, -1)
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
        turn_q, turn_k = scores(query, key, planes_of(self.unit.operands[1].rotary, self.unit.head_dim), self.unit.head_dim)
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
        q, k, v = self.unit.operands
        out = known(u.output)
        weight = out.matrix().astype(np.float64).reshape(u.heads, u.value_dim, -1)
        rows, to = np.arange(u.heads * u.value_dim).reshape(u.heads, -1), 0
        for n, group in enumerate(groups):
            turn_q, turn_k = scores(*self._scores_of(queries, keys, group), planes_of(k.rotary, u.head_dim), u.head_dim)
            turn_v, back, _ = values(*_chosen(moment, reads, group, u.value_dim), u.value_dim)
            editor.columns(known(k.linear), k.columns[list(group)].reshape(-1), turn_k, k.columns[n])
            editor.columns(known(v.linear), v.columns[list(group)].reshape(-1), turn_v, v.columns[n])
            for place, head in enumerate(group):
                for query in range(head * u.group, (head + 1) * u.group):
                    editor.columns(known(q.linear), q.columns[query], turn_q[place * u.head_dim : (place + 1) * u.head_dim], q.columns[to])
                    editor.rows(out, rows[to], back[:, place * u.value_dim : (place + 1) * u.value_dim] @ weight[query])
                    to += 1


def _places(group: Sequence[int], width: int) -> Array:
    return np.asarray((np.array(group)[:, None] * width + np.arange(width)).reshape(-1))


def _chosen(moment: Array, reads: Array, group: Sequence[int], width: int) -> tuple[Array, Array]:
    """E[v v^T] of these heads, and W W^T in blocks: each reads its own values alone."""
    places = _places(group, width)
    squares = np.zeros((len(places), len(places)))
    for k, head in enumerate(group):
        squares[k * width : (k + 1) * width, k * width : (k + 1) * width] = reads[head]
    return moment[np.ix_(places, places)], squares
