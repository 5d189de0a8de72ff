"""What there is to choose from: names without importing anything, options and purposes where they are asked for."""

from __future__ import annotations

import inspect
from typing import Any

from graphopt.core.errors import PipelineError
from graphopt.core.options import near
from graphopt.core.registry import Registry


def rows(known: Registry, *, options: bool = False) -> list[dict[str, str]]:
    """Name and owner of each; with `options` also its options and the first line of its docstring, which imports every module.

    A module that cannot be imported is listed with the reason.
    """
    if not options:
        return [{"name": name, "owner": known.owner(name)} for name in known]
    found = []
    for name in known:
        try:
            cls = known[name]
            options_text, purpose = cls.describe(), _doc(cls).partition("\n")[0]
        except Exception as error:  # noqa: BLE001 -- one broken module must not hide the others; its reason stands in the list
            options_text, purpose = "", f"cannot be imported: {type(error).__name__}: {error}"
        found.append({"name": name, "options": options_text, "purpose": purpose, "owner": known.owner(name)})
    return found


def describe(known: Registry, name: str, kind: str) -> dict[str, Any]:
    """Everything about one pass or target.

    Raises:
        PipelineError: there is none of this name.
    """
    if name not in known:
        raise PipelineError(f"there is no {kind} `{name}`{near(name, known)}; `graphopt {kind}{'es' if kind == 'pass' else 's'}` lists them")
    cls = known[name]
    facts = {"name": name, "owner": known.owner(name), "options": cls.describe(), "doc": _doc(cls)}
    return facts | ({"exact": cls.exact} if kind == "pass" else {})


def text(facts: dict[str, Any]) -> str:
    kind = "" if facts.get("exact", True) else ", may change the numbers"
    return f"{facts['name']} ({facts['owner']}{kind})\n  options: {facts['options'] or 'none'}\n\n{facts['doc']}"


def _doc(cls: type) -> str:
    written = inspect.getdoc(cls) or ""
    return "" if written.startswith(f"{cls.__name__}(") else written  # what a dataclass writes by itself says nothing
