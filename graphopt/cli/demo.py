"""`graphopt demo`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from graphopt.cli.shell import Json, console, progress

if TYPE_CHECKING:
    from rich.console import Console

    from graphopt.cli.demo_race import Demo


def demo(
    target: Annotated[str, typer.Option(metavar="T", help="Where to lower for.")] = "quantized",
    fast: Annotated[bool, typer.Option("--fast", help="A smoke test: few rounds, small shapes; not for numbers to quote.")] = False,
    as_json: Json = False,
) -> None:
    """Compile a real sentence encoder (MiniLM) and race it against its plain export and onnxruntime's quantizer."""
    from graphopt.cli import demo_race as demonstration

    with progress() as tell:
        found = demonstration.run(target=target, fast=fast, progress=tell)
    if as_json:
        print(json.dumps(found.as_dict(), indent=1))
        return
    print_demo(found, console())


def print_demo(found: Demo, terminal: Console) -> None:
    from graphopt.report.terminal import table

    rows = [
        (r.name, f"{r.bytes / 1e6:.1f}", *(f"{t:.1f}" for t in r.milliseconds), f"{r.speed_up:.2f}x", f"{r.pearson:.4f}", f"{r.cosine:.4f}")
        for r in found.rows
    ]
    title = f"all-MiniLM-L6-v2, median ms at batch x tokens, {found.threads} thread, target {found.target}"
    terminal.print(table(title, ["model", "MB", *found.shapes, "speed-up", "Pearson", "cosine"], rows))
    terminal.print("speed-up: geometric mean over the shapes, against the plain export; timed in interleaved rounds")
    terminal.print("Pearson: cosine similarity of embeddings against human similarity, Lee documents; cosine: to the plain export's embeddings")
    terminal.print(f"{found.seconds:.0f} s in all")
