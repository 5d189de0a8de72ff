"""`graphopt bisect` and `graphopt reduce`: which change breaks a model, and on how little that shows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphopt.cli.shell import (
    Check,
    CheckCommand,
    Evidence,
    InputShapes,
    Json,
    Level,
    ModelPath,
    PipelineText,
    Plugins,
    TargetText,
    Task,
    Tokenizer,
    WithPast,
    passes_asked,
    progress,
    show,
)


def bisect(
    model: ModelPath,
    level: Level = None,
    pipeline: PipelineText = None,
    target: TargetText = "cpu",
    samples: Evidence = None,
    tokenizer: Tokenizer = None,
    check: Check = None,
    check_command: CheckCommand = None,
    plugin: Plugins = None,
    task: Task = None,
    with_past: WithPast = False,
    input_shape: InputShapes = None,
    as_json: Json = False,
) -> None:
    """Find the first pass that breaks a model, and in it the first change."""
    level = passes_asked(level, pipeline, target, plugin)
    from graphopt.driver.debug.search import Asked, bisected
    from graphopt.io import bind_shapes

    shaped = dict(bind_shapes.parse_shape(text) for text in input_shape or ())
    with progress() as tell:
        found = bisected(
            model, pipeline, Asked(check, check_command), level=level, target=target, samples=samples, tokenizer=tokenizer, plugins=plugin or (),
            task=task, with_past=with_past, input_shapes=shaped or None, progress=tell,
        )  # fmt: skip
    show(found, as_json)


def reduce(
    model: ModelPath,
    out: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="The .onnx file to write.", show_default=False)],
    level: Level = None,
    pipeline: PipelineText = None,
    target: TargetText = "cpu",
    samples: Evidence = None,
    tokenizer: Tokenizer = None,
    check: Check = None,
    check_command: CheckCommand = None,
    plugin: Plugins = None,
    task: Task = None,
    with_past: WithPast = False,
    input_shape: InputShapes = None,
    as_json: Json = False,
) -> None:
    """Find the smallest graph on which passes still fail, and write it with the command that shows it."""
    level = passes_asked(level, pipeline, target, plugin)
    from graphopt.driver.debug.reduced import reduced
    from graphopt.driver.debug.search import Asked
    from graphopt.io import bind_shapes

    shaped = dict(bind_shapes.parse_shape(text) for text in input_shape or ())
    with progress() as tell:
        found = reduced(
            model, pipeline, Asked(check, check_command), out, level=level, target=target, samples=samples, tokenizer=tokenizer,
            plugins=plugin or (), task=task, with_past=with_past, input_shapes=shaped or None, progress=tell,
        )  # fmt: skip
    show(found, as_json)
