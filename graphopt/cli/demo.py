"""`graphopt demo`."""

from __future__ import annotations

from typing import Annotated

import typer

from graphopt.cli.shell import Json, progress, show


def demo(
    target: Annotated[str, typer.Option(metavar="T", help="Where to lower for.")] = "quantized",
    fast: Annotated[bool, typer.Option("--fast", help="A smoke test: few rounds, small shapes; not for numbers to quote.")] = False,
    as_json: Json = False,
) -> None:
    """Compile a real sentence encoder (MiniLM) and race it against its plain export and onnxruntime's quantizer."""
    from graphopt.cli import demo_race

    with progress() as tell:
        found = demo_race.run(target=target, fast=fast, progress=tell)
    show(found, as_json)
