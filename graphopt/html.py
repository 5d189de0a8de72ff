"""A report as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from graphopt.report import megabytes, plural, rise_text

if TYPE_CHECKING:
    from graphopt.report import Report

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .75rem; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
code { background: #f4f4f4; padding: 0 .2rem; }
"""


def page(report: Report) -> str:
    """The whole report: sizes, latency, what each pass did, and every remark."""
    a, b = report.input, report.output
    sizes = [
        ("size", megabytes(a.bytes), megabytes(b.bytes), f"{report.compression_ratio:.2f}x smaller"),
        ("nodes", a.nodes, b.nodes, ""),
        ("parameters", f"{a.parameters:,}", f"{b.parameters:,}", ""),
        ("opset", a.opset, b.opset, ""),
        ("IR version", a.ir_version, b.ir_version, ""),
        ("metadata of nodes", megabytes(a.metadata), megabytes(b.metadata), ""),
    ]
    latency = [(t.shape, f"{t.input_ms:.2f}", f"{t.output_ms:.2f}", f"{t.speed_up:.2f}x") for t in report.latency]
    passes = [(r.name, r.changes, f"{r.seconds:.2f}", sum(x.kind == "missed" for x in r.remarks)) for r in report.passes]
    remarks = [(r.kind, r.pass_name, r.node, r.message) for record in report.passes for r in record.remarks]
    target = escape(str(report.target.get("name", "")))
    rises = "".join(f"<p>{escape(rise_text(rise))}</p>" for rise in report.rises)
    parts = [
        f"<p>{plural(report.changes, 'change')} by <code>{escape(report.pipeline)}</code> for <code>{target}</code></p>",
        f"<p>Speed-up: {escape(report.speed_up.text('{:.2f}x'))}. Loss: {escape(report.loss.text('{:.3g}'))}.</p>",
        _table(["", "input", "output", ""], sizes),
        rises,
        _section("Latency, milliseconds", ["shape", "input", "output", "speed-up"], latency),
        _section("Passes", ["pass", "changes", "seconds", "missed"], passes),
        _section("Remarks", ["kind", "pass", "node", "message"], remarks),
    ]
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>graphopt report</title><style>{_STYLE}</style></head>\n<body><h1>graphopt report</h1>\n{body}\n</body></html>\n'  # noqa: E501


def _section(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    return f"<h2>{escape(title)}</h2>\n{_table(head, rows)}" if rows else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    top = "".join(f"<th>{escape(h)}</th>" for h in head)
    return f"<table><tr>{top}</tr>\n" + "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows) + "</table>"


def _cell(value: object) -> str:
    text = str(value)
    number = text[:1].isdigit() and not isinstance(value, bool)
    return f"<td{' class=number' if number else ''}>{escape(text)}</td>"
