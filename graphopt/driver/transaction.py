"""Lossy passes as transactions: what each one costs is measured; over the budget it is weakened, or undone.

The graph before the pass is kept as a clone that shares its weights, so that keeping it costs no memory to speak of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import onnx_ir as ir

from graphopt.core.contract import Context, Pass
from graphopt.core.pipeline import Instrument, PassManager, PassRecord
from graphopt.core.remarks import Remark

_TRIES = 16  # settings of one pass, at most
_FINER = 3  # of them, after the first that is within the budget
_CLOSE = 0.9  # of the budget; what is nearer is not worth another try


class TransactionManager(PassManager):
    """A pass manager that keeps the loss of the whole pipeline within `max_loss`.

    Args:
        loss: the loss of a graph against the original, as a fraction (0.01 = 1 %).
        max_loss: the budget that all lossy passes share; each is judged by the loss of the graph after it, so its predecessors count too.
    """

    def __init__(self, passes: Sequence[Pass], instruments: Sequence[Instrument] = (), *, loss: Callable[[ir.Model], float], max_loss: float) -> None:
        super().__init__(passes, instruments)
        self.loss, self.max_loss = loss, max_loss

    def _step(self, step: Pass, position: int, model: ir.Model, ctx: Context) -> PassRecord:
        """Milder and milder settings until one is within the budget, then some between it and the mildest that was not."""
        if step.exact or step.binding:
            return super()._step(step, position, model, ctx)
        before, fuel = model.clone(), ctx.fuel.burned
        over: Pass | None = None
        best: _Kept | None = None
        now: Pass = step
        seconds, told, finer = 0.0, list[Remark](), _FINER
        for _ in range(_TRIES):
            record = super()._step(now, position, model, ctx)
            seconds += record.seconds
            loss = self.loss(model) if record.changes else 0.0
            if loss <= self.max_loss:
                best = _Kept(now, record, loss, ctx.fuel.burned, model.clone())
            else:
                over = now
            if best is None:
                following = now.weaker()
            else:
                following = None if over is None or not finer or best.loss >= _CLOSE * self.max_loss else over.between(best.step)
            finer -= best is not None
            if best is None or best.step is not now:
                then = f"trying `{following}`" if following is not None else "undone" if best is None else f"`{best.step}` stays"
                message = f"`{now}` loses {loss:.4g}, over the budget {self.max_loss:g}; {then}"
                told.append(Remark("missed", step.name, "", message, {"loss": loss, "max_loss": self.max_loss}))
            if following is None:
                break
            self._back(model, ctx, before.clone(), fuel)
            now = following
        if best is None:
            self._back(model, ctx, before, fuel)
            return PassRecord(str(step), 0, seconds, told)
        if best.step is not now:
            self._back(model, ctx, best.model, best.fuel)
            for instrument in self.instruments:
                instrument.after(best.step, position, best.record.changes, best.record.seconds, model, ctx)
        kept = [Remark("applied", step.name, "", f"loss {best.loss:.4g}, within the budget {self.max_loss:g}", {"loss": best.loss})]
        remarks = best.record.remarks + told + (kept if best.record.changes else [])
        return PassRecord(best.record.name, best.record.changes, seconds, remarks, "" if best.step == step else str(step))

    @staticmethod
    def _back(model: ir.Model, ctx: Context, saved: ir.Model, fuel: int) -> None:
        restore(model, saved)
        ctx.invalidate()
        ctx.fuel.back_to(fuel)


@dataclasses.dataclass(frozen=True)
class _Kept:
    """A setting within the budget, and what it left."""

    step: Pass
    record: PassRecord
    loss: float
    fuel: int
    model: ir.Model


def restore(model: ir.Model, saved: ir.Model) -> None:
    """Give `model` the contents of `saved`, which must not be used afterwards."""
    model.graph, model.ir_version = saved.graph, saved.ir_version
    model.metadata_props.clear()
    model.metadata_props.update(saved.metadata_props)
