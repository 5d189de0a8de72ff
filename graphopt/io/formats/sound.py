"""Is a ModelProto what it says: text is text, and a tensor holds as many numbers as its shape asks for. No data are copied but of small tensors."""

from __future__ import annotations

import math
from typing import Any

import onnx
import onnx_ir as ir

from graphopt.core.errors import LoadError

_FREE = frozenset({"doc_string", "metadata_props", "producer_name", "producer_version"})  # of text that nobody reads by
_SMALL = 1 << 20  # bytes: of a larger tensor only the size of the whole message is looked at
_FIELDS = {  # field -> types that are stored in it
    "float_data": ("FLOAT", "COMPLEX64"), "double_data": ("DOUBLE", "COMPLEX128"), "int64_data": ("INT64",), "uint64_data": ("UINT32", "UINT64"),
    "string_data": ("STRING",),
}  # fmt: skip


def check(message: Any, free: bool = False) -> None:
    """Text for people that is not UTF-8 is escaped, in place. `free`: such text is all that is in here.

    Raises:
        LoadError: a name is not UTF-8, an attribute has no type, or a tensor holds too few or too many numbers; one line.
    """
    if isinstance(message, onnx.TensorProto):
        return _check_tensor(message)
    if isinstance(message, onnx.AttributeProto) and not message.type and not message.ref_attr_name:
        raise LoadError(f"invalid ONNX model: the attribute {message.name!r} has no type; export the model again")
    for field, value in message.ListFields():
        if field.type == field.TYPE_STRING:
            _check_text(message, field, value, free or field.name in _FREE)
        elif field.type == field.TYPE_MESSAGE:
            for part in value if _repeated(field) else (value,):
                check(part, free or field.name in _FREE)
    return None


def _repeated(field: Any) -> bool:
    return bool(field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED)


def _check_text(message: Any, field: Any, value: Any, free: bool) -> None:
    """Text that is not UTF-8 is read as bytes."""
    found = [x for x in (value if _repeated(field) else (value,)) if isinstance(x, bytes)]
    if found and not free:
        raise LoadError(f"invalid ONNX model: the {field.name} {found[0][:80]!r} is not UTF-8; export the model again")
    if found:
        setattr(message, field.name, found[0].decode("utf-8", "backslashreplace"))


def _check_tensor(tensor: onnx.TensorProto) -> None:
    if isinstance(tensor.name, bytes):
        raise LoadError(f"invalid ONNX model: the name {tensor.name[:80]!r} of a tensor is not UTF-8; export the model again")
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError:
        raise LoadError(f"invalid ONNX model: the tensor `{tensor.name}` is of the unknown type {tensor.data_type}; export the model again") from None
    if min(tensor.dims, default=0) < 0 or dtype == ir.DataType.UNDEFINED:
        what = f"the shape {list(tensor.dims)}" if dtype != ir.DataType.UNDEFINED else "no type"
        raise LoadError(f"invalid ONNX model: the tensor `{tensor.name}` has {what}; export the model again")
    size = math.prod(tensor.dims)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return _check_external(tensor, -(-size * dtype.bitwidth // 8))
    if dtype.name.startswith("FLOAT6"):
        return None  # packed or not: writers differ
    if tensor.HasField("raw_data"):
        wanted = -(-size * dtype.bitwidth // 8) if dtype != ir.DataType.STRING else 0
        whole = tensor.ByteSize()
        held, unit = len(tensor.raw_data) if whole < _SMALL else wanted if wanted <= whole <= wanted + _SMALL else whole, "bytes"
    else:
        name = next((field for field, types in _FIELDS.items() if dtype.name in types), "int32_data")
        held, unit = len(getattr(tensor, name)), f"entries of {name}"
        wanted = (
            size * 2
            if dtype.name.startswith("COMPLEX")
            else -(-size * dtype.bitwidth // 8)
            if dtype != ir.DataType.STRING and dtype.bitwidth < 8
            else size
        )
    if held != wanted:
        where = f"the tensor `{tensor.name}`, {dtype.name.lower()}{list(tensor.dims)},"
        raise LoadError(f"invalid ONNX model: {where} holds {held} {unit} instead of {wanted}; it is truncated: export or download it again")
    return None


def _check_external(tensor: onnx.TensorProto, wanted: int) -> None:
    """Where the data of a tensor are said to be, in bytes; whether the file has them is seen where its place is known."""
    said = {entry.key: entry.value for entry in tensor.external_data}
    if not said.get("location"):
        raise LoadError(f"invalid ONNX model: the tensor `{tensor.name}` has its data in a file that it does not name; export the model again")
    for key in ("offset", "length"):
        if key in said and not (said[key].isascii() and said[key].isdigit()):
            raise LoadError(
                f"invalid ONNX model: the tensor `{tensor.name}` has the {key} `{said[key]:.40}` in its data file; export the model again"
            )
    if "length" in said and int(said["length"]) != wanted:
        where = f"the tensor `{tensor.name}`, {ir.DataType(tensor.data_type).name.lower()}{list(tensor.dims)},"
        raise LoadError(
            f"invalid ONNX model: {where} is given {said['length']} bytes of its data file instead of {wanted}; export or download it again"
        )
