"""`graphopt passes` and `graphopt targets`."""

from __future__ import annotations

from graphopt.cli.shell import Json, Name, Plugins, Verbose, show


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
    show(listing.listed(known, options=verbose) if name is None else listing.described(known, name, kind), as_json)
