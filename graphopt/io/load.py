"""The front door: whatever a model comes as, it leaves here as an `onnx_ir.Model` in normal form, and the caller's object is as it was."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, Unpack, cast

import onnx
import onnx_ir as ir

from graphopt.core.errors import GraphoptError, LoadError, about
from graphopt.core.options import near
from graphopt.core.remarks import Remarks
from graphopt.graph.opset import versions as opset
from graphopt.graph.opset.node_form import WORKING
from graphopt.io.bind_shapes import override_shapes
from graphopt.io.formats.format import Format, Loaded, described
from graphopt.io.formats.onnx_file import from_model
from graphopt.io.normal_form import normalize
from graphopt.io.save import SOURCE_FILES

if TYPE_CHECKING:
    import torch

    Source: TypeAlias = str | os.PathLike[str] | onnx.ModelProto | ir.Model | torch.nn.Module | torch.export.ExportedProgram

SOURCE = "graphopt.source"  # model.meta: where the model came from, as text


class LoadOptions(TypedDict, total=False):
    """How a source is read: keywords of everything that takes one (`load`, `optimize`, `inspect`, `compare`).

    Keys:
        example_inputs: positional inputs of a module, as for `torch.export`.
        example_kwargs: its keyword inputs.
        dynamic_shapes: as for `torch.export`. By default the first axis of every input is dynamic, and the second axis too where the input
            is integer or boolean, or has at most three axes, so far as the module allows; an axis that it fixes is a warning.
        input_shapes: input name -> one int or symbol per axis; an int below 1 leaves the axis as it is.
        task: for a folder: `text-classification` and the like, instead of the class that its config.json names.
        with_past: for the folder of a decoder: with inputs past_key_values.N.key/value and outputs present.N.key/value, float32
            [batch, kv_heads, past_sequence, head_dim].
    """

    example_inputs: Sequence[Any] | None
    example_kwargs: Mapping[str, Any] | None
    dynamic_shapes: Any
    input_shapes: Mapping[str, Sequence[int | str]] | None
    task: str | None
    with_past: bool


def load(source: Source, *, remarks: Remarks | None = None, **options: Unpack[LoadOptions]) -> ir.Model:
    """Bring a model into normal form.

    Args:
        source: path of an .onnx file (external data stay on disk, memory-mapped) or of a Hugging Face model folder, `onnx.ModelProto`,
            `onnx_ir.Model`, `torch.nn.Module`, or `torch.export.ExportedProgram`. It is not changed; weights are shared with it, so do not
            change them while the result is in use.
        remarks: gets what is worth knowing about the model.
        options: see `LoadOptions`.

    Raises:
        LoadError: one line that names the source, what was found, and what to do.
    """
    remarks = Remarks() if remarks is None else remarks
    with _silent("onnx_ir", "onnx_shape_inference"):
        model, name = _open(source, options, remarks)
        return _normal(model, name, remarks)


def load_both(source: Source, *, remarks: Remarks, **options: Unpack[LoadOptions]) -> tuple[ir.Model, ir.Model]:
    """The input as it came (with `input_shapes` bound), and its normal form; arguments as for `load`."""
    with _silent("onnx_ir", "onnx_shape_inference"):
        original, name = _open(source, options, remarks)
        model, _, _ = from_model(original)
        return original, _normal(model, name, remarks)


def check_options(options: Mapping[str, Any], known: type = LoadOptions) -> None:
    """Raises TypeError for a keyword that is not among the `known`, as for a function that spells them."""
    unknown = next((name for name in options if name not in known.__annotations__), None)
    if unknown is not None:
        raise TypeError(f"unexpected keyword argument `{unknown}`{near(unknown, known.__annotations__)}")


def load_options(options: Mapping[str, Any]) -> LoadOptions:
    """Those of loading, of the options of something that also loads."""
    return cast("LoadOptions", {name: value for name, value in options.items() if name in LoadOptions.__annotations__})


def _open(source: Source, options: LoadOptions, remarks: Remarks) -> tuple[ir.Model, str]:
    """The model as it came, with its inputs bound to the shapes asked for, and its name in messages."""
    check_options(options)
    shapes = options.get("input_shapes")
    model, name, files = read(source, options, remarks)
    remember(model, name, files)
    with about(name), _explained("the shapes of the inputs cannot be set"):
        check_interface(model)
        if shapes:
            override_shapes(model, shapes)
    return model, name


def _normal(model: ir.Model, name: str, remarks: Remarks) -> ir.Model:
    with about(name), _explained("the graph cannot be brought into normal form"):
        normalize(model, remarks)
    return model


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """What a library raises, or we did not think of, is an error of loading, with what to do."""
    try:
        yield
    except GraphoptError:
        raise
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0]
        text = f"{what}: {type(error).__name__}: {line[:300]}; check the model with onnx.checker.check_model, and export it again"
        raise LoadError(f"{text} (GRAPHOPT_TRACEBACK=1 shows where)") from error


@contextlib.contextmanager
def _silent(*names: str) -> Iterator[None]:
    """What these libraries would log comes as an error or a remark instead."""
    before = {logger: logger.level for logger in map(logging.getLogger, names)}
    try:
        for logger in before:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in before.items():
            logger.setLevel(level)


# ---- formats --------------------------------------------------------------------------------------------------------------------------


FORMATS = (  # file and class in io/formats/: the first that recognizes a source reads it
    "huggingface.HuggingFaceFolder",
    "onnx_file.OnnxFile",
    "onnx_file.OnnxProto",
    "onnx_file.OnnxModel",
    "torch_module.TorchProgram",
    "torch_module.TorchModule",
)


def formats() -> tuple[Format, ...]:
    places = (name.split(".") for name in FORMATS)
    return tuple(getattr(importlib.import_module(f"graphopt.io.formats.{file}"), cls)() for file, cls in places)


def format_of(source: Any) -> Format | None:
    """The first format that recognizes a source; None = nothing that can be loaded."""
    return next((one for one in formats() if one.recognizes(source)), None)


def keeps_bytes(path: Path) -> bool:
    """Whether it is an ONNX file, which can be written again as the bytes that it has."""
    found = format_of(path)
    return found is not None and found.onnx_file and path.is_file()


def read(source: Any, options: LoadOptions, remarks: Remarks) -> Loaded:
    """The model, not yet in normal form; its name in messages; its files."""
    found = format_of(source)
    for other in formats():
        given = (options.get(name) for name in other.own)
        if type(other) is not type(found) and any(value is not None and value is not False for value in given):
            raise LoadError(f"{other.owned}, and {described(source)} is none")
    if found is None:
        *kinds, last = dict.fromkeys(one.given for one in formats())
        raise LoadError(f"cannot load {described(source)}: give {', '.join(kinds)} or {last}")
    return found.read(source, options, remarks)


# ---- what is remembered, and overridden -----------------------------------------------------------------------------------------------


def remember(model: ir.Model, name: str, files: list[str]) -> None:
    """Facts about the input that saving needs. graph.meta survives a clone; model.meta holds the same for a reader at hand."""
    facts: dict[str, Any] = {
        opset.ORIGIN: model.opset_imports.get("", model.opset_imports.get("ai.onnx", WORKING)),
        opset.ORIGIN_IR: model.ir_version,
        SOURCE: name,
        SOURCE_FILES: tuple(files),
    }
    for key, value in facts.items():  # a model that was loaded before remembers its first source
        model.meta[key] = model.graph.meta[key] = model.graph.meta.get(key, value)


def check_interface(model: ir.Model) -> None:
    """Raises LoadError if one input or output is listed twice: the normal form has a name for each."""
    for what, values, remedy in (("input", model.graph.inputs, ""), ("output", model.graph.outputs, ", or give the others names by Identity nodes")):
        names = [v.name for v in values]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise LoadError(f"the {what} `{twice}` is listed {names.count(twice)} times; list it once{remedy}")
