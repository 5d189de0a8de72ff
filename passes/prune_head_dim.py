"""prune-head-dim: every head narrower, with the softmax scale that it was trained with."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.heads import Heads, Units
from graphopt.analysis.projections import HeadOperand
from graphopt.calibration.averages import Averages
from graphopt.compress.prune.narrow import HeadPart, keys_of, values_of
from graphopt.compress.prune.refit import fit_behind
from graphopt.compress.prune.units import carry_out
from graphopt.compress.weights import Editor
from graphopt.core.contract import Array, Context, Pass
from graphopt.core.options import exclusive, option
from graphopt.core.strength import Dial
from graphopt.graph.questions import static_dim
from graphopt.rewrite.slicing.close import Slicing
from graphopt.rewrite.slicing.plan import Refusal, kept
from graphopt.run.observe import observable


@dataclasses.dataclass(frozen=True)
class PruneHeadDim(Pass):
    """Give every head fewer features: query and key together, value and output projection together. The softmax scale stays as it was trained.

    Query and key meet in a product, and so do value and output projection: each pair may be turned by any invertible matrix and its inverse.
    Where nothing but layout stands between projection and product, the best narrower head is therefore a truncated singular value decomposition,
    of the scores E(q^T k)^2 and of what a head adds to the residual stream, both on the samples. Under a rotary embedding features cannot be
    turned: pairs go, the same in all heads that share the angles, those with the least E[q^2] E[k^2]. Queries and keys that pass a norm over the
    features of a head stay as they are, since the norm would see fewer.

    Args:
        dim: features that stay in each head.
        ratio: the fraction that goes; what stays is rounded up to a multiple of `multiple`.
        parts: both, keys (query and key), or values (value and output projection).
        method: auto, or select: whole features go also where they could be turned.
        multiple: with `ratio`.
        refit: fit the output projections by least squares on the samples.
        rows: so many rows (tokens) of the samples are used.
        resize: names of inputs and outputs that may change their size with the heads (key and value caches).

    Raises:
        PipelineError: none or both of dim and ratio, or one out of range.
        SampleError: there are no samples.
    """

    dim: int | None = option(None, least=1)
    ratio: float | None = option(None, above=0, below=1, what="a fraction")
    parts: str = option("both", one_of=("both", "keys", "values"))
    method: str = option("auto", one_of=("auto", "select"))
    multiple: int = option(8, least=1)
    refit: bool = True
    rows: int = option(32768, least=1)
    resize: tuple[str, ...] = ()
    exact: ClassVar[bool] = False
    samples = "needs"
    ways = exclusive("dim", "ratio", says="how many features of a head stay")
    dials = (Dial("ratio"),)

    def run(self, model: ir.Model, ctx: Context) -> int:
        self.ways.require(self)
        averages = Averages()
        found = [(unit, part) for unit in ctx.get(Units()).attention for part in self._parts(model, ctx, unit, averages)]
        if not found:
            return 0
        averages.run(ctx, self.rows)
        teacher = model.clone() if self.refit else model
        plan, editor, outputs, changes = Slicing(model, resize=self.resize), Editor(model), dict[str, None](), 0
        for unit, part in found:
            few = averages.too_few(*part.handles)
            if few is not None:
                ctx.remarks.missed(unit.node.name or "", f"{part.what} not narrowed: {few}")
                continue
            gone, lost = part.choose(averages)
            try:
                self._try(model, unit, part, gone)
                with plan.together():
                    plan.remove(part.operand.value, part.operand.dim_axis, part.operand.mask(gone), inside=unit.inside)
                    if not ctx.fuel.burn():
                        raise Refusal(ctx.fuel.why)
            except Refusal as refusal:
                ctx.remarks.missed(unit.node.name or "", f"{part.what} not narrowed: {refusal}")
                continue
            if part.turning is not None:
                part.turning(averages, editor)
            self._tell(ctx, unit, part, gone, lost)
            changes += 1
            if unit.output is not None:
                outputs[str(unit.output.node.name)] = None
        if not changes:
            return 0
        editor.flush()
        carry_out(plan, ctx)
        if self.refit:
            fit_behind(model, teacher, list(outputs), ctx, self.rows)
        return changes

    @staticmethod
    def _tell(ctx: Context, unit: Heads, part: HeadPart, gone: Array, lost: float) -> None:
        before, how = part.operand.dim, "selected" if part.turning is None else "turned"
        after = before - len(gone)
        told = {"layer": unit.index, "part": part.what, "before": before, "after": after, "lost": round(lost, 6), "how": how}
        told |= {"removed": gone.tolist()} if part.turning is None else {}
        ctx.remarks.applied(unit.node.name or "", f"layer {unit.index}: {part.what} {before} -> {after} features a head, {how}", **told)

    def _stays(self, dim: int) -> int:
        if self.dim is not None:
            return self.dim
        return min(dim, -(-int(np.ceil(dim * (1 - float(self.ratio or 0)) - 1e-9)) // self.multiple) * self.multiple)

    def _parts(self, model: ir.Model, ctx: Context, unit: Heads, averages: Averages) -> list[HeadPart]:
        """What of one attention can be narrowed; the rest is remarked on."""
        name, operands = unit.node.name or "", unit.operands
        hidden = next((o.value for o in operands if not observable(model, o.value)), None)
        if hidden is not None:
            ctx.remarks.missed(name, f"not narrowed: `{hidden.name}` is computed inside a subgraph")
            return []
        turns = self.method == "auto"
        parts: list[HeadPart] = []
        if self.parts != "values" and self._narrows(ctx, name, "query and key", operands[0]):
            groups = self._together(model, unit, operands[0])
            if isinstance(groups, str):
                ctx.remarks.missed(name, f"query and key not narrowed: {groups}")
            else:
                parts.append(keys_of(operands, self._stays(operands[0].dim), groups, turns, averages))
        if self.parts != "keys" and self._narrows(ctx, name, "value", operands[2]):
            parts.append(values_of(unit, operands[2], self._stays(operands[2].dim), turns, averages))
        return parts

    def _narrows(self, ctx: Context, name: str, what: str, operand: HeadOperand) -> bool:
        if self._stays(operand.dim) < operand.dim:
            return True
        ctx.remarks.missed(name, f"{what} have {operand.dim} features a head, and {self._stays(operand.dim)} would stay")
        return False

    def _together(self, model: ir.Model, unit: Heads, query: HeadOperand) -> list[Array] | str:
        """The features of a head that can only go together: pairs under a rotary embedding."""
        groups, seen = list[Array](), np.zeros(query.dim, bool)
        for feature in range(query.dim):
            if seen[feature]:
                continue
            trial = Slicing(model, resize=self.resize)
            try:
                trial.remove(query.value, query.dim_axis, query.mask([feature]), inside=unit.inside)
            except Refusal as refusal:
                return str(refusal)
            mask = trial.removed[query.value][query.dim_axis % len(query.value.shape or ())]
            group = kept(~mask[: query.dim])
            seen[group] = True
            groups.append(group)
        return groups

    def _try(self, model: ir.Model, unit: Heads, part: HeadPart, gone: Array) -> None:
        """Raises Refusal if the removal cannot be carried out, or takes more than it should."""
        operand = part.operand
        trial = Slicing(model, resize=self.resize)
        trial.remove(operand.value, operand.dim_axis, operand.mask(gone), inside=unit.inside)
        norm = next((text for _, text in trial.notes if "features that are left" in text), None)
        if norm is not None:
            raise Refusal(f"a norm in front of the product would see fewer features ({norm}); prune-heads leaves the norms of heads as they are")
        axis = operand.dim_axis % len(operand.value.shape or ())
        if int(trial.removed[operand.value][axis].sum()) != int(operand.mask(gone).sum()):
            raise Refusal(f"{len(gone)} features of {static_dim(operand.value, axis)} cannot go without others")
