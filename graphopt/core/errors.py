"""Every error a user can meet. One line each: what was expected, what was found, where, and what to do next."""

from __future__ import annotations

import contextlib
import importlib
import traceback
from collections.abc import Iterator
from typing import Any


class GraphoptError(Exception):
    """Base of all errors that graphopt raises on purpose; the command line prints it as one line."""


class LoadError(GraphoptError):
    """The source could not be turned into a graph. One line, also where a name in it holds several."""

    def __init__(self, message: str) -> None:
        super().__init__(message.replace("\r", "\\r").replace("\n", "\\n"))


@contextlib.contextmanager
def about(name: str) -> Iterator[None]:
    """A LoadError says of which model it is."""
    try:
        yield
    except LoadError as error:
        raise LoadError(f"{name}: {error}") from error.__cause__


class SaveError(GraphoptError):
    """The artifact could not be written; nothing was left behind."""


class PipelineError(GraphoptError):
    """A pipeline, pass or target text that does not parse, or names what does not exist; `option` is the one under which the text gets its caret."""

    def __init__(self, message: str, option: str = "") -> None:
        super().__init__(message)
        self.option = option


class VerifyError(GraphoptError):
    """A graph breaks the normal form, or computes other numbers than the one it came from."""


class TargetError(GraphoptError):
    """A target cannot express or run the graph."""


class SampleError(GraphoptError):
    """Samples are missing, or do not fit the inputs of the model."""


def _place(error: BaseException) -> str:
    """Where an error was raised, for who writes the pass: in a file of their own rather than in a library that it calls."""
    frames = list(traceback.extract_tb(error.__traceback__))
    own = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    return f" ({own[-1].filename}:{own[-1].lineno})" if own else ""


class PassError(GraphoptError):
    """A pass raised; the text has the file and line, where the error is none of graphopt's own. The input of the pipeline is untouched.

    Attributes:
        pass_text: the pass as pipeline text.
        position: its place in the pipeline, from 1.
        cause: the exception that it raised.
    """

    def __init__(self, pass_text: str, position: int, cause: BaseException) -> None:
        self.pass_text, self.position, self.cause = pass_text, position, cause
        what = str(cause) if isinstance(cause, GraphoptError) else f"{type(cause).__name__}: {' '.join(str(cause).split())}{_place(cause)}"
        super().__init__(f"pass {position} `{pass_text}` failed: {what}")


def require(what: str, extra: str, *modules: str, error: type[GraphoptError] = LoadError) -> Any:
    """The last of some modules of other packages, imported now.

    Raises:
        LoadError (or `error`): one of them is not installed; `what` needs them, and `extra` of this package brings them.
    """
    try:
        return [importlib.import_module(name) for name in modules][-1]
    except ImportError as cause:
        raise error(f"{what} need an extra that is not installed ({cause.name}): pip install 'graphopt[{extra}]'") from None
