"""`graphopt compare`: how far two models are apart, and where the error enters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphopt.cli.shell import Plugins


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="The model to trust: an .onnx file, or a Hugging Face folder.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="The model that is compared with it.", show_default=False)],
    samples: Annotated[str | None, typer.Option(metavar="DATA", help="Inputs: .npz, a folder of .npz, or a text file.  [default: made up]")] = None,
    tokenizer: Annotated[str | None, typer.Option(metavar="FILE", help="tokenizer.json for samples that are text.")] = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE.html|FILE.json", help="Write the comparison; HTML has a plot.")] = None,
    plugin: Plugins = None,
    threads: Annotated[int, typer.Option(min=0, help="Threads of the runtime; 0 = its choice.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Compare two models on samples: their outputs, and in which block the error enters."""
    from graphopt.cli.shell import console, progress
    from graphopt.core import places
    from graphopt.core.errors import SaveError

    if report is not None:
        if report.suffix not in (".html", ".json"):
            raise SaveError(f"a report is FILE.json or FILE.html, found {report}")
        places.check_places([report], [a, b])
    from graphopt.report.comparison import compare as measure

    with progress() as tell:
        tell("run both models", 0.0)
        found = measure(a, b, samples=samples, tokenizer=tokenizer, threads=threads, plugins=plugin or ())
    if report is not None:
        found.save(report)
    if as_json:
        print(found.json())
        return
    from graphopt.report.terminal import print_comparison

    print_comparison(found, console())
