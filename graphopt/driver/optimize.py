"""`optimize`: load, run the passes, lower for the target, and report. The caller's object or file is never changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

from graphopt.driver.debug.repro import reproducible
from graphopt.driver.job import Job
from graphopt.driver.options import RunOptions
from graphopt.driver.result import Result
from graphopt.io.load import check_options

if TYPE_CHECKING:
    from graphopt.io.load import Source


def optimize(source: Source, pipeline: str | None = None, **options: Unpack[RunOptions]) -> Result:
    """Load a model, run a pipeline over it, and lower it for a target.

    Args:
        source: what `graphopt.load` takes; it is not changed.
        pipeline: passes as text, such as `canonicalize, fuse-attention`, or `@FILE`; by default those of `level` for the target.
        level: 0 = normal form, 1 = exact passes, 2 = also dynamic int8, 3 = also compression that needs samples.
        target: text such as `cpu{threads=2}`, or a Target.
        samples: what `Samples.load` takes; `tokenizer` is for text (by default the one of a Hugging Face folder).
        metric: from a session to a number, larger for better models; judges lossy passes instead of the distance of the outputs.
        max_loss: the loss that all passes together may cost, as a fraction (0.01 = 1 %): the relative fall of the metric, or the relative L2
            distance of the outputs. A lossy pass that goes over it is weakened or undone.
        require: names of passes that must change something.
        plugins: files or modules that bring passes or targets.
        verify_each, check_numerics, time, print_changed, dump: instruments (see docs/cli.md); `dump` is a folder.
        fuel: how many changes may happen at most, for bisecting.
        promise: time the artifact against the input, and take lossless changes back where it is slower (docs/tuning.md). By default for a
            level of 1 or more, and not for a `pipeline` of your own, for `fuel`, or for a target that cannot run here.
        gate: open and run the artifact once as its target opens it, in a process that may die, and take back what breaks it (docs/tuning.md).
        shapes: BATCHxSEQUENCE sizes to measure at, such as `1x16,8x64`; they become the option `shapes` of the target, if it has one.
        progress: called with what is done now and the fraction of all steps.
        out: where the result will be saved; whether the files of the target can be written there is checked before anything is loaded.
        writes: other files that will be written from the result; checked as well.
        repro: on an error, a folder that reproduces it is written there, with made-up weights unless `with_weights` (docs/debugging.md).
        example_inputs, task, input_shapes and so on: of loading, see `graphopt.io.load.LoadOptions`.

    Raises:
        PipelineError: the pipeline or target text is wrong, or a required pass is not in it.
        LoadError: the source cannot be read.
        PassError: a pass raised; it names the pass, its place and the cause.
        SampleError, VerifyError: a budget has neither a metric nor a sample; what the passes left is no legal graph, or has another interface.
        SaveError: a file of `out`, `writes` or `dump` cannot be written, or belongs to the input.
        TargetError: the artifact does not load or run, or its numbers are wrong there, and what is to blame was asked for by name.
        GraphoptError: a required pass changed nothing, or the metric failed.
    """
    check_options(options, RunOptions)
    with reproducible(options.pop("repro", None), "optimize", [source], pipeline, options, with_weights=options.pop("with_weights", False)):
        return Job.make(source, pipeline, **options).run()
