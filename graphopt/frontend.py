"""The front door: whatever a model comes as, it leaves here as an `onnx_ir.Model` in normal form, and the caller's object is as it was."""

from __future__ import annotations

import contextlib
import keyword
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import onnx
import onnx_ir as ir

from graphopt import opset, reading
from graphopt.errors import LoadError
from graphopt.normalize import normalize
from graphopt.remarks import Remarks
from graphopt.save import SOURCE_FILES
from graphopt.spelling import WORKING

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


def parse_shape(text: str) -> tuple[str, list[int | str]]:
    """`"x:0,4,s"` -> `("x", [0, 4, "s"])`, an item of `input_shapes`; a name may hold colons.

    Raises:
        LoadError: no colon, or an empty axis.
    """
    name, colon, dims = text.rpartition(":")
    parts = [p.strip() for p in dims.split(",")]
    if not colon or not name or not all(parts):
        raise LoadError(f"`{text}` is no input shape: write NAME:DIM,DIM,... such as input_ids:1,128 or x:batch,16")
    dims_ = [int(p) if re.fullmatch(r"[+-]?[0-9]{1,18}", p) else p for p in parts]
    for dim in dims_:
        _check_dim(name, dim)
    return name, dims_


def _check_dim(name: str, dim: object) -> None:
    """A size that a tensor can have, or a name that can stand in an expression."""
    number = isinstance(dim, int) and not isinstance(dim, bool) and dim < 2**31
    if not number and not (isinstance(dim, str) and dim.isidentifier() and not keyword.iskeyword(dim)):
        raise LoadError(f"`{dim}` is no axis of input `{name}`: give a whole number below 2^31, or a name such as batch")


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
        from graphopt import huggingface

        return huggingface.export_folder(Path(source), task, with_past, remarks), str(source), _files_under(Path(source))
    if isinstance(source, str | os.PathLike):
        return reading.from_file(Path(source))
    if isinstance(source, onnx.ModelProto):
        return reading.from_proto(source)
    if isinstance(source, ir.Model):
        return reading.from_model(source)
    if "torch.ExportedProgram" in kinds:
        from graphopt import export

        return export.export_program(source, remarks), "the ExportedProgram", []
    if "torch.Module" in kinds:
        from graphopt import export

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


def override_shapes(model: ir.Model, wanted: Mapping[str, Sequence[int | str]]) -> None:
    """Bind dimensions of the inputs: a symbol that becomes a number, or another symbol, does so at every input and output.

    Raises:
        LoadError: unknown name, wrong rank, or a size that contradicts the model.
    """
    inputs = {v.name: v for v in model.graph.inputs}
    bound: dict[str, int | str] = {}
    for name, dims in wanted.items():
        value = inputs.get(name)
        if value is None:
            raise LoadError(f"there is no input `{name}` to shape; inputs: {', '.join(str(n) for n in inputs)}")
        if value.shape is not None and len(value.shape) != len(dims):
            raise LoadError(f"input `{name}` has {len(value.shape)} axes {value.shape}, not {len(dims)}; give one size or symbol for each")
        known = set(map(str, value.shape or ()))
        for dim in dims:
            if str(dim) not in known:  # what the model says itself may be more than a name
                _check_dim(name, dim)
        for axis, (old, new) in enumerate(zip(value.shape or (), dims, strict=False)):
            _bind(name, axis, old, new, bound)
    for value in dict.fromkeys((*model.graph.inputs, *model.graph.outputs)):
        dims = wanted.get(value.name or "", ()) if value.is_graph_input() else ()
        old_dims = value.shape if value.shape is not None else [None] * len(dims) if dims else None
        if old_dims is not None:
            value.shape = ir.Shape([_new_dim(old, dims[axis] if dims else 0, bound) for axis, old in enumerate(old_dims)])


def _bind(name: str, axis: int, old: Any, new: int | str, bound: dict[str, int | str]) -> None:
    """Note what a symbol becomes."""
    if _keeps(new) or str(new) == str(old):
        return
    if isinstance(old, int):
        raise LoadError(f"axis {axis} of input `{name}` is fixed at {old} in the model and cannot become {new}")
    if old.value is not None and bound.setdefault(str(old), new) != new:
        raise LoadError(f"axis {axis} of input `{name}` is `{old}`, which cannot be both {bound[str(old)]} and {new}")


def _keeps(new: int | str) -> bool:
    return isinstance(new, int) and new < 1


def _new_dim(old: Any, new: int | str, bound: Mapping[str, int | str]) -> Any:
    if isinstance(old, int):
        return old
    if old is not None and old.value is not None:
        return bound.get(str(old), old)
    return old if _keeps(new) else new
