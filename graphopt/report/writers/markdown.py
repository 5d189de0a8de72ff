"""Elements as Markdown with tables as on GitHub, for a pull request or a wiki."""

from __future__ import annotations

import re
from collections.abc import Iterable

from graphopt.report.elements import Element, Line, Plot, Table, Text
from graphopt.report.writers.plot import bars


def page(title: str, elements: Iterable[Element]) -> str:
    """The whole page; `title` is its heading."""
    return "\n\n".join([f"# {_prose(title)}", *map(_draw, elements)]) + "\n"


def _draw(element: Element) -> str:
    match element:
        case Line():
            return re.sub(r"^(\d*)(?=[-+#.)=>])", r"\1\\", _prose(element.text))  # at its start, these make a list or a heading
        case Text():
            return _fenced(element.text)
        case Table():
            return _table(element)
        case Plot():
            return _fenced(bars(element))


def _table(table: Table) -> str:
    title = f"## {_prose(table.title)}\n\n" if table.title else ""
    rule = ["---:" if table.right(k) else "---" for k in range(len(table.columns))]
    rows = [[_prose(str(cell)).replace("|", r"\|") for cell in row] for row in (table.columns, *table.rows)]
    return title + "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


def _fenced(text: str) -> str:
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 0)
    return f"{fence}\n{text}\n{fence}"


def _prose(text: str) -> str:
    """On one line, and nothing outside of code means anything; a bar is left to the tables."""
    parts = re.split(r"(`[^`]+`)", " ".join(text.splitlines()))  # every second part is code
    return "".join(part if k % 2 else _plain(part) for k, part in enumerate(parts))


def _plain(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"[\\`*~\[\]]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)  # an underscore within a word means nothing
