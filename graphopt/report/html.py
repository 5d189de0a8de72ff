"""A report as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from math import inf
from typing import TYPE_CHECKING

from graphopt.report.words import megabytes, plural, rise_text

if TYPE_CHECKING:
    from graphopt.report.comparison import BlockDifference, Comparison
    from graphopt.report.report import Report

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
    return _document("graphopt report", parts)


def comparison_page(found: Comparison) -> str:
    """Two models side by side: outputs, worst channels, and a plot of the signal-to-noise ratio along the blocks."""
    outputs = [(x.name, f"{x.snr:.1f}", f"{x.l2:.3g}", f"{x.cosine:.6f}", f"{x.cosine_min:.6f}", f"{x.max_abs:.3g}") for x in found.outputs]
    channels = [(x.name, channel, f"{share:.3g}") for x in found.outputs for channel, share in x.channels]
    blocks = [(x.name, f"{x.snr:.1f}", f"{x.own:.1f}", f"{x.l2:.3g}", f"{x.cosine:.6f}", f"{x.max_abs:.3g}", x.value) for x in found.blocks]
    made = ", made up by type" if found.made_up else ""
    parts = [
        f"<p>A: <code>{escape(found.a)}</code>, B: <code>{escape(found.b)}</code>; {plural(found.samples, 'batch', 'batches')}{made}</p>",
        f"<p>{escape(found.verdict)}</p>",
        f"<p>{escape(found.note)}</p>" if found.note and found.blocks else "",
        _plot(found.blocks),
        _section("Blocks", ["block", "SNR, dB", "alone", "relative L2", "cosine", "max |d|", "value"], blocks),
        _section("Outputs", ["output", "SNR, dB", "relative L2", "cosine", "smallest cosine", "max |d|"], outputs),
        _section("Worst channels", ["output", "channel", "relative L2"], channels),
    ]
    return _document("graphopt compare", parts)


def _plot(blocks: Sequence[BlockDifference]) -> str:
    """Signal-to-noise ratio of each block: a bar as the models run, a ring for the block alone. What reaches the right border has no error."""
    if not blocks:
        return ""
    left, wide, step = 170, 560, 20
    top = max(20.0, *(20 * (x // 20 + 1) for b in blocks for x in (b.snr, b.own) if abs(x) < inf))

    def place(ratio: float) -> float:
        return round(left + wide * min(max(ratio, 0.0), top) / top, 1)

    high = step * (len(blocks) + 2)
    marks = [
        f'<line x1="{place(x)}" y1="0" x2="{place(x)}" y2="{high - 2 * step}" stroke="#ddd"/><text x="{place(x)}" y="{high - 1.3 * step}" text-anchor="middle">{x}</text>'  # noqa: E501
        for x in range(0, int(top) + 1, 20)
    ]
    ring = 'r="4" fill="none" stroke="#b03030" stroke-width="2"'
    rows = [
        f'<text x="{left - 8}" y="{step * k + 14}" text-anchor="end">{escape(b.name)}</text>'
        f'<rect x="{left}" y="{step * k + 4}" width="{round(place(b.snr) - left, 1)}" height="12" fill="#7aa6c2"><title>{b.snr:.1f} dB</title></rect>'
        f'<circle cx="{place(b.own)}" cy="{step * k + 10}" {ring}><title>alone {b.own:.1f} dB</title></circle>'
        for k, b in enumerate(blocks)
    ]
    legend = f'<text x="{left}" y="{high - 4}">signal-to-noise ratio, dB: bar, as the models run; ring, the block alone</text>'
    size = f'width="{left + wide + 30}" height="{high}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-size="12" role="img">{"".join((*marks, *rows, legend))}</svg>'


def _document(title: str, parts: Iterable[str]) -> str:
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style></head>\n<body><h1>{title}</h1>\n{body}\n</body></html>\n'  # noqa: E501


def _section(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    return f"<h2>{escape(title)}</h2>\n{_table(head, rows)}" if rows else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    top = "".join(f"<th>{escape(h)}</th>" for h in head)
    return f"<table><tr>{top}</tr>\n" + "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows) + "</table>"


def _cell(value: object) -> str:
    text = str(value)
    number = text[:1].isdigit() and not isinstance(value, bool)
    return f"<td{' class=number' if number else ''}>{escape(text)}</td>"
