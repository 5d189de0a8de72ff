"""The OpenVINO provider of ONNX Runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import onnx_ir as ir

from ._ort import OwnOperators
from ._vendored import VENDOR

_REFUSED = {"Attention", "RotaryEmbedding", "RMSNormalization", "DynamicQuantizeSequenceToSequence", "TensorScatter", "Optional", "SequenceEmpty"}
_TAKEN = {"SkipLayerNormalization", "BiasGelu", "QuickGelu", "MatMulNBits", "FusedMatMul"}  # of the runtime's own operators


@dataclasses.dataclass(frozen=True)
class Openvino(OwnOperators):
    """OpenVINO on the CPU through ONNX Runtime; it compiles the graph itself and fuses what it recognizes.

    It refuses standard Attention, RotaryEmbedding and RMSNormalization (onnxruntime-openvino 1.24.1, tried one by one), so they are
    written as the operators that they are made of. The package replaces onnxruntime: give it an environment of its own.
    """

    provider: ClassVar[str] = "OpenVINOExecutionProvider"
    package: ClassVar[str] = "onnxruntime-openvino"
    has_kernels: ClassVar[bool] = False

    def refusal(self, node: ir.Node, opset: int | None = None) -> str | None:
        if node.domain in ("", "ai.onnx"):
            return f"OpenVINO refuses {node.op_type}" if node.op_type in _REFUSED else None
        return None if node.domain == VENDOR and node.op_type in _TAKEN else f"OpenVINO does not know {node.domain}::{node.op_type}"

    def providers(self) -> Sequence[str | tuple[str, Mapping[str, str]]]:
        options = {"device_type": "CPU"} | ({"num_of_threads": str(self.threads)} if self.threads else {})
        return ((self.provider, options),)
