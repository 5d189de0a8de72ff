"""Numbers, names and circumstances as words."""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from graphopt.core.machine import processor
from graphopt.report.elements import Table

_PACKAGES = ("graphopt", "onnx", "onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "torch")


def megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 100_000 else f"{nbytes / 1e3:.1f} kB"


def called(source: Any) -> str:
    """What a model is called: its path, or the type of an object."""
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else type(source).__name__


def head(**facts: object) -> Table:
    """The head of a page: `facts` that are not empty, and what every number in it depends on: the command, versions, the processor, the day."""
    told = {key.replace("_", " "): text for key, value in (facts | {"command": _command()}).items() if (text := str(value))}
    told |= {"versions": ", ".join(versions()), "processor": processor(), "date": time.strftime("%Y-%m-%d %H:%M %z")}
    return Table(("", ""), list(told.items()), detail=True)


def _command() -> str:
    """What was typed, where this process is the command line."""
    started = Path(sys.argv[0])
    name = started.parent.name if started.name == "__main__.py" else started.stem
    return shlex.join(["graphopt", *sys.argv[1:]]) if name == "graphopt" else ""


def versions() -> Iterator[str]:
    from importlib import metadata

    for name in _PACKAGES:
        try:
            yield f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue


def plain(value: Any) -> Any:
    """JSON values: numbers of numpy and sets have no form in JSON, and nor has a number that is not finite."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "item"):
        return plain(value.item())
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)
