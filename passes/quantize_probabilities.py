"""quantize-probabilities: attention probabilities on an 8-bit or 4-bit grid, linear or of powers of two."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from graphopt.analysis.attention import Attentions
from graphopt.core.contract import Context
from graphopt.core.options import option_error
from graphopt.core.strength import Switch
from graphopt.graph.questions import producer
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.match import Match, Miss
from graphopt.rewrite.rules import RewritePass

_BITS = {"linear": (4, 8), "log": (3, 4)}


@dataclasses.dataclass(frozen=True)
class ProbabilitiesMatch(Match):
    """The product `nodes[0]` of `probabilities` [..., rows, keys] and the values."""

    probabilities: ir.Value

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"probabilities": self.probabilities.name}


@dataclasses.dataclass(frozen=True)
class QuantizeProbabilities(RewritePass[ProbabilitiesMatch]):
    """Round the probabilities of every recognized attention before they meet the values.

    `linear`: k / (2^bits - 1), by QuantizeLinear and DequantizeLinear. `log`: 2^-k, of which the last code is zero, looked up in a codebook
    (Lin et al. 2022, "FQ-ViT"). The range is that of a softmax, [0, 1], so nothing is calibrated. It shows what a quantized attention
    would cost in accuracy: ONNX Runtime has no kernel that multiplies such codes, so nothing becomes faster. Before fuse-attention only.

    Args:
        codes: linear or log.
        bits: 8 or 4 for linear; 4 or 3 for log.

    Raises:
        PipelineError: a width that the codes do not have.
    """

    codes: Literal["linear", "log"] = "linear"
    bits: int = 8
    exact: ClassVar[bool] = False
    dials = (Switch("codes", "log", {"codes": "linear", "bits": 8}), Switch("bits", 4, {"bits": 8}))
    anchors: ClassVar[frozenset[str]] = frozenset({"Softmax", "Attention"})

    def __post_init__(self) -> None:
        super().__post_init__()
        known = _BITS.get(self.codes, ())
        if known and self.bits not in known:
            raise option_error(self.name, "bits", f"{' or '.join(map(str, known))} for codes={self.codes}", self.bits)

    def match(self, node: ir.Node, ctx: Context) -> ProbabilitiesMatch | Miss | None:
        if node.op_type == "Attention":
            return Miss(node, "its probabilities are inside the operator", "put quantize-probabilities before fuse-attention")
        facts = ctx.get(Attentions())[node]
        if isinstance(facts, str):
            return Miss(node, f"not quantized: {facts}")
        product, p = producer(facts.output, "MatMul"), facts.probabilities
        if product is None or p is None or product.inputs[0] is not p or p.dtype != ir.DataType.FLOAT:
            return Miss(node, "not quantized: its probabilities do not meet the values in a MatMul of FLOAT")
        return ProbabilitiesMatch((product,), (product.outputs[0],), p)

    def build(self, op: Builder, m: ProbabilitiesMatch) -> Sequence[ir.Value]:
        rounded = self._log(op, m.probabilities) if self.codes == "log" else self._linear(op, m.probabilities)
        return [op.MatMul(rounded, m.nodes[0].inputs[1])]

    def _linear(self, op: Builder, p: ir.Value) -> ir.Value:
        grid = op.const(np.array(1 / (2**self.bits - 1), np.float32), "scale"), op.const(np.array(0, np.uint8), "zero_point")
        value: ir.Value = op.DequantizeLinear(op.QuantizeLinear(p, *grid), *grid)
        return value

    def _log(self, op: Builder, p: ir.Value) -> ir.Value:
        last = 2**self.bits - 1
        codebook = np.append(0.5 ** np.arange(last), 0).astype(np.float32)
        power = op.Mul(op.Log(p), op.const(np.array(-1 / math.log(2), np.float32), "per_octave"))  # of zero: infinite, so the last code
        bounded = op.Min(power, op.const(np.array(last, np.float32), "last"))
        codes = op.QuantizeLinear(bounded, op.const(np.array(1, np.float32), "octave"), op.const(np.array(0, np.uint8), "zero_point"))
        value: ir.Value = op.Gather(op.const(codebook, "codebook"), op.Cast(codes, to=ir.DataType.INT32), axis=0)
        return value
