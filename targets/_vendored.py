"""Which stored weights the operators of the runtime read that the lowerings of weight-only quantization write."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.graph.questions import is_constant, producer

VENDOR = "com.microsoft"  # the domain of the operators of ONNX Runtime
_MULTIPLIES, _LOOKS_UP = ("MatMulNBits", "MatMulBnb4"), "GatherBlockQuantized"


def blocked_weights(node: ir.Node) -> tuple[str, str, bool] | None:
    """(`table` or `weight`, the name of the codes, whether it multiplies integers), or None for another operator."""
    if node.domain == "" and node.op_type == "Gather":
        return _packed_rows(node)
    if node.domain != VENDOR or node.op_type not in (*_MULTIPLIES, _LOOKS_UP):
        return None
    value = node.inputs[0 if node.op_type == _LOOKS_UP else 1]
    reshape = producer(value, "Reshape")
    value = value if reshape is None else reshape.inputs[0]
    level = node.attributes.get("accuracy_level")
    name = "" if value is None else value.name or ""
    return ("table" if node.op_type == _LOOKS_UP else "weight"), name, level is not None and level.as_int() == 4


def _packed_rows(gather: ir.Node) -> tuple[str, str, bool] | None:
    """Rows of two codes in a byte, which a MatMulBnb4 may read too as one long vector."""
    reshape = producer(gather.inputs[0], "Reshape")
    codes = None if reshape is None else reshape.inputs[0]
    if codes is None or not is_constant(codes) or codes.dtype != ir.DataType.UINT8:
        return None
    return "table", codes.name or "", False
