"""`graphopt passes` and `graphopt targets`."""

from __future__ import annotations

import json

from graphopt.cli.shell import Json, Name, Plugins, Verbose, console


def passes(name: Name = None, verbose: Verbose = False, plugin: Plugins = None, as_json: Json = False) -> None:
    """List the passes, or show one with its options."""
    _list("pass", name, verbose, plugin, as_json)


def targets(name: Name = None, verbose: Verbose = False, plugin: Plugins = None, as_json: Json = False) -> None:
    """List the targets, or show one with its options."""
    _list("target", name, verbose, plugin, as_json)


def _list(kind: str, name: str | None, verbose: bool, plugin: list[str] | None, as_json: bool) -> None:
    from graphopt.core import registry
    from graphopt.report import listing

    known = (registry.passes if kind == "pass" else registry.targets)(tuple(plugin or ()))
    if name is not None:
        found = listing.describe(known, name, kind)
        print(json.dumps(found, indent=1) if as_json else listing.text(found))
        return
    rows = listing.rows(known, options=verbose)
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    from graphopt.report.terminal import table

    columns = ("name", "options", "purpose", "owner") if verbose else ("name", "owner")
    console().print(table("", columns, [[row[column] for column in columns] for row in rows]))
