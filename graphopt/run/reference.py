"""Run a model by the reference evaluator of the onnx package: slow, and the meaning of every standard op."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphopt.core.contract import Array
from graphopt.core.errors import SaveError, TargetError
from graphopt.graph.serialize import to_proto
from graphopt.run import Dim, Feeds, Port, check_feeds, in_width, one_line

if TYPE_CHECKING:
    import onnx


class ReferenceSession:
    """A loaded model, with the interface of `run.ort.OrtSession`."""

    def __init__(self, proto: onnx.ModelProto, evaluator: Any) -> None:
        defaults = {tensor.name for tensor in proto.graph.initializer}
        self._evaluator = evaluator
        self.inputs = tuple(_port(x) for x in proto.graph.input if x.name not in defaults)
        self.outputs = tuple(_port(x) for x in proto.graph.output)
        self._overridable = defaults & {x.name for x in proto.graph.input}

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """The outputs by name, in order.

        Raises:
            TargetError: an input is missing or unknown, or the evaluator failed; one line.
        """
        check_feeds({k: v for k, v in feeds.items() if k not in self._overridable}, self.inputs)
        names = [port.name for port in self.outputs]
        try:
            with np.errstate(all="ignore"):
                arrays = self._evaluator.run(names, in_width(feeds, self.inputs))
        except Exception as error:
            raise TargetError(f"the ONNX reference evaluator failed to run the model: {one_line(error)}") from error
        return dict(zip(names, arrays, strict=True))


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
        if not Path(model).is_file():
            raise TargetError(f"{model} is not a file; give a saved .onnx model")
        return onnx.load(os.fspath(model))
    proto: onnx.ModelProto = model
    return proto


def _port(described: onnx.ValueInfoProto) -> Port:
    import onnx

    tensor = described.type.tensor_type
    known = tensor.elem_type not in (0, onnx.TensorProto.UNDEFINED)
    dims: tuple[Dim, ...] = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim)
    return Port(described.name, np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)) if known else None, dims)
