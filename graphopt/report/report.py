"""What an optimization did, as data: JSON for tools, HTML for people, and a text summary."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from graphopt.core.errors import SaveError
from graphopt.core.pipeline import PassRecord
from graphopt.core.places import beside, check_places
from graphopt.core.remarks import Remark
from graphopt.graph.size import Size
from graphopt.report.words import _plain, megabytes, plural, rise_text

_VARYING = re.compile(r"`[^`]*`|\d+(\.\d+)?%?")  # what differs between remarks that say the same


@dataclasses.dataclass(frozen=True)
class Measured:
    """A number, or None and the reason why it is not known. `how` says what the number is."""

    value: float | None
    reason: str | None = None
    how: str | None = None

    def __post_init__(self) -> None:
        assert (self.value is None) == (self.reason is not None), "a number, or the reason why there is none"

    def as_dict(self) -> dict[str, Any]:
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None or k in ("value", "reason")}

    def text(self, form: str) -> str:
        return f"not known: {self.reason}" if self.value is None else form.format(self.value)


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
class Report:
    """The record of one `optimize` call; every number that is missing says why.

    `rises` are versions that the output needs and the input did not: {what, before, after, reason}.
    """

    pipeline: str
    target: dict[str, Any]
    input: Size
    output: Size
    passes: list[PassRecord]
    loss: Measured
    speed_up: Measured = Measured(None, "not measured; leave out --no-measure, or call Result.measure()")
    latency: Sequence[Timing] = ()
    rises: Sequence[dict[str, Any]] = ()

    @property
    def changes(self) -> int:
        return sum(record.changes for record in self.passes)

    @property
    def compression_ratio(self) -> float:
        """Bytes of the input over bytes of the output."""
        return self.input.bytes / max(1, self.output.bytes)

    def remarks(self, kind: str) -> list[Remark]:
        return [remark for record in self.passes for remark in record.remarks if remark.kind == kind]

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
            "latency": [dataclasses.asdict(t) | {"speed_up": t.speed_up} for t in self.latency] or None,
            "passes": [record.as_dict() for record in self.passes],
        }

    def json(self) -> str:
        return json.dumps(self.as_dict(), indent=1, default=_plain)

    def save(self, path: str | Path) -> None:
        """Write `.json` or `.html` (one file that needs nothing else), whole or not at all.

        Raises:
            SaveError: another extension, or the file cannot be written.
        """
        with self.staged(path):
            pass

    @contextlib.contextmanager
    def staged(self, path: str | Path) -> Iterator[None]:
        """As `save`, around something else: written beside `path` before the body, so that what cannot be written shows before the body
        has left anything, and put in place after it; not at all if the body fails.
        """
        path = Path(path)
        if path.suffix not in (".json", ".html"):
            raise SaveError(f"a report is FILE.json or FILE.html, found {path}")
        check_places((path,))
        with beside(path.absolute()) as folder:
            draft = folder / path.name
            self._write(draft, path)
            yield
            self._write(draft, path)  # the body may have found out more
            os.replace(draft, path)

    def _write(self, draft: Path, path: Path) -> None:
        try:
            draft.write_text(self._text(path.suffix), encoding="utf-8")
        except OSError as error:
            raise SaveError(f"cannot write the report {path}: {error.strerror or error}") from error

    def _text(self, suffix: str) -> str:
        if suffix == ".json":
            return self.json() + "\n"
        from graphopt.report.html import page

        return page(self)

    def __str__(self) -> str:
        lines = [
            f"{plural(self.changes, 'change')} by `{self.pipeline}`",
            f"nodes {self.input.nodes} -> {self.output.nodes}, {megabytes(self.input.bytes)} -> {megabytes(self.output.bytes)} "
            f"({self.compression_ratio:.2f}x smaller), opset {self.input.opset} -> {self.output.opset}",
            f"speed-up {self.speed_up.text('{:.2f}x')}",
            f"loss {self.loss.text('{:.3g}')}",
        ]
        lines += [rise_text(rise) for rise in self.rises]
        lines += [f"{record.name}: {plural(record.changes, 'change')}" for record in self.passes if record.changes]
        return "\n".join(lines + self.grouped("missed") + self.grouped("warning"))
