"""What there is: passes and targets to choose from, and timings in the cache."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from graphopt.core.errors import PipelineError
from graphopt.core.options import near
from graphopt.core.registry import PASSES, Registry
from graphopt.core.remarks import plural
from graphopt.report.declared import declared
from graphopt.report.document import Document
from graphopt.report.elements import Element, Line, Table, Text


@dataclasses.dataclass(frozen=True)
class Listing(Document):
    """Facts about each of several things, as text; all have the same keys."""

    rows: Sequence[Mapping[str, str]]

    def as_dict(self) -> list[dict[str, str]]:
        return [dict(row) for row in self.rows]

    def elements(self) -> Sequence[Table]:
        columns = tuple(next(iter(self.rows), {}))
        return [Table(columns, [[row[column] for column in columns] for row in self.rows])]


@dataclasses.dataclass(frozen=True)
class Described(Document):
    """One pass or target in full."""

    facts: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return dict(self.facts)

    def elements(self) -> Sequence[Text]:
        facts = self.facts
        kind = "" if facts.get("exact", True) else ", may change the numbers"
        kind += {"needs": ", needs samples", "can": ", can use samples"}.get(facts.get("samples", ""), "")
        kind += f", but not with: {facts['data_free']}" if facts.get("data_free") else ""
        return [Text(f"{facts['name']} ({facts['owner']}{kind})\n  options: {facts['options'] or 'none'}\n\n{facts['doc']}")]


@dataclasses.dataclass(frozen=True)
class Cached(Document):
    """The timings of a tuning cache, as its `rows` give them, and where it is."""

    rows: Sequence[Mapping[str, Any]]
    path: str

    def as_dict(self) -> list[dict[str, Any]]:
        return [dict(row) for row in self.rows]

    def elements(self) -> Sequence[Element]:
        """A table for each machine."""
        machines: dict[tuple[Any, ...], list[tuple[str, ...]]] = {}
        for row in sorted(self.rows, key=lambda r: (r["description"], r["shape"], r["seconds"])):
            where = (row["processor"], row["runtime"], row["provider"], row["threads"])
            machines.setdefault(where, []).append((row["description"], row["spelling"].partition(" (")[0], f"{row['seconds'] * 1e3:.4f}"))
        found: list[Element] = []
        for (processor, runtime, provider, threads), lines in machines.items():
            found.append(Line(f"{processor} | {runtime} | {provider} | {plural(threads, 'thread')}"))
            found.append(Table(("piece", "spelling", "ms"), lines, align="llr"))
        return [*found, Text(f"{plural(len(self.rows), 'timing')} in {self.path}")]


_SAMPLES = {"no": "", "can": "can use", "needs": "needs"}


def listed(known: Registry, *, options: bool = False) -> Listing:
    """Of each its name, what kind of pass it is, what it does, and who brings it; with `options` also these, which imports every module.

    A module that cannot be read or imported is listed with the reason.
    """
    keys = ("exact", "samples") if known.group == PASSES else ()
    found = []
    for name in known:
        facts: dict[str, Any] = dict.fromkeys(keys)
        options_text = ""
        try:
            facts = declared(known.place(name), name, *keys)
            options_text = known[name].describe() if options else ""
        except Exception as error:  # noqa: BLE001 -- one broken module must not hide the others; its reason stands in the list
            facts["purpose"] = f"cannot be imported: {type(error).__name__}: {error}"
        kind = {"numbers": {False: "lossy", True: "exact"}.get(facts["exact"], ""), "samples": _SAMPLES.get(facts["samples"], "")} if keys else {}
        more = {"options": options_text} if options else {}
        found.append({"name": name} | kind | {"purpose": facts["purpose"]} | more | {"owner": known.owner(name)})
    return Listing(found)


def described(known: Registry, name: str, kind: str) -> Described:
    """Everything about one pass or target.

    Raises:
        PipelineError: there is none of this name.
    """
    if name not in known:
        raise PipelineError(f"there is no {kind} `{name}`{near(name, known)}; `graphopt {kind}{'es' if kind == 'pass' else 's'}` lists them")
    cls = known[name]
    facts = {"name": name, "owner": known.owner(name), "options": cls.describe(), "doc": _doc(cls)}
    return Described(facts | ({"exact": cls.exact, "samples": cls.samples, "data_free": cls.data_free} if kind == "pass" else {}))


def _doc(cls: type) -> str:
    written = inspect.getdoc(cls) or ""
    return "" if written.startswith(f"{cls.__name__}(") else written  # what a dataclass writes by itself says nothing
