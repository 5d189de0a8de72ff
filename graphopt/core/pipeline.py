"""Pipelines: the text grammar, the pass manager and what it records.

pipeline := element (("," | newline) element)*
element  := name ("{" option (("," | blank) option)* "}")?
option   := key ("=" value)?         a value is a bare word or a double-quoted string; lists join with "+"; "#" starts a comment
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import onnx_ir as ir

from graphopt.core.contract import Context, Pass, Target
from graphopt.core.errors import PassError, PipelineError
from graphopt.core.options import Configurable, near
from graphopt.core.remarks import Remark

C = TypeVar("C", bound=Configurable)
_LISTS = {"pass": "passes", "target": "targets"}  # the commands that explain what there is
_TOKEN = re.compile(r'(?P<space>[ \t\r]+|#[^\n]*)|(?P<sep>[,\n{}=])|(?P<word>(?:"(?:\\.|[^"\\])*"|[^\s,{}"#=])+)|(?P<bad>.)', re.S)


def parse(text: str, classes: Mapping[str, type[C]], what: str = "pass") -> list[C]:
    """Parse pipeline text; `@file` reads a recipe.

    Raises:
        PipelineError: with the line, a caret under the bad token, and what is near or known.
    """
    if text.strip().startswith("@"):
        path = Path(text.strip()[1:])
        if not path.is_file():
            raise PipelineError(f"recipe {path} is not a file")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = "it is no text" if isinstance(error, UnicodeDecodeError) else error.strerror or error
            raise PipelineError(f"recipe {path} cannot be read: {why}; a recipe is a text file of passes") from None
    return _Parser(text, classes, what).pipeline()


def render(passes: Sequence[Configurable]) -> str:
    """The text that parses to the same passes."""
    return ", ".join(map(str, passes))


class _Parser:
    def __init__(self, text: str, classes: Mapping[str, type[Any]], what: str) -> None:
        self.text, self.classes, self.what = text, classes, what
        self.tokens = [(m.lastgroup or "bad", m.group(), m.start()) for m in _TOKEN.finditer(text) if m.lastgroup != "space"]
        self.tokens.append(("end", "", len(text)))
        self.at = 0

    def pipeline(self) -> list[Any]:
        out: list[Any] = []
        while True:
            while self.peek() in (",", "\n"):
                self.at += 1
            if self.tokens[self.at][0] == "end":
                return out
            out.append(self.element())
            if self.tokens[self.at][0] != "end" and self.peek() not in (",", "\n"):
                raise self.error(f"expected `,` or a new line after `{out[-1].name}`, found `{self.peek()}`", self.tokens[self.at])

    def element(self) -> Any:
        token = self.word(f"the name of a {self.what}")
        cls = self.classes.get(token[1])
        if cls is None:
            known = f"  passes: {', '.join(sorted(self.classes))}" if self.what == "pass" else ""
            raise self.error(f"there is no {self.what} `{token[1]}`{near(token[1], self.classes)}", token, known)
        options, places = self.options() if self.peek() == "{" else ({}, {})
        try:
            made = cls.from_options(options)
            if isinstance(made, Pass):
                made.check(self.classes)
            return made
        except PipelineError as error:
            place = places.get(error.option, token)
            head, _, tail = str(error).partition("\n")
            tail += f"\n  `graphopt {_LISTS[self.what]} {cls.name}` explains them" if tail and self.what in _LISTS else ""
            raise self.error(head, place, tail) from None

    def options(self) -> tuple[dict[str, str | None], dict[str, tuple[str, str, int]]]:
        options: dict[str, str | None] = {}
        places = {}
        self.at += 1
        while self.peek() != "}":
            if self.peek() in (",", "\n"):
                self.at += 1
                continue
            key = self.word("an option")
            if key[1] in options:
                raise self.error(f"option `{key[1]}` is given twice", key)
            options[key[1]], places[key[1]] = None, key
            if self.peek() == "=":
                self.at += 1
                options[key[1]] = self.word(f"a value for `{key[1]}`")[1]
        self.at += 1
        return options, places

    def peek(self) -> str:
        return self.tokens[self.at][1]

    def word(self, expected: str) -> tuple[str, str, int]:
        token = self.tokens[self.at]
        if token[0] != "word":
            raise self.error(f"expected {expected}, found {'the end' if token[0] == 'end' else repr(token[1])}", token)
        self.at += 1
        return token

    def error(self, message: str, token: tuple[str, str, int], tail: str = "") -> PipelineError:
        start = self.text.rfind("\n", 0, token[2]) + 1
        end = self.text.find("\n", start)
        line = self.text[start : end if end >= 0 else None]
        caret = " " * (token[2] - start) + "^" * max(1, min(len(token[1]), len(line) - (token[2] - start)))
        return PipelineError(f"{message}\n  {line}\n  {caret}\n{tail}".rstrip("\n"))


@dataclasses.dataclass
class PassRecord:
    """What one pass did: its text, the number of changes, seconds, and its remarks; `asked` is the text that was asked for, where it ran milder."""

    name: str
    changes: int
    seconds: float
    remarks: list[Remark]
    asked: str = ""

    @property
    def told(self) -> str:
        return f"{self.name} (asked for: {self.asked})" if self.asked else self.name

    def as_dict(self) -> dict[str, Any]:
        asked = {"asked": self.asked} if self.asked else {}
        facts = {"name": self.name, "changes": self.changes, "seconds": round(self.seconds, 4)}
        return facts | asked | {"remarks": [r.as_dict() for r in self.remarks]}


class Instrument:
    """Looks over the pass manager's shoulder; each overrides what it needs, and may raise a GraphoptError to stop the run."""

    def before_pipeline(self, model: ir.Model, ctx: Context) -> None:
        """Called once, with the graph before the first pass."""

    def before(self, step: Pass, position: int, model: ir.Model, ctx: Context) -> None:
        """Called before each pass; `position` counts from 1."""

    def after(self, step: Pass, position: int, changes: int, seconds: float, model: ir.Model, ctx: Context) -> None:
        """Called after each pass that did not raise."""

    def failed(self, step: Pass, position: int, error: BaseException, model: ir.Model, ctx: Context) -> None:
        """Called when a pass or an instrument raised."""


