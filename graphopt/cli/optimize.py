"""`graphopt optimize`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import typer

from graphopt.cli.shell import (
    REPORTS,
    InputShapes,
    Json,
    Level,
    ModelPath,
    PipelineText,
    Plugins,
    Repro,
    Shapes,
    TargetText,
    Task,
    Tokenizer,
    WithPast,
    WithWeights,
    fraction,
    passes_asked,
    progress,
    show,
)  # fmt: skip


def optimize(  # long, as it is the list of options: typer reads each from its argument
    model: ModelPath,
    out: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="The file to write.", show_default=False)],
    level: Level = None,
    pipeline: PipelineText = None,
    target: TargetText = "cpu",
    samples: Annotated[str | None, typer.Option(metavar="DATA", help="Inputs to judge by: .npz, a folder of .npz, or a text file.")] = None,
    tokenizer: Tokenizer = None,
    metric: Annotated[str | None, typer.Option(metavar="NAME|FILE.py:FUNCTION", help="A number that is larger for better models.")] = None,
    max_loss: Annotated[float | None, typer.Option(metavar="X", parser=fraction, help="What lossy passes may cost together: 0.01, or 1%.")] = None,
    report: Annotated[Path | None, typer.Option(metavar=REPORTS, help="Write the report.")] = None,
    plugin: Plugins = None,
    require: Annotated[list[str] | None, typer.Option(metavar="PASS", help="Fail unless this pass changed something; repeatable.")] = None,
    verify_each: Annotated[bool, typer.Option("--verify-each", help="Check the graph after every pass.")] = False,
    check_numerics: Annotated[bool, typer.Option("--check-numerics", help="Check the numbers after every pass.")] = False,
    time: Annotated[bool, typer.Option("--time", help="Print the seconds of every pass.")] = False,
    print_changed: Annotated[bool, typer.Option("--print-changed", help="Print what every pass changed.")] = False,
    dump: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the graph after every pass.")] = None,
    fuel: Annotated[int | None, typer.Option(min=0, metavar="N", help="Stop after N changes, for bisecting.")] = None,
    remarks: Annotated[Literal["missed", "applied", "warning", "all"] | None, typer.Option(help="Print the remarks, one a line.")] = None,
    remarks_format: Annotated[Literal["lines", "table", "jsonl"] | None, typer.Option(help="How; jsonl prints these JSON lines alone.")] = None,
    task: Task = None,
    with_past: WithPast = False,
    input_shape: InputShapes = None,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Time input and output; take back what is slower.")] = True,
    gate: Annotated[bool, typer.Option("--gate/--no-gate", help="Open and run the output once before it is written.")] = True,
    shapes: Shapes = None,
    repro: Repro = None,
    with_weights: WithWeights = False,
    as_json: Json = False,
) -> None:
    """Optimize a model for a target and write it."""
    if as_json and remarks_format == "jsonl":
        raise typer.BadParameter("give either --json, whose report has every remark, or --remarks-format jsonl, not both")
    level = passes_asked(level, pipeline, target, plugin)
    from graphopt.core import registry
    from graphopt.driver import optimize as api
    from graphopt.driver.debug.repro import reproducible
    from graphopt.driver.options import RunOptions
    from graphopt.io import bind_shapes
    from graphopt.report.document import checked

    writes = [] if report is None else [checked(report)]  # a run of minutes must not end at a report of an unknown kind
    shaped = dict(bind_shapes.parse_shape(text) for text in input_shape or ())
    judge = None if metric is None else registry.load_metric(metric, tuple(plugin or ()))
    options = RunOptions(
        level=level, target=target, samples=samples, tokenizer=tokenizer, metric=judge, max_loss=max_loss, require=require or (),
        plugins=plugin or (), input_shapes=shaped or None, task=task, with_past=with_past, verify_each=verify_each, check_numerics=check_numerics,
        time=time, print_changed=print_changed, dump=dump, fuel=fuel, promise=measure and level != 0 and fuel is None, shapes=shapes, out=out,
        writes=writes, gate=gate,
    )  # fmt: skip
    with reproducible(repro, "optimize", [model], pipeline, {**options, "metric": metric}, with_weights=with_weights):
        with progress() as tell:
            result = api.optimize(model, pipeline, **(options | RunOptions(progress=tell)))
            if measure and result.report.speed_up.value is None:
                result.measure(shapes, progress=lambda done: tell("timing input and output, interleaved", done))
        result.save(out, report)
    kind, lines = remarks or ("all" if remarks_format else ""), remarks_format == "jsonl"
    listed = result.report.listed(kind, remarks_format or "lines")
    if not lines:
        show(dataclasses.replace(result.report, apart="" if as_json else kind), as_json)
    if listed.remarks and not as_json:
        show(listed, as_json=lines)
