"""From torch to a graph: torch.export, then the dynamo ONNX exporter, with dynamic sizes and names that people can read."""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import onnx_ir as ir

from graphopt.core.errors import LoadError, require
from graphopt.core.remarks import Remarks
from graphopt.graph.questions import module_of
from graphopt.io.formats.format import Format, Loaded, described

if TYPE_CHECKING:
    import torch

OPSET = 18  # at 23 the exporter emits operators that runtimes refuse (rotary caches of batch 1); everything is recognized from primitives anyway
_SYMBOL = re.compile(r"\bs\d+\b")  # a size that torch.export named
_AXIS_NAMES = {0: "batch", 1: "sequence"}
DimNames = Mapping[str, Mapping[int, str]]


class TorchModule(Format):
    given: ClassVar[str] = "a torch.nn.Module"
    own: ClassVar[tuple[str, ...]] = ("example_inputs", "example_kwargs")
    owned: ClassVar[str] = "example inputs are for a torch.nn.Module"

    def recognizes(self, source: Any) -> bool:
        return _is_torch(source, "Module")

    def read(self, source: Any, options: Mapping[str, Any], remarks: Remarks) -> Loaded:
        examples = options.get("example_inputs"), options.get("example_kwargs")
        return export_module(source, *examples, options.get("dynamic_shapes"), remarks), described(source), []


class TorchProgram(Format):
    given: ClassVar[str] = "an ExportedProgram"

    def recognizes(self, source: Any) -> bool:
        return _is_torch(source, "ExportedProgram")

    def read(self, source: Any, options: Mapping[str, Any], remarks: Remarks) -> Loaded:
        return export_program(source, remarks), "the ExportedProgram", []


def _is_torch(source: Any, name: str) -> bool:
    """Whether it is one of torch's classes of this name, told without importing torch."""
    return any(cls.__name__ == name and cls.__module__.partition(".")[0] == "torch" for cls in type(source).__mro__)


