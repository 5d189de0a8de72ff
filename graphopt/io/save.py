"""Writing a model: at the smallest opset, whole or not at all, and never over the files that it was loaded from."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt.core.contract import Artifact
from graphopt.core.errors import SaveError
from graphopt.core.places import beside, check_places, data_file
from graphopt.graph.opset import versions
from graphopt.graph.opset.versions import Rise
from graphopt.graph.questions import all_nodes, graphs
from graphopt.graph.serialize import fits, inside, read, structure, to_bytes
from graphopt.graph.shapes import declared_shape
from graphopt.io import closed
from graphopt.io.advisories import input_symbols
from graphopt.io.dim_names import show_names

SOURCE_FILES = "graphopt.files"  # graph.meta: the files of the input, which no output may overwrite
STATES_SHAPES = "graphopt.states_shapes"  # graph.meta: whether the input has value_info
_INLINE = 1024  # bytes up to which a weight stays in the model file when the others go into a data file
_ALIGN, _ALIGNED = 4096, 1 << 16  # large weights start at a page, so that runtimes can map them


@dataclasses.dataclass(frozen=True)
class SaveInfo(Artifact):
    """What was written: the files, their bytes, the versions, and what rose above the input's versions and why."""

    opset: int
    ir_version: int
    rises: tuple[Rise, ...] = ()


def finish(model: ir.Model, opset: int | None = None) -> tuple[ir.Model, tuple[Rise, ...]]:
    """A copy that shares the weights, at the opset and IR version that it will be written with, and with sound value_info only.

    Args:
        opset: the opset that must not be exceeded; None for no limit.

    Raises:
        TargetError: the limit cannot hold; it names the first node that needs more.
    """
    copy = model.clone()
    closed.open_again(copy)
    floor, ir_floor = versions.origin(model)
    rises = versions.lower(copy, floor, ceiling=opset, ir_floor=ir_floor)
    _scrub(copy)
    show_names(copy)
    closed.restore_names(copy)
    return copy, tuple(rises)


def save(model: ir.Model, path: str | os.PathLike[str], *, external: bool | None = None, opset: int | None = None) -> SaveInfo:
    """Write `path`, and `path`.data if the weights go outside; both or none.

    Args:
        external: weights outside (True), inside (False), or outside only if they do not fit (None).
        opset: see `finish`.

    Raises:
        SaveError: the files cannot be written, or are files of the input.
        TargetError: see `finish`.
    """
    copy, rises = finish(model, opset)
    files, size = _write(copy, Path(path), sources_of(model), not fits(copy) if external is None else external)
    return SaveInfo(files, size, copy.opset_imports[""], copy.ir_version, rises)


def save_as_is(model: ir.Model, path: str | os.PathLike[str], source: Path | None = None) -> SaveInfo:
    """Write the input as it came: the bytes of the file `source` (data outside it go to `path`.data), or `model` where there is no file.

    Raises:
        SaveError: as `save`.
    """
    if source is None or not source.is_file():
        return save(model, path)
    from graphopt.io.formats.onnx_file import from_file

    original, _, files = from_file(source)
    outside = len(files) > 1
    written, size = _write(original, Path(path), {*files, *sources_of(model)}, outside, None if outside else source)
    return SaveInfo(written, size, original.opset_imports.get("", 0), original.ir_version)


def _write(model: ir.Model, path: Path, sources: set[str], external: bool, same: Path | None = None) -> tuple[tuple[Path, ...], int]:
    """Write model and data files, or neither; `same` is a file to copy. Changes where the weights of `model` lie if they go outside."""
    out = path.absolute()
    data = data_file(out)
    check_places((out, data), sources)
    for file in (data,) if external else () if out.suffix == ".onnx" else (out,):
        _check_owner(file, out)
    try:
        with beside(out) as folder:
            if external:
                _write_data(model, folder / data.name)
                (folder / out.name).write_bytes(structure(model).SerializeToString(deterministic=True))
            elif same is None:
                (folder / out.name).write_bytes(to_bytes(model))
            else:
                shutil.copyfile(same, folder / out.name)
            files = [f for f in (out, data) if (folder / f.name).exists()]
            size = sum((folder / f.name).stat().st_size for f in files)
            _move(folder, files, stale=[data] if data not in files and _refers(out, data) else [])
    except OSError as error:
        raise SaveError(f"cannot write {path}: {error.strerror or error}") from None
    return tuple(files), size


