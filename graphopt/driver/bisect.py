"""Bisection: the first step of a run that breaks a model, and in it the first single change.

The pipeline runs once, and the graph before every step is kept (clones share their weights). A binary search over these graphs finds two
neighbours, one fine and one not; a second search, over the fuel of the step between them, finds the change.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.core.contract import Context, Pass
from graphopt.core.errors import GraphoptError, PassError
from graphopt.core.fuel import Fuel
from graphopt.core.pipeline import PassManager, PassRecord
from graphopt.core.pipeline import parse as parse_pipeline
from graphopt.core.remarks import Remark
from graphopt.driver.history import History
from graphopt.graph.questions import all_nodes, origins
from graphopt.graph.text import diff, graph_text, node_text
from graphopt.report.document import Document
from graphopt.report.elements import Element, Line, Table, Text

if TYPE_CHECKING:
    from graphopt.driver.job import Job

Check = Callable[[ir.Model], str | None]  # what is wrong with a graph, in one line; None = it is fine
State = ir.Model | PassError  # a graph between two steps, or how a step failed
_WORD = re.compile(r"(?<![\w/.%-])[A-Za-z]{3,}(?![\w/.:-]*[\w/])")
_NUMBERS = {"nan", "inf"}
_SHOWN = 12  # nodes and remarks that are told
_QUOTED = re.compile(r"`[^`]*`|'[^']*'|\"[^\"]*\"")


class NothingWrong(GraphoptError):
    """The graph after the last step passes the check."""


@dataclasses.dataclass(frozen=True)
class Culprit(Document):
    """The step that breaks a model, and the change of it.

    Attributes:
        step: the pass as text; `position` is its place among all `steps` of the run, lowerings included, from 1.
        change: the number of the guilty change within the step, from 1, of `changes`; None where it could not be narrowed down, and `note` says why.
        fuel: the same number counted over the whole run: with `fuel - 1` the model is fine, with `skip={fuel}` all other changes are made.
        gone, made, altered: texts of nodes that the change removed, put in, and gave other inputs or attributes; `weights`: names of weights
            that it made or gave other contents.
        remarks: what the pass said about the change.
        before, after: what the check said of the graph before and after it; None = it is fine.
        diff: the change as a diff of the graph's text.
        stands_for: names of the nodes of the input that the touched nodes stand for.
        note: what makes the answer less sure than it looks.
    """

    title: ClassVar[str] = "graphopt bisect"

    step: str
    position: int
    steps: int
    change: int | None
    changes: int
    fuel: int | None
    gone: tuple[str, ...]
    made: tuple[str, ...]
    altered: tuple[str, ...]
    weights: tuple[str, ...]
    remarks: tuple[Remark, ...]
    before: str | None
    after: str
    diff: str
    stands_for: tuple[str, ...] = ()
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"remarks": [remark.as_dict() for remark in self.remarks]}

    def elements(self) -> Sequence[Element]:
        which = f"change {self.change} of {self.changes} in " if self.change is not None else ""
        lines = [f"{which}step {self.position} of {self.steps}, `{self.step}`", f"before: {self.before or 'fine'}", f"after: {self.after}"]
        lines += [f"note: {self.note}"] if self.note else []
        lines += (
            [f"with --fuel {self.fuel - 1} the model is fine, with --fuel {self.fuel} it is not (with --no-gate, or it is taken back)"]
            if self.fuel is not None
            else []
        )
        rows = [(what, *text.replace("`", "").split(": ", 1)) for what in ("gone", "made", "altered") for text in getattr(self, what)]
        rows += [("weight", name, "") for name in self.weights]
        more = [("", "", f"and {len(rows) - _SHOWN} more")] if len(rows) > _SHOWN else []
        table = [Table(("", "node", "what it is"), [*rows[:_SHOWN], *more])] if rows else []
        said = [Line(str(remark)) for remark in self.remarks[:_SHOWN]]
        return [*map(Line, lines), *table, *said, *([Text(self.diff)] if self.diff and len(rows) <= _SHOWN else [])]

    def __str__(self) -> str:
        """One line."""
        which = "" if self.change is None else f", change {self.change} of {self.changes},"
        nodes = "; ".join((*self.gone, *self.altered)[:2]) or "; ".join(self.made[:2])
        at = f" at {nodes}" if nodes and self.change is not None else ""
        return f"step {self.position} of {self.steps}, `{self.step}`{which} breaks it{at}: {self.after}"


def kind(text: str | None) -> tuple[str, ...]:
    """The class of what a check says: its plain words. Names, numbers and what is quoted do not count."""
    words = [] if text is None else _WORD.findall(_QUOTED.sub(" ", text))
    return tuple(dict.fromkeys(w for w in words if w.lower() not in _NUMBERS))


def bisect(job: Job, check: Check) -> Culprit:
    """The first step of a job that breaks its model, and the first change in it.

    Only what fails as the whole run does counts: a graph in between that fails otherwise says nothing about the step that is looked for. Where
    the pipeline is not monotone (broken, mended, broken again), one of the places is found: the graph before it is fine, and the one after it
    is not. A pass that raises counts as a graph that is not fine.

    Args:
        check: what is wrong with a graph of the run, in one line. It gets the graph as it is between two steps, and must not change it; to
            finish, lower or save it is its own business. It is asked about each graph once, and once more about the last.

    Raises:
        NothingWrong: the check finds nothing wrong after the last step.
        GraphoptError: it finds something wrong before the first.
    """
    return _Bisection(job, check).run()


class _Every(History):
    """Trusts no pass that says it changed nothing."""

    def after(self, step: Pass, position: int, changes: int, seconds: float, model: ir.Model, ctx: Context) -> None:
        super().after(step, position, 1, seconds, model, ctx)


class _Bisection:
    def __init__(self, job: Job, check: Check) -> None:
        self.job, self.check, self.asked, self.fuel = job, check, 0, Fuel(job.fuel, job.skip)
        self.first_lowering = len(job.passes) + 1
        self.wanted: tuple[str, ...] = ()

    def run(self) -> Culprit:
        states, history, steps = self._states()
        last = self.judge(states[-1])
        if last is None:
            raise NothingWrong("the check finds nothing wrong after the last step; there is nothing to look for")
        said: dict[int, str | None] = {0: self.judge(states[0]), len(states) - 1: last}
        if said[0] is not None:
            raise GraphoptError(f"the check finds the input itself wrong, before any pass: {said[0]}")
        self.wanted = kind(last)
        low, high = 0, len(states) - 1
        while high - low > 1:
            middle = (low + high) // 2
            said[middle] = self.judge(states[middle])
            low, high = (low, middle) if self.guilty(said[middle]) else (middle, high)
        return _Step(self, history, steps, high).search(said[low], said[high] or "")

    def _states(self) -> tuple[list[State], History, list[Pass]]:
        """The graph before the first and after each step, or how a step failed; and the steps as they were settled."""
        job = self.job
        model, history = job.model.clone(), _Every(self.first_lowering, len(job.steps), job.tell)
        end: State = model
        records: list[PassRecord] = []
        try:
            records = job.manager(job.steps, [history]).run(model, job.context(model, self.fuel))
        except PassError as error:
            end = error
        steps = [_settled(job, step, record) for step, record in zip(job.steps, records, strict=False)]
        return [*history.at.values(), end], history, steps or list(job.steps)

    def guilty(self, text: str | None) -> bool:
        return text is not None and kind(text) == self.wanted

    def judge(self, state: State) -> str | None:
        self.asked += 1
        self.job.tell(f"check {self.asked}", min(0.95, 0.5 + self.asked / 40))
        return str(state.cause) if isinstance(state, PassError) else self.check(state)


class _Step:
    """The search within one step: it is repeated from the graph before it, with less fuel. Lowerings are repeated from the first, which chooses."""

    def __init__(self, search: _Bisection, history: History, steps: Sequence[Pass], position: int) -> None:
        self.whole, self.history, self.steps, self.position = search, history, steps, position
        self.start = min(position, search.first_lowering)
        self.burned = history.burned[position]  # units, before this step

    def search(self, before: str | None, after: str) -> Culprit:
        whole = self._try(None)
        if not self.whole.guilty(whole.said):
            why = "repeated from the same graph it does not fail so: the pass is not deterministic, or the check is not steady"
            return self._culprit(_Trial(self.history.at[self.position], before), _Trial(self.history.at.get(self.position + 1), after), None, 0, why)
        total = whole.burned - self.burned
        none = self._try(0) if total else whole
        if self.whole.guilty(none.said):
            why = "it asks for no fuel, change by change" if isinstance(none.state, ir.Model) else "it fails before its first change"
            return self._culprit(_Trial(self.history.at[self.position], before), whole, None, total, why)
        low, high, trials = 0, total, {0: none, total: whole}
        while high - low > 1:
            middle = (low + high) // 2
            trials[middle] = self._try(middle)
            low, high = (low, middle) if self.whole.guilty(trials[middle].said) else (middle, high)
        note = "" if trials[low].said is None else "the graph before this change fails, too, in another way"
        if isinstance(trials[high].state, PassError):
            note = "the pass raises at this change, or on its way to the next one"
        return self._culprit(trials[low], trials[high], high, total, note)

    def _try(self, units: int | None) -> _Trial:
        """The graph after the step with so many of its changes."""
        job = self.whole.job
        model = self.history.at[self.start].clone()
        limit = job.fuel if units is None else self.burned + units
        ctx = job.context(model, self.whole.fuel.rewound(self.history.burned[self.start], limit))
        state: State = model
        records: list[PassRecord] = []
        try:
            records = PassManager(self.steps[self.start - 1 : self.position]).run(model, ctx)
        except PassError as error:
            state = error
        return _Trial(state, self.whole.judge(state), ctx.fuel.burned, tuple(records[-1].remarks) if records else ())

    def _culprit(self, before: _Trial, after: _Trial, change: int | None, changes: int, note: str) -> Culprit:
        step = str(self.steps[self.position - 1])
        gone, made, altered, weights, text = touched(before.state, after.state)
        known = {_same(r) for r in before.remarks}
        remarks = tuple(r for r in after.remarks if r.kind != "missed" and _same(r) not in known)
        fuel = None if change is None else self.burned + change
        return Culprit(
            step, self.position, len(self.whole.job.steps), change, changes, fuel, gone, made, altered, weights, remarks, before.said,
            after.said or "", text, _stand_for(before.state, after.state, (*gone, *made, *altered)), note,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Trial:
    """A graph, or how the pass failed; what the check said of it, the fuel that it took, and what the pass said."""

    state: State | None
    said: str | None
    burned: int = 0
    remarks: tuple[Remark, ...] = ()


def _settled(job: Job, step: Pass, record: PassRecord) -> Pass:
    """The step with the options that the budget left it, so that it can be repeated alone."""
    return step if record.name == str(step) else parse_pipeline(record.name, job.known)[0]


def _same(remark: Remark) -> tuple[str, str, str]:
    return remark.kind, remark.node, remark.message


def touched(before: object, after: object) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...], str]:
    """Nodes gone, made and altered, as texts; names of weights; the diff. Nothing where one of both is no graph."""
    if not (isinstance(before, ir.Model) and isinstance(after, ir.Model)):
        return (), (), (), (), ""
    old, new = ({str(node.name): node_text(node) for node in all_nodes(model)} for model in (before, after))
    gone = tuple(f"`{name}`: {text}" for name, text in old.items() if name not in new)
    made = tuple(f"`{name}`: {text}" for name, text in new.items() if name not in old)
    altered = tuple(f"`{name}`: {text}" for name, text in new.items() if old.get(name, text) != text)
    stored = before.graph.initializers
    weights = tuple(str(name) for name, value in after.graph.initializers.items() if _differ(stored.get(name), value))
    return gone, made, altered, weights, diff(graph_text(before), graph_text(after))


def _stand_for(before: object, after: object, texts: Sequence[str]) -> tuple[str, ...]:
    there = {f"`{node.name}`": node for model in (after, before) if isinstance(model, ir.Model) for node in all_nodes(model)}
    touched_nodes = (there[name] for text in texts if (name := text.partition(": ")[0]) in there)
    return tuple(sorted(frozenset[str]().union(*map(origins, touched_nodes))))


def _differ(a: ir.Value | None, b: ir.Value) -> bool:
    if a is None or a.const_value is None or b.const_value is None:
        return True
    x, y = a.const_value, b.const_value
    if x is y:
        return False
    return x.dtype != y.dtype or list(x.shape) != list(y.shape) or not np.array_equal(x.numpy(), y.numpy())
