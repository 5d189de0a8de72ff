"""threshold-attention: attention weights under a threshold become zero, and the others are normalized again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import onnx_ir as ir

from graphopt.analysis.attention import AttentionFacts, Attentions
from graphopt.core import Array, Context, Pass
from graphopt.distance import relative_l2
from graphopt.graph import all_nodes, attr, producer
from graphopt.options import at_option
from graphopt.rewrite import Builder, Match, Miss, RewritePass
from graphopt.run import ort
from graphopt.run.observe import observable, observe

_DEFAULT = 0.01
_EDGES = np.append(np.geomspace(1e-7, 1, 281), np.inf)  # of the histogram of weights: 40 steps for each factor of ten


@dataclasses.dataclass(frozen=True)
class ThresholdAttention(Pass):
    """Weights of a softmax that are below a threshold count as zero. The largest of a row always stays; rows that are masked throughout stay zero.

    Written with standard operators between the softmax and the product with the values: no runtime skips the zeros, so nothing becomes faster. It
    shows how many weights an attention does without, and what that costs. Before fuse-attention only.

    Args:
        threshold: of a weight, from 0 to 1; the default is 0.01.
        sparsity: instead of it: each head gets the threshold under which this part of its weights lies on the samples.
        relative: the threshold is a part of the largest weight of each row.

    Raises:
        PipelineError: both of them, or one out of its range.
        SampleError: when it runs: sparsity without samples.
    """

    threshold: float | None = None
    sparsity: float | None = None
    relative: bool = False
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.threshold is not None and self.sparsity is not None:
            _refuse("sparsity", "to stand alone; `threshold` stands beside it")
        for key in ("threshold", "sparsity"):
            value = getattr(self, key)
            if value is not None and not 0 < value < 1:
                _refuse(key, f"a number between 0 and 1, found {value:g}")

    def weaker(self) -> Self | None:
        if self.sparsity is not None:
            return dataclasses.replace(self, sparsity=round(0.7 * self.sparsity, 4)) if self.sparsity > 0.02 else None
        now = self.threshold or _DEFAULT
        return dataclasses.replace(self, threshold=now / 2) if now > 1e-5 else None

    def run(self, model: ir.Model, ctx: Context) -> int:
        if self.sparsity is not None:
            ctx.require_samples()
        facts = {n: f for n, f in ctx.get(Attentions()).items() if isinstance(f, AttentionFacts)}
        seen = self._seen(model, ctx, facts)
        limits = {node: self._limit(seen.get(node)) for node in facts}
        before = None if ctx.samples is None else model.clone()
        changes = _Cut(limits, self.relative, {n: _facts(seen[n], limits[n]) for n in seen}).run(model, ctx)
        if changes and before is not None and ctx.samples is not None:
            old, new = ort.session(before), ort.session(model)
            loss = relative_l2((old.run(f) for f in ctx.samples), (new.run(f) for f in ctx.samples))
            told = [_facts(seen[n], limits[n])["sparsity"] for n in seen]
            ctx.remarks.applied("", f"{np.mean(told):.1%} of the weights become zero; the outputs move by {loss:.4g} (relative L2)", loss=loss)
        return changes

    def _seen(self, model: ir.Model, ctx: Context, facts: Mapping[ir.Node, AttentionFacts]) -> dict[ir.Node, _Histogram]:
        """What the samples show of the weights of each attention."""
        if ctx.samples is None:
            return {}
        found: dict[ir.Node, _Histogram] = {}
        values: dict[ir.Value, _Histogram] = {}
        for node, f in facts.items():
            p = f.probabilities
            if p is not None and observable(model, p) and p.shape is not None:
                by_head = len(p.shape) == 4 and p.shape[1] == f.heads
                found[node] = values[p] = _Histogram(f.heads if by_head else 1, self.relative)
        if values:
            observe(model, ctx.samples, values)
        return found

    def _limit(self, seen: _Histogram | None) -> Array | None:
        """The threshold [1], or of each head [heads, 1, 1]; None where nothing is known of an attention."""
        if self.sparsity is None:
            return np.array([self.threshold or _DEFAULT], np.float32)
        return None if seen is None else seen.limit(self.sparsity)


class _Histogram:
    """Counts of the weights of each head that are not zero, over all samples."""

    def __init__(self, heads: int, relative: bool) -> None:
        self.counts, self.relative = np.zeros((heads, len(_EDGES)), np.int64), relative

    def __call__(self, p: Array) -> None:
        if self.relative:
            p = p / np.maximum(p.max(-1, keepdims=True), np.finfo(np.float32).tiny)
        heads = np.moveaxis(p, 1, 0) if len(self.counts) > 1 else p[None]
        for head, array in enumerate(heads):
            weights = array[array > 0]
            self.counts[head] += np.bincount(np.searchsorted(_EDGES, weights, side="right"), minlength=len(_EDGES))[: len(_EDGES)]

    def limit(self, sparsity: float) -> Array:
        """The largest edge below which at most this part of the weights of a head lies: [heads, 1, 1]."""
        below = np.cumsum(self.counts, 1) / np.maximum(self.counts.sum(1, keepdims=True), 1)
        last = np.maximum((below <= sparsity).sum(1) - 1, 0)
        found: Array = _EDGES[np.minimum(last, len(_EDGES) - 2)].astype(np.float32).reshape(-1, 1, 1)
        return found

    def below(self, limit: Array) -> float:
        """The part of the weights below a limit, to the nearest edge."""
        at = np.broadcast_to(np.searchsorted(_EDGES * 0.999, limit.reshape(-1), side="right") - 1, (len(self.counts),))
        under = sum(int(row[: k + 1].sum()) for row, k in zip(self.counts, at, strict=True))
        return under / max(int(self.counts.sum()), 1)


@dataclasses.dataclass(frozen=True)
class _Found(Match):
    probabilities: ir.Value
    limit: Array
    told: Mapping[str, Any]

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.told


class _Cut(RewritePass[_Found]):
    exact: ClassVar[bool] = False
    anchors: ClassVar[frozenset[str]] = frozenset({"Softmax", "Attention"})

    def __init__(self, limits: Mapping[ir.Node, Array | None], relative: bool, told: Mapping[ir.Node, Mapping[str, Any]]) -> None:
        self.limits, self.relative, self.told = dict(limits), relative, told

    def run(self, model: ir.Model, ctx: Context) -> int:
        changes = super().run(model, ctx)
        if not changes and not any(n.op_type in self.anchors and not n.domain for n in all_nodes(model)):
            ctx.remarks.missed("", "nothing to cut: the graph has no Softmax and no Attention")
        return changes

    def match(self, node: ir.Node, ctx: Context) -> _Found | Miss | None:
        if node.op_type == "Attention":
            return Miss(node, "its weights are inside the operator", "put threshold-attention before fuse-attention")
        facts = ctx.get(Attentions())[node]
        if isinstance(facts, str):
            return None if _is_cut(node) else Miss(node, f"not cut: {facts}")
        product, p, limit = producer(facts.output, "MatMul"), facts.probabilities, self.limits.get(node)
        if limit is None:
            return Miss(node, "not cut: samples do not show its weights; give threshold instead of sparsity")
        if product is None or p is None or product.inputs[0] is not p or p.dtype != ir.DataType.FLOAT:
            return Miss(node, "not cut: its weights do not meet the values in a MatMul of FLOAT")
        return _Found((product,), (product.outputs[0],), p, limit, self.told.get(node, {"threshold": float(limit.max())}))

    def build(self, op: Builder, m: _Found) -> Sequence[ir.Value]:
        p, last = m.probabilities, op.const(np.array([-1], np.int64), "last")
        top, limit = op.ReduceMax(p, last, keepdims=1), op.const(m.limit, "threshold")
        bound = op.Mul(top, limit) if self.relative else op.Min(top, limit)
        kept = op.Where(op.GreaterOrEqual(p, bound), p, op.const(np.array(0, np.float32), "zero"))
        least = op.const(np.array(np.finfo(np.float32).tiny, np.float32), "least")
        total = op.Max(op.ReduceSum(kept, last, keepdims=1), least)
        return [op.MatMul(op.Div(kept, total), m.nodes[0].inputs[1])]


def _is_cut(softmax: ir.Node) -> bool:
    """This pass was here before."""
    readers = {use.node.op_type for use in softmax.outputs[0].uses()}
    return attr(softmax, "axis", -1) is not None and {"GreaterOrEqual", "Where", "ReduceMax"} <= readers


def _facts(seen: _Histogram, limit: Array | None) -> dict[str, Any]:
    if limit is None:
        return {"sparsity": 0.0}
    told = [float(f"{x:.4g}") for x in limit.reshape(-1)]
    return {"threshold": told[0] if len(told) == 1 else told, "sparsity": round(seen.below(limit), 4)}


def _refuse(key: str, expected: str) -> None:
    raise at_option(key, f"threshold-attention: option `{key}` expects {expected}")