# ---- the place ------------------------------------------------------------------------------------------------------------------------


def sources_of(model: ir.Model) -> set[str]:
    """The files that a model was loaded from, or still reads its weights from."""
    return {*model.graph.meta.get(SOURCE_FILES, ()), *(t.path for t in _external_tensors(model))}


def _move(folder: Path, files: list[Path], stale: list[Path]) -> None:
    """Put the new files in place of the old ones; if anything goes wrong between two moves, the old ones come back."""
    old = folder / "old"
    old.mkdir()
    kept, placed = [], []
    try:
        for file in [*files, *stale]:
            if file.exists() or file.is_symlink():
                kept.append(file)
                os.replace(file, old / file.name)
        for file in files:
            placed.append(file)
            os.replace(folder / file.name, file)
    except BaseException:
        for file in placed:
            file.unlink(missing_ok=True)
        for file in kept:
            if (old / file.name).exists() or (old / file.name).is_symlink():
                os.replace(old / file.name, file)
        raise


def _check_owner(file: Path, out: Path) -> None:
    """Refuse a file that holds the weights of another model in its folder."""
    for other in sorted(file.parent.glob("*.onnx")) if file.is_file() and not _refers(out, file) else ():
        if other != out and _refers(other, file):
            raise SaveError(f"cannot write {file}: it holds the weights of {other}; choose another name")


def _refers(model_file: Path, data: Path) -> bool:
    """True if weights of a model lie in the file `data`."""
    if not (model_file.is_file() and data.is_file()):
        return False
    try:
        old = read(model_file, weights=False)
    except Exception:  # noqa: BLE001 -- whatever it is, it is no model, and so the data are not known to be its
        return False
    return any(e.key == "location" and e.value == data.name for t in old.graph.initializer for e in t.external_data)


# ---- weights --------------------------------------------------------------------------------------------------------------------------


def _external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    for graph in model.graphs():
        yield from (v.const_value for v in graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor))


def _write_data(model: ir.Model, file: Path) -> None:
    """Write the large weights one after the other into a new file, and let the model refer to it by its bare name."""
    with file.open("wb") as stream:
        for graph in model.graphs():
            for value in graph.initializers.values():
                tensor = value.const_value
                if tensor is None or tensor.dtype == ir.DataType.STRING:
                    continue
                if tensor.nbytes > _INLINE:
                    value.const_value = _append(stream, tensor, file.name, value.name or "")
                elif isinstance(tensor, ir.ExternalTensor):
                    value.const_value = inside(tensor)


def _append(stream: Any, tensor: ir.TensorProtocol, location: str, name: str) -> ir.ExternalTensor:
    offset = stream.tell()
    if tensor.nbytes >= _ALIGNED and offset % _ALIGN:
        offset = stream.seek((offset // _ALIGN + 1) * _ALIGN)
    length = stream.write(tensor.tobytes())
    return ir.ExternalTensor(location, offset, length, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name)


# ---- value_info -----------------------------------------------------------------------------------------------------------------------


def _scrub(model: ir.Model) -> None:
    """Keep a shape only where it says something that surely holds: sizes, and symbols of the graph inputs; the interface stays as declared.

    A model whose input file states no inner shapes gets none: they would only make it larger.
    """
    public = frozenset((*model.graph.inputs, *model.graph.outputs))
    symbols = input_symbols(model)
    keep = model.graph.meta.get(STATES_SHAPES, True)
    for value in model.graph.outputs:
        value.shape = declared_shape(value)
    for graph in graphs(model):
        for value in graph.initializers.values():
            if value not in public:
                value.type = value.shape = None  # the weight itself says it
        for value in (*graph.inputs, *graph.outputs):
            if value not in public and not _sound(value.shape, symbols):
                value.shape = None
    for node in all_nodes(model):
        for value in node.outputs:
            if value not in public and not value.is_graph_output() and not (keep and _sound(value.shape, symbols)):
                value.type = value.shape = None


def _sound(shape: ir.Shape | None, symbols: frozenset[str]) -> bool:
    return shape is not None and all(_sound_dim(d, symbols) for d in shape)


def _sound_dim(dim: Any, symbols: frozenset[str]) -> bool:
    return isinstance(dim, int) or (dim.value is not None and str(dim) in symbols)
