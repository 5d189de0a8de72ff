"""`graphopt bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphopt.cli.shell import Json, Shapes, console, progress

if TYPE_CHECKING:
    from rich.console import Console

    from graphopt.run.clock import Timings


def bench(
    models: Annotated[list[Path], typer.Argument(metavar="A [B ...]", help="Models; the first is the baseline.", show_default=False)],
    shapes: Shapes = None,
    threads: Annotated[int, typer.Option(min=0, help="Threads of the runtime; 0 = its choice.")] = 1,
    as_json: Json = False,
) -> None:
    """Time models side by side, in interleaved rounds."""
    from graphopt.report.bench import bench_files

    with progress() as tell:
        timings = bench_files(models, shapes, threads=threads, progress=lambda done: tell("timing, interleaved", done))
    if as_json:
        print(json.dumps(timings.as_dict(), indent=1))
        return
    print_timings(timings, console())


def print_timings(timings: Timings, terminal: Console) -> None:
    from graphopt.report.terminal import table

    rows = [(name, *(f"{t * 1e3:.2f}" for t in seconds), f"{timings.speedup(name):.2f}x") for name, seconds in timings.seconds.items()]
    terminal.print(table("median latency in ms", ["model", *timings.shapes, "speed-up"], rows))
