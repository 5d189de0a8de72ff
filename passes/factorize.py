"""factorize: a stored weight [in, out] becomes the product of [in, rank] and [rank, out], where that is smaller and loses least."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import onnx_ir as ir

from graphopt.analysis.linear import Embedding, Embeddings, Linear
from graphopt.calibration.moments import input_moments
from graphopt.compress.lowrank.by_budget import by_budget, plans_of
from graphopt.compress.lowrank.cut import RankPlan, plan
from graphopt.compress.lowrank.factorable import Item, Whole, items, joined, table_reason
from graphopt.compress.lowrank.factors import PutFactors, TableCut
from graphopt.compress.lowrank.faster import Stopwatch
from graphopt.compress.lowrank.sequential import refit
from graphopt.compress.lowrank.spectrum import Spectrum, factors, spectrum
from graphopt.compress.select import check_patterns
from graphopt.compress.weights import numbers
from graphopt.core.contract import Array, Context, Pass
from graphopt.core.options import exclusive, option, option_error
from graphopt.core.strength import Dial
from graphopt.graph.questions import static_dim
from graphopt.run.observe import observable

_ENERGY = 0.95


@dataclasses.dataclass(frozen=True)
class Factorize(Pass):
    """Each MatMul and Gemm with a stored weight becomes two, with standard operators, so that `quantize` works after it.

    How far a weight is cut is said by one of `energy`, `rank`, `ratio` and `budget` (none: energy=0.95). A weight stays whole, with a remark, where
    factors would hold as many numbers as it, where they take more time on the target (if that runs here and may time: not tune=off), where it
    is tied to a table, or read by something else.

    Args:
        energy: this part of the mean square of each output stays (0.95); the rank is rounded up to `multiple`.
        rank: of every weight.
        ratio: this part of the numbers of each weight goes (0.25); the rank is rounded down to `multiple`.
        budget: this part of the operations of the whole model goes (0.3), at the sizes of the first sample; the ranks of all layers are
            chosen together, by what each costs in output error. A weight may stay whole.
        method: `whitened`: the optimum of the output error on the samples (SVD-LLM, Wang et al. 2024); `asvd`: inputs scaled by their
            magnitude on the samples (Yuan et al. 2023); `svd`: of the weight alone, without samples.
        joint: weights of one input (query, key and value; gate and up) share the first factor, each weighed by the size of its output; with
            `budget` only where that loses less than one by one.
        sensitivity: with `budget`: errors of layers are compared by what they do to the outputs of the model, one run for each; `false`: by their
            own relative size.
        sequential: layer after layer, each is fitted to the inputs that it gets from the layers cut before it, so that it makes up for
            their error, also for that of the residual stream; one run over the samples for each input.
        multiple: ranks above it are a multiple of it, as kernels like them.
        embeddings: tables that Gather reads, too: [rows, rank] and a multiply [rank, width]; every row counts the same. Not with `budget`, as it
            saves no operations.
        include: only the nodes whose name (here or in the input model) fits one of these patterns (`*`, `?`, `[abc]`).
        exclude: not the nodes whose name fits one of these.

    Raises:
        PipelineError: more than one of energy, rank, ratio and budget, or one out of its range; when it runs: a pattern that fits no node.
        SampleError: when it runs: a method that needs samples, without any.
    """

    energy: float | None = option(None, above=0, below=1)
    rank: int | None = option(None, least=1)
    ratio: float | None = option(None, above=0, below=1)
    budget: float | None = option(None, above=0, below=1)
    method: Literal["whitened", "asvd", "svd"] = "whitened"
    joint: bool = False
    sensitivity: bool = True
    sequential: bool = False
    multiple: int = option(16, least=1)
    embeddings: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    exact: ClassVar[bool] = False
    samples = "needs"
    data_free = "method=svd"
    ways = exclusive("energy", "rank", "ratio", "budget")
    dials = (
        Dial("energy", mild=0.9998, rest=True, unset=_ENERGY),
        Dial("rank", mild=2**14, by=2 / 3, rises=True),
        Dial("ratio", mild=0.02, by=0.7),
        Dial("budget", mild=0.02, by=0.7),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sequential and self.method == "svd":
            raise option_error(self.name, "sequential", "a method that reads samples: whitened or asvd", "svd")

    def run(self, model: ir.Model, ctx: Context) -> int:
        check_patterns(model, (*self.include, *self.exclude), ("MatMul", "Gemm", "Gather"))
        if self.method != "svd":
            ctx.require_samples()
        single, whole = items(model, ctx, self.include, self.exclude)
        single, hidden = self._seen(model, single)
        moments, few = self._moments(model, ctx, single)
        unknown = {item: reason for item in single if (reason := next((few[x.x] for x in item.linears if x.x in few), None)) is not None}
        plans, kept = self._plans(model, ctx, [item for item in single if item not in unknown], moments)
        whole |= hidden | kept | {x.node: f"{reason}; method=svd needs none" for item, reason in unknown.items() for x in item.linears}
        tables = self._tables(ctx, whole)
        if self.sequential and plans:
            changes = refit(model, ctx, plans)
            return changes + PutFactors((), tables, whole).run(model, ctx)
        return PutFactors([p.cut(bool(moments)) for p in plans], tables, whole).run(model, ctx)

    def _seen(self, model: ir.Model, found: Sequence[Item]) -> tuple[list[Item], Whole]:
        """Those whose inputs can be observed on samples, where that is needed."""
        if self.method == "svd":
            return list(found), {}
        seen: list[Item] = []
        hidden: Whole = {}
        for item in found:
            reason = next((r for x in item.linears if (r := _hidden(model, x)) is not None), None)
            if reason is None:
                seen.append(item)
            else:
                hidden |= {x.node: f"{reason}; method=svd needs no samples" for x in item.linears}
        return seen, hidden

    def _moments(self, model: ir.Model, ctx: Context, found: Sequence[Item]) -> tuple[Mapping[ir.Value, Array], Mapping[ir.Value, str]]:
        """Of the inputs, where enough rows show them; and why not (the plain SVD weighs nothing by them, and does without)."""
        if self.method == "svd" and ctx.samples is None:
            return {}, {}
        values = dict.fromkeys(x.x for item in found for x in item.linears if _hidden(model, x) is None)
        ranks = self.rank is None and self.ratio is None and self.method != "svd"
        seen = dict(input_moments(ctx, list(values), ranks=ranks)) if values else {}
        few = {value: m for value, m in seen.items() if isinstance(m, str)} if self.method != "svd" else {}
        return {value: m for value, m in seen.items() if not isinstance(m, str)}, few

    def _plans(self, model: ir.Model, ctx: Context, single: Sequence[Item], moments: Mapping[ir.Value, Array]) -> tuple[list[RankPlan], Whole]:
        """What is cut, and how far."""
        together = joined(single) if self.joint else list(single)
        if self.budget is not None:
            planned = plans_of(ctx, single, together, moments, self.method, self.sensitivity)
            plans, kept = by_budget(ctx, planned, single, together, self.budget, self.multiple)
        else:
            plans, kept = [], {}
            for item in together:
                found = plan(item, moments, self.method)
                rank = self._rank(item, found.spectrum)
                if rank > item.largest:
                    kept |= dict.fromkeys((x.node for x in item.linears), _no_smaller(item, rank))
                else:
                    plans.append(dataclasses.replace(found, rank=rank))
        watch = Stopwatch(model, ctx)
        slow = {p.item: reason for p in plans if (reason := watch.why_slower(p.item, p.rank)) is not None}
        kept |= {x.node: reason for item, reason in slow.items() for x in item.linears}
        return [p for p in plans if p.item not in slow], kept

    def _rank(self, item: Item, cut: Spectrum) -> int:
        if self.rank is not None:
            return self.rank
        if self.ratio is not None:
            rank = max(int((1 - self.ratio) * item.in_features * item.out_features / (item.in_features + item.out_features)), 1)
            return rank if rank <= self.multiple else rank // self.multiple * self.multiple
        rank = cut.rank_for(self.energy or _ENERGY)
        return rank if rank <= self.multiple else -(-rank // self.multiple) * self.multiple

    def _tables(self, ctx: Context, whole: Whole) -> list[TableCut]:
        if not self.embeddings:
            return []
        by_table: dict[ir.Value, list[Embedding]] = {}
        for e in ctx.get(Embeddings(casts=True)):
            by_table.setdefault(e.table, []).append(e)
        found: list[TableCut] = []
        for readers in by_table.values():
            first = readers[0]
            reason = next((r for e in readers if (r := table_reason(e, ctx, self.include, self.exclude)) is not None), None)
            if reason is None and self.budget is not None:
                reason = "a smaller table saves no operations; give energy, rank or ratio instead of budget"
            if reason is None:
                cut = spectrum(numbers(first.table), None, "svd")
                stand_in = Item((Linear(first.node, first.ids, first.table, (), False, first.rows, first.width),))
                rank = self._rank(stand_in, cut)
                if rank <= stand_in.largest:
                    rows, right = factors(numbers(first.table), cut, rank)
                    found.append(TableCut(tuple(readers), rows, right, cut.error(rank) ** 0.5))
                    continue
                reason = _no_smaller(stand_in, rank)
            whole |= {e.node: reason for e in readers}
        return found


def _hidden(model: ir.Model, linear: Linear) -> str | None:
    """Why samples do not show the input of a multiply."""
    if linear.node.graph is not model.graph or not observable(model, linear.x):
        return "its input is computed inside a subgraph, where samples do not show it"
    if linear.trans_x:
        return "its input lies transposed"
    return None if static_dim(linear.x, -1) == linear.in_features else f"the last axis of `{linear.x.name}` is not known to be {linear.in_features}"


def _no_smaller(item: Item, rank: int) -> str:
    told = f"[{item.in_features},{item.out_features}]: rank {rank} would hold {item.kept(rank):,} numbers instead of {item.size:,}"
    return f"{told}; the largest rank that saves any is {item.largest}"
