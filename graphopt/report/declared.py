"""What a class declares, read off its source: a list of passes imports none of them, so that it is there at once."""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from graphopt.core.errors import GraphoptError
from graphopt.core.options import kebab


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
