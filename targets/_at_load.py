"""What ONNX Runtime makes of multiplies between DequantizeLinear nodes when it loads a model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import onnx
import onnx_ir as ir

from graphopt.analysis.linear import Embedding, Linear
from graphopt.graph.questions import consumers
from graphopt.graph.serialize import read
from graphopt.run import guarded
from graphopt.run.worker import Settings

INTEGER = ("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul")  # the weight is their second input
ROUNDED = (
    "ONNX Runtime makes MatMulNBits of it when it loads the file, and rounds blocks of the activation to 8 bits; "
    "the session option session.qdq_matmulnbits_accuracy_level=0 multiplies floats"
)
_INT8_BLOCKS = 4  # accuracy_level of MatMulNBits
_BETWEEN_CODES = ("QLinearMatMul", "QGemm", "QLinearConv")  # the weight is their fourth input
_DATA = {"session.optimized_model_external_initializers_file_name": "fused.bin"}


def multiplied_at_load(shipped: ir.Model, operands: Iterable[Linear | Embedding]) -> tuple[set[str], set[str]]:
    """The weights that are multiplied as integers by the runtime's default: with activations that the graph rounds to 8 bits, and with
    activations that only the runtime rounds (a file cannot say how exact such a product should be; the session option is in `ROUNDED`).

    Args:
        shipped: the model as it is written: at another opset the runtime may refuse it.
        operands: of the model before that; names are the same.

    Raises:
        TargetError: the runtime refuses it, or dies of it.
    """
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        file = Path(folder, "fused.onnx")
        guarded.probe(shipped, None, Settings(level="extended", saved_to=str(file), entries=_DATA))
        nodes = read(file, weights=False).graph.node
    integer = [(n, n.input[1]) for n in nodes if n.op_type in INTEGER] + [(n, n.input[3]) for n in nodes if n.op_type in _BETWEEN_CODES]
    blocked = {output for n in nodes if n.op_type == "MatMulNBits" and _level(n) == _INT8_BLOCKS for output in n.output}
    made = {output for n, _ in integer for output in n.output}
    linears = [x for x in operands if isinstance(x, Linear)]  # weights may be renamed, outputs are not
    fused = {x.weight.name or "" for x in linears if made & _outputs(x)} | {weight for _, weight in integer}
    return fused, {x.weight.name or "" for x in linears if blocked & _outputs(x)}


def _outputs(linear: Linear) -> set[str]:
    """What a multiply may give at load: its own output, with the bias, or the codes of either."""
    values = (linear.node.outputs[0], linear.output)
    codes = [n.outputs[0] for v in values for n in consumers(v) if n.op_type == "QuantizeLinear"]
    return {str(v.name) for v in (*values, *codes)}


def _level(node: onnx.NodeProto) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "accuracy_level"), 0)
