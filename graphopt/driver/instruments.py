"""What looks over the pass manager's shoulder: verify each pass, check the numbers, time, print what changed, dump every graph."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.core.contract import Array, Batches, Context, Pass, Session
from graphopt.core.errors import GraphoptError, SampleError, TargetError, VerifyError
from graphopt.core.pipeline import Instrument
from graphopt.core.remarks import plural
from graphopt.driver.options import RunOptions
from graphopt.graph.interface import RESIZED, RETYPED, Interface, interface
from graphopt.graph.questions import all_nodes, grain
from graphopt.graph.text import diff, graph_text
from graphopt.graph.verify import complaints, verify
from graphopt.report.writers import changes as changes_writer
from graphopt.run.distance import TOLERANCE, Difference, arrays_in, compare_outputs, excess, flat
from graphopt.run.samples import Samples, runnable_samples

Outputs = list[dict[str, Any]]  # for each sample, name -> array, or what a sequence, an optional or a map holds
FEEDS = 4  # samples that check-numerics runs, at most


class VerifyEach(Instrument):
    """The normal form, the public interface and an honest count of changes, before the first and after every pass."""

    def __init__(self) -> None:
        self._interface: Interface | None = None
        self._known: frozenset[str] = frozenset()
        self._before = ""

    def before_pipeline(self, model: ir.Model, ctx: Context) -> None:
        self._interface, self._known = interface(model), complaints(model)
        for text in sorted(self._known - {"checker"}):
            ctx.remarks.warning("", f"of the input, and so of no pass: {text}")

    def before(self, step: Pass, position: int, model: ir.Model, ctx: Context) -> None:
        self._before = _state(model)

    def after(self, step: Pass, position: int, changes: int, seconds: float, model: ir.Model, ctx: Context) -> None:
        verify(model, interface=self._interface, known=self._known)
        if changes == 0 and _state(model) != self._before:
            raise VerifyError(f"`{step}` says that it changed nothing, but the graph is another")


class CheckNumerics(Instrument):
    """Runs the graph before the first pass and after every pass, with runtime optimizations off, on the samples.

    After an exact pass each output must be that of the pipeline's input, within `distance.TOLERANCE`. After a lossy one the outputs must
    still have their shapes and dtypes, and no new NaN; they are the baseline from then on. Outputs that differ between two runs of one
    graph (live Dropout, random nodes) are left out, and named in a warning.
    It runs in onnxruntime with ORT_DISABLE_ALL, or in the ONNX reference where that cannot run the input.

    Raises (in `after`):
        VerifyError: names the pass, the first output that differs and where, and the first value inside the graph that does.
    """

    def __init__(self) -> None:
        self._feeds: list[dict[str, Array]] = []
        self._baseline: Outputs = []
        self._unsteady: set[str] = set()
        self._stale = False
        self._before: ir.Model | None = None

    def before_pipeline(self, model: ir.Model, ctx: Context) -> None:
        session = self._choose(model, ctx.samples)
        self._baseline, again = self._run(session), self._run(session)
        pairs = [(name, a[name], b[name]) for a, b in zip(self._baseline, again, strict=True) for name in a]
        self._unsteady = {name for name, a, b in pairs if compare_outputs({name: a}, {name: b})}
        if self._unsteady:
            names = ", ".join(f"`{n}`" for n in sorted(self._unsteady))
            ctx.remarks.warning("", f"the numbers of {names} are not checked: the graph is random, and gives others in every run")

    def before(self, step: Pass, position: int, model: ir.Model, ctx: Context) -> None:
        if self._stale:  # read here, not after the lossy pass: it may have been undone by now
            self._baseline, self._stale = self._run(self._load(model)), False
        self._before = model.clone()

    def after(self, step: Pass, position: int, changes: int, seconds: float, model: ir.Model, ctx: Context) -> None:
        try:
            outputs = self._run(self._load(model))
        except TargetError as error:
            raise VerifyError(f"check-numerics: after pass {position} `{step}` the graph no longer runs: {error}") from error
        self._stale = not step.exact
        assert self._before is not None, "before comes first"
        compare = functools.partial(_rounded, grain(self._before)) if step.exact else functools.partial(broken, free=free_outputs(model))
        for number, (expected, found) in enumerate(zip(self._baseline, outputs, strict=True), start=1):
            difference = compare(self._steady(expected), self._steady(found))
            if difference is not None:
                inside = self._first_inside(model, number - 1) if step.exact else ""
                raise VerifyError(f"check-numerics: pass {position} `{step}` changed the numbers: {difference}, on sample {number}{inside}")

    def _choose(self, model: ir.Model, samples: Batches | None) -> Session:
        """The first engine that runs the input decides for the whole pipeline, and so do its samples."""
        reason: GraphoptError | None = None
        for load in (_plain, _reference):
            try:
                session = load(model)
                fitted = runnable_samples(model, session) if samples is None else Samples.load(samples, model)
                self._feeds = list(fitted)[:FEEDS]
                session.run(self._feeds[0])
            except TargetError as error:
                reason = reason or error
            except SampleError as error:
                if samples is not None:
                    raise
                reason = reason or error
            else:
                self._load = load
                return session
        raise VerifyError(f"check-numerics: the input of the pipeline cannot be run: {reason}")

    def _run(self, session: Session) -> Outputs:
        return [session.run(feed) for feed in self._feeds]

    def _steady(self, outputs: dict[str, Any]) -> dict[str, Any]:
        return {name: array for name, array in outputs.items() if name not in self._unsteady}

    def _first_inside(self, model: ir.Model, number: int) -> str:
        """The first value, in the order of the graph, that the graphs before and after the pass both name and do not agree on."""
        from graphopt.run.observe import exposed

        assert self._before is not None, "before comes first"
        shared = {str(v.name) for node in self._before.graph for v in node.outputs if v.name}
        names = [str(v.name) for node in model.graph for v in node.outputs if v.name in shared and not v.is_graph_output()]
        if not names:
            return ""
        try:
            old, new = (self._load(exposed(graph, names)).run(self._feeds[number]) for graph in (self._before, model))
        except GraphoptError as error:
            return f" (the values inside cannot be compared: {error})"
        differences = (compare_outputs({name: old[name]}, {name: new[name]}) for name in names)
        first = next((d for d in differences if d is not None), None)
        return "" if first is None else f"; inside the graph, the first is {str(first).removeprefix('output ')}"


class Time(Instrument):
    """Prints the seconds of each pass to stderr as it ends."""

    def after(self, step: Pass, position: int, changes: int, seconds: float, model: ir.Model, ctx: Context) -> None:
        print(f"{position:3d} {seconds:8.3f} s  {changes:5d} changes  {step}", file=sys.stderr)


class PrintChanged(Instrument):
    """Prints what each pass changed to stderr, as a diff of the graph's text (report/writers/changes.py)."""

    def before(self, step: Pass, position: int, model: ir.Model, ctx: Context) -> None:
        self._before = graph_text(model)

    def after(self, step: Pass, position: int, changes: int, seconds: float, model: ir.Model, ctx: Context) -> None:
        changed = diff(self._before, graph_text(model), context=3)
        same = "" if changed else ", the graph is the same"
        changes_writer.show(f"--- after pass {position} `{step}`: {plural(changes, 'change')}{same}", changed)


