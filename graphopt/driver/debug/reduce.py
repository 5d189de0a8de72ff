"""The smallest graph on which a pipeline still fails: delta debugging that begins at the culprit.

Bisection names the step that breaks the model, and the nodes of the input that its first wrong change stands for. The search begins with these
nodes alone, cut out of the model; values that they read of others become inputs, which are fed what the whole model computed there. If that
does not fail, nodes around it join. Then nodes, outputs, branches, the contents of weights and the sizes of axes go, as long as it fails.

A candidate counts only if it is a legal model, if the check finds nothing wrong with it before the pipeline, and if the same step breaks it
in the same way (Zeller and Hildebrandt, Simplifying and Isolating Failure-Inducing Input, 2002, call the rest unresolved).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.core.contract import Array
from graphopt.core.errors import GraphoptError, PassError
from graphopt.core.pipeline import PassManager
from graphopt.core.remarks import Progress, Remarks
from graphopt.driver.bisect import Culprit, bisect, kind
from graphopt.driver.debug import cuts
from graphopt.driver.debug.checks import FEEDS, Make
from graphopt.driver.debug.cuts import Case
from graphopt.driver.debug.memo import Memo
from graphopt.driver.history import History
from graphopt.driver.job import Job
from graphopt.driver.loss import Loss
from graphopt.graph.dims import fed_inputs
from graphopt.graph.questions import all_nodes
from graphopt.graph.verify import verify
from graphopt.io.load import load_both
from graphopt.run import Feeds, ort
from graphopt.run.observe import exposed
from graphopt.run.samples import Samples, runnable_samples

_ROUNDS = 4  # of all moves, at most
_SMALL = 64  # nodes up to which all values of a case are kept


@dataclasses.dataclass
class Reduction:
    """A search. `best` is the smallest case that failed so far, also while the search runs; None before the first. `nodes`: of the whole model.

    Raises (in `run`):
        NothingWrong: the pipeline does not fail.
        GraphoptError: the input fails, or the failure is another one on the samples that candidates are run on.
    """

    job: Job
    make: Make
    memo: Memo
    tell: Progress
    best: Case | None = None
    culprit: Culprit | None = None
    tried: int = 0
    _table: tuple[dict[str, Array], ...] = ()  # what is known of the values of the whole model

    @property
    def nodes(self) -> int:
        return len(list(all_nodes(self.job.model)))

    def run(self) -> Case:
        """The smallest case."""
        self.tell("bisect", 0.0)
        found = self.culprit = bisect(dataclasses.replace(self.job, tell=_quiet), self.memo.keep(self.make(self.job)))
        self._table = self._feeds()
        case = self._begin(Case(self.job.model, self._table), found.stands_for)
        for _ in range(_ROUNDS):
            size = _size(case)
            for move in (self._fewer_outputs, self._fewer_nodes, self._bypassed, self._one_branch, self._emptied, self._resized, self._bare):
                case = move(case)
            if _size(case) == size:
                break
        return case

    # ---- what fails -----------------------------------------------------------------------------------------------------------------------

    def fails(self, case: Case | None) -> bool:
        """Whether it fails in the same way by the same step, and is sound before."""
        if case is None or not self._fed(case):
            return False
        key = "candidate " + self.memo.contents.of(case.model)
        there, said = self.memo.recall(key)
        if there:
            return said is None
        self.tried += 1
        count, whole = len(list(all_nodes(case.model))), max(2, self.nodes)
        self.tell(f"candidate {self.tried}: {count} of {whole} nodes", min(0.95, 1 - count / whole))
        try:
            reason = self.refused(on(self.job, case.model, case.feeds))
        except Exception as error:  # noqa: BLE001 -- whatever a library makes of a mutilated graph, it is not the failure that is looked for
            reason = f"{type(error).__name__}: {error}"
        self.memo.remember(key, reason)
        return reason is None

    def refused(self, job: Job) -> str | None:
        """Why the model of this job does not count."""
        assert self.culprit is not None
        verify(job.model)
        check, wanted, position = self.make(job), kind(self.culprit.after), self.culprit.position
        model, history = job.model.clone(), History(0, len(job.steps))
        end: ir.Model | PassError = model
        try:
            PassManager(job.steps, [history]).run(model, job.context(model))
        except PassError as error:
            end = error
        if isinstance(end, PassError):
            if end.position != position or kind(str(end.cause)) != wanted:
                return f"fails otherwise: {end}"
        elif kind(check(end)) != wanted or kind(check(history.at.get(position + 1, end))) != wanted:
            return "does not fail, or otherwise"
        if check(job.model) is not None:
            return "fails before the pipeline"
        return "another step breaks it" if kind(check(history.at[position])) == wanted else None

    def _better(self, case: Case, smaller: Case | None) -> Case:
        """The smaller one if it fails, too. A small case has its own values inside, which go on with what was changed in it."""
        if smaller is None or not self.fails(smaller):
            return case
        if len(smaller.model.graph) <= _SMALL and smaller.table:
            with contextlib.suppress(GraphoptError):  # a runtime that cannot show them leaves what is known
                smaller = Case(smaller.model, tuple({**feed, **_inside(smaller.model, feed)} for feed in smaller.feeds or ()))
        self.best = smaller
        return smaller

    # ---- values ---------------------------------------------------------------------------------------------------------------------------

    def _feeds(self) -> tuple[dict[str, Array], ...]:
        """The first samples; none where nothing can be made up, as for a model that only a check of the user can run."""
        job = self.job
        try:
            samples = job.samples or runnable_samples(job.model, ort.session(job.model, optimize=False))
        except GraphoptError:
            return ()
        return tuple(dict(feed) for feed in itertools.islice(samples, FEEDS))

    def _fed(self, case: Case) -> bool:
        """Whether there is an array for every input; what the whole model computes there is looked up when it is first needed."""
        missing = case.missing
        if missing and case.table is self._table:
            try:
                for values in self._table:
                    values.update(_inside(self.job.model, {str(v.name): values[str(v.name)] for v in fed_inputs(self.job.model)}, missing))
            except GraphoptError:
                return False
        return not case.missing

    # ---- where to begin -------------------------------------------------------------------------------------------------------------------

    def _begin(self, whole: Case, start: Sequence[str]) -> Case:
        """The nodes around the culprit that fail alone; else the whole model."""
        everything, hops, seen = len(whole.model.graph), 0, 0
        while True:
            near = cuts.around(whole.model, start, hops)
            if not near or len(near) > everything / 2 or len(near) == seen:
                break
            case = self._better(whole, _with(whole, cuts.part(whole.model, near)))
            if case is not whole:
                return case
            hops, seen = max(1, 2 * hops), len(near)
        if not self.fails(whole):
            raise GraphoptError("the failure does not show on the model in normal form with the first samples alone, so it cannot be reduced")
        self.best = whole
        return whole

    # ---- moves ----------------------------------------------------------------------------------------------------------------------------

    def _fewer_outputs(self, case: Case) -> Case:
        return self._without(case, lambda c: [str(v.name) for v in c.model.graph.outputs], cuts.with_outputs)

    def _fewer_nodes(self, case: Case) -> Case:
        return self._without(case, lambda c: cuts.names(c.model), cuts.part)

    def _without(self, case: Case, items: Callable[[Case], list[str]], rest: Callable[[ir.Model, set[str]], ir.Model | None]) -> Case:
        """Leave out neighbours, at first half of all, then fewer and fewer."""
        chunk = max(1, len(items(case)) // 2)
        while True:
            at = 0
            while at < len(now := items(case)):
                before = case
                case = self._better(case, _with(case, rest(case.model, set(now[:at] + now[at + chunk :]))))
                at += chunk if case is before else 0  # else what stands at this place is new
            if chunk == 1:
                return case
            chunk = max(1, min(chunk, len(now)) // 2)

    def _bypassed(self, case: Case) -> Case:
        return self._each(case, [(str(node.name),) for node in all_nodes(case.model)], cuts.stepped_over)

    def _one_branch(self, case: Case) -> Case:
        places = [(str(node.name), name) for node in case.model.graph if node.op_type == "If" for name in ("then_branch", "else_branch")]
        return self._each(case, places, cuts.branch)

    def _each(self, case: Case, places: Iterable[tuple[Any, ...]], move: Callable[..., ir.Model | None]) -> Case:
        for place in places:
            case = self._better(case, _with(case, move(case.model, *place)))
        return case

    def _emptied(self, case: Case) -> Case:
        """All weights at once, else one after the other."""
        found = cuts.weights(case.model)
        for chosen in dict.fromkeys([tuple(found), *((name,) for name in found)]):
            for number in (0, 1):
                if chosen and set(chosen) <= set(cuts.weights(case.model)):
                    case = self._better(case, _with(case, cuts.filled(case.model, chosen, number)))
        return case

    def _resized(self, case: Case) -> Case:
        """Every size by itself, and with its multiples (a hidden size is heads times features)."""
        done = set[int]()
        while todo := [size for size in cuts.sizes(case.model) if size not in done]:
            size = todo[0]
            done.add(size)
            multiples = [m for m in cuts.sizes(case.model) if m > size and m % size == 0]
            for new in dict.fromkeys(new for new in (1, 2, size // 8) if 0 < new < size):
                alone, whole = {size: new}, {size: new, **{m: m // size * new for m in multiples}}
                before = case
                for mapping in (alone, whole) if multiples else (alone,):
                    case = self._better(case, cuts.resized(case, mapping)) if case is before else case
                if case is not before:
                    done.update(whole.values())
                    break
        return case

    def _bare(self, case: Case) -> Case:
        return self._better(case, _with(case, cuts.bare(case.model)))


def _inside(model: ir.Model, feed: Feeds, names: Iterable[str] | None = None) -> dict[str, Array]:
    """What a graph computes with runtime optimizations off, by name; by default every tensor of the main graph."""
    made = [str(v.name) for node in model.graph for v in node.outputs if v.name and isinstance(v.type, ir.TensorType)]
    found = ort.session(exposed(model, made if names is None else names), optimize=False).run(feed)
    return {name: array for name, array in found.items() if isinstance(array, np.ndarray)}


def on(job: Job, source: ir.Model | Path, feeds: Sequence[Feeds] | None) -> Job:
    """The same job for another model; without feeds they are made up."""
    original, model = load_both(source, remarks=Remarks())
    samples = None if feeds is None else Samples(feeds).fit(model)
    loss = Loss(job.target, original, samples, None)
    return dataclasses.replace(job, original=original, model=model, samples=samples, loss=loss, source=None, tell=_quiet)


def _with(case: Case, model: ir.Model | None) -> Case | None:
    return None if model is None else Case(model, case.table)


def _size(case: Case) -> tuple[int, int, int, int]:
    model = case.model
    elements = sum(v.const_value.size for v in model.graph.initializers.values() if v.const_value is not None)
    return len(list(all_nodes(model))), len(model.graph.outputs), elements, len(cuts.weights(model))


def _quiet(text: str, done: float) -> None: ...
