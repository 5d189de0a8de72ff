"""What is asked of a graph while the fault of a pipeline is looked for: that it loads and gives the numbers of the input, or what the user asks.

A check says what is wrong, in one line, or None. Where the runtime or the user's function may end the process, it is asked in another one.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.core import registry
from graphopt.core.contract import Array, Target
from graphopt.core.errors import GraphoptError, SampleError, TargetError
from graphopt.driver.bisect import Check
from graphopt.driver.gate import Gate, tensors
from graphopt.driver.instruments import broken, free_outputs
from graphopt.driver.job import Job
from graphopt.run import guarded, one_line, ort
from graphopt.run.distance import compare_outputs
from graphopt.run.samples import runnable_samples

FEEDS = 2  # samples that a graph is run on, at most
Make = Callable[[Job], Check]  # the check of the graphs of a job


class Numbers:
    """With runtime optimizations off, a graph gives the numbers of the input; and the gate lets it through: it loads and runs on its target.

    After a pipeline with lossy passes, only shapes, dtypes and NaN count. Outputs that differ between two runs of the input are not looked at.

    Attributes:
        unsteady: the names of these outputs.

    Raises:
        TargetError: the input itself does not run.
    """

    def __init__(self, job: Job) -> None:
        self.target, self.gate = job.target, Gate(job)
        self.exact = all(step.exact for step in job.steps)
        try:
            session = ort.session(job.original, optimize=False)  # one for both runs: a random node gives the same again in the next one
            *_, self.feed = itertools.islice(job.samples or runnable_samples(job.model, session), FEEDS)
            self.expected, again = (tensors(session.run(self.feed)) for _ in range(2))
        except (SampleError, TargetError) as error:
            raise TargetError(f"the input itself does not run, so there is nothing to compare with; say by --check what is right: {error}") from error
        self.unsteady = {name for name, array in self.expected.items() if compare_outputs({name: array}, {name: again[name]})}

    def __call__(self, model: ir.Model) -> str | None:
        try:
            finished, _ = self.target.finish(model)
            found = tensors(guarded.probe(finished, self.feed, ort.settings(optimize=False)))
        except GraphoptError as error:
            return str(error)
        compare = compare_outputs if self.exact else functools.partial(broken, free=free_outputs(model))
        difference = compare(self._steady(self.expected), self._steady(found))
        if difference is not None:
            return str(difference)
        return None if self.gate.off else self.gate.check(model, self.exact)

    def _steady(self, outputs: dict[str, Array]) -> dict[str, Array]:
        return {name: array for name, array in outputs.items() if name not in self.unsteady}


# ---- of the user ----------------------------------------------------------------------------------------------------------------------


def saved(target: Target, ask: Callable[[Path], str | None]) -> Check:
    """A check of the file that the target writes for a graph."""

    def check(model: ir.Model) -> str | None:
        with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
            path = Path(folder, "model.onnx")
            try:
                target.save(model, path)
            except GraphoptError as error:
                return str(error)
            return ask(path)

    return check


class Function:
    """`FILE.py:FUNCTION`, in a process of its own: it gets the path of a model, and gives True where it is good. False, or what it raises, is bad.

    Raises:
        GraphoptError: there is no such function, or it gave something else.
    """

    def __init__(self, text: str) -> None:
        registry.load_function(text, "check")
        self.text = text
        self._running: tuple[Any, Any] | None = None  # the process, and this end of the pipe to it

    def __call__(self, path: Path) -> str | None:
        if self._running is None:
            spawn = get_context("spawn")
            mine, its = spawn.Pipe()
            self._running = spawn.Process(target=_serve, args=(its, self.text), daemon=True), mine
            self._running[0].start()
            its.close()
        _, pipe = self._running
        try:
            pipe.send(str(path))
            verdict, said = pipe.recv()
        except (EOFError, OSError):
            self.close()
            return f"the check {self.text} ended its process"
        if verdict is None:
            raise GraphoptError(f"the check {self.text} must give True (the model is good) or False, found {said}")
        return None if verdict else str(said)

    def close(self) -> None:
        """End the process, whatever it does."""
        if self._running is not None:
            process, pipe = self._running
            process.kill()
            process.join()
            pipe.close()
        self._running = None


def _serve(pipe: Any, text: str) -> None:
    """In the process of a function: paths come in; what goes out is a verdict (None: it gave no bool), and what was said."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    os.dup2(2, 1)  # what the function prints is no result of the command
    with contextlib.suppress(EOFError, BrokenPipeError):  # who asks is gone, also while an answer was on its way
        while True:
            pipe.send(_verdict(text, Path(pipe.recv())))


def _verdict(text: str, path: Path) -> tuple[bool | None, str]:
    try:
        said = registry.load_function(text, "check")(path)
    except (Exception, SystemExit) as error:  # noqa: BLE001 -- whatever a user's function raises is its verdict
        return False, f"{type(error).__name__}: {one_line(error)}"
    return (bool(said), f"the check {text} gave False") if isinstance(said, (bool, np.bool_)) else (None, repr(said))


class Command:
    """A command of the shell, in which `{}` is the path of a model; exit code 0 is good."""

    def __init__(self, text: str) -> None:
        if "{}" not in text:
            raise GraphoptError(f"--check-command needs {{}} where the path of the model goes, found `{text}`")
        self.text = text

    def __call__(self, path: Path) -> str | None:
        done = subprocess.run(
            self.text.replace("{}", shlex.quote(str(path))), shell=True, capture_output=True, text=True, errors="replace", check=False
        )
        if done.returncode in (126, 127):
            raise GraphoptError(f"the check `{self.text}` cannot be run: {_last(done.stderr)}")
        return None if done.returncode == 0 else f"exit code {done.returncode}: {_last(done.stderr or done.stdout)}"


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it said nothing"
