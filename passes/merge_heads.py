"""merge-heads: similar heads of an attention become one, or key and value heads are shared by more queries."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.heads import Heads, Units
from graphopt.calibration.attention_maps import map_distances
from graphopt.calibration.averages import Averages
from graphopt.compress.budget import Menu, solve
from graphopt.compress.prune.merge import Asked, Merging, unmergeable
from graphopt.compress.prune.pool import pool
from graphopt.compress.prune.refit import fit_behind
from graphopt.compress.prune.units import carry_out, planned
from graphopt.compress.weights import Editor
from graphopt.core.contract import Context, Pass
from graphopt.core.options import exclusive, option
from graphopt.core.strength import Dial
from graphopt.rewrite.slicing.close import Slicing
from graphopt.rewrite.slicing.plan import Refusal
from graphopt.run.observe import Limited, observable


@dataclasses.dataclass(frozen=True)
class MergeHeads(Pass):
    """Let one head stand for several that are alike, or (`kv-heads`) let more query heads share a key and value head.

    Merged heads: clusters grow by average linkage, over all layers, where it costs least (distance times what the heads contribute). The head
    that stays gets the best rank-limited query and key for the mean of the cluster's scores, and the value and output projection that add most
    of what the whole cluster added: all turns of a head's features are tried at once by a singular value decomposition, where aligning the heads
    (orthogonal Procrustes) and averaging would try rotations alone. Under a rotary embedding features are turned as complex numbers, with which
    it commutes. Behind norms of each head the head that stays keeps its own query and key.

    `kv-heads=N` makes multi-head attention grouped-query attention (Ainslie et al. 2023): key heads are grouped by what pooling them would cost,
    query heads move to their group, and each group gets the common key and value that are aligned best, instead of a mean. Query, key and value
    may come from one packed projection, whose key and value columns become fewer. It needs the operator Attention; run fuse-attention first.

    The output projections are refitted afterwards.

    Args:
        ratio: this fraction of all heads goes, chosen over all layers.
        heads: so many stay in each attention.
        kv_heads: so many key and value heads stay in each attention.
        by: maps (distance of attention weights) or projections (distance of scores over independent rows).
        refit: fit the output projections by least squares on the samples.
        rows: so many rows (tokens) of the samples are used.
        resize: names of inputs and outputs that may change their size with the heads (key and value caches).

    Raises:
        PipelineError: not exactly one of ratio, heads and kv-heads, or one out of range.
        SampleError: there are no samples.
    """

    ratio: float | None = option(None, above=0, below=1, what="a fraction")
    heads: int | None = option(None, least=1)
    kv_heads: int | None = option(None, least=1)
    by: str = option("maps", one_of=("maps", "projections"))
    refit: bool = True
    rows: int = option(32768, least=1)
    resize: tuple[str, ...] = ()
    exact: ClassVar[bool] = False
    samples = "needs"
    ways = exclusive("ratio", "heads", "kv_heads", says="how many heads go")
    dials = (Dial("ratio"),)

    def run(self, model: ir.Model, ctx: Context) -> int:
        self.ways.require(self)
        if self.kv_heads is not None:
            return pool(model, ctx, self.kv_heads, rows=self.rows, refits=self.refit, resize=self.resize)
        found = self._measured(model, ctx)
        clusters = _by_ratio(found, self.ratio) if self.ratio is not None else {m: _clusters(m, m.unit.heads - int(self.heads or 0)) for m in found}
        teacher = model.clone() if self.refit else model
        plan, editor, outputs = Slicing(model, resize=self.resize), Editor(model), list[str]()
        for m, merged in clusters.items():
            if not merged:
                continue
            if self._merge(ctx, m, merged, plan, editor):
                assert m.unit.output is not None
                outputs.append(str(m.unit.output.node.name))
        if not outputs:
            return 0
        editor.flush()
        carry_out(plan, ctx)
        if self.refit:
            fit_behind(model, teacher, outputs, ctx, self.rows)
        return len(outputs)

    def _merge(self, ctx: Context, m: Merging, clusters: Sequence[Sequence[int]], plan: Slicing, editor: Editor) -> bool:
        """Plan the removal of all heads of these clusters but those that stay for them, and draft their weights."""
        unit, stays = m.unit, [m.stays(cluster) for cluster in clusters]
        gone = sorted(h for cluster, kept in zip(clusters, stays, strict=True) for h in cluster if h != kept)
        try:
            planned(plan, ctx, (unit,), gone)
        except Refusal as refusal:
            ctx.remarks.missed(unit.node.name or "", f"not merged: {refusal}")
            return False
        lost = [m.write(editor, cluster) for cluster in clusters]
        listed = [sorted(map(int, cluster)) for cluster in clusters]
        text = ", ".join("+".join(map(str, cluster)) for cluster in listed)
        ctx.remarks.applied(
            unit.node.name or "", f"layer {unit.index}: heads {text} merged", layer=unit.index, merged=listed, kept=stays, removed=gone,
            of=unit.count, keys="aligned" if m.turns else "of the head that stays", lost=round(max(lost), 6),
        )  # fmt: skip
        return True

    def _measured(self, model: ir.Model, ctx: Context) -> list[Merging]:
        """The attentions whose heads can be merged; the rest is remarked on."""
        averages, asked = Averages(), list[Asked]()
        for unit in ctx.get(Units()).attention:
            reason = unmergeable(unit) or self._unsuited(model, unit)
            one = Asked(unit, averages) if reason is None else None
            if one is not None and self.by == "projections" and not one.turns:
                reason = "its query and key are not projections that can be compared; use by=maps"
            if reason is not None:
                ctx.remarks.missed(unit.node.name or "", f"not merged: {reason}")
            elif one is not None:
                asked.append(one)
        if not asked:
            return []
        samples = ctx.require_samples()
        averages.run(ctx, self.rows)
        maps = map_distances(model, Limited(samples, self.rows), {a.unit.node: a.unit.heads for a in asked}) if self.by == "maps" else {}
        few = {a: reason for a in asked if (reason := averages.too_few(*a.handles)) is not None}
        for a, reason in few.items():
            ctx.remarks.missed(a.unit.node.name or "", f"not merged: {reason}")
        asked = [a for a in asked if a not in few]
        for a in asked:
            if self.by == "maps" and a.unit.node not in maps:
                ctx.remarks.missed(a.unit.node.name or "", "not merged: its attention weights cannot be observed")
        return [a.found(averages, maps.get(a.unit.node)) for a in asked if self.by != "maps" or a.unit.node in maps]

    def _unsuited(self, model: ir.Model, unit: Heads) -> str | None:
        assert unit.output is not None
        if not observable(model, unit.output.x):
            return f"`{unit.output.x.name}` is computed inside a subgraph"
        if self.heads is not None and self.heads >= unit.heads:
            return f"it has {unit.heads} heads, and {self.heads} are to stay"
        return None


def _clusters(m: Merging, merges: int) -> list[list[int]]:
    """Clusters of two or more heads after so many merges."""
    clusters = {h: [h] for h in range(m.unit.heads)}
    for _, a, b in m.steps()[:merges]:
        clusters[a] += clusters.pop(b)
    return [sorted(c) for c in clusters.values() if len(c) > 1]


def _by_ratio(found: Sequence[Merging], ratio: float) -> Mapping[Merging, list[list[int]]]:
    """The merges of all layers that cost least together, so that a fraction of all heads is gone."""
    menus = [Menu(range(m.unit.heads), -np.arange(m.unit.heads), np.cumsum([0.0, *(cost for cost, _, _ in m.steps())])) for m in found]
    most = sum(m.unit.heads - 1 for m in found)
    choice = solve(menus, cost=-min(round(sum(m.unit.heads for m in found) * ratio), most))
    assert choice is not None
    return {m: _clusters(m, n) for m, n in zip(found, choice.settings, strict=True) if n}
