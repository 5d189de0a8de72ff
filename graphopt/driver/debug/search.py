"""What `graphopt bisect` and `graphopt reduce` begin with: a job in which nothing is timed, the check that was asked for, and what is known of it."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, Unpack

from graphopt.core.errors import GraphoptError
from graphopt.core.pipeline import render
from graphopt.driver.bisect import Check, Culprit, NothingWrong, bisect
from graphopt.driver.debug.checks import Command, Function, Make, Numbers, saved
from graphopt.driver.debug.memo import Memo
from graphopt.driver.job import Job
from graphopt.driver.options import RunOptions

if TYPE_CHECKING:
    from graphopt.io.load import Source

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Asked:
    """The check that was asked for: `function` as FILE.py:FUNCTION, or a `command`; by default that a graph loads and gives the numbers of the input.

    Raises (in `making`):
        GraphoptError: both are given, or one that cannot be used.
    """

    function: str | None = None
    command: str | None = None

    @contextlib.contextmanager
    def making(self) -> Iterator[Make]:
        """How the check of a job is made."""
        if self.function is not None and self.command is not None:
            raise GraphoptError("give either --check or --check-command, not both")
        if self.command is not None:
            command = Command(self.command)
            yield lambda job: saved(job.target, command)
        elif self.function is not None:
            with contextlib.closing(Function(self.function)) as function:
                yield lambda job: saved(job.target, function)
        else:
            yield Numbers

    def about(self) -> str:
        """What its verdicts depend on."""
        file = Path((self.function or "").rpartition(":")[0])
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        return f"{self.function} {self.command} {text}"


def bisected(source: Source, pipeline: str | None, asked: Asked, **options: Unpack[RunOptions]) -> Culprit:
    """The first step and change that break a model; arguments as for `optimize`. Nothing is timed where the failure shows without.

    Raises:
        GraphoptError: the whole pipeline breaks nothing, or the input is broken itself. What `Job.make` raises.
    """

    def search(job: Job, make: Make, memo: Memo) -> Culprit:
        check = make(job)
        return noted(bisect(job, memo.keep(check)), check)

    options["promise"] = False
    return searching(Job.make(source, pipeline, **options), asked, "bisect", search)


def noted(found: Culprit, check: Check) -> Culprit:
    """With what the check did not look at."""
    notes = [found.note] if found.note else []
    if isinstance(check, Numbers) and not check.exact:
        notes.append("a pass is lossy, so only loading, shapes, dtypes and NaN were checked; --check looks at more")
    if isinstance(check, Numbers) and check.unsteady:
        notes.append(f"outputs that are random were not checked: {', '.join(sorted(check.unsteady))}")
    return dataclasses.replace(found, note="; ".join(notes))


def searching(job: Job, asked: Asked, what: str, search: Callable[[Job, Make, Memo], T]) -> T:
    """Search in a job in which nothing is timed; where that hides the failure, in the job as it is. What is known stays for the next run, unless
    the search ends."""
    plain = untimed(job)
    with asked.making() as make:
        try:
            return _kept(plain, asked, what, make, search)
        except NothingWrong:
            if plain is job:
                raise
        return _kept(job, asked, what, make, search)


def _kept(job: Job, asked: Asked, what: str, make: Make, search: Callable[[Job, Make, Memo], T]) -> T:
    memo = Memo(_about(job, asked, what))
    try:
        found = search(job, make, memo)
    except GraphoptError:
        memo.forget()
        raise
    except BaseException:  # Ctrl-C: the next run goes on from here
        memo.flush()
        raise
    memo.forget()
    return found


def untimed(job: Job) -> Job:
    """The same job with spellings by the target's table; itself where there is nothing to time."""
    fields = {field.name for field in dataclasses.fields(job.target)}  # type: ignore[arg-type]
    if "tune" not in fields or job.target.tune == "off":
        return job
    target = dataclasses.replace(job.target, tune="off")  # type: ignore[type-var]
    return dataclasses.replace(job, target=target, lowerings=tuple(target.lowerings()))


def _about(job: Job, asked: Asked, what: str) -> list[str]:
    """All that verdicts depend on besides the graph that they are about."""
    versions = [version(name) for name in ("graphopt", "onnxruntime", "onnx", "onnx-ir")]
    samples = [] if job.samples is None else [repr({k: (v.shape, v.tobytes()[:4096]) for k, v in feed.items()}) for feed in job.samples]
    files = {file for step in job.steps if (file := inspect.getsourcefile(type(step))) is not None}
    code = [Path(file).read_text(encoding="utf-8") for file in sorted(files)]
    return [what, job.name, render(job.steps), str(job.target), asked.about(), *versions, *samples[:4], *code]
