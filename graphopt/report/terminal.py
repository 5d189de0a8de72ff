"""What the command line prints on a terminal: tables of a report, an inspection, a benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from graphopt.report.words import megabytes, plural, rise_text

if TYPE_CHECKING:
    from graphopt.report.card import Card
    from graphopt.report.comparison import Comparison
    from graphopt.report.inspection import Inspection
    from graphopt.report.report import Report

_SHOWN = 12  # kinds of remark, at most, before the list is cut


def print_report(report: Report, console: Console) -> None:
    """Sizes, latency, what each pass did, and why candidates were declined."""
    a, b = report.input, report.output
    rows = [
        ("size", megabytes(a.bytes), megabytes(b.bytes), _ratio(a.bytes, b.bytes)),
        ("nodes", a.nodes, b.nodes, ""),
        ("parameters", f"{a.parameters:,}", f"{b.parameters:,}", ""),
        ("opset", a.opset, b.opset, ""),
        ("IR version", a.ir_version, b.ir_version, ""),
        ("metadata", megabytes(a.metadata), megabytes(b.metadata), ""),
    ]
    console.print(table("", ["model", "input", "output", ""], rows))
    if report.latency:
        timings = [(t.shape, f"{t.input_ms:.2f}", f"{t.output_ms:.2f}", f"{t.speed_up:.2f}x") for t in report.latency]
        timings.append(("geometric mean", "", "", report.speed_up.text("{:.2f}x")))
        console.print(table("latency in ms", ["shape", "input", "output", "speed-up"], timings))
    else:
        console.print(f"speed-up {report.speed_up.text('{:.2f}x')}", markup=False)
    console.print(f"loss {report.loss.text('{:.3g}')}" + (f" ({report.loss.how})" if report.loss.how else ""), markup=False)
    told = [f"{key} {len(value) if isinstance(value, list) else value}" for key, value in report.target.items() if key != "name" and value]
    if told:
        console.print(f"target {report.target['name']}: {', '.join(told)}", markup=False)
    for rise in report.rises:
        console.print(rise_text(rise), markup=False)
    passes = [(r.name, r.changes, f"{r.seconds:.2f}", sum(x.kind == "missed" for x in r.remarks) or "") for r in report.passes]
    console.print(table(plural(report.changes, "change"), ["pass", "changes", "seconds", "missed"], passes))
    _print_grouped(report, "missed", console)
    _print_grouped(report, "warning", console)


def _ratio(before: int, after: int) -> str:
    if before == after:
        return ""
    if abs(after - before) < before / 200:
        return f"{after - before:+,} bytes"
    return f"{before / max(1, after):.2f}x smaller" if after < before else f"{after / max(1, before):.2f}x larger"


def _print_grouped(report: Report, kind: str, console: Console) -> None:
    found = report.grouped(kind)
    for line in found[:_SHOWN]:
        console.print(line, markup=False)
    if len(found) > _SHOWN:
        console.print(f"... and {len(found) - _SHOWN} more reasons: --remarks all")


def print_card(card: Card, console: Console) -> None:
    """Layers that follow each other and are alike are one line."""
    rows = [
        (f"{part.count} x" if part.count > 1 else "", part.part, part.what, f"{part.parameters:,}", f"{part.flops / 1e6:,.1f}" if part.flops else "")
        for part in card.parts
    ]
    sizes = ", ".join(f"{name}={size}" for name, size in card.sizes.items()) or "static sizes"
    console.print(table(f"blocks (parameters and MFLOPs of one, at {sizes})", ["", "block", "what", "parameters", "MFLOPs"], rows))


def print_inspection(found: Inspection, console: Console) -> None:
    facts: Mapping[str, Any] = found.as_dict()
    rows: list[tuple[object, ...]] = [
        (key.replace("_", " "), megabytes(facts[key]) if key in ("bytes", "metadata") else f"{facts[key]:,}")
        for key in ("nodes", "parameters", "bytes", "metadata", "opset", "ir_version")
    ]
    console.print(table("", ["model", found.source], [*rows, ("producer", found.producer or "not named")]))
    console.print(table("inputs and outputs", ["", "name", "type"], [("in", *p) for p in found.inputs] + [("out", *p) for p in found.outputs]))
    print_card(found.card, console)
    counts = sorted(((name, count) for name, count in found.ops.items()), key=lambda item: (-item[1], item[0]))
    console.print(table("operators", ["operator", "count"], counts))
    if found.blocks:
        columns = ("node", "heads", "kv_heads", "head_dim", "scale", "mask")
        console.print(table("attention", columns, [[_cell(block[c]) for c in columns] for block in found.blocks]))
    if found.declined:
        console.print(table("not attention", ["node", "reason"], [(d["node"], d["reason"]) for d in found.declined]))
    if not found.blocks and not found.declined:
        console.print("no attention found")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else "" if value is None else str(value)


def print_remarks(report: Report, kind: str) -> None:
    """One remark a line, on stdout."""
    for record in report.passes:
        for remark in record.remarks:
            if kind in ("all", remark.kind):
                print(remark)


def print_comparison(found: Comparison, console: Console) -> None:
    """Every output with its worst channels, every block with its error, and where the error enters."""
    title = f"outputs on {plural(found.samples, 'batch', 'batches')}{', made up' if found.made_up else ''}"
    rows = [
        (x.name, f"{x.snr:.1f}", f"{x.l2:.3g}", f"{x.cosine:.6f}", f"{x.cosine_min:.6f}", f"{x.max_abs:.3g}",
         ", ".join(f"{channel} ({share:.2g})" for channel, share in x.channels))
        for x in found.outputs
    ]  # fmt: skip
    console.print(table(title, ["output", "SNR dB", "relative L2", "cosine", "smallest", "max |d|", "worst channels (relative L2)"], rows))
    if found.blocks:
        blocks = [(x.name, f"{x.snr:.1f}", f"{x.own:.1f}", f"{x.l2:.3g}", f"{x.cosine:.6f}", f"{x.max_abs:.3g}", x.value) for x in found.blocks]
        console.print(table("blocks, in order", ["block", "SNR dB", "alone", "relative L2", "cosine", "max |d|", "value"], blocks))
    console.print(found.verdict, markup=False)
    if found.note and found.blocks:
        console.print(found.note, markup=False)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A plain table; every column but the first is right-aligned where all its cells start with a digit."""
    out = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for k, name in enumerate(columns):
        numeric = k > 0 and bool(rows) and all(str(row[k])[:1].isdigit() or not str(row[k]) for row in rows)
        out.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        out.add_row(*(escape(str(cell)) for cell in row))
    return out
