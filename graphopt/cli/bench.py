"""`graphopt bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphopt.cli.shell import Json, Repro, Shapes, Threads, WithWeights, progress, show


def bench(
    models: Annotated[list[Path], typer.Argument(metavar="A [B ...]", help="Models; the first is the baseline.", show_default=False)],
    shapes: Shapes = None,
    threads: Threads = 1,
    repro: Repro = None,
    with_weights: WithWeights = False,
    as_json: Json = False,
) -> None:
    """Time models side by side, in interleaved rounds."""
    from graphopt.driver.debug.repro import reproducible
    from graphopt.report.bench import bench as measure

    options = {"shapes": shapes, "threads": threads}
    with reproducible(repro, "bench", models, None, options, with_weights=with_weights), progress() as tell:
        timed = measure(models, shapes, threads=threads, progress=lambda done: tell("timing, interleaved", done))
    show(timed, as_json)
