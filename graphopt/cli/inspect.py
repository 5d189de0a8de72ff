"""`graphopt inspect` and `graphopt view`: look at a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphopt.cli.shell import Json, ModelPath, Plugins, Repro, Task, WithPast, WithWeights, progress, show


def inspect(
    model: ModelPath,
    task: Task = None,
    with_past: WithPast = False,
    plugin: Plugins = None,
    repro: Repro = None,
    with_weights: WithWeights = False,
    as_json: Json = False,
) -> None:
    """Show what a model is, and every attention in it or why it is none."""
    from graphopt.driver.debug.repro import reproducible
    from graphopt.report.inspection import inspect as look

    options = {"plugins": plugin or (), "task": task, "with_past": with_past}
    with reproducible(repro, "inspect", [model], None, options, with_weights=with_weights), progress() as tell:
        tell("load and recognize", 0.0)
        found = look(model, plugins=plugin or (), task=task, with_past=with_past)
    show(found, as_json)


def view(
    model: Annotated[Path, typer.Argument(metavar="FILE", help="An .onnx file, or what a target wrote.", show_default=False)],
    port: Annotated[int | None, typer.Option("--port", "-p", min=0, max=65535, metavar="N", help="Serve it here.  [default: a free one]")] = None,
    host: Annotated[str, typer.Option(metavar="NAME", help="The address to serve at; 0.0.0.0 = also for other machines.")] = "localhost",
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page, or only serve it.")] = True,
) -> None:
    """Show the graph of a file in the browser, drawn by netron, which the extra `view` brings; Ctrl-C ends it."""
    from graphopt.core.errors import GraphoptError, LoadError, require

    if model.is_dir():
        inside = sorted(path.name for path in model.iterdir() if path.suffix in (".onnx", ".xml"))
        written = f"graphopt optimize {model} -O0 -o model.onnx` writes one, and `graphopt view model.onnx` shows it"
        raise LoadError(f"{model}: expected a file, found a folder; " + (f"give {model / inside[0]}" if inside else f"`{written}"))
    if not model.is_file():
        raise LoadError(f"{model}: there is no such file; give an .onnx file")
    netron = require("views", "view", "netron")
    try:
        place, number = netron.serve(str(model), None, (host, port), browser)
    except OSError as error:
        raise GraphoptError(f"cannot serve at {host}, port {port or 'any'}: {error.strerror or error}; give another --port or --host") from error
    print(f"{model} is shown at http://{place}:{number}; Ctrl-C ends it", flush=True)
    netron.wait()  # until Ctrl-C, which is the way to end it and no failure
