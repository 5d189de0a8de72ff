"""`graphopt bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphopt.cli.shell import Json, Shapes, Threads, progress, show


def bench(
    models: Annotated[list[Path], typer.Argument(metavar="A [B ...]", help="Models; the first is the baseline.", show_default=False)],
    shapes: Shapes = None,
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """Time models side by side, in interleaved rounds."""
    from graphopt.report.bench import bench as measure

    with progress() as tell:
        timed = measure(models, shapes, threads=threads, progress=lambda done: tell("timing, interleaved", done))
    show(timed, as_json)
