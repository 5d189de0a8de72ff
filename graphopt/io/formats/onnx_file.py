"""ONNX models from files and from memory: checked, with data that stay where they are until they are needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import onnx
import onnx_ir as ir

from graphopt.core.errors import LoadError, about
from graphopt.core.remarks import Remarks
from graphopt.graph.serialize import graph_of, read
from graphopt.io.formats import sound
from graphopt.io.formats.format import Format, Loaded, is_path
from graphopt.io.formats.sparse import densified
from graphopt.io.order import check_sources, put_in_order

_LONG = 400  # letters of another library's message
_MAGIC = {
    b"PK\x03\x04": "a zip archive; unpack it, or, if it is a PyTorch checkpoint, load the module in Python and pass it with example_inputs",
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"\x80\x02": "a pickle; load the module in Python and pass it with example_inputs",
    b"GGUF": "a GGUF file; save the model with transformers and give the folder",
}


_FIELDS = {ir.DataType.FLOAT: "float_data", ir.DataType.DOUBLE: "double_data", ir.DataType.INT64: "int64_data"}  # one element for each
_BESIDE = 64  # bytes of a stored tensor, for each axis and for itself, besides its data and its texts


class OnnxFile(Format):
    """A path that no other format wants."""

    given: ClassVar[str] = "a path"
    onnx_file: ClassVar[bool] = True

    def recognizes(self, source: Any) -> bool:
        return is_path(source)

    def read(self, source: Any, options: Mapping[str, Any], remarks: Remarks) -> Loaded:
        return from_file(Path(source))


class OnnxProto(Format):
    given: ClassVar[str] = "an onnx.ModelProto"

    def recognizes(self, source: Any) -> bool:
        return isinstance(source, onnx.ModelProto)

    def read(self, source: Any, options: Mapping[str, Any], remarks: Remarks) -> Loaded:
        return from_proto(source)


class OnnxModel(Format):
    given: ClassVar[str] = "an onnx_ir.Model"

    def recognizes(self, source: Any) -> bool:
        return isinstance(source, ir.Model)

    def read(self, source: Any, options: Mapping[str, Any], remarks: Remarks) -> Loaded:
        return from_model(source)


def from_file(path: Path) -> Loaded:
    """Read an .onnx file. Weights in external data stay on disk and are mapped when they are read."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        todo = (
            "give an .onnx file or a Hugging Face model folder"
            if isinstance(error, (FileNotFoundError, NotADirectoryError))
            else "it is there, and cannot be read"
        )
        raise LoadError(f"{path}: {error.strerror or error}; {todo}") from None
    if not head:
        raise LoadError(f"{path}: the file is empty; export or download it again")
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            raise LoadError(f"{path}: expected an ONNX model, found {kind}")
    try:
        proto = read(path)
    except Exception as error:  # noqa: BLE001 -- DecodeError has another home in each protobuf implementation
        found = "text" if _is_text(head) else "what no ONNX parser reads"
        raise LoadError(f"{path}: expected an ONNX model, found {found}, or the file is truncated ({error}); export or download it again") from None
    model = _deserialize(proto, str(path))
    keeper = _Weights(str(path), path.absolute().parent, shared=False)
    _map_tensors(model, keeper)
    return model, str(path), [str(path.absolute()), *sorted(keeper.files)]


def from_proto(proto: onnx.ModelProto) -> Loaded:
    """Read a caller's ModelProto, which is not changed; external data are looked up from the working directory."""
    model, name = _deserialize(proto, "the ModelProto"), "the ModelProto"
    keeper = _Weights(name, Path.cwd(), shared=True)
    _map_tensors(model, keeper)
    return model, name, sorted(keeper.files)


def from_model(source: ir.Model) -> Loaded:
    """Copy a caller's model; the weights are shared."""
    name = "the ir.Model"
    with about(name):
        check_sources(source)
    try:
        model = source.clone()
    except RuntimeError as error:
        raise LoadError(f"{name} cannot be copied: {_root_line(error)}; pass onnx_ir.to_proto(model) instead") from None
    keeper = _Weights(name, None, shared=True)
    _map_tensors(model, keeper)
    return model, name, sorted(keeper.files)


def _is_text(head: bytes) -> bool:
    try:
        return head.decode("utf-8").isprintable() or b"\n" in head
    except UnicodeDecodeError:
        return False


def _deserialize(proto: onnx.ModelProto, name: str) -> ir.Model:
    if not proto.HasField("graph") or not (proto.graph.node or proto.graph.output):
        raise LoadError(f"{name}: expected an ONNX model, found no graph; it is something else, or truncated")
    imports = {o.domain: o.version for o in proto.opset_import}
    standard = imports.get("", imports.get("ai.onnx"))
    if not imports:
        raise LoadError(f"{name}: the model imports no opset; it is truncated, or was written by hand: add opset_import")
    if standard is not None and standard > onnx.defs.onnx_opset_version():
        raise LoadError(f"{name}: opset {standard} is newer than the installed onnx knows ({onnx.defs.onnx_opset_version()}); update onnx")
    with about(name):
        sound.check(proto)
        proto = densified(proto)
    try:
        model = graph_of(proto)
    except Exception as error:  # noqa: BLE001 -- the deserializer wraps every kind of error; the innermost one says what is wrong
        raise LoadError(f"{name}: invalid ONNX model: {_root_line(error)}; check it with onnx.checker.check_model, and export it again") from None
    with about(name):
        put_in_order(model)
    return model


