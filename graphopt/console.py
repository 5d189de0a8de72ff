"""Plain tables for a terminal; light, since the lists of passes and targets are printed with them."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.markup import escape
from rich.table import Table


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A plain table; every column but the first is right-aligned where all its cells start with a digit."""
    out = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for k, name in enumerate(columns):
        numeric = k > 0 and bool(rows) and all(str(row[k])[:1].isdigit() or not str(row[k]) for row in rows)
        out.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        out.add_row(*(escape(str(cell)) for cell in row))
    return out