class Dump(Instrument):
    """Writes the graph before the first pass and after each one: `00-input.onnx`, `01-canonicalize.onnx`, and the same as .txt.

    Raises (in `before_pipeline`):
        GraphoptError: the folder cannot be written.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)

    def places(self, steps: Sequence[Pass]) -> list[Path]:
        """The files that it may write for these passes."""
        names = ["00-input", *(_file_name(step, position) for position, step in enumerate(steps, start=1))]
        return [self._folder / f"{name}{end}" for name in names for end in (".onnx", ".onnx.data", ".txt", ".failed.txt")]

    def before_pipeline(self, model: ir.Model, ctx: Context) -> None:
        self._write("00-input", model)

    def after(self, step: Pass, position: int, changes: int, seconds: float, model: ir.Model, ctx: Context) -> None:
        self._write(_file_name(step, position), model)

    def failed(self, step: Pass, position: int, error: BaseException, model: ir.Model, ctx: Context) -> None:
        """The graph as the failure left it, as text only: it may not be a legal model."""
        text = f"# {' '.join(str(error).split())}\n{graph_text(model)}"
        self._folder.joinpath(f"{_file_name(step, position)}.failed.txt").write_text(text, encoding="utf-8")

    def _write(self, name: str, model: ir.Model) -> None:
        from graphopt.graph.serialize import write

        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._folder.joinpath(f"{name}.txt").write_text(graph_text(model), encoding="utf-8")
            write(model, self._folder / f"{name}.onnx")
        except OSError as error:
            raise GraphoptError(f"cannot dump to {self._folder}: {error.strerror or error}; give another folder") from error


def _plain(model: ir.Model) -> Session:
    from graphopt.run import ort

    return ort.session(model, optimize=False)


def _reference(model: ir.Model) -> Session:
    """The ONNX reference; onnxruntime for a graph with ops that only it has, as after lowering."""
    from graphopt.run import reference

    standard = all(node.domain in ("", "ai.onnx") for node in all_nodes(model))
    return reference.session(model) if standard else _plain(model)


def _rounded(coarsest: str, expected: dict[str, Any], found: dict[str, Any]) -> Difference | None:
    """What is beyond the rounding of the graph: an output of float32 that is computed in float16 is as exact as that, and rounding flips codes."""
    there = flat(found)
    for name, array in flat(expected).items():
        other = {key: value for key, value in there.items() if key == name}
        difference = compare_outputs({name: array}, other)
        exact = array.dtype.name not in TOLERANCE and coarsest != "codes"
        if difference is not None and (exact or difference.reason or excess({name: array}, other, coarsest).times > 1):
            return difference
    return None


def free_outputs(model: ir.Model) -> set[str]:
    """Inputs and outputs whose size or type the user asked to change."""
    return {*model.graph.meta.get(RESIZED, ()), *model.graph.meta.get(RETYPED, ())}


def broken(expected: dict[str, Any], found: dict[str, Any], free: Collection[str]) -> Difference | None:
    """What even a lossy pass must not do: another shape or dtype (but for outputs that are `free`, as the user asked for it), a NaN that was none."""
    for name, array in expected.items():
        difference = compare_outputs({name: array}, {k: v for k, v in found.items() if k == name})
        if difference is not None and difference.reason:
            if name in free and name in found:
                continue
            return difference
        for (at, before), (_, after) in zip(arrays_in(array, name), arrays_in(found[name], name), strict=True):
            if before.dtype.kind == "f" and bool((np.isnan(after) & ~np.isnan(before)).any()):
                return Difference(at, reason="has become NaN")
    return None


def _state(model: ir.Model) -> str:
    """What a change changes: the text of the graph, and which tensors it holds."""
    tensors = (f"{name} {id(v.const_value)}" for name, v in model.graph.initializers.items())
    return graph_text(model, weights=False) + "\n".join(tensors)


def _file_name(step: Pass, position: int) -> str:
    return f"{position:02d}-" + re.sub(r"[^\w.-]+", "-", step.name)


_BY_OPTION = {"verify_each": VerifyEach, "check_numerics": CheckNumerics, "time": Time, "print_changed": PrintChanged}


def chosen(options: RunOptions) -> list[Instrument]:
    """Those that were asked for, in the order in which they look."""
    dump = options.get("dump")
    found: list[Instrument] = [make() for option, make in _BY_OPTION.items() if options.get(option)]
    return found if dump is None else [*found, Dump(dump)]
