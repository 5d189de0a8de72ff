"""The front door: whatever a model comes as, it leaves here as an `onnx_ir.Model` in normal form, and the caller's object is as it was."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, Unpack, cast

import onnx
import onnx_ir as ir

from graphopt.core.errors import LoadError
from graphopt.core.options import near
from graphopt.core.remarks import Remarks
from graphopt.graph.opset import versions as opset
from graphopt.graph.opset.node_form import WORKING
from graphopt.io import onnx_file as reading
from graphopt.io.bind_shapes import override_shapes
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
        model, _, _ = reading.from_model(original)
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
    with _named(name):
        check_outputs(model)
        if shapes:
            override_shapes(model, shapes)
    return model, name


def _normal(model: ir.Model, name: str, remarks: Remarks) -> ir.Model:
    with _named(name):
        normalize(model, remarks)
    return model


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """An error says of which model it is."""
    try:
        yield
    except LoadError as error:
        raise LoadError(f"{name}: {error}") from None


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


def read(source: Any, options: LoadOptions, remarks: Remarks) -> tuple[ir.Model, str, list[str]]:
    """The model, not yet in normal form; its name in messages; its files."""
    folder = isinstance(source, str | os.PathLike) and os.path.isdir(source)
    task, with_past = options.get("task"), options.get("with_past", False)
    if (task is not None or with_past) and not folder:
        raise LoadError(f"task and with_past are for Hugging Face folders, and {_describe(source)} is none")
    example_inputs, example_kwargs = options.get("example_inputs"), options.get("example_kwargs")
    kinds = {c.__module__.partition(".")[0] + "." + c.__name__ for c in type(source).__mro__}
    if (example_inputs is not None or example_kwargs is not None) and "torch.Module" not in kinds:
        raise LoadError(f"example inputs are for a torch.nn.Module, and {_describe(source)} is none")
    if folder:
        from graphopt.io import huggingface

        return huggingface.export_folder(Path(source), task, with_past, remarks), str(source), _files_under(Path(source))
    if isinstance(source, str | os.PathLike):
        return reading.from_file(Path(source))
    if isinstance(source, onnx.ModelProto):
        return reading.from_proto(source)
    if isinstance(source, ir.Model):
        return reading.from_model(source)
    if "torch.ExportedProgram" in kinds:
        from graphopt.io import torch_module as export

        return export.export_program(source, remarks), "the ExportedProgram", []
    if "torch.Module" in kinds:
        from graphopt.io import torch_module as export

        return export.export_module(source, example_inputs, example_kwargs, options.get("dynamic_shapes"), remarks), _describe(source), []
    raise LoadError(f"cannot load {_describe(source)}: give a path, an onnx.ModelProto, an onnx_ir.Model, a torch.nn.Module or an ExportedProgram")


def _describe(source: Any) -> str:
    return str(source) if isinstance(source, str | os.PathLike) else f"an object of type {type(source).__module__}.{type(source).__qualname__}"


def _files_under(folder: Path) -> list[str]:
    return [str(p.absolute()) for p in folder.rglob("*") if p.is_file()]


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


def check_outputs(model: ir.Model) -> None:
    """Raises LoadError if one output is listed twice: runtimes load that, but the normal form has a name for each."""
    names = [v.name for v in model.graph.outputs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise LoadError(f"the output `{twice}` is listed {names.count(twice)} times; list it once, or give the others names by Identity nodes")
