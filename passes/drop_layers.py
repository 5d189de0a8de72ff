"""drop-layers: the layers that change the residual stream least are taken out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import onnx_ir as ir

from graphopt.analysis.stream import StreamLayer, Streams
from graphopt.calibration.enough import too_few
from graphopt.calibration.observe import Reducer, observe
from graphopt.calibration.padding import Paddings
from graphopt.core.contract import Array, Context, Pass
from graphopt.core.errors import PipelineError
from graphopt.core.options import exclusive, option
from graphopt.core.strength import Dial
from graphopt.run.observe import observable

from ._drop import DropSteps, StreamUnit, cosines, inside, left_over, units


@dataclasses.dataclass(frozen=True)
class DropLayers(Pass):
    """Layers, or only their attentions or FFNs, are removed where the cosine between the residual stream before and after them is largest.

    Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect"; for attentions alone He et al. 2024,
    "What Matters in Transformers? Not All Attention is Needed". Pre-norm: the summand goes. Post-norm: the block x -> norm(x + f(x)) goes, and
    what read its result reads x. The inputs and outputs of the model stay: where one is a key/value cache of a dropped layer, its projections
    are still computed, with a remark. One layer of each stream (encoder, decoder) stays at least.

    Args:
        count: so many; the default is 1.
        ratio: this part of those that there are, rounded down.
        layers: these, by their number in graph order from 0 (`3+4`); needs no samples.
        what: `layer`, `attention` (cross-attention too) or `ffn`.

    Raises:
        PipelineError: more than one of count, ratio and layers, or one out of its range; when it runs: a number that no layer has.
        SampleError: when it runs: no samples, and no `layers`.
    """

    count: int | None = option(None, least=1)
    ratio: float | None = option(None, above=0, below=1)
    layers: tuple[int, ...] = option((), least=0)
    what: Literal["layer", "attention", "ffn"] = "layer"
    exact: ClassVar[bool] = False
    samples = "needs"
    data_free = "layers=0+1"
    ways = exclusive("count", "ratio", "layers")
    dials = (Dial("count", mild=1, by=0.7), Dial("ratio", by=0.7), Dial("layers", mild=1, by=0.7))

    def run(self, model: ir.Model, ctx: Context) -> int:
        if not self.layers:
            ctx.require_samples()
        layers: tuple[StreamLayer, ...] = ctx.get(Streams())
        found, refused = units(layers, self.what)
        for number, reason in refused:
            ctx.remarks.missed("", f"{self.what} {number} stays: {reason}")
        if not found:
            ctx.remarks.missed("", "the graph shows no residual stream with layers; put `canonicalize` before, which finds shapes and norms")
            return 0
        scores = {} if self.layers else self._scores(model, ctx, found)
        chosen = self._chosen(ctx, found, scores)
        nodes = {unit: inside(unit) for unit in chosen}
        told = {unit: {"number": unit.number, "what": self.what, **_score(scores, unit)} for unit in chosen}
        changes = DropSteps(told).run(model, ctx)
        for unit, own in nodes.items():
            names = left_over(model, own)
            if names:
                ctx.remarks.missed("", f"{self.what} {unit.number} is dropped, but still computed in part for the output {', '.join(names)}")
        return changes

    def _chosen(self, ctx: Context, found: Sequence[StreamUnit], scores: Mapping[StreamUnit, float]) -> list[StreamUnit]:
        if self.layers:
            known = {unit.number: unit for unit in found}
            unknown = [k for k in self.layers if k not in known]
            if unknown:
                raise PipelineError(f"{self.name}: option `layers` expects numbers of {', '.join(map(str, known))}, found {unknown[0]}")
            wanted = [known[k] for k in self.layers]
        else:
            count = int(self.ratio * len(found)) if self.ratio is not None else self.count or 1
            if count == 0:
                ctx.remarks.missed("", f"ratio={self.ratio:g} of {len(found)} is less than one")
            wanted = sorted(scores, key=lambda unit: -scores[unit])
        left = {stream: sum(u.stream == stream for u in found) for stream in {u.stream for u in found}}
        chosen: list[StreamUnit] = []
        for unit in wanted:
            if not self.layers and len(chosen) == count:
                break
            if left[unit.stream] == 1 and self.what == "layer":
                ctx.remarks.missed("", f"{self.what} {unit.number} stays: it is the last of its stream")
                continue
            left[unit.stream] -= 1
            chosen.append(unit)
        if not self.layers:
            kept = {str(u.number): round(scores[u], 4) for u in scores if u not in chosen}
            ctx.remarks.missed("", f"{len(kept)} of {len(scores)} stay: they change the stream more", cosine=kept)
        return sorted(chosen, key=lambda unit: unit.number)

    def _scores(self, model: ir.Model, ctx: Context, found: Sequence[StreamUnit]) -> dict[StreamUnit, float]:
        """The mean over rows of the cosine of the stream behind a unit with what it would be without."""
        sums = {unit: [0.0, 0] for unit in found}

        def reducer(unit: StreamUnit) -> Reducer:
            values = _read(unit)
            assert all(observable(model, v) for v in values), "a stream lies in the main graph"

            def add(*rows: Array) -> None:
                total, count = cosines(_without(unit, rows), rows[0])
                sums[unit][0] += total
                sums[unit][1] += count

            return Reducer(values, add)

        observe(model, ctx.require_samples(), ctx.get(Paddings()), [reducer(unit) for unit in found])
        few = {unit: reason for unit, (_, rows) in sums.items() if (reason := too_few(int(rows), 1)) is not None}
        for unit, reason in few.items():
            ctx.remarks.missed("", f"{self.what} {unit.number} stays: {reason}")
        return {unit: total / rows for unit, (total, rows) in sums.items() if unit not in few}


def _read(unit: StreamUnit) -> tuple[ir.Value, ...]:
    """The stream behind a unit, and what tells how it would be without."""
    return (unit.after, unit.before) if unit.whole else (unit.after, *(b.value for b in unit.cuts[0][1]))


def _without(unit: StreamUnit, rows: Sequence[Array]) -> Array:
    """The stream behind a unit without it, out of what `_read` names."""
    if unit.whole:
        return rows[1]
    rest = rows[0]
    for branch in rows[1:]:
        rest = rest - branch
    return rest


def _score(scores: Mapping[StreamUnit, float], unit: StreamUnit) -> dict[str, float]:
    return {"cosine": round(scores[unit], 4)} if unit in scores else {}
