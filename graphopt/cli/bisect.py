"""`graphopt bisect`: which pass, and which change of it, breaks a model."""

from __future__ import annotations

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
)  # fmt: skip


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
    level = passes_asked(level, pipeline)
    from graphopt.driver.debug.search import Asked, bisected
    from graphopt.io import bind_shapes

    shaped = dict(bind_shapes.parse_shape(text) for text in input_shape or ())
    with progress() as tell:
        found = bisected(
            model, pipeline, Asked(check, check_command), level=level, target=target, samples=samples, tokenizer=tokenizer, plugins=plugin or (),
            task=task, with_past=with_past, input_shapes=shaped or None, progress=tell,
        )  # fmt: skip
    show(found, as_json)
