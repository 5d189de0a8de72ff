"""The command line. It reads options, calls the library, and prints; the logic is elsewhere, and nothing heavy is imported until a command runs.

Exit code 0, or 1 with an error on stderr and no output file, or 2 for wrong usage, or 130 after Ctrl-C. Results go to stdout or files,
everything else to stderr.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn, ParamSpec, TypeVar

import typer

from graphopt import cli_compare, cli_tune
from graphopt.errors import GraphoptError, SaveError

P = ParamSpec("P")
R = TypeVar("R")
Progress = Callable[[str, float], None]
INTERRUPTED = 130  # the exit code of shells after SIGINT
app = typer.Typer(
    name="graphopt",
    help="A compiler for trained Transformer models: export, fuse, quantize and measure, for the machine at hand.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Kind(StrEnum):
    MISSED = "missed"
    APPLIED = "applied"
    ALL = "all"


Model = Annotated[str, typer.Argument(metavar="MODEL", help="An .onnx file, or a Hugging Face model folder.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Plugins = Annotated[list[str] | None, typer.Option("--plugin", metavar="FILE|MODULE", help="Bring passes or targets from here; repeatable.")]
Task = Annotated[str | None, typer.Option(metavar="T", help="What to load from a Hugging Face folder, such as text-classification.")]
WithPast = Annotated[bool, typer.Option("--with-past", help="Export a decoder with its key/value cache.")]
Shapes = Annotated[str | None, typer.Option(metavar="1x16,8x64", help="BATCHxSEQUENCE sizes to time.")]
Name = Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show this one in full.", show_default=False)]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Also options and purpose; this imports every module.")]


def main() -> None:
    """Entry point of the `graphopt` script."""
    if not sys.warnoptions and not os.environ.get("GRAPHOPT_TRACEBACK"):
        warnings.simplefilter("ignore")  # of exporters and runtimes; what a user must know is a remark
        logging.disable(logging.WARNING)
    try:
        app()
    except KeyboardInterrupt:  # before a command runs
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def one_line_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Every failure is one error on stderr and exit code 1; GRAPHOPT_TRACEBACK=1 shows where it came from."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except GraphoptError as error:
            fail(str(error))
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader went away (`| head`); Python must not complain at exit
            raise typer.Exit(1) from None
        except Exception as error:  # noqa: BLE001 -- the last door: a defect of ours is still one line for the user
            first = str(error).strip().splitlines() or [""]
            fail(f"internal: {type(error).__name__}: {first[0]} (GRAPHOPT_TRACEBACK=1 shows where; please report it)")

    return run


def fail(message: str) -> NoReturn:
    if os.environ.get("GRAPHOPT_TRACEBACK"):
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(1)


def show_version(wanted: bool) -> None:
    if wanted:
        from graphopt import __version__

        print(f"graphopt {__version__}")
        raise typer.Exit


@app.callback()
def root(version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")] = False) -> None:
    """A compiler for trained Transformer models: export, fuse, quantize and measure, for the machine at hand."""


@app.command()
@one_line_errors
def optimize(
    model: Model,
    out: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="The file to write.", show_default=False)],
    level: Annotated[
        int | None, typer.Option("-O", "--level", min=0, max=3, help="0 normal form, 1 exact passes, 2 also int8, 3 also compression.  [default: 1]")
    ] = None,
    pipeline: Annotated[str | None, typer.Option(metavar="TEXT|@FILE", help="Passes to run, instead of a level.")] = None,
    target: Annotated[str, typer.Option(metavar="T", help="Where the model will run, such as cpu{threads=2}.")] = "cpu",
    samples: Annotated[str | None, typer.Option(metavar="DATA", help="Inputs to judge by: .npz, a folder of .npz, or a text file.")] = None,
    tokenizer: Annotated[str | None, typer.Option(metavar="FILE", help="tokenizer.json for samples that are text.")] = None,
    metric: Annotated[str | None, typer.Option(metavar="FILE.py:FUNCTION", help="From a session to a number, larger is better.")] = None,
    max_loss: Annotated[float | None, typer.Option(min=0.0, metavar="X", help="What lossy passes may cost together; 0.01 is 1 %.")] = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE.json|FILE.html", help="Write the report.")] = None,
    plugin: Plugins = None,
    require: Annotated[list[str] | None, typer.Option(metavar="PASS", help="Fail unless this pass changed something; repeatable.")] = None,
    verify_each: Annotated[bool, typer.Option("--verify-each", help="Check the graph after every pass.")] = False,
    check_numerics: Annotated[bool, typer.Option("--check-numerics", help="Check the numbers after every pass.")] = False,
    time: Annotated[bool, typer.Option("--time", help="Print the seconds of every pass.")] = False,
    print_changed: Annotated[bool, typer.Option("--print-changed", help="Print what every pass changed.")] = False,
    dump: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the graph after every pass.")] = None,
    fuel: Annotated[int | None, typer.Option(min=0, metavar="N", help="Stop after N changes, for bisecting.")] = None,
    remarks: Annotated[Kind | None, typer.Option(help="Print the remarks, one a line.")] = None,
    task: Task = None,
    with_past: WithPast = False,
    input_shape: Annotated[list[str] | None, typer.Option(metavar="NAME:DIM,...", help="Fix the shape of an input; repeatable.")] = None,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Time input and output; take back what is slower.")] = True,
    shapes: Shapes = None,
    as_json: Json = False,
) -> None:
    """Optimize a model for a target and write it."""
    if level is not None and pipeline is not None:
        raise typer.BadParameter("give either -O LEVEL or --pipeline, not both")
    writes = _places(model, out, report)
    from graphopt import api, frontend, loss
    from graphopt.bench import parse_shapes

    parse_shapes(shapes or "1")
    shaped = dict(frontend.parse_shape(text) for text in input_shape or ())
    judge = None if metric is None else loss.load_metric(metric)
    with progress() as tell:
        result = api.optimize(
            model, pipeline, level=1 if level is None else level, target=target, samples=samples, tokenizer=tokenizer, metric=judge,
            max_loss=max_loss, require=require or (), plugins=plugin or (), input_shapes=shaped or None, task=task, with_past=with_past,
            verify_each=verify_each, check_numerics=check_numerics, time=time, print_changed=print_changed, dump=dump, fuel=fuel, progress=tell,
            promise=measure and level != 0 and fuel is None, shapes=shapes, writes=writes,
        )  # fmt: skip
        if measure and result.report.speed_up.value is None:
            result.measure(shapes, progress=lambda done: tell("timing input and output, interleaved", done))
    result.save(out, report)
    if as_json:
        print(result.report.json())
        return
    from graphopt.tables import print_remarks, print_report

    print_report(result.report, _console())
    if remarks is not None:
        print_remarks(result.report, remarks.value)


@app.command()
@one_line_errors
def inspect(model: Model, task: Task = None, with_past: WithPast = False, plugin: Plugins = None, as_json: Json = False) -> None:
    """Show what a model is, and every attention in it or why it is none."""
    from graphopt.inspect import inspect as look

    with progress() as tell:
        tell("load and recognize", 0.0)
        found = look(model, plugins=plugin or (), task=task, with_past=with_past)
    if as_json:
        print(json.dumps(found.as_dict(), indent=1))
        return
    from graphopt.tables import print_inspection

    print_inspection(found, _console())


@app.command()
@one_line_errors
def bench(
    models: Annotated[list[Path], typer.Argument(metavar="A [B ...]", help="Models; the first is the baseline.", show_default=False)],
    shapes: Shapes = None,
    threads: Annotated[int, typer.Option(min=0, help="Threads of the runtime; 0 = its choice.")] = 1,
    as_json: Json = False,
) -> None:
    """Time models side by side, in interleaved rounds."""
    from graphopt.bench import bench_files

    with progress() as tell:
        timings = bench_files(models, shapes, threads=threads, progress=lambda done: tell("timing, interleaved", done))
    if as_json:
        print(json.dumps(timings.as_dict(), indent=1))
        return
    from graphopt.tables import print_timings

    print_timings(timings, _console())


@app.command()
@one_line_errors
def passes(name: Name = None, verbose: Verbose = False, plugin: Plugins = None, as_json: Json = False) -> None:
    """List the passes, or show one with its options."""
    _list("pass", name, verbose, plugin, as_json)


@app.command()
@one_line_errors
def targets(name: Name = None, verbose: Verbose = False, plugin: Plugins = None, as_json: Json = False) -> None:
    """List the targets, or show one with its options."""
    _list("target", name, verbose, plugin, as_json)


@app.command()
@one_line_errors
def demo(
    target: Annotated[str, typer.Option(metavar="T", help="Where to lower for.")] = "quantized",
    fast: Annotated[bool, typer.Option("--fast", help="A smoke test: few rounds, small shapes; not for numbers to quote.")] = False,
    as_json: Json = False,
) -> None:
    """Compile a real sentence encoder (MiniLM) and race it against its plain export and onnxruntime's quantizer."""
    from graphopt import demo as demonstration

    with progress() as tell:
        found = demonstration.run(target=target, fast=fast, progress=tell)
    if as_json:
        print(json.dumps(found.as_dict(), indent=1))
        return
    from graphopt.tables import print_demo

    print_demo(found, _console())


