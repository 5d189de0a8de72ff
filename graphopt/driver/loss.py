"""What an optimization costs: how far the outputs moved on the samples, or how far the user's metric fell."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import onnx_ir as ir

from graphopt.calibration.padding import Padding
from graphopt.core.contract import Metric, Session, Target
from graphopt.core.errors import GraphoptError, SampleError
from graphopt.core.pipeline import lower
from graphopt.report.report import Measured
from graphopt.run import guarded
from graphopt.run.distance import arrays_in, relative_l2
from graphopt.run.samples import Samples

Outputs = dict[str, Any]  # of one batch, without padding
_HELD = 64 * 2**20  # bytes of the original's outputs that are remembered
NO_SAMPLES = "no samples; add --samples DATA, or --metric M (samples=... or metric=... in Python)"


class Loss:
    """The loss of a model against `original`, as a fraction: 0.01 is 1 %.

    With a metric (larger is better): its relative fall, negative where it rose. Without: ||outputs - original outputs|| / ||original outputs||
    over all samples, of the output where it is largest; positions of padding do not count.
    """

    def __init__(self, target: Target, original: ir.Model, samples: Samples | None, metric: Metric | None) -> None:
        self.target, self.original, self.samples = target, original, samples
        self.metric = None if metric is None else _Judge(metric)
        self._outputs: list[Outputs] | None = None
        self._padding = Padding(original)
        self._score: float | None = None

    @property
    def known(self) -> bool:
        return self.samples is not None or self.metric is not None

    @property
    def failure(self) -> GraphoptError | None:
        """How the metric of the user failed first, if it did."""
        return None if self.metric is None else self.metric.failure

    @property
    def how(self) -> str:
        return "relative fall of the metric" if self.metric is not None else "relative L2 distance of the outputs on the samples"

    def of(self, session: Session) -> float:
        """The loss of what this session runs.

        Raises:
            SampleError: there is neither a metric nor a sample.
            GraphoptError: the metric of the original is not a positive number.
        """
        if self.metric is not None:
            return self._fall(self.metric, session)
        if self.samples is None:
            raise SampleError(NO_SAMPLES)
        return relative_l2(self._originals(self.samples), self._run(session, self.samples))

    def of_graph(self, model: ir.Model) -> float:
        """The loss of a graph before lowering, as the target runs it by its table: to judge a pass, nothing is timed."""
        return self.of(self._opened(self.target.finish(lower(model, self.target, tune=False, original=self.original))[0]))

    def report(self, session: Callable[[], Session]) -> Measured:
        """The loss for the report, or why there is none."""
        if not self.known:
            return Measured(None, NO_SAMPLES)
        try:
            return Measured(self.of(session()), None, self.how)
        except GraphoptError as error:
            return Measured(None, str(error))

    def _fall(self, metric: Metric, session: Session) -> float:
        if self._score is None:
            self._score = float(metric(self._opened(self.original)))
        if not self._score > 0:
            raise GraphoptError(f"the metric of the original is {self._score:g}; a relative fall needs a positive number, larger for better models")
        return (self._score - float(metric(session))) / self._score

    def _originals(self, samples: Samples) -> Iterator[Outputs]:
        """What the original gives, batch after batch: remembered if it is small, else made anew each time, so that no batch waits for another."""
        if self._outputs is not None:
            yield from self._outputs
            return
        held, size = list[Outputs](), 0
        for outputs in self._run(self._opened(self.original), samples):
            size += sum(array.nbytes for _, array in arrays_in(list(outputs.values())))
            if size <= _HELD:
                held.append(outputs)
            else:
                held.clear()
            yield outputs
        self._outputs = held if size <= _HELD else None

    def _opened(self, model: ir.Model) -> Session:
        """What the runtime dies of must not end this process."""
        return guarded.opened(self.target, model, None if self.samples is None else next(iter(self.samples)))

    def _run(self, session: Session, samples: Samples) -> Iterator[Outputs]:
        return (self._padding.kept(feed).counted(session.run(feed)) for feed in samples)


class _Judge:
    """The metric of a user, who may have made a mistake: `failure` is the first one, in one line."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.failure: GraphoptError | None = None

    def __call__(self, session: Session) -> float:
        try:
            score: Any = self.metric(session)
            score = float(score)
        except (Exception, SystemExit) as error:  # noqa: BLE001 -- whatever a user's function raises is the user's to read
            self._fail(f"{type(error).__name__}: {' '.join(str(error).split())}", error)
        if not math.isfinite(score):
            self._fail(f"it gave {score}, and must give a finite number", None)
        return float(score)

    def _fail(self, why: str, cause: BaseException | None) -> NoReturn:
        error = GraphoptError(f"the metric failed: {why}")
        self.failure = self.failure or error
        raise error from cause