def export_module(
    module: torch.nn.Module,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None,
    dynamic_shapes: Any,
    remarks: Remarks,
    dim_names: DimNames | None = None,
) -> ir.Model:
    """Export a module in evaluation mode; its training flags and its state are as they were afterwards.

    Args:
        dynamic_shapes: as for torch.export; None makes the first axis of every input dynamic, and the second axis too where the input is
            integer or boolean, or has at most three axes, so far as the module allows.
        dim_names: names for sizes, input -> axis -> name, where it is known that equal names mean equal sizes.

    Raises:
        LoadError: no or wrong example inputs, or the module cannot be exported.
    """
    torch = require_torch()
    if example_inputs is None and example_kwargs is None:
        raise LoadError("a torch.nn.Module needs example inputs: pass example_inputs=(...), with at least 2 for sizes that shall be dynamic")
    args = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs or ())
    kwargs = dict(example_kwargs or {})
    try:
        inspect.signature(module.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise LoadError(f"the example inputs do not fit forward{inspect.signature(module.forward)}: {error}") from None
    with evaluating(module), quiet(), torch.no_grad():
        if dynamic_shapes is None:
            program = _export_dynamic(module, args, kwargs)
        else:
            program = _export(module, args, kwargs, dynamic_shapes)
            dim_names = dim_names or _given_names(module, dynamic_shapes)
        return _to_graph(program, remarks, dim_names, wanted=dynamic_shapes is None)


def export_program(program: torch.export.ExportedProgram, remarks: Remarks) -> ir.Model:
    """Turn an exported program into a graph; its dynamic sizes are those that it was exported with."""
    torch = require_torch()
    with quiet(), torch.no_grad():
        return _to_graph(program, remarks, None, wanted=False)


def require_torch() -> Any:
    """The torch module, where the exporter's other half is installed, too; raises as `require`."""
    return require("torch models", "torch", "onnxscript", "torch")


@contextlib.contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; each submodule gets its own flag back."""
    flags = {m: m.training for m in module.modules()}
    try:
        module.eval()
        yield
    finally:
        for m, training in flags.items():
            m.training = training


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters talk a lot; what matters comes back as an error or a remark."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# ---- torch.export ---------------------------------------------------------------------------------------------------------------------


def _export_dynamic(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Export with the default dynamic axes. A size of 1 in the example would be taken for fixed, so it is doubled where the module allows."""
    import torch
    from torch.utils import _pytree as pytree

    wide_args, wide_kwargs = pytree.tree_map_only(torch.Tensor, _widen, (args, kwargs))
    bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    auto = torch.export.Dim.AUTO
    axes = pytree.tree_map(
        lambda x: dict.fromkeys(_dynamic_axes(x.ndim, x.is_floating_point()), auto) if isinstance(x, torch.Tensor) else None, dict(bound)
    )
    widened = any(a is not b for a, b in zip(pytree.tree_leaves((args, kwargs)), pytree.tree_leaves((wide_args, wide_kwargs)), strict=True))
    if widened:
        with contextlib.suppress(LoadError):
            return _export(module, wide_args, wide_kwargs, axes)
    return _export(module, args, kwargs, axes)


def _given_names(module: torch.nn.Module, dynamic_shapes: Any) -> dict[str, dict[int, str]]:
    """The names of the `torch.export.Dim` objects that the caller gave to whole inputs."""
    parameters = list(inspect.signature(module.forward).parameters)
    given = dynamic_shapes if isinstance(dynamic_shapes, Mapping) else dict(zip(parameters, dynamic_shapes, strict=False))
    out: dict[str, dict[int, str]] = {}
    for name, axes in given.items():
        pairs = axes.items() if isinstance(axes, Mapping) else enumerate(axes or ())
        named = {axis: str(getattr(dim, "__name__", "")) for axis, dim in pairs}
        out[name] = {axis: text for axis, text in named.items() if isinstance(axis, int) and text.isidentifier()}
    return out


def _dynamic_axes(rank: int, is_float: bool) -> range:
    """The axes that are dynamic by default: all of small inputs, batch and sequence of a float [batch, sequence, features]; batch of an image."""
    return range(min(rank, 2 if rank <= 3 or not is_float else 1))


def _widen(tensor: torch.Tensor) -> torch.Tensor:
    ones = [axis for axis in _dynamic_axes(tensor.ndim, tensor.is_floating_point()) if tensor.shape[axis] == 1]
    return tensor.repeat([2 if axis in ones else 1 for axis in range(tensor.ndim)]) if ones else tensor


def _export(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> Any:
    import torch

    try:
        return torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        hint = "set model.config.use_cache = False" if "Cache" in str(error) else "see torch.export's documentation"
        raise LoadError(f"torch.export cannot export {type(module).__name__}: {first_line(error)}; {hint}") from error


def first_line(error: BaseException) -> str:
    """The first line of what a library has to say, with its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


# ---- the graph ------------------------------------------------------------------------------------------------------------------------


def _to_graph(program: Any, remarks: Remarks, dim_names: DimNames | None, *, wanted: bool) -> ir.Model:
    import torch

    try:
        exported = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False, external_data=False)
    except Exception as error:
        raise LoadError(f"torch.onnx cannot express the module: {first_line(error.__cause__ or error)}") from error
    assert exported is not None
    model: ir.Model = exported.model
    _name_nodes(model)
    _name_outputs(model, program)
    _name_sizes(model, dim_names)
    if wanted:
        _warn_fixed(model, remarks)
    return model


def _name_nodes(model: ir.Model) -> None:
    """`node_linear_28` of the module `lm_head` is `lm_head/linear_28`: what people can name in `exclude` and recognize in a remark."""
    for node in model.graph:
        if (module := module_of(node)) and (node.name or "").startswith("node_"):
            node.name = f"{module}/{str(node.name).removeprefix('node_')}"


def _name_outputs(model: ir.Model, program: Any) -> None:
    """Name the outputs by their place in what the module returns: the keys of a dict or dataclass, else output_0, output_1, ..."""
    from torch.utils import _pytree as pytree

    leaves = program.graph_signature.user_outputs
    places, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(len(leaves))), program.call_spec.out_spec))
    names = [_place_name(path) for path, index in places if isinstance(leaves[index], str)]
    outputs = list(model.graph.outputs)
    if len(names) != len(outputs) or len(set(names)) != len(names):
        return
    taken = {v.name for v in model.graph.inputs} | set(model.graph.initializers)
    for value, name in zip(outputs, names, strict=True):
        if not value.is_graph_input() and not value.is_initializer() and name not in taken and outputs.count(value) == 1:
            value.name = name


def _place_name(path: Sequence[Any]) -> str:
    parts = [str(getattr(step, "key", getattr(step, "idx", getattr(step, "name", "")))) for step in path]
    text = "_".join(parts)
    return text if text and not text[0].isdigit() else f"output_{text}".rstrip("_")


def _name_sizes(model: ir.Model, dim_names: DimNames | None) -> None:
    """Give the sizes that torch.export called s12 and s34 names: batch, sequence. Two sizes share a name only if torch proved them equal, or
    `dim_names` says so. Inner shapes are dropped; they follow from the inputs."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        given = (dim_names or {}).get(value.name or "", {})
        for axis, dim in enumerate(value.shape or ()):
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None and _SYMBOL.fullmatch(str(dim)) and str(dim) not in names:
                name = given.get(axis) or _AXIS_NAMES.get(axis, f"{value.name}_axis_{axis}")
                names[str(dim)] = name if axis in given or name not in names.values() else f"{value.name}_{name}"
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
    for value in dict.fromkeys((*model.graph.inputs, *model.graph.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([_readable(d, names) for d in value.shape])


def _readable(dim: Any, names: Mapping[str, str]) -> int | str | None:
    """The exporter writes a size that turned out to be fixed as the symbol "7"."""
    if isinstance(dim, int) or dim.value is None:
        return dim if isinstance(dim, int) else None
    text = str(dim)
    return int(text) if text.isdigit() else _SYMBOL.sub(lambda m: names.get(m[0], m[0]), text)


def _warn_fixed(model: ir.Model, remarks: Remarks) -> None:
    """Name the axes that were to be dynamic and are not; the second axis of a float matrix usually holds features, which are fixed by nature."""
    for value in model.graph.inputs:
        if value.shape is None or value.dtype is None:
            continue
        rank, is_float = len(value.shape), value.dtype.is_floating_point()
        axes = [k for k in _dynamic_axes(rank, is_float) if isinstance(value.shape[k], int) and not (is_float and rank == 2 and k == 1)]
        if axes:
            fixed = " and ".join(f"{k} (= {value.shape[k]})" for k in axes)
            remarks.warning(value.name or "", f"the module fixes axis {fixed} of this input; other sizes will not run")