def _root_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    line = str(error).partition("\n")[0]
    return line if len(line) <= _LONG else f"{line[:_LONG]}..."


# ---- tensors --------------------------------------------------------------------------------------------------------------------------


def _map_tensors(model: ir.Model, change: Callable[[Any], Any]) -> None:
    """Replace the tensor of every initializer and attribute, in functions and subgraphs too, by `change(tensor)`."""
    for root in (model.graph, *(f.graph for f in model.functions.values())):
        for graph in (root, *root.subgraphs()):
            for value in graph.initializers.values():
                if value.const_value is not None:
                    value.const_value = change(value.const_value)
        for node in ir.traversal.RecursiveGraphIterator(root):
            for key, attribute in list(node.attributes.items()):
                if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                    node.attributes[key] = ir.AttrTensor(key, change(attribute.value))


class _Weights:
    """What each tensor of a source becomes; no data are read.

    An external tensor gets the absolute place of its data, so that a later change of the working directory does not matter. Any other
    tensor of a caller (`shared`) gets an object of its own over the same data, since renaming a value renames its tensor.
    """

    def __init__(self, name: str, folder: Path | None, *, shared: bool) -> None:
        self.name, self.folder, self.shared = name, folder, shared
        self.homes = () if folder is None else (folder.resolve(), (folder / Path(name).name).resolve().parent)
        self.files: set[str] = set()

    def __call__(self, tensor: Any) -> Any:
        if isinstance(tensor, ir.ExternalTensor):
            return self._external(tensor)
        self._check(tensor)
        if not self.shared:
            return tensor
        shape = ir.Shape(tensor.shape.numpy())
        if tensor.dtype == ir.DataType.STRING:
            return ir.StringTensor(list(tensor.numpy().reshape(-1)), shape=shape, name=tensor.name)
        return ir.LazyTensor(lambda: tensor, dtype=tensor.dtype, shape=shape, name=tensor.name)

    def _check(self, tensor: Any) -> None:
        """What it says of its length; the data are not copied out of the message for it."""
        if not isinstance(tensor, ir.TensorProtoTensor) or tensor.dtype == ir.DataType.STRING:
            return
        held, rest = tensor.raw.ByteSize(), len(tensor.name or "") + len(tensor.doc_string or "") + _BESIDE * (len(tensor.shape) + 1)
        fits = tensor.nbytes <= held <= tensor.nbytes + rest + sum(map(len, tensor.metadata_props.values()))
        if not tensor.raw.HasField("raw_data"):
            field = _FIELDS.get(tensor.dtype)
            fits = field is None or len(getattr(tensor.raw, field)) == tensor.size
        if not fits:
            text = (
                f"the weight `{tensor.name}` is {tensor.dtype.name.lower()}{list(tensor.shape)}, {tensor.nbytes} bytes, and its data are not as long"
            )
            raise LoadError(f"{self.name}: {text}; download or export it again")

    def _external(self, tensor: ir.ExternalTensor) -> ir.ExternalTensor:
        path = self._place(tensor)
        if not path.is_file():
            raise LoadError(f"{self.name}: the data file {path} is missing; put it beside the model, where the model expects it")
        end, size = (tensor.offset or 0) + (tensor.nbytes if tensor.length is None else tensor.length), path.stat().st_size
        if size < end:
            raise LoadError(f"{self.name}: the data file {path} has {size} bytes, and `{tensor.name}` ends at byte {end}; download it again")
        self.files.add(str(path))
        shape = ir.Shape(tensor.shape.numpy())
        return ir.ExternalTensor(path, tensor.offset, tensor.length, tensor.dtype, shape=shape, name=tensor.name or "", base_dir="")

    def _place(self, tensor: ir.ExternalTensor) -> Path:
        """Where the data lie: in the model's folder. A link may lead to where the model itself lies (caches are made of such), and nowhere else."""
        if self.folder is None:
            return Path(os.path.abspath(tensor.path))
        location = os.fspath(tensor.location)
        place = self.folder / location
        apart = os.path.isabs(location) or ".." in Path(location).parts
        if apart or not any(place.resolve().is_relative_to(home) for home in self.homes):
            said = f"{location}," if apart else f"{location}, a link to {place.resolve()},"
            raise LoadError(f"{self.name}: the data of `{tensor.name}` are said to be at {said} outside the model's folder; move the file there")
        return place
