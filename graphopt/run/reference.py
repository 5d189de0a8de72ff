"""Run a model by the reference evaluator of the onnx package: slow, and the meaning of every standard op."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphopt.core.contract import Array
from graphopt.core.errors import SaveError, TargetError
from graphopt.graph.serialize import to_proto
from graphopt.run import Port, Runner, one_line, saved

if TYPE_CHECKING:
    import onnx


class ReferenceSession(Runner):
    engine = "the ONNX reference evaluator"

    def __init__(self, proto: onnx.ModelProto, evaluator: Any) -> None:
        stored, inputs = {tensor.name for tensor in proto.graph.initializer}, list(map(_port, proto.graph.input))
        fed, defaults = ([port for port in inputs if (port.name in stored) == default] for default in (False, True))
        super().__init__(fed, map(_port, proto.graph.output), defaults)
        self._evaluator = evaluator

    def _call(self, outputs: list[str], feeds: dict[str, Array]) -> Sequence[Array]:
        with np.errstate(all="ignore"):
            arrays: list[Array] = self._evaluator.run(outputs, feeds)
        return arrays


def session(model: ir.Model | onnx.ModelProto | bytes | str | os.PathLike[str]) -> ReferenceSession:
    """Load a model (a graph, a ModelProto, its bytes, or a file).

    Raises:
        TargetError: the evaluator lacks an op, or refuses the model; one line.
    """
    from onnx.reference import ReferenceEvaluator

    proto = _proto(model)
    try:
        return ReferenceSession(proto, ReferenceEvaluator(proto))
    except Exception as error:
        raise TargetError(f"the ONNX reference evaluator cannot load the model: {one_line(error)}") from error


def _proto(model: Any) -> onnx.ModelProto:
    import onnx

    if isinstance(model, ir.Model):
        try:
            return to_proto(model)
        except SaveError as error:
            raise TargetError(f"the ONNX reference evaluator takes one message: {error}") from error
    if isinstance(model, bytes):
        return onnx.load_model_from_string(model)
    if isinstance(model, (str, os.PathLike)):
        return onnx.load(saved(model))
    proto: onnx.ModelProto = model
    return proto


def _port(described: onnx.ValueInfoProto) -> Port:
    return Port.of(ir.serde.deserialize_value_info_proto(described, None))
