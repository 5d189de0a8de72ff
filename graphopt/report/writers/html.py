"""Elements as one HTML file that needs nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape

from graphopt.report.elements import Element, Line, Plot, Table, Text
from graphopt.report.writers.plot import svg

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .75rem; text-align: left; vertical-align: top; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
code { background: #f4f4f4; padding: 0 .2rem; }
pre { white-space: pre-wrap; }
"""


def page(title: str, elements: Iterable[Element]) -> str:
    """The whole page; `title` is also its heading."""
    name, body = escape(title), "\n".join(map(_draw, elements))
    head = f'<head><meta charset="utf-8"><title>{name}</title><style>{_STYLE}</style></head>'
    return f'<!doctype html>\n<html lang="en">{head}\n<body><h1>{name}</h1>\n{body}\n</body></html>\n'


def _draw(element: Element) -> str:
    match element:
        case Line():
            return f"<p>{_prose(element.text)}</p>"
        case Text():
            return f"<pre>{escape(element.text)}</pre>"
        case Table():
            return _table(element)
        case Plot():
            return svg(element)


def _table(table: Table) -> str:
    title = f"<h2>{escape(table.title)}</h2>\n" if table.title else ""
    rows = [_row(table, "th", table.columns)] if any(table.columns) else []
    rows += [_row(table, "td", row) for row in table.rows]
    return f"{title}<table>{chr(10).join(rows)}</table>"


def _row(table: Table, tag: str, cells: Iterable[object]) -> str:
    looks = (' class="number"' if table.right(k) else "" for k in range(len(table.columns)))
    return f"<tr>{''.join(f'<{tag}{look}>{_prose(str(cell))}</{tag}>' for look, cell in zip(looks, cells, strict=True))}</tr>"


def _prose(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