class PassManager:
    """Runs passes in order over one graph, in place."""

    def __init__(self, passes: Sequence[Pass], instruments: Sequence[Instrument] = ()) -> None:
        self.passes, self.instruments = list(passes), list(instruments)

    def __str__(self) -> str:
        return render(self.passes)

    def run(self, model: ir.Model, ctx: Context) -> list[PassRecord]:
        """Run every pass.

        Raises:
            PassError: a pass or an instrument raised; it names the pass, its place in the pipeline and the cause.
        """
        for instrument in self.instruments:
            instrument.before_pipeline(model, ctx)
        return [self._step(step, position, model, ctx) for position, step in enumerate(self.passes, start=1)]

    def _step(self, step: Pass, position: int, model: ir.Model, ctx: Context) -> PassRecord:
        ctx.step, ctx.remarks.current, mark, start = step, step.name, len(ctx.remarks), time.perf_counter()
        try:
            for instrument in self.instruments:
                instrument.before(step, position, model, ctx)
            start = time.perf_counter()
            changes = step.run(model, ctx)
            seconds = time.perf_counter() - start
            if changes:
                ctx.invalidate()
            for instrument in self.instruments:
                instrument.after(step, position, changes, seconds, model, ctx)
        except (Exception, SystemExit) as error:  # a pass must not end the program, and with exit code 0 at that
            for instrument in self.instruments:
                instrument.failed(step, position, error, model, ctx)
            raise PassError(str(step), position, error) from error
        return PassRecord(str(step), changes, seconds, ctx.remarks.since(mark))


def lower(model: ir.Model, target: Target, *, tune: bool = True, original: ir.Model | None = None) -> ir.Model:
    """A copy of `model` (the weights are shared) as the target runs it.

    Args:
        tune: False = nothing is timed for it, whatever the target's option says.
        original: the model before any pass, where that is another one.
    """
    copy = model.clone()
    PassManager(target.lowerings()).run(copy, Context(copy, target=target, original=original, tune=tune))
    return copy
