"""Element types and arrays of ONNX as torch has them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
import torch

from graphopt.core.contract import Array
from graphopt.core.errors import TargetError

Tensor: TypeAlias = torch.Tensor
Ints = Sequence[int]

DTYPES: dict[ir.DataType, torch.dtype] = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
    ir.DataType.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    ir.DataType.FLOAT8E5M2: torch.float8_e5m2,
    ir.DataType.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
    ir.DataType.BOOL: torch.bool,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.UINT16: torch.uint16,
    ir.DataType.UINT32: torch.uint32,
    ir.DataType.UINT64: torch.uint64,
    ir.DataType.INT4: torch.int8,  # torch has no type of less than 8 bits: the same numbers, a byte each
    ir.DataType.UINT4: torch.uint8,
    ir.DataType.INT2: torch.int8,
    ir.DataType.UINT2: torch.uint8,
    ir.DataType.COMPLEX64: torch.complex64,
    ir.DataType.COMPLEX128: torch.complex128,
}
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)
_SUB_BYTE = {"int4": np.int8, "uint4": np.uint8, "int2": np.int8, "uint2": np.uint8}


def dtype_of(kind: int | ir.DataType | None) -> torch.dtype:
    """The torch type of an ONNX element type.

    Raises:
        TargetError: torch has none (strings, 4-bit floats).
    """
    known = DTYPES.get(ir.DataType(kind)) if kind is not None else None
    if known is None:
        name = "an unknown type" if kind is None else ir.DataType(kind).name
        raise TargetError(f"torch has no element type for {name}; run this model by graphopt.run.ort or graphopt.run.reference")
    return known


def kind_of(dtype: torch.dtype) -> ir.DataType:
    """The ONNX element type of a torch type; of int8 and uint8 the type of 8 bits."""
    return next(kind for kind, own in DTYPES.items() if own == dtype)


def to_tensor(array: Array) -> Tensor:
    """An array as a tensor; the memory is shared where numpy lets it be written to and torch knows the type."""
    name = array.dtype.name
    if name in _SUB_BYTE:
        return torch.from_numpy(array.astype(_SUB_BYTE[name]))
    if array.dtype.kind not in "OUS" and not name.startswith(("float8_", "bfloat16", "float4_", "float6_")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # read-only arrays; nothing here writes to a tensor that it did not make
            return torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))
    try:
        kind = dtype_of(ir.DataType.from_numpy(array.dtype))
    except TypeError:
        kind = dtype_of(ir.DataType.STRING)
    raw = np.ascontiguousarray(array).reshape(array.shape).view(np.int16 if array.dtype.itemsize == 2 else np.uint8)
    return torch.from_numpy(raw.copy()).view(kind)


def to_array(tensor: Tensor, kind: ir.DataType | None = None) -> Array:
    """A tensor as an array, of the ONNX element type `kind` where it is given (a quantized value may be floats, see `quantized`)."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16 or tensor.dtype in FLOAT8:
        own = kind_of(tensor.dtype)
        array: Array = tensor.contiguous().view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.uint8).numpy().view(own.numpy())
    else:
        array = tensor.numpy()
    if kind is None or kind == ir.DataType.STRING or array.dtype == kind.numpy():
        return array
    return array.astype(kind.numpy())


def along(vector: Tensor, axis: int, rank: int) -> Tensor:
    """A vector that lies on one axis, beside tensors with `rank` axes."""
    return vector.reshape([-1 if d == axis % rank else 1 for d in range(rank)])


def integers(tensor: Tensor) -> list[int]:
    """The contents of a shape, of axes, of sizes."""
    found: list[int] = tensor.detach().reshape(-1).tolist()
    return found
