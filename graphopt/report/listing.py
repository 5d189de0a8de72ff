"""What there is: passes and targets to choose from, and timings in the cache."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from graphopt.core.errors import GraphoptError, PipelineError
from graphopt.core.options import kebab, near
from graphopt.core.registry import PASSES, Registry
from graphopt.core.remarks import plural
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


# ---- what a class declares, read off its source: a list of passes imports none of them, so that it is there at once -------------------------


def declared(place: str | type, name: str, *keys: str) -> dict[str, object]:
    """The `purpose` of a class in one line (that of its module, where this names it, as `smooth: ...`, or the first of its docstring), and the
    attributes `keys`, its own or inherited.

    Args:
        place: its module, which is not imported, or the class itself.

    Raises:
        GraphoptError: the module has no such class.
    """
    if isinstance(place, type):
        return {"purpose": first_line(place.__doc__), **{key: getattr(place, key) for key in keys}}
    tree = _tree(place)
    found = next((node for node in _classes(tree) if kebab(node.name) == name), None)
    if found is None:
        raise GraphoptError(f"{place} has no class for `{name}`")
    head, _, purpose = first_line(ast.get_docstring(tree)).partition(": ")
    own = first_line(ast.get_docstring(found))
    return {"purpose": purpose if head == name and purpose else own, **{key: _attribute(place, found, key) for key in keys}}


def first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]


@functools.cache
def _tree(module: str) -> ast.Module:
    """Empty where there is no source."""
    spec = importlib.util.find_spec(module)
    text = "" if spec is None or not str(spec.origin).endswith(".py") else Path(str(spec.origin)).read_text(encoding="utf-8")
    return ast.parse(text)


def _classes(tree: ast.Module) -> Iterator[ast.ClassDef]:
    return (node for node in tree.body if isinstance(node, ast.ClassDef))


def _attribute(module: str, cls: ast.ClassDef, key: str) -> object:
    """The constant that a class, or the first of its bases that says anything, gives to an attribute; None where nobody does."""
    for line in cls.body:
        targets = [line.target] if isinstance(line, ast.AnnAssign) else line.targets if isinstance(line, ast.Assign) else []
        value = line.value if isinstance(line, (ast.AnnAssign, ast.Assign)) else None
        if isinstance(value, ast.Constant) and any(isinstance(target, ast.Name) and target.id == key for target in targets):
            return value.value
    for base in cls.bases:
        named = base.value if isinstance(base, ast.Subscript) else base  # RewritePass[Match]
        above = _named(module, named.id) if isinstance(named, ast.Name) else None
        found = None if above is None else _attribute(*above, key)
        if found is not None:
            return found
    return None


def _named(module: str, name: str) -> tuple[str, ast.ClassDef] | None:
    """The class that a module knows by this name, and the module that it stands in."""
    tree = _tree(module)
    for cls in _classes(tree):
        if cls.name == name:
            return module, cls
    for line in ast.walk(tree):  # also those for a type checker alone, by which graphopt names what it hands on
        if isinstance(line, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in line.names):
            package = module.rsplit(".", line.level)[0] if line.level else ""
            return _named(".".join(filter(None, (package, line.module))), next(a.name for a in line.names if (a.asname or a.name) == name))
    return None
