"""`--repro DIR`: on an error, a folder that shows it again to somebody else: the model, the pipeline and options, versions, and the command.

Nothing of the user's machine is in it: weights are made up unless asked for, data are not copied, paths are names.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from graphopt.core.errors import GraphoptError, SaveError
from graphopt.core.places import beside, check_places
from graphopt.core.remarks import Remarks
from graphopt.driver.debug import elide
from graphopt.driver.debug.command import spelled
from graphopt.graph.serialize import to_proto
from graphopt.io.load import keeps_bytes, load_options, read
from graphopt.report.words import versions
from graphopt.run.samples import random_samples

_ROOT = str(Path(__file__).parents[3]) + os.sep  # where the package stands
_MARK = "repro.json"  # a folder that holds it was written by us, and may be written anew
_PATH = re.compile(r"(?<![\w.~])(?:[A-Za-z]:)?[/\\](?:[^\s/\\'\"`:,;()]+[/\\])+([^\s/\\'\"`:,;()]*)")


@contextlib.contextmanager
def reproducible(
    folder: str | Path | None, verb: str, sources: Sequence[Any], pipeline: str | None, options: Mapping[str, Any], *, with_weights: bool = False
) -> Iterator[None]:
    """If the body fails, write a folder that reproduces it, and say so in a note of the error.

    Args:
        folder: None = nothing is written. It must not be there, or be empty, or hold an earlier reproduction.
        verb: the command that the body carries out; `sources`, `pipeline` and `options` are what it was given.

    Raises:
        SaveError: the folder cannot be written; nothing was done.
    """
    if folder is None:
        yield
        return
    folder = Path(os.path.abspath(folder))
    _check(folder)
    try:
        yield
    except Exception as error:
        with contextlib.suppress(AttributeError):  # an error of a library may take no notes
            error.add_note(_written(folder, verb, sources, pipeline, options, with_weights, error))
        raise


def _check(folder: Path) -> None:
    if os.path.lexists(folder) and not (folder.is_dir() and ((folder / _MARK).is_file() or not any(folder.iterdir()))):
        raise SaveError(f"cannot write the reproduction to {folder}: it is there already; name a new folder")
    check_places([folder / _MARK, folder])


def _written(
    folder: Path, verb: str, sources: Sequence[Any], pipeline: str | None, options: Mapping[str, Any], with_weights: bool, error: Exception
) -> str:
    """One line that says what was written, or why nothing could be."""
    try:
        with beside(folder) as room:
            draft = room / folder.name
            draft.mkdir()
            missing = _fill(draft, verb, sources, pipeline, options, with_weights, error)
            old = room / "old"
            if folder.exists():
                os.replace(folder, old)
            os.replace(draft, folder)
    except (OSError, GraphoptError) as problem:
        return f"the reproduction could not be written to {folder}: {problem}"
    kind = "with its weights" if with_weights else "with made-up weights"
    return f"what reproduces it is in {folder} (the model {kind}; run command.sh)" + (f"; not in it: {missing}" if missing else "")


def _fill(
    room: Path, verb: str, sources: Sequence[Any], pipeline: str | None, options: Mapping[str, Any], with_weights: bool, error: Exception
) -> str:
    """Write everything into `room`; returns what could not be."""
    missing, names = [], []
    for number, source in enumerate(sources):
        name = f"model{number if len(sources) > 1 else ''}.onnx"
        names.append(name)
        try:
            elide.write(elide.load(_proto(source, options), weights=with_weights), room / name)
        except Exception as problem:  # noqa: BLE001 -- whatever a library says of the input; that it cannot be read may be the error itself
            shown = Path(source).name if isinstance(source, (str, os.PathLike)) else type(source).__name__
            missing.append(f"the model {shown}, which cannot be read ({_public(str(problem)).splitlines()[0]})")
    kept = _kept(room, options, names[0], missing)
    text = _recipe(pipeline)
    command = spelled(verb, names[0], text, kept)
    command = command.replace(f" {names[0]} ", f" {' '.join(names)} ", 1) if len(names) > 1 else command
    (room / "command.sh").write_text(f'#!/bin/sh\ncd "$(dirname "$0")"\n{command}\n', encoding="utf-8")
    told = {
        "error": _public(f"{type(error).__name__}: {error}"),
        "command": command,
        "pipeline": text,
        "options": {name: _public(str(value)) for name, value in sorted(kept.items()) if value},
        "weights": "its own" if with_weights else "made up",
        "missing": missing,
        "versions": dict(line.split(" ", 1) for line in versions()),
        "from": _frames(error),
    }
    (room / _MARK).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return "; ".join(missing)


def _proto(source: Any, options: Mapping[str, Any]) -> Path | onnx.ModelProto:
    """The input as an ONNX model; whatever else it is, as it is exported."""
    if isinstance(source, onnx.ModelProto):
        return source
    if isinstance(source, (str, os.PathLike)) and keeps_bytes(Path(source)):
        return Path(source)
    return to_proto(source if isinstance(source, ir.Model) else read(source, load_options(options), Remarks())[0])


def _kept(room: Path, options: Mapping[str, Any], model: str, missing: list[str]) -> dict[str, Any]:
    """The options as the command has them there: a plugin is copied, samples are made up, other data of the user are left out."""
    kept = {name: value for name, value in options.items() if value is not None and name not in ("progress", "writes", "dump", "task", "with_past")}
    kept["plugins"] = [_copied(room, str(plugin)) for plugin in options.get("plugins", ())]
    if kept.get("metric") is not None:
        if isinstance(metric := kept.pop("metric"), str):
            kept["metric"] = _copied(room, metric)
        else:
            missing.append("the metric, which is no text")
    if kept.pop("samples", None) is not None:
        kept.pop("tokenizer", None)
        try:
            import numpy as np

            np.savez(room / "samples.npz", allow_pickle=False, **next(iter(random_samples(ir.load(room / model)))))
            kept["samples"] = "samples.npz"
        except Exception as problem:  # noqa: BLE001 -- as above
            missing.append(f"samples, as none can be made up ({_public(str(problem)).splitlines()[0]})")
    if kept.get("out") is not None:
        kept["out"] = "out" + Path(kept["out"]).suffix
    return kept


def _copied(room: Path, text: str) -> str:
    """FILE.py or FILE.py:FUNCTION, with the file beside the model; the name of a module stays."""
    place, colon, function = (text, "", "") if Path(text).is_file() else text.rpartition(":")
    if not Path(place).is_file():
        return text
    shutil.copyfile(place, room / Path(place).name)
    return f"{Path(place).name}{colon}{function}"


def _recipe(pipeline: str | None) -> str | None:
    """The text of a pipeline, also of one in a file."""
    if pipeline is None or not pipeline.strip().startswith("@"):
        return pipeline
    with contextlib.suppress(OSError, UnicodeDecodeError):  # a recipe that cannot be read is the error itself
        return Path(pipeline.strip()[1:]).read_text(encoding="utf-8")
    return pipeline


def _frames(error: BaseException | None) -> list[str]:
    """Where it was raised, the cause last: `graphopt/driver/job.py:159 run`."""
    if error is None:
        return []
    found = traceback.extract_tb(error.__traceback__)
    own = [f"{_public(frame.filename.removeprefix(_ROOT))}:{frame.lineno} {frame.name}" for frame in found]
    return [f"{type(error).__name__}: {_public(str(error))}", *own, *_frames(error.__cause__)]


def _public(text: str) -> str:
    """With the names of files in place of their paths: what begins with a folder of this machine."""

    def name(found: re.Match[str]) -> str:
        first = re.match(r"(?:[A-Za-z]:)?[/\\][^/\\]+", found[0])
        return found[1] if first is not None and os.path.isdir(first[0]) else found[0]

    return _PATH.sub(name, text)
