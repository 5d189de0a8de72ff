"""The command line. It reads options, calls the library, and prints; the logic is elsewhere, and nothing heavy is imported until a command runs.

Exit code 0, or 1 with an error on stderr and no output file, or 2 for wrong usage, or 130 after Ctrl-C. Results go to stdout or files,
everything else to stderr.
"""

from __future__ import annotations

import codecs
import importlib
import io
import logging
import os
import sys
import warnings
from typing import Annotated

import typer

from graphopt.cli import tune
from graphopt.cli.shell import INTERRUPTED, one_line_errors

COMMANDS = (  # file and function, which have one name in most; in the order of --help
    "optimize",
    "inspect",
    "inspect.view",
    "bench",
    "lists.passes",
    "lists.targets",
    "demo",
    "compare",
    "debug.bisect",
    "debug.reduce",
)

app = typer.Typer(
    name="graphopt",
    help="A compiler for trained Transformer models: export, fuse, quantize and measure, for the machine at hand.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the `graphopt` script."""
    _speak_utf8()
    if not sys.warnoptions and not os.environ.get("GRAPHOPT_TRACEBACK"):
        warnings.simplefilter("ignore")  # of exporters and runtimes; what a user must know is a remark
        logging.disable(logging.WARNING)
    try:
        app()
    except KeyboardInterrupt:  # before a command runs
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _speak_utf8() -> None:
    """Start again in the UTF-8 mode of Python where the locale is plain ASCII: names of files are UTF-8 there, too, and so are our texts."""
    if codecs.lookup(sys.getfilesystemencoding()).name == "ascii" and not sys.flags.utf8_mode:
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # a sign that a terminal lacks is no failure


def show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"graphopt {version('graphopt')}")
        raise typer.Exit


@app.callback()
def root(version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")] = False) -> None:
    """A compiler for trained Transformer models: export, fuse, quantize and measure, for the machine at hand."""


for _file, _, _function in (_command.partition(".") for _command in COMMANDS):
    app.command()(one_line_errors(getattr(importlib.import_module(f"graphopt.cli.{_file}"), _function or _file)))
for _name, _part in tune.COMMANDS.items():
    tune.app.command(_name)(one_line_errors(_part))
app.add_typer(tune.app, name="tune")


if __name__ == "__main__":
    main()
