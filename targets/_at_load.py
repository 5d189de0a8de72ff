"""What ONNX Runtime makes of multiplies between DequantizeLinear nodes when it loads a model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import onnx
import onnx_ir as ir

from graphopt.analysis.linear import Embedding, Linear
from graphopt.graph.serialize import read
from graphopt.run.ort import loadable

INTEGER = ("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul")  # the weight is their second input
ROUNDED = (
    "ONNX Runtime makes MatMulNBits of it when it loads the file, and rounds blocks of the activation to 8 bits; "
    "the session option session.qdq_matmulnbits_accuracy_level=0 multiplies floats"
)
_INT8_BLOCKS = 4  # accuracy_level of MatMulNBits


def multiplied_at_load(model: ir.Model, operands: Iterable[Linear | Embedding]) -> tuple[set[str], set[str]]:
    """The weights that are multiplied as integers by the runtime's default: with activations that the graph rounds to 8 bits, and with
    activations that only the runtime rounds (a file cannot say how exact such a product should be; the session option is in `ROUNDED`)."""
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath, options.log_severity_level = str(Path(folder, "fused.onnx")), 4
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "fused.bin")
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        source, _keep = loadable(model)
        onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        nodes = read(Path(options.optimized_model_filepath), weights=False).graph.node
    made = {output for n in nodes if n.op_type == "MatMulNBits" and _level(n) == _INT8_BLOCKS for output in n.output}
    linears = [x for x in operands if isinstance(x, Linear)]
    rounded = {x.weight.name or "" for x in linears if made & {x.node.outputs[0].name, x.output.name}}  # weights are renamed, outputs are not
    return {node.input[1] for node in nodes if node.op_type in INTEGER}, rounded


def _level(node: onnx.NodeProto) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "accuracy_level"), 0)
