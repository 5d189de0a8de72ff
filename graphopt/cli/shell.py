"""What all commands share: their common options, errors in one line, progress, and how a result is printed."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, ParamSpec, TypeVar

import typer

from graphopt.core.errors import GraphoptError
from graphopt.core.remarks import Progress

if TYPE_CHECKING:
    from graphopt.report.document import Document

P = ParamSpec("P")
R = TypeVar("R")
INTERRUPTED = 130  # the exit code of shells after SIGINT
REPORTS = "FILE.json|FILE.html|FILE.md"  # as in report/document.py, which is too much for a start

ModelPath = Annotated[str, typer.Argument(metavar="MODEL", help="An .onnx file, or a Hugging Face model folder.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Level = Annotated[int | None, typer.Option("-O", "--level", min=0, help="0 normal form, 1 exact passes, 2 also int8.  [default: 1]")]
PipelineText = Annotated[str | None, typer.Option("--pipeline", metavar="TEXT|@FILE", help="Passes to run, instead of a level.")]
TargetText = Annotated[str, typer.Option("--target", metavar="T", help="Where the model will run, such as cpu{threads=2}.")]
InputShapes = Annotated[list[str] | None, typer.Option("--input-shape", metavar="NAME:DIM,...", help="Fix the shape of an input; repeatable.")]
Evidence = Annotated[str | None, typer.Option("--samples", metavar="DATA", help="Inputs to check on: .npz, a folder of .npz, or a text file.")]
Repro = Annotated[Path | None, typer.Option("--repro", metavar="DIR", help="On an error, write a folder that reproduces it.")]
WithWeights = Annotated[bool, typer.Option("--with-weights", help="In --repro: the weights of the model, instead of made-up ones.")]
Check = Annotated[
    str | None,
    typer.Option("--check", metavar="FILE.py:FUNCTION", help="From the path of a model to True (good) or False.  [default: it loads, same numbers]"),
]
CheckCommand = Annotated[str | None, typer.Option(metavar="CMD", help="A command with {} for the path of a model; exit code 0 is good.")]
Plugins = Annotated[list[str] | None, typer.Option("--plugin", metavar="FILE|MODULE", help="Bring passes, targets or metrics from here; repeatable.")]
Task = Annotated[str | None, typer.Option(metavar="T", help="What to load from a Hugging Face folder, such as text-classification.")]
WithPast = Annotated[bool, typer.Option("--with-past", help="Export a decoder with its key/value cache.")]
Shapes = Annotated[str | None, typer.Option(metavar="1x16,8x64", help="BATCHxSEQUENCE sizes to time.")]
Threads = Annotated[int, typer.Option(min=0, help="Threads of the runtime; 0 = its choice.")]
Tokenizer = Annotated[str | None, typer.Option(metavar="FILE", help="tokenizer.json for samples that are text.")]
Name = Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show this one in full.", show_default=False)]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Also the options.")]


def passes_asked(level: int | None, pipeline: str | None, target: str, plugins: list[str] | None) -> int:
    """The level, of which there is none beside a pipeline, and which the target has."""
    if level is not None and pipeline is not None:
        raise typer.BadParameter("give either -O LEVEL or --pipeline, not both")
    if level is not None:
        check_level(level, target, plugins)
    return 1 if level is None else level


def one_line_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Every failure is one error on stderr and exit code 1; GRAPHOPT_TRACEBACK=1 shows where it came from."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except GraphoptError as error:
            fail(str(error), *getattr(error, "__notes__", ()))
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt as stop:
            print(": ".join(["interrupted", *map(str, stop.args)]), file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader went away (`| head`); Python must not complain at exit
            raise typer.Exit(1) from None
        except Exception as error:  # noqa: BLE001 -- the last door: a defect of ours is still one line for the user
            first = str(error).strip().splitlines() or [""]
            told = f"internal: {type(error).__name__}: {first[0]} (GRAPHOPT_TRACEBACK=1 shows where; please report it)"
            fail(told, *getattr(error, "__notes__", ()))

    return run


def fraction(text: str) -> float:
    """`0.01` or `1%`."""
    number, percent, rest = str(text).partition("%")
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        value = -1.0
    if not value >= 0 or rest:
        raise typer.BadParameter(f"expected a fraction of 0 or more such as 0.01, or 1%, found {text}")
    return value


def check_level(level: int, target: str, plugins: list[str] | None) -> None:
    """A level that the target does not have is wrong usage; which it has, it says itself."""
    from graphopt.core.errors import TargetError
    from graphopt.driver.job import parse_target

    try:
        parse_target(target, tuple(plugins or ())).pipeline(level)
    except TargetError as error:
        raise typer.BadParameter(str(error)) from None


def fail(message: str, *notes: str) -> NoReturn:
    """Notes are said after the error, one a line."""
    if os.environ.get("GRAPHOPT_TRACEBACK"):
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    print("\n".join([f"error: {message}", *notes]), file=sys.stderr)
    raise typer.Exit(1)


def show(found: Document | str, as_json: bool = False) -> None:
    """Print on stdout what a command has found, or a text as it stands."""
    if as_json and not isinstance(found, str):
        print(found.json())
        return
    from graphopt.report.elements import Text
    from graphopt.report.writers import terminal

    terminal.show([Text(found)] if isinstance(found, str) else found.elements())


@contextmanager
def progress() -> Iterator[Progress]:
    """A bar on stderr while the body runs; silent where stderr is no terminal."""
    from rich import progress as bar
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text, done: None
        return
    columns = bar.TextColumn("{task.description}", markup=False), bar.BarColumn(), bar.TimeElapsedColumn()
    with bar.Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("", total=1.0)
        yield lambda text, done: bars.update(task, description=text, completed=done)
