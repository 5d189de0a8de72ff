"""The smallest failing graph as files: the model, the command that shows its fault, and a sample where made-up ones do not show it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

import numpy as np
import onnx_ir as ir

from graphopt.core.errors import GraphoptError
from graphopt.core.pipeline import render
from graphopt.core.places import beside, check_places
from graphopt.core.remarks import plural
from graphopt.driver.debug.checks import Make
from graphopt.driver.debug.command import spelled
from graphopt.driver.debug.cuts import Case
from graphopt.driver.debug.memo import Memo
from graphopt.driver.debug.reduce import Reduction, on
from graphopt.driver.debug.search import Asked, searching
from graphopt.driver.job import Job
from graphopt.driver.options import RunOptions
from graphopt.graph.questions import all_nodes
from graphopt.graph.serialize import write
from graphopt.graph.text import graph_text
from graphopt.io.load import load
from graphopt.io.save import save, sources_of
from graphopt.report.document import Document
from graphopt.report.elements import Element, Line, Text
from graphopt.run import Feeds

if TYPE_CHECKING:
    from graphopt.io.load import Source


@dataclasses.dataclass(frozen=True)
class Reduced(Document):
    """What was written.

    Attributes:
        files: the model, the command (a shell script), and the sample, if one is needed.
        nodes, before: of the model now, and of the input in normal form.
        step, failure: the step that breaks it, and what the check says.
        command: what shows the failure.
        tried: candidates that were run.
        text: the graph.
    """

    title: ClassVar[str] = "graphopt reduce"

    files: tuple[str, ...]
    nodes: int
    before: int
    step: str
    failure: str
    command: str
    tried: int
    text: str
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def elements(self) -> Sequence[Element]:
        lines = [f"{self.nodes} of {plural(self.before, 'node')}; `{self.step}` still breaks it: {self.failure}"]
        lines += [f"{plural(self.tried, 'candidate')} tried; written: {', '.join(self.files)}", *([f"note: {self.note}"] if self.note else [])]
        return [*map(Line, lines), Text(self.text), Text(self.command)]


def reduced(source: Source, pipeline: str | None, asked: Asked, to: Path, **options: Unpack[RunOptions]) -> Reduced:
    """Search the smallest graph on which a pipeline still fails a check, and write it; arguments as for `optimize`.
    Files that are there are written over. Where the search is interrupted, the best so far is written.

    Raises:
        GraphoptError: the pipeline breaks nothing, or the input is broken itself; a file cannot be written. What `Job.make` raises.
        KeyboardInterrupt: it was interrupted; the text says what was written.
    """
    places = _places(to)
    options["promise"], options["writes"] = False, places
    job = Job.make(source, pipeline, **options)
    check_places(places, sources_of(job.original))
    plugins, target = tuple(map(str, options.get("plugins", ()))), str(job.target)

    def search(job: Job, make: Make, memo: Memo) -> Reduced:
        reduction = Reduction(job, make, memo, job.tell)
        output = _Output(reduction, places, asked, plugins, target)
        try:
            case = reduction.run()
        except KeyboardInterrupt:
            if reduction.best is None:
                raise
            found = output.write(reduction.best, sure=False)
            raise KeyboardInterrupt(f"the best so far, of {plural(found.nodes, 'node')}, is in {to}; run it again to go on") from None
        return output.write(case, sure=True)

    return searching(job, asked, "reduce", search)


def _places(out: Path) -> tuple[Path, Path, Path]:
    """Of the model, the command, and the sample."""
    return out, out.with_name(out.stem + ".sh"), out.with_name(out.stem + ".npz")


@dataclasses.dataclass(frozen=True)
class _Output:
    reduction: Reduction
    places: tuple[Path, Path, Path]
    asked: Asked
    plugins: tuple[str, ...]
    target: str

    def write(self, case: Case, *, sure: bool) -> Reduced:
        """All files, or none. `sure`: the written file is run again, until one form of it and of its samples shows the failure."""
        model, script, sample = self.places
        with beside(model.absolute()) as folder:
            draft = folder / model.name
            last, first = (case.feeds[-1], case.feeds[0]) if case.feeds else (None, None)
            forms: list[tuple[bool, Feeds | None]] = [(True, None), (True, last), (True, first), (False, last)]
            form = next((form for form in forms if self._shows(case.model, draft, *form)), None) if sure else None
            plain, feed = form or forms[-1]
            _draft(case.model, draft, plain)
            told = load(draft) if form is not None else case.model  # inference has filled in the shapes
            command = self._command(model, None if feed is None else sample)
            (folder / script.name).write_text(f"#!/bin/sh\n# {self._failure()}\n{command}\n", encoding="utf-8")
            drafts = [(draft, model), (folder / script.name, script)]
            if feed is not None:
                np.savez(folder / sample.name, allow_pickle=False, **dict(feed))
                drafts.append((folder / sample.name, sample))
            for made, place in drafts:
                os.replace(made, place)
        note = "" if form is not None else "not run again from the file: the search was interrupted" if not sure else _ELUSIVE
        return self._told(told, [str(place) for _, place in drafts], command, note)

    def _shows(self, model: ir.Model, draft: Path, plain: bool, feed: Feeds | None) -> bool:
        """Whether what was written shows the failure when it is loaded again."""
        try:
            _draft(model, draft, plain)
            return self.reduction.refused(on(self.reduction.job, draft, None if feed is None else [feed])) is None
        except GraphoptError:
            return False

    def _command(self, model: Path, sample: Path | None) -> str:
        asked = {"check": self.asked.function, "command": self.asked.command, "samples": sample}
        target = None if self.target == "cpu" else self.target
        return spelled("bisect", str(model), render(self.reduction.job.passes), {"plugins": self.plugins, "target": target, **asked})

    def _failure(self) -> str:
        culprit = self.reduction.culprit
        return "" if culprit is None else " ".join(f"`{culprit.step}` breaks it: {culprit.after}".split())

    def _told(self, model: ir.Model, files: Sequence[str], command: str, note: str) -> Reduced:
        culprit, count = self.reduction.culprit, len(list(all_nodes(model)))
        assert culprit is not None
        text = graph_text(model) if count <= _SHOWN else ""
        return Reduced(tuple(files), count, self.reduction.nodes, culprit.step, culprit.after, command, self.reduction.tried, text, note)


_SHOWN = 40  # nodes of a graph that is printed
_ELUSIVE = "written as it was searched; loaded from the file alone it does not fail in the same way"


def _draft(model: ir.Model, path: Path, plain: bool) -> None:
    """`plain`: at the opset of the input, as a user would give it; else at the one that passes work at."""
    if plain:
        save(model, path, external=False)
    else:
        write(model, path)
