"""What an optimization did."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from graphopt.core.pipeline import PassRecord
from graphopt.core.remarks import Remark, plural
from graphopt.graph.size import Size
from graphopt.report.document import Document
from graphopt.report.elements import Element, Line, Table, Text
from graphopt.report.words import head, megabytes, plain

_VARYING = re.compile(r"`[^`]*`|\d+(\.\d+)?%?")  # what differs between remarks that say the same
_SHOWN = 12  # kinds of remark, at most, before the list is cut


@dataclasses.dataclass(frozen=True)
class Measured:
    """A number, or None and the reason why it is not known. `how` says what the number is, and `note` what else is to be known of it."""

    value: float | None
    reason: str | None = None
    how: str | None = None
    note: str | None = None

    def __post_init__(self) -> None:
        assert (self.value is None) == (self.reason is not None), "a number, or the reason why there is none"

    def as_dict(self) -> dict[str, Any]:
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None or k in ("value", "reason")}

    def text(self, form: str) -> str:
        return f"not known: {self.reason}" if self.value is None else form.format(self.value)


@dataclasses.dataclass(frozen=True)
class Gated:
    """Whether the output was opened and run once as its target opens it. `passed` None: it was not judged; False: it must not be written."""

    passed: bool | None
    reason: str


@dataclasses.dataclass(frozen=True)
class Timing:
    """Median latency of input and output for feeds of one shape, in milliseconds, measured in interleaved blocks."""

    shape: str
    input_ms: float
    output_ms: float

    @property
    def speed_up(self) -> float:
        return self.input_ms / self.output_ms


@dataclasses.dataclass
class Report(Document):
    """The record of one `optimize` call; every number that is missing says why.

    Attributes:
        rises: versions that the output needs and the input did not: {what, before, after, reason}.
        model, threads: what the input is called, and the threads that it was timed with, where they are known.
        samples: `batches` and `rows` (tokens, where ids are fed; padding included) that passes and the loss could read; None without samples.
        apart: the kind of remarks that stand in full beside it, and are not summed up again.
    """

    title: ClassVar[str] = "graphopt report"

    pipeline: str
    target: dict[str, Any]
    input: Size
    output: Size
    passes: list[PassRecord]
    loss: Measured
    speed_up: Measured = Measured(None, "not measured; leave out --no-measure, or call Result.measure()")
    latency: Sequence[Timing] = ()
    rises: Sequence[dict[str, Any]] = ()
    model: str = ""
    threads: int | None = None
    samples: Mapping[str, int] | None = None
    apart: str = ""
    gate: Gated = Gated(None, "it was not asked for")

    @property
    def changes(self) -> int:
        return sum(record.changes for record in self.passes)

    @property
    def compression_ratio(self) -> float:
        """Bytes of the input over bytes of the output."""
        return self.input.bytes / max(1, self.output.bytes)

    def remarks(self, kind: str = "all") -> list[Remark]:
        """Those of one kind, each once: a pass that stands in the pipeline twice may say the same about a node twice."""
        found = (remark for record in self.passes for remark in record.remarks if kind in ("all", remark.kind))
        return list({(x.kind, x.pass_name, x.node, x.message): x for x in found}.values())

    def listed(self, kind: str, form: str) -> Listed:
        """The remarks of a kind as a document of its own."""
        return Listed(self.remarks(kind), form)

    def grouped(self, kind: str) -> list[str]:
        """One line for remarks of one pass that differ in names and numbers only; the most frequent first."""
        groups: dict[tuple[str, str], list[Remark]] = {}
        for remark in self.remarks(kind):
            groups.setdefault((remark.pass_name, _VARYING.sub("_", remark.message)), []).append(remark)
        ordered = sorted(groups.values(), key=len, reverse=True)
        return [f"{found[0]}" + (f" (and {len(found) - 1} more like it)" if len(found) > 1 else "") for found in ordered]

    def as_dict(self) -> dict[str, Any]:
        from importlib.metadata import version

        return {
            "graphopt": version("graphopt"),
            "pipeline": self.pipeline,
            "target": self.target,
            "changes": self.changes,
            "input": dataclasses.asdict(self.input),
            "output": dataclasses.asdict(self.output),
            "rises": list(self.rises),
            "compression_ratio": {"value": round(self.compression_ratio, 4), "reason": None},
            "speed_up": self.speed_up.as_dict(),
            "loss": self.loss.as_dict(),
            "gate": dataclasses.asdict(self.gate),
            "latency": [dataclasses.asdict(t) | {"speed_up": t.speed_up} for t in self.latency] or None,
            "samples": None if self.samples is None else dict(self.samples),
            "passes": [record.as_dict() for record in self.passes],
        }

    def elements(self) -> Sequence[Element]:
        """Sizes, latency, what each pass did, and why candidates were declined; every remark is a detail."""
        changed = ", ".join(record.told for record in self.passes if record.changes)
        found: list[Element] = [
            head(
                model=self.model,
                pipeline=self.pipeline,
                changed_by=changed,
                target=self.target.get("name", ""),
                threads="" if self.threads is None else self.threads,
            ),
            self._sizes(),
            *(self._latency() if self.latency else [Line(self._speed_up())]),
            Line(self._loss()),
        ]
        if self.gate.passed is None:
            found.append(Line(_ungated(self.gate)))
        told = [f"{key} {len(value) if isinstance(value, list) else value}" for key, value in self.target.items() if key != "name" and value]
        if told:
            found.append(Line(f"target {self.target['name']}: {', '.join(told)}"))
        if self.samples is not None:
            found.append(Line(f"samples: {plural(self.samples['batches'], 'batch', 'batches')}, {self.samples['rows']:,} tokens or rows"))
        found += [Line(_rise(rise)) for rise in self.rises]
        found += self._passes()
        for kind in ("missed", "warning"):
            reasons = self.grouped(kind) if self.apart not in (kind, "all") else []
            found += map(Line, reasons[:_SHOWN])
            if len(reasons) > _SHOWN:
                found.append(Line(f"... and {plural(len(reasons) - _SHOWN, 'more reason')}: --remarks all"))
        if remarks := self.remarks():
            found.append(remark_table(remarks, title="remarks", detail=True))
        return found

    def _sizes(self) -> Table:
        a, b = self.input, self.output
        rows = [
            ("size", megabytes(a.bytes), megabytes(b.bytes), _ratio(a.bytes, b.bytes)),
            ("nodes", a.nodes, b.nodes, ""),
            ("parameters", f"{a.parameters:,}", f"{b.parameters:,}", ""),
            ("opset", a.opset, b.opset, ""),
            ("IR version", a.ir_version, b.ir_version, ""),
            ("metadata", megabytes(a.metadata), megabytes(b.metadata), ""),
        ]
        return Table(("model", "input", "output", ""), rows, align="lrrr")

    def _latency(self) -> list[Element]:
        rows = [(t.shape, f"{t.input_ms:.2f}", f"{t.output_ms:.2f}", f"{t.speed_up:.2f}x") for t in self.latency]
        rows.append(("geometric mean", "", "", self.speed_up.text("{:.2f}x")))
        table = Table(("shape", "input", "output", "speed-up"), rows, "latency in ms", "lrrr")
        return [table, Line(self.speed_up.note)] if self.speed_up.note else [table]

    def _passes(self) -> list[Element]:
        """A row for each pass that changed something, and how many did not."""
        done = [r for r in self.passes if r.changes]
        rows = [(r.told, r.changes, f"{r.seconds:.2f}", sum(x.kind == "missed" for x in r.remarks) or "") for r in done]
        idle = [r for r in self.passes if not r.changes]
        title = plural(self.changes, "change")
        found: list[Element] = [Table(("pass", "changes", "seconds", "missed"), rows, title, "lrrr")] if rows else [Line(title)]
        if idle:
            found.append(Line(f"{plural(len(idle), 'other pass', 'other passes')} changed nothing ({sum(r.seconds for r in idle):.2f} s)"))
        return found

    def _speed_up(self) -> str:
        return f"speed-up {self.speed_up.text('{:.2f}x')}" + (f" ({self.speed_up.note})" if self.speed_up.note else "")

    def _loss(self) -> str:
        return f"loss {self.loss.text('{:.3g}')}" + (f" ({self.loss.how})" if self.loss.how else "")

    def __str__(self) -> str:
        lines = [
            f"{plural(self.changes, 'change')} by `{self.pipeline}`",
            f"nodes {self.input.nodes} -> {self.output.nodes}, {megabytes(self.input.bytes)} -> {megabytes(self.output.bytes)} "
            f"({self.compression_ratio:.2f}x smaller), opset {self.input.opset} -> {self.output.opset}",
            self._speed_up(),
            self._loss(),
        ]
        lines += [_ungated(self.gate)] if self.gate.passed is None else []
        lines += map(_rise, self.rises)
        lines += [f"{record.name}: {plural(record.changes, 'change')}" for record in self.passes if record.changes]
        return "\n".join(lines + self.grouped("missed") + self.grouped("warning"))


def _ungated(gate: Gated) -> str:
    return f"not judged by opening and running it as its target does: {gate.reason}"


@dataclasses.dataclass(frozen=True)
class Listed(Document):
    """Remarks in full. `form`: one a line (`lines`), or a `table`; its JSON is one object a line, whatever the form."""

    title: ClassVar[str] = "graphopt remarks"

    remarks: Sequence[Remark]
    form: str

    def as_dict(self) -> list[dict[str, Any]]:
        return [{"pass": x.pass_name} | x.as_dict() for x in self.remarks]

    def json(self) -> str:
        return "\n".join(json.dumps(plain(row)) for row in self.as_dict())

    def elements(self) -> Sequence[Element]:
        if self.form == "lines":
            return [Text("\n".join(map(str, self.remarks)))]
        return [remark_table(self.remarks)]


def remark_table(remarks: Sequence[Remark], **options: Any) -> Table:
    rows = [(x.kind, x.pass_name, x.node, x.message) for x in remarks]
    return Table(("kind", "pass", "node", "message"), rows, **options)


def _rise(rise: Mapping[str, Any]) -> str:
    return f"{rise['what']} {rise['before']} -> {rise['after']}: {rise['reason']}"


def _ratio(before: int, after: int) -> str:
    if before == after:
        return ""
    if abs(after - before) < before / 200:
        return f"{after - before:+,} bytes"
    return f"{before / max(1, after):.2f}x smaller" if after < before else f"{after / max(1, before):.2f}x larger"
