"""`graphopt tune`: fill, show, export, import and clear the cache of timings. Each function is one command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="The timings that decide how a graph is spelled: fill, show, export, import, clear.")
Plugins = Annotated[list[str] | None, typer.Option("--plugin", metavar="FILE|MODULE", help="Bring passes or targets from here; repeatable.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def fill(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="An .onnx file, or a Hugging Face model folder.", show_default=False)],
    target: Annotated[str, typer.Option(metavar="T", help="Where to measure, such as cpu{threads=2}.")] = "cpu",
    level: Annotated[int, typer.Option("-O", "--level", min=1, max=3, help="The level whose graph is lowered.")] = 1,
    shapes: Annotated[str | None, typer.Option(metavar="1x16,8x64", help="BATCHxSEQUENCE sizes to time.")] = None,
    plugin: Plugins = None,
) -> None:
    """Time the pieces of a model in every spelling that the target knows, and keep the result."""
    from graphopt.cli.shell import progress
    from graphopt.core.errors import TargetError
    from graphopt.driver import optimize as api
    from graphopt.driver.lowering.cache import Cache

    cache = Cache()
    before = len(cache.rows())
    cache.require()
    with progress() as tell:
        result = api.optimize(model, level=level, target=target, plugins=plugin or (), shapes=shapes, promise=False, progress=tell)
    if not result.target.runs_here():
        raise TargetError(f"{result.target} cannot run here, so nothing can be measured for it")
    if not result.target.spellings():
        print(f"{result.target} has no table of spellings: nothing to time")
    for record in result.report.passes:
        if record.name == "choose-spellings":
            print(*record.remarks, sep="\n")
    print(f"{len(Cache().rows()) - before} new timings in {cache.path}")


def show(as_json: Json = False) -> None:
    """Print every timing, the newest first."""
    from graphopt.driver.lowering.cache import Cache

    cache = Cache()
    rows = cache.rows()
    cache.require()
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    from graphopt.cli.shell import console
    from graphopt.report.terminal import table

    machines: dict[tuple[object, ...], list[tuple[object, ...]]] = {}
    for row in sorted(rows, key=lambda r: (r["description"], r["shape"], r["seconds"])):
        where = (row["processor"], row["runtime"], row["provider"], row["threads"])
        machines.setdefault(where, []).append((row["description"], row["spelling"].partition(" (")[0], f"{row['seconds'] * 1e3:.4f}"))
    for (processor, runtime, provider, threads), lines in machines.items():
        console().print(f"{processor} | {runtime} | {provider} | {threads} thread{'' if threads == 1 else 's'}", markup=False)
        console().print(table("", ["piece", "spelling", "ms"], lines))
    print(f"{len(rows)} timings in {cache.path}")


def export_file(file: Annotated[Path, typer.Argument(metavar="FILE", help="The .json to write.", show_default=False)]) -> None:
    """Write every timing to a file, to be imported on the machine where models are built."""
    from graphopt.core.errors import SaveError
    from graphopt.driver.lowering.cache import Cache

    cache = Cache()
    text = cache.export()
    cache.require()
    try:
        file.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise SaveError(f"cannot write {file}: {error.strerror}") from error
    print(f"{len(cache.rows())} timings written to {file}")


def import_file(file: Annotated[Path, typer.Argument(metavar="FILE", help="What `graphopt tune export` wrote.", show_default=False)]) -> None:
    """Take in timings of another machine; name it by the target's option `processor`."""
    from graphopt.core.errors import LoadError
    from graphopt.driver.lowering.cache import Cache

    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"cannot read {file}: {error}") from error
    cache = Cache()
    count = cache.take(text)
    names = sorted({row["processor"] for row in json.loads(text)["timings"]})
    print(f"{count} timings of {', '.join(names) or 'no processor'} taken into {cache.path}")


def clear() -> None:
    """Forget every timing."""
    from graphopt.driver.lowering.cache import Cache

    cache = Cache()
    cache.clear()
    print(f"{cache.path} is gone")


COMMANDS: dict[str, Callable[..., None]] = {"fill": fill, "show": show, "export": export_file, "import": import_file, "clear": clear}
