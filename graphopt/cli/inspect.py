"""`graphopt inspect`."""

from __future__ import annotations

from graphopt.cli.shell import Json, ModelPath, Plugins, Repro, Task, WithPast, WithWeights, progress, show


def inspect(
    model: ModelPath,
    task: Task = None,
    with_past: WithPast = False,
    plugin: Plugins = None,
    repro: Repro = None,
    with_weights: WithWeights = False,
    as_json: Json = False,
) -> None:
    """Show what a model is, and every attention in it or why it is none."""
    from graphopt.driver.debug.repro import reproducible
    from graphopt.report.inspection import inspect as look

    options = {"plugins": plugin or (), "task": task, "with_past": with_past}
    with reproducible(repro, "inspect", [model], None, options, with_weights=with_weights), progress() as tell:
        tell("load and recognize", 0.0)
        found = look(model, plugins=plugin or (), task=task, with_past=with_past)
    show(found, as_json)
