"""Elements on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import rich.table
import rich.text
from rich import box
from rich.console import Console

from graphopt.report.elements import Element, Line, Plot, Table, Text
from graphopt.report.writers.plot import bars


def show(elements: Iterable[Element], console: Console | None = None) -> None:
    """Print what is no detail, on stdout by default: as wide as the terminal, or 120 columns and whole lines where it is a file or a pipe."""
    to_file = not sys.stdout.isatty()
    console = console or Console(width=120 if to_file else None, soft_wrap=to_file, highlight=False)
    for element in elements:
        if not element.detail:
            _draw(element, console)


def _draw(element: Element, console: Console) -> None:
    match element:
        case Line():
            console.print(rich.text.Text(element.text))
        case Text():
            console.print(rich.text.Text(element.text), soft_wrap=True)
        case Table():
            console.print(_table(element))
        case Plot():
            console.print(rich.text.Text(bars(element)), soft_wrap=True)


def _table(table: Table) -> rich.table.Table:
    """Cells are `Text`, as rich would read `[bold]` and `:x:` in a name."""
    title = rich.text.Text(table.title, style="bold") if table.title else None
    out = rich.table.Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for k, name in enumerate(table.columns):
        out.add_column(rich.text.Text(name), justify="right" if table.right(k) else "left", overflow="fold")
    for row in table.rows:
        out.add_row(*(rich.text.Text(str(cell)) for cell in row))
    return out
