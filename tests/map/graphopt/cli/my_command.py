"""`graphopt my-command`."""

from __future__ import annotations

from pathlib import Path

from graphopt.cli.shell import Json, ModelPath, show


def my_command(model: ModelPath, report: Path | None = None, as_json: Json = False) -> None:
    """Count the operators of a model."""
    from graphopt.report.my_report import count

    found = count(model)
    if report is not None:
        found.write(report)
    show(found, as_json)
