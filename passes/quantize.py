"""quantize: 8-bit weights and activations, written as DequantizeLinear around multiplies that stay what they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import onnx_ir as ir

from graphopt.analysis.linear import StoredOperands
from graphopt.calibration.activations import LinearInputs
from graphopt.calibration.observe import together
from graphopt.calibration.ranges import Ranges
from graphopt.compress.quantize.activation_grid import METHODS
from graphopt.compress.quantize.bias import CorrectBias
from graphopt.compress.quantize.integer import Integers
from graphopt.compress.quantize.weight_only import WeightOnly
from graphopt.compress.select import check_patterns
from graphopt.core.contract import Context, Pass
from graphopt.core.options import option, option_error
from graphopt.core.strength import Switch

from ._decode import DecodeWeights
from ._left import TurnLeftWeights

_MODES = ("dynamic", "static", "weight-only")
_CODES = {"linear": (8, 4), "nf4": (4,), "kmeans": (4, 8)}
_CODERS = ("nearest", "gptq", "awq", "awq-gptq")
_BLOCKS = (None, 0, 16, 32, 64, 128, 256)
_BLOCK = {("linear", 4): 32, ("nf4", 4): 32}  # where none is given; else 0


@dataclasses.dataclass(frozen=True)
class Quantize(Pass):
    """Stored weights become integers. Activations too: their scale is measured at run time, or (static) on samples beforehand, or they stay float.

    A stored weight [in, out] becomes int8 with one scale for each output feature, an embedding table int8 with one for each row. The multiply
    stays a MatMul or Gemm between DequantizeLinear nodes; the target turns that into integer arithmetic. One activation is quantized
    once for all its readers; a weight with several readers, also one that is the transpose of an embedding table, is stored once. A product whose
    weight stands on the left is turned round first.

    Args:
        mode: `dynamic`: integer products; `static`: the same, and needs samples; activations are uint8 in both, and a bias stays float.
            `weight-only`: float products with weights of `bits` bits, for size and memory traffic.
        calibrate: what the range of a static activation is: `minmax`, `percentile`, `mse` or `entropy` (graphopt.calibration.ranges).
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
            where the samples show that it is needed. It costs four elementwise nodes. The range of the codes is fixed, so
            that a text gives the same numbers alone, in any batch, and with any padding.
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
    samples = "can"
    data_free = "mode=dynamic, or mode=weight-only method=nearest"
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
        check_patterns(model, (*self.include, *self.exclude), ("MatMul", "Gemm", "Gather"))
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
        before = sum(x.quantized for x in ctx.get(StoredOperands(casts=True)).values())
        if self.mode == "weight-only":
            block = _BLOCK.get((self.codes, self.bits), 0) if self.block is None else self.block
            changes = WeightOnly.of(self, block=block).run(model, ctx)
        else:
            changes = DecodeWeights().run(model, ctx) + Integers.of(self, ranges=self._ranges if self.mode == "static" else None).run(model, ctx)
        if not changes:
            why = f"{before} weights are quantized already" if before else "no MatMul, Gemm or Gather reads a stored weight that fits"
            ctx.remarks.missed("", f"nothing to quantize: {why}")
        return changes