app.command("compare")(one_line_errors(cli_compare.compare))
for _name, _command in cli_tune.COMMANDS.items():
    cli_tune.app.command(_name)(one_line_errors(_command))
app.add_typer(cli_tune.app, name="tune")


def _list(kind: str, name: str | None, verbose: bool, plugin: list[str] | None, as_json: bool) -> None:
    from graphopt import listing, registry

    known = (registry.passes if kind == "pass" else registry.targets)(tuple(plugin or ()))
    if name is not None:
        found = listing.describe(known, name, kind)
        print(json.dumps(found, indent=1) if as_json else listing.text(found))
        return
    rows = listing.rows(known, options=verbose)
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    from graphopt.console import table

    columns = ("name", "options", "purpose", "owner") if verbose else ("name", "owner")
    _console().print(table("", columns, [[row[column] for column in columns] for row in rows]))


def _places(model: str, out: Path, report: Path | None) -> list[Path]:
    """The files that will be written; checked before any work: a run of minutes must not end at a folder that is missing."""
    if report is not None and report.suffix not in (".json", ".html"):
        raise SaveError(f"a report is FILE.json or FILE.html, found {report}")
    from graphopt import save

    files = [out, save.data_file(out), *([] if report is None else [report])]
    save.check_places(files, [model])
    return files


def _console() -> Any:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120, highlight=False, soft_wrap=not sys.stdout.isatty())


@contextmanager
def progress() -> Iterator[Progress]:
    """A bar on stderr while the body runs; silent where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text, done: None
        return
    with Progress(TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn(), console=console, transient=True) as bars:
        task = bars.add_task("", total=1.0)
        yield lambda text, done: bars.update(task, description=text, completed=done)


if __name__ == "__main__":
    main()
