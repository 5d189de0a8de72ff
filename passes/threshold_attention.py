"""threshold-attention: attention weights under a threshold become zero, and the others are normalized again."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence, Set
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.linear import Linears
from graphopt.analysis.projections import behind, made_by
from graphopt.calibration.observe import Reducer, observe
from graphopt.calibration.padding import Padding
from graphopt.compress.attention_weights import Place, place_of
from graphopt.core.contract import Array, Context, Pass
from graphopt.core.options import exclusive, option
from graphopt.core.strength import Dial
from graphopt.graph.questions import all_nodes, graphs
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.engine import Driver
from graphopt.rewrite.match import Match, Miss
from graphopt.rewrite.rules import RewritePass
from graphopt.run import ort
from graphopt.run.distance import Squares
from graphopt.run.observe import observable

from ._positional import FORMS, Nearest, Patterns, sentence
from ._unread import DropUnread
from ._weights_seen import WeightHistogram, histograms

_DEFAULT = 0.01


@dataclasses.dataclass(frozen=True)
class ThresholdAttention(Pass):
    """Weights of a softmax that are below a threshold count as zero. The largest of a row always stays; rows that are masked throughout stay zero.

    Written with standard operators between the softmax and the product with the values; the operator Attention is written out for it. No runtime
    skips the zeros, so that alone makes nothing faster: it shows how many weights an attention does without, and what that costs. Heads that come
    to depend on positions and the mask only (Voita et al. 2019, "Analyzing Multi-Head Self-Attention": positional heads) need no scores.

    Args:
        threshold: of a weight, from 0 to 1; the default is 0.01.
        sparsity: instead of it: each head gets the threshold under which this part of its weights lies on the samples.
        relative: the threshold is a part of the largest weight of each row.
        constant: heads whose weights, cut, are nowhere on the samples (padding left out) further than this from one of these forms get that form:
            each row reads itself; the previous or the next key, or itself where there is none that is visible; the first visible key; all
            visible keys alike. Where all heads of an attention do, its queries and keys are not computed.

    Raises:
        PipelineError: threshold and sparsity, or one out of its range.
        SampleError: when it runs: sparsity or constant without samples.
    """

    threshold: float | None = option(None, above=0, below=1)
    sparsity: float | None = option(None, above=0, below=1)
    relative: bool = False
    constant: float | None = option(None, above=0, below=1)
    exact: ClassVar[bool] = False
    samples = "can"
    data_free = "threshold=0.01"
    ways = exclusive("threshold", "sparsity")
    dials = (Dial("threshold", mild=1e-5, unset=_DEFAULT), Dial("sparsity", mild=0.02, by=0.7), Dial("constant", mild=1e-5))

    def run(self, model: ir.Model, ctx: Context) -> int:
        if self.sparsity is not None or self.constant is not None:
            ctx.require_samples()
        anchors = [n for n in all_nodes(model) if n.op_type in _CutWeights.anchors and not n.domain]
        places = {n: p for n in anchors if isinstance(p := place_of(n, ctx), Place)}
        seen = histograms(model, ctx, places, self.relative)
        limits = {node: self._limit(seen.get(node)) for node in places}
        before = None if ctx.samples is None else model.clone()
        nearest = {} if self.constant is None else _nearest(model, ctx, limits, self.relative)
        forms = {n: found.within(self.constant or 0.0) for n, found in nearest.items()}
        made = made_by(ctx.get(Linears())) if nearest else {}
        projections = {n: {str(x.node.outputs[0].name) for x in behind(places[n].operands, made)} for n in nearest}
        changes = _CutWeights(limits, self.relative, {n: _facts(seen[n], limits[n]) for n in seen}, forms).run(model, ctx)
        if not changes and not anchors:
            ctx.remarks.missed("", "nothing to cut: the graph has no Softmax and no Attention")
        if any(forms[n] and all(forms[n]) for n in forms):
            DropUnread().run(model, ctx)
        self._tell_forms(model, ctx, nearest, projections)
        if changes and before is not None and ctx.samples is not None:
            old, new = ort.session(before), ort.session(model)
            padding, moved = Padding(before), Squares()
            for feed in ctx.samples:
                kept = padding.kept(feed)
                moved.add(kept.counted(old.run(feed)), kept.counted(new.run(feed)))
            loss = moved.relative
            told = [_facts(seen[n], limits[n])["sparsity"] for n in seen] or [0.0]
            ctx.remarks.applied("", f"{np.mean(told):.1%} of the weights become zero; the outputs move by {loss:.4g} (relative L2)", loss=loss)
        return changes

    def _limit(self, seen: WeightHistogram | None) -> Array | None:
        """The threshold [1], or of each head [heads, 1, 1]; None where nothing is known of an attention."""
        if self.sparsity is None:
            return np.array([self.threshold or _DEFAULT], np.float32)
        return None if seen is None else seen.limit(self.sparsity)

    def _tell_forms(self, model: ir.Model, ctx: Context, nearest: Mapping[ir.Node, Nearest], projections: Mapping[ir.Node, Set[str]]) -> None:
        there = {str(v.name) for n in all_nodes(model) for v in n.outputs} if nearest else set()
        for layer, (node, found) in enumerate(nearest.items()):
            tolerance = self.constant or 0.0
            say = ctx.remarks.applied if any(found.within(tolerance)) else ctx.remarks.missed
            text = sentence(found, tolerance, gone=there.isdisjoint(projections[node]))
            say(node.name or "", f"layer {layer}: {text}", layer=layer, heads=found.told(tolerance))


def _nearest(model: ir.Model, ctx: Context, limits: Mapping[ir.Node, Array | None], relative: bool) -> dict[ir.Node, Nearest]:
    """Which form each head is nearest to when all attentions are cut."""
    copy = model.clone()
    twins = dict(zip(all_nodes(copy), all_nodes(model), strict=True))
    cut = _CutWeights({twin: limits[node] for twin, node in twins.items() if node in limits}, relative, {}, {}, probe=True)
    Driver(copy, Context(copy)).round(cut)  # not cleaned: nothing reads what is observed
    for graph in graphs(copy):
        graph.sort()
    probes, gaps = {v: node for node, v in cut.probes.items() if observable(copy, v)}, collections.defaultdict[ir.Node, list[Array]](list)
    padding = Padding(copy).about((str(v.name) for v in probes), by_size=True)

    def reducer(value: ir.Value) -> Reducer:
        def add(rows: Array) -> None:
            gaps[probes[value]] += [rows.max(0)] if len(rows) else []

        return Reducer((value,), add, _of_several)

    observe(copy, ctx.require_samples(), padding, [reducer(v) for v in probes], optimize=False)
    return {twins[node]: Nearest.of(np.max(found, axis=0).reshape(len(FORMS), -1).T) for node, found in gaps.items() if found}


def _of_several(gap: Array) -> Array:
    """[batch, rows, K] -> [rows, K]; none of sequences of one position, where all forms are one."""
    return gap[:, : gap.shape[1] if gap.shape[1] > 1 else 0].reshape(-1, gap.shape[-1])


@dataclasses.dataclass(frozen=True)
class _Found(Match):
    place: Place
    limit: Array
    told: Mapping[str, Any]

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.told


@dataclasses.dataclass(frozen=True, eq=False)
class _CutWeights(RewritePass[_Found]):
    """Cuts, with the given forms of heads; `probe` also compares the cut weights with all forms, and leaves the values that tell in `probes`."""

    exact: ClassVar[bool] = False
    anchors: ClassVar[frozenset[str]] = frozenset({"Softmax", "Attention"})

    limits: Mapping[ir.Node, Array | None]
    relative: bool
    told: Mapping[ir.Node, Mapping[str, Any]]
    forms: Mapping[ir.Node, Sequence[str | None]]
    probe: bool = False
    probes: dict[ir.Node, ir.Value] = dataclasses.field(default_factory=dict, init=False)

    def match(self, node: ir.Node, ctx: Context) -> _Found | Miss | None:
        place, limit = place_of(node, ctx), self.limits.get(node)
        if place is None:
            return None
        if isinstance(place, str):
            return Miss(node, f"not cut: {place}")
        if limit is None:
            return Miss(node, "not cut: samples do not show its weights; give threshold instead of sparsity")
        return _Found((place.node,), (place.node.outputs[0],), place, limit, self.told.get(node, {"threshold": float(limit.max())}))

    def build(self, op: Builder, m: _Found) -> Sequence[ir.Value]:
        forms = self.forms.get(m.place.anchor, ())
        p = None if forms and all(forms) else self._cut(op, m.place.weights(op), m.limit)
        if any(forms):
            p = Patterns(op, m.place).mixed(forms, p)
        assert p is not None
        if self.probe and not isinstance(m.place.masks(), str):
            self.probes[m.place.anchor] = Patterns(op, m.place).gaps(p)
        return [m.place.result(op, p)]

    def _cut(self, op: Builder, p: ir.Value, limits: Array) -> ir.Value:
        last = op.const(np.array([-1], np.int64), "last")
        top, limit = op.ReduceMax(p, last, keepdims=1), op.const(limits, "threshold")
        bound = op.Mul(top, limit) if self.relative else op.Min(top, limit)
        kept = op.Where(op.GreaterOrEqual(p, bound), p, op.const(np.array(0, np.float32), "zero"))
        least = op.const(np.array(np.finfo(np.float32).tiny, np.float32), "least")
        return op.Div(kept, op.Max(op.ReduceSum(kept, last, keepdims=1), least))


def _facts(seen: WeightHistogram, limit: Array | None) -> dict[str, Any]:
    if limit is None:
        return {"sparsity": 0.0}
    told = [float(f"{x:.4g}") for x in limit.reshape(-1)]
    return {"threshold": told[0] if len(told) == 1 else told, "sparsity": round(seen.below(limit), 4)}
