"""`graphopt tune`: fill, show, export, import and clear the cache of timings. Each function is one command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from graphopt.cli.shell import Json, ModelPath, Plugins, Shapes, check_level, progress, show
from graphopt.core.remarks import plural

app = typer.Typer(no_args_is_help=True, help="The timings that decide how a graph is spelled: fill, show, export, import, clear.")


def fill(
    model: ModelPath,
    target: Annotated[str, typer.Option(metavar="T", help="Where to measure, such as cpu{threads=2}.")] = "cpu",
    level: Annotated[int, typer.Option("-O", "--level", min=1, help="The level whose graph is lowered.")] = 1,
    shapes: Shapes = None,
    plugin: Plugins = None,
) -> None:
    """Time the pieces of a model in every spelling that the target knows, and keep the result."""
    from graphopt.core.errors import TargetError
    from graphopt.driver import optimize as api
    from graphopt.driver.lowering.cache import Cache

    check_level(level, target, plugin)
    cache = Cache()
    before = len(cache.rows())
    cache.require()
    with progress() as tell:
        result = api.optimize(model, level=level, target=target, plugins=plugin or (), shapes=shapes, promise=False, progress=tell)
    if not result.target.runs_here():
        raise TargetError(f"{result.target} cannot run here, so nothing can be measured for it")
    chosen = [str(remark) for record in result.report.passes if record.name == "choose-spellings" for remark in record.remarks]
    if not result.target.spellings():
        chosen = [f"{result.target} has no table of spellings: nothing to time"]
    show("\n".join([*chosen, f"{plural(len(Cache().rows()) - before, 'new timing')} in {cache.path}"]))


def show_cache(as_json: Json = False) -> None:
    """Print every timing, the newest first."""
    from graphopt.driver.lowering.cache import Cache
    from graphopt.report.listing import Cached

    cache = Cache()
    rows = cache.rows()
    cache.require()
    show(Cached(rows, str(cache.path)), as_json)


def export_file(file: Annotated[Path, typer.Argument(metavar="FILE", help="The .json to write.", show_default=False)]) -> None:
    """Write every timing to a file, to be imported on the machine where models are built."""
    from graphopt.core.places import write_text
    from graphopt.driver.lowering.cache import Cache

    cache = Cache()
    rows, text = cache.rows(), cache.export()
    cache.require()
    write_text(file, text + "\n")
    show(f"{plural(len(rows), 'timing')} written to {file}")


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
    show(f"{plural(count, 'timing')} of {', '.join(names) or 'no processor'} taken into {cache.path}")


def clear() -> None:
    """Forget every timing."""
    from graphopt.driver.lowering.cache import Cache

    cache = Cache()
    cache.clear()
    show(f"{cache.path} is gone")


COMMANDS: dict[str, Callable[..., None]] = {"fill": fill, "show": show_cache, "export": export_file, "import": import_file, "clear": clear}
