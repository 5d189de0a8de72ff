"""`graphopt optimize`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import typer

from graphopt.cli.shell import REPORTS, Json, ModelPath, Plugins, Shapes, Task, Tokenizer, WithPast, check_level, fraction, progress, show


def optimize(  # long, as it is the list of options: typer reads each from its argument
    model: ModelPath,
    out: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="The file to write.", show_default=False)],
    level: Annotated[int | None, typer.Option("-O", "--level", min=0, help="0 normal form, 1 exact passes, 2 also int8.  [default: 1]")] = None,
    pipeline: Annotated[str | None, typer.Option(metavar="TEXT|@FILE", help="Passes to run, instead of a level.")] = None,
    target: Annotated[str, typer.Option(metavar="T", help="Where the model will run, such as cpu{threads=2}.")] = "cpu",
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
    input_shape: Annotated[list[str] | None, typer.Option(metavar="NAME:DIM,...", help="Fix the shape of an input; repeatable.")] = None,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Time input and output; take back what is slower.")] = True,
    shapes: Shapes = None,
    as_json: Json = False,
) -> None:
    """Optimize a model for a target and write it."""
    if level is not None and pipeline is not None:
        raise typer.BadParameter("give either -O LEVEL or --pipeline, not both")
    if as_json and remarks_format == "jsonl":
        raise typer.BadParameter("give either --json, whose report has every remark, or --remarks-format jsonl, not both")
    if level is not None:
        check_level(level, target, plugin)
    from graphopt.core import registry
    from graphopt.driver import optimize as api
    from graphopt.io import bind_shapes
    from graphopt.report.document import checked

    writes = [] if report is None else [checked(report)]  # a run of minutes must not end at a report of an unknown kind
    shaped = dict(bind_shapes.parse_shape(text) for text in input_shape or ())
    judge = None if metric is None else registry.load_metric(metric, tuple(plugin or ()))
    with progress() as tell:
        result = api.optimize(
            model, pipeline, level=1 if level is None else level, target=target, samples=samples, tokenizer=tokenizer, metric=judge,
            max_loss=max_loss, require=require or (), plugins=plugin or (), input_shapes=shaped or None, task=task, with_past=with_past,
            verify_each=verify_each, check_numerics=check_numerics, time=time, print_changed=print_changed, dump=dump, fuel=fuel, progress=tell,
            promise=measure and level != 0 and fuel is None, shapes=shapes, out=out, writes=writes,
        )  # fmt: skip
        if measure and result.report.speed_up.value is None:
            result.measure(shapes, progress=lambda done: tell("timing input and output, interleaved", done))
    result.save(out, report)
    kind, lines = remarks or ("all" if remarks_format else ""), remarks_format == "jsonl"
    listed = result.report.listed(kind, remarks_format or "lines")
    if not lines:
        show(dataclasses.replace(result.report, apart="" if as_json else kind), as_json)
    if listed.remarks and not as_json:
        show(listed, as_json=lines)
