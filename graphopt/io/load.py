"""The front door: whatever a model comes as, it leaves here as an `onnx_ir.Model` in normal form, and the caller's object is as it was."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import onnx
import onnx_ir as ir

from graphopt.core.errors import LoadError
from graphopt.core.remarks import Remarks
from graphopt.graph.opset import versions as opset
from graphopt.graph.opset.node_form import WORKING
from graphopt.io import bind_shapes
from graphopt.io import onnx_file as reading
from graphopt.io.bind_shapes import override_shapes
from graphopt.io.normal_form import normalize
from graphopt.io.save import SOURCE_FILES

if TYPE_CHECKING:
    import torch

    Source: TypeAlias = str | os.PathLike[str] | onnx.ModelProto | ir.Model | torch.nn.Module | torch.export.ExportedProgram

SOURCE = "graphopt.source"  # model.meta: where the model came from, as text


def load(
    source: Source,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    task: str | None = None,
    with_past: bool = False,
    input_shapes: Mapping[str, Sequence[int | str]] | None = None,
    remarks: Remarks | None = None,
) -> ir.Model:
    """Bring a model into normal form.

    Args:
        source: path of an .onnx file (external data stay on disk, memory-mapped) or of a Hugging Face model folder, `onnx.ModelProto`,
            `onnx_ir.Model`, `torch.nn.Module`, or `torch.export.ExportedProgram`. It is not changed; weights are shared with it, so do not
            change them while the result is in use.
        example_inputs: positional inputs of a module, as for `torch.export`.
        example_kwargs: its keyword inputs.
        dynamic_shapes: as for `torch.export`. By default the first axis of every input is dynamic, and the second axis too where the input
            is integer or boolean, or has at most three axes, so far as the module allows; an axis that it fixes is a warning.
        task: for a folder: `text-classification` and the like, instead of the class that its config.json names.
        with_past: for the folder of a decoder: with inputs past_key_values.N.key/value and outputs present.N.key/value, float32
            [batch, kv_heads, past_sequence, head_dim].
        input_shapes: input name -> one int or symbol per axis; an int below 1 leaves the axis as it is.
        remarks: gets what is worth knowing about the model.

    Raises:
        LoadError: one line that names the source, what was found, and what to do.
    """
    remarks = Remarks() if remarks is None else remarks
    with _silent("onnx_ir", "onnx_shape_inference"):
        model, name, files = read(source, example_inputs, example_kwargs, dynamic_shapes, task, with_past, remarks)
        try:
            remember(model, name, files)
            check_outputs(model)
            if input_shapes:
                override_shapes(model, input_shapes)
            normalize(model, remarks)
        except LoadError as error:
            raise LoadError(f"{name}: {error}") from None
    return model


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


def read(
    source: Any, example_inputs: Any, example_kwargs: Any, dynamic_shapes: Any, task: str | None, with_past: bool, remarks: Remarks
) -> tuple[ir.Model, str, list[str]]:
    """The model, not yet in normal form; its name in messages; its files."""
    folder = isinstance(source, str | os.PathLike) and os.path.isdir(source)
    if (task is not None or with_past) and not folder:
        raise LoadError(f"task and with_past are for Hugging Face folders, and {_describe(source)} is none")
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

        return export.export_module(source, example_inputs, example_kwargs, dynamic_shapes, remarks), _describe(source), []
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


def load_both(
    source: Source,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    input_shapes: Mapping[str, Sequence[int | str]] | None = None,
    task: str | None = None,
    with_past: bool = False,
    remarks: Remarks,
) -> tuple[ir.Model, ir.Model]:
    """The input as it came (with `input_shapes` bound), and its normal form; arguments as for `graphopt.load`."""
    original, name, files = read(source, example_inputs, example_kwargs, dynamic_shapes, task, with_past, remarks)
    remember(original, name, files)
    model, _, _ = reading.from_model(original)
    try:
        check_outputs(original)
        if input_shapes:
            bind_shapes.override_shapes(original, input_shapes)
            bind_shapes.override_shapes(model, input_shapes)
        normalize(model, remarks)
    except LoadError as error:
        raise LoadError(f"{name}: {error}") from None
    return original, model
