"""quantize: 8-bit weights and activations, written as DequantizeLinear around multiplies that stay what they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from graphopt.analysis.linear import Embedding, Linear, StoredOperands
from graphopt.calibration.activations import LinearInputs
from graphopt.calibration.observe import together
from graphopt.calibration.ranges import Ranges
from graphopt.compress.quantize.activation_grid import METHODS, ActivationGrid, calibrated, even_rows, on_grid, row_scale, wants_rows
from graphopt.compress.quantize.bias import CorrectBias
from graphopt.compress.quantize.eligible import LONGEST_SUM, quantized_before, say_nothing_to_do, unfit_linear, unfit_table
from graphopt.compress.quantize.forms import decoded
from graphopt.compress.quantize.int8 import REDUCED, Coded, encode
from graphopt.compress.quantize.weight_only import WeightOnly
from graphopt.compress.select import check_patterns, passed_over
from graphopt.compress.weights import numbers, tied_table, why_no_linear
from graphopt.core.contract import Context
from graphopt.core.options import option, option_error
from graphopt.core.strength import Switch
from graphopt.graph.questions import attr, constant, producer
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.match import Match, Miss
from graphopt.rewrite.rules import RewritePass

from ._decode import DecodeWeights
from ._left import TurnLeftWeights

_MODES = ("dynamic", "static", "weight-only")
_CODES = {"linear": (8, 4), "nf4": (4,), "kmeans": (4, 8)}
_CODERS = ("nearest", "gptq", "awq", "awq-gptq")
_BLOCKS = (None, 0, 16, 32, 64, 128, 256)
_DOMINATED = 0.25  # relative error of a channel beside its largest weight, above which one input row rules its scale


@dataclasses.dataclass(frozen=True)
class QuantizeMatch(Match):
    """`source`: the stored float constant, `coded`: what replaces it (None: it is decoded from integers already, and only the activation
    is quantized); `transposed`: the multiply wants its last two axes exchanged; `activation`: the fixed grid of its input, if it has one;
    `rows`: each row of its input has a scale of its own."""

    source: ir.Value
    coded: Coded | None
    transposed: bool = False
    tied: str = ""
    activation: ActivationGrid | None = None
    rows: bool = False

    @property
    def facts(self) -> Mapping[str, Any]:
        told: dict[str, Any] = {"name": self.nodes[0].name, "op": self.nodes[0].op_type, "weight": self.source.name}
        if self.activation is not None:
            told = {**told, "covers": [self.activation.low, self.activation.high], "seen": list(self.activation.seen)}
        if self.rows:
            told["rows"] = True
        if self.coded is None:
            return told
        told = {
            **told,
            "shape": list(self.coded.codes.shape),
            "axis": self.coded.axis,
            "worst_error": round(self.coded.worst, 6),
            "worst_channel": self.coded.channel,
            "error_without_largest": round(self.coded.rest, 6),
        }
        return {**told, "tied_to": self.tied} if self.tied else told


@dataclasses.dataclass(frozen=True)
class Quantize(RewritePass[QuantizeMatch]):
    """Stored weights become integers. Activations too: their scale is measured at run time, or (static) on samples beforehand, or they stay float.

    A stored weight [in, out] becomes int8 with one scale for each output feature, an embedding table int8 with one for each row. The multiply
    stays a MatMul or Gemm between DequantizeLinear nodes; the target turns that into integer arithmetic. One activation is quantized
    once for all its readers; a weight with several readers, also one that is the transpose of an embedding table, is stored once. A product whose
    weight stands on the left is turned round first.

    Args:
        mode: `dynamic`: integer products; `static`: the same, and needs samples; activations are uint8 in both, and a bias stays float.
            `weight-only`: float products with weights of `bits` bits, for size and memory traffic.
        calibrate: what the range of a static activation is: `minmax`, `percentile`, `mse` or `entropy` (graphopt.analysis.ranges).
        percentile: how many percent of its values calibrate=percentile covers.
        per_channel: one scale for each output feature; False: one for the whole weight. Embedding tables always have one for each row.
        symmetric: codes around zero ([-127, 127] in mode `dynamic`); False: a zero point as well.
        bits: 8; weight-only also 4 (nf4: only 4). Weights that are quantized already are left alone, so that two of these passes can mix widths.
        block: weight-only: so many neighbours along the input features share a scale (16 to 256, a power of two); 0: each output feature
            has one. The default is 32 for 4 bits, and 0 for 8 and for kmeans.
        codes: weight-only: `linear`, a grid of even steps; `nf4`, the quantiles of a normal distribution, times the largest weight of each block
            (Dettmers et al. 2023); `kmeans`, the codebook of least squared error, weighted by the samples where there are any (Kim et al. 2023):
            one for each output feature, or, with a block or 8 bits, one for the weight, times the largest weight of each block (feature).
        method: weight-only: `nearest`, with the scale of least error; `gptq` corrects the error of each rounded column in the columns that
            follow, as the samples weigh it (Frantar et al. 2022); `awq` scales input channels by their magnitude on the samples, folded into what
            makes them, and clips each block where its products err least (Lin et al. 2023; not kmeans); `awq-gptq` scales, then corrects. Tables
            that are also looked up are rounded to nearest.
        reduce_range: codes of multiplied weights in [-64, 64]: safe on CPUs that add two products in 16 bits (no VNNI), one bit less exact.
        rows: dynamic: a scale for each row of an activation, so that one large token does not coarsen the others: `false`, `true`, or `auto`,
            where the samples show that it is needed. It costs four elementwise nodes.
        bias_correction: what a product is off by on the average of the samples joins its bias (Nagel et al. 2019; compress/quantize/bias.py).
        embeddings: also the tables that Gather reads rows of.
        include: only the nodes whose name (here or in the input model) fits one of these patterns (`*`, `?`, `[abc]`).
        exclude: not the nodes whose name fits one of these.

    Raises:
        PipelineError: a mode, width or way to calibrate that does not exist; when it runs: a pattern that fits no node.
        SampleError: when it runs: static, gptq, rows=auto or bias-correction without samples.
    """

    mode: str = "dynamic"
    calibrate: str = "minmax"
    percentile: float = option(99.999, above=50, most=100)
    per_channel: bool = True
    symmetric: bool = True
    bits: int = 8
    block: int | None = None
    codes: str = "linear"
    method: str = "nearest"
    reduce_range: bool = False
    rows: Literal["false", "true", "auto"] = "false"
    bias_correction: bool = False
    embeddings: bool = True
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    exact: ClassVar[bool] = False
    dials = (
        Switch("per_channel", False, {"per_channel": True}),
        Switch("mode", "static", {"mode": "dynamic"}),
        Switch("bits", 4, {"bits": 8, "codes": "linear"}),
        Switch("embeddings", True, {"embeddings": False}),
    )
    anchors: ClassVar[frozenset[str]] = frozenset({"MatMul", "Gemm", "Gather"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, value, known in self._known():
            if value not in known:
                raise option_error(self.name, key, f"{' or '.join(str(x) for x in known if x is not None)} in this version", value)
        if self.bias_correction and self.method.startswith("awq"):  # it rescales the inputs that the correction has looked at
            raise option_error(self.name, "bias-correction", "false beside method=awq", True)

    def _known(self) -> Sequence[tuple[str, Any, Sequence[Any]]]:
        """(option, its value, the values that it may have)."""
        if self.mode not in _MODES:
            return (("mode", self.mode, _MODES),)
        only = self.mode == "weight-only"
        blocks, codes = (_BLOCKS, tuple(_CODES)) if only else ((None, 0), ("linear",))
        if self.codes not in codes:
            return (("codes", self.codes, codes),)
        coders = len(_CODERS) if self.codes != "kmeans" else 2  # its codebooks take up what scaling and clipping would change
        methods = _CODERS[: coders if only else 1]
        bits, symmetric = _CODES[self.codes] if only else (8,), (True, False) if self.codes == "linear" else (True,)
        own = ("bits", self.bits, bits), ("block", self.block, blocks), ("method", self.method, methods), ("symmetric", self.symmetric, symmetric)
        reduced = (False,) if self.mode == "weight-only" else (False, True)  # float products cannot saturate
        rows = ("false", "true", "auto") if self.mode == "dynamic" else ("false",)
        return *own, ("calibrate", self.calibrate, METHODS), ("reduce_range", self.reduce_range, reduced), ("rows", self.rows, rows)

    def run(self, model: ir.Model, ctx: Context) -> int:
        check_patterns(model, (*self.include, *self.exclude), self.anchors)
        if self.mode == "static":
            ctx.require_samples()
        turned = TurnLeftWeights(self.include, self.exclude).run(model, ctx)
        if not self.bias_correction:
            return turned + self._quantize(model, ctx)
        ctx.require_samples()
        if self.mode == "static":
            together(ctx, LinearInputs(), self._ranges)
        correct = CorrectBias.before(ctx)
        changes = turned + self._quantize(model, ctx)
        return changes + correct.run(model, ctx) if changes else 0

    @property
    def _ranges(self) -> Ranges:
        return Ranges(self.calibrate, self.percentile)

    def _quantize(self, model: ir.Model, ctx: Context) -> int:
        if self.mode == "weight-only":
            return WeightOnly(self).run(model, ctx)
        done = quantized_before(ctx)
        mark = len(ctx.remarks)
        changes = DecodeWeights().run(model, ctx) + super().run(model, ctx)
        _warn_of_rulers(ctx, mark)
        if not changes:
            say_nothing_to_do(ctx, done)
        return changes

    def match(self, node: ir.Node, ctx: Context) -> QuantizeMatch | Miss | None:
        found = self._match(node, ctx)
        if not isinstance(found, QuantizeMatch) or node.op_type == "Gather":
            return found
        if self.mode == "dynamic":
            return dataclasses.replace(found, rows=wants_rows(node, self.rows, ctx))
        assert node.inputs[0] is not None
        grid = calibrated(node.inputs[0], self._ranges, ctx)
        return Miss(node, f"stays float: {grid}") if isinstance(grid, str) else dataclasses.replace(found, activation=grid)

    def _match(self, node: ir.Node, ctx: Context) -> QuantizeMatch | Miss | None:
        operand = ctx.get(StoredOperands(casts=True)).get(node)
        if operand is None:
            return None if node.op_type == "Gather" else Miss(node, f"stays float: {why_no_linear(node)}")
        if operand.quantized:
            return self._match_decoded(operand, ctx)
        reason = self._unfit(operand)
        if reason is not None:
            return Miss(node, f"stays float: {reason}")
        found = self._match_table(operand, ctx) if isinstance(operand, Embedding) else self._match_linear(operand, ctx)
        array = found.source.const_value
        assert array is not None
        assert found.coded is not None
        if found.coded.nbytes >= array.nbytes:
            return Miss(node, f"stays float: codes and scales of {found.coded.nbytes} bytes are no smaller than the weight, {array.nbytes} bytes")
        return found

    def build(self, op: Builder, m: QuantizeMatch) -> Sequence[ir.Value]:
        node, graph = m.nodes[0], m.nodes[0].graph
        swapped = m.transposed and node.op_type == "MatMul"
        weight = node.inputs[1] if m.coded is None else decoded(op, m.source, m.coded, graph, transposed=swapped)
        if node.op_type == "Gather":
            return [op.Gather(weight, node.inputs[1], axis=0)]
        x, grid = node.inputs[0], m.activation
        assert x is not None
        back = row_scale(op, x, graph) if m.rows else None
        source = even_rows(op, x, graph) if m.rows else x
        x = op.shared(("activation", source, graph), lambda: _measured(op, source) if grid is None else on_grid(op, source, grid))
        if node.op_type == "Gemm":
            kept = {name: a.value for name, a in node.attributes.items() if name != "transB"}
            across = attr(node, "transB", 0) if m.coded is None else int(m.transposed)
            added = [] if m.rows else node.inputs[2:]
            product = op.Gemm(x, weight, *added, transB=across, **(_without_beta(kept) if m.rows else kept))
            return [product if back is None else _plus(op, op.Mul(product, back), node)]
        product = op.MatMul(x, weight)
        return [product if back is None else op.Mul(product, back)]

    def _match_decoded(self, operand: Linear | Embedding, ctx: Context) -> QuantizeMatch | Miss | None:
        """A multiply of a float activation with a weight that is stored as integers: only the activation is still to be quantized."""
        if isinstance(operand, Embedding) or producer(operand.x, "DequantizeLinear") is not None:
            return None
        grid = operand.grid
        if grid is None or grid.block or operand.weight.dtype != ir.DataType.INT8 or grid.axis not in (None, operand.channel_axis):
            return Miss(operand.node, "stays float: its integer weight is not int8 with one scale for each output, or for all")
        reason = passed_over(operand.node, self.include, self.exclude)
        if reason is not None:
            return Miss(operand.node, f"stays float: {reason}")
        if operand.in_features > LONGEST_SUM or operand.x.dtype != ir.DataType.FLOAT:
            return Miss(operand.node, "stays float: its input is not FLOAT, or its sums may leave 32 bits")
        if self.reduce_range and np.abs(numbers(operand.weight).astype(np.int16)).max(initial=0) > REDUCED:
            return Miss(operand.node, f"stays float: reduce-range=true, and its stored codes leave [-{REDUCED}, {REDUCED}]")
        return QuantizeMatch((operand.node,), (operand.node.outputs[0],), operand.weight, None)

    def _match_table(self, e: Embedding, ctx: Context) -> QuantizeMatch:
        linears = (x for x in ctx.get(StoredOperands(casts=True)).values() if isinstance(x, Linear) and not x.quantized)
        multiplied = any(x.weight is e.table or tied_table(x, ctx, self._unfit) is e for x in linears) if self.reduce_range else False
        return QuantizeMatch((e.node,), (e.node.outputs[0],), e.table, encode(numbers(e.table), 0, symmetric=self.symmetric, reduced=multiplied))

    def _match_linear(self, linear: Linear, ctx: Context) -> QuantizeMatch:
        nodes, outputs, reduced = (linear.node,), (linear.node.outputs[0],), self.reduce_range
        tied = tied_table(linear, ctx, self._unfit)
        if tied is not None:  # the row scales of the table are the channel scales of the multiply
            coded = encode(numbers(tied.table), 0, symmetric=self.symmetric, reduced=reduced)
            return QuantizeMatch(nodes, outputs, tied.table, coded, True, tied.node.name or "")
        symmetric = self.symmetric or bool(linear.batch)  # runtimes fail on a zero point for each channel of a batch of matrices
        coded = encode(numbers(linear.weight), linear.channel_axis, per_channel=self.per_channel, symmetric=symmetric, reduced=reduced)
        return QuantizeMatch(nodes, outputs, linear.weight, coded, linear.transposed)

    def _unfit(self, operand: Linear | Embedding) -> str | None:
        """Why this operand must stay float."""
        reason = passed_over(operand.node, self.include, self.exclude)
        if reason is not None:
            return reason
        if isinstance(operand, Linear):
            return unfit_linear(operand)
        return unfit_table(operand) if self.embeddings else "embeddings=false"


def _measured(op: Builder, x: ir.Value) -> ir.Value:
    """x rounded to a grid that is measured at run time."""
    value: ir.Value = op.DequantizeLinear(*op.node("DynamicQuantizeLinear", (x,), _outputs=3))
    return value


def _without_beta(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if name != "beta"}


def _plus(op: Builder, product: ir.Value, gemm: ir.Node) -> ir.Value:
    """beta * C of a Gemm, added behind the scales of the rows."""
    third = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    if third is None:
        return product
    beta, array = attr(gemm, "beta", 1.0), constant(third)
    if beta != 1.0:
        factor = np.array(beta, np.float32)
        third = op.Mul(third, op.const(factor, "beta")) if array is None else op.const(array * factor, f"{third.name}_scaled")
    value: ir.Value = op.Add(product, third)
    return value


def _warn_of_rulers(ctx: Context, mark: int) -> None:
    """One scale for each output cannot help where one input row is much larger than the others: they round to nothing."""
    for remark in ctx.remarks.since(mark):
        facts = remark.facts
        if remark.kind == "applied" and facts.get("op", "Gather") != "Gather" and facts.get("error_without_largest", 0) > _DOMINATED:
            text = f"one input row of `{facts['weight']}` rules the scales: without it, a channel is {facts['error_without_largest']:.0%} off"
            ctx.remarks.warning(remark.node, text, **facts)
