"""`graphopt compare`: how far two models are apart, and where the error enters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphopt.cli.shell import REPORTS, Json, Plugins, Repro, Threads, Tokenizer, WithWeights, progress, show


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="The model to trust: an .onnx file, or a Hugging Face folder.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="The model that is compared with it.", show_default=False)],
    samples: Annotated[str | None, typer.Option(metavar="DATA", help="Inputs: .npz, a folder of .npz, or a text file.  [default: made up]")] = None,
    tokenizer: Tokenizer = None,
    report: Annotated[Path | None, typer.Option(metavar=REPORTS, help="Write the comparison, with a plot; HTML draws it.")] = None,
    plugin: Plugins = None,
    threads: Threads = 1,
    repro: Repro = None,
    with_weights: WithWeights = False,
    as_json: Json = False,
) -> None:
    """Compare two models on samples: their outputs, and in which block the error enters."""
    from graphopt.core import places
    from graphopt.report.document import checked

    if report is not None:
        places.check_places([checked(report)], [a, b])
    from graphopt.driver.debug.repro import reproducible
    from graphopt.report.comparison import compare as measure

    options = {"samples": samples, "tokenizer": tokenizer, "threads": threads, "plugins": plugin or ()}
    with reproducible(repro, "compare", [a, b], None, options, with_weights=with_weights), progress() as tell:
        tell("run both models", 0.0)
        found = measure(a, b, samples=samples, tokenizer=tokenizer, threads=threads, plugins=plugin or ())
    if report is not None:
        found.write(report)
    show(found, as_json)
