"""Lossy passes as transactions: what each one costs is measured; over the budget it is weakened, or undone.

The graph before the pass is kept as a clone that shares its weights, so that keeping it costs no memory to speak of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from graphopt.core.contract import Context, Pass
from graphopt.core.pipeline import Instrument, PassManager, PassRecord
from graphopt.core.remarks import Remark

_TRIES = 16  # settings of one pass, at most


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
        if step.exact or step.binding:
            return super()._step(step, position, model, ctx)
        before = model.clone()
        seconds, refused = 0.0, list[Remark]()
        for _ in range(_TRIES):
            record = super()._step(step, position, model, ctx)
            seconds += record.seconds
            loss = self.loss(model) if record.changes else 0.0
            if loss <= self.max_loss:
                kept = [Remark("applied", step.name, "", f"loss {loss:.4g}, within the budget {self.max_loss:g}", {"loss": loss})]
                return PassRecord(record.name, record.changes, seconds, record.remarks + refused + (kept if record.changes else []))
            restore(model, before.clone())
            ctx.invalidate()
            weaker = step.weaker()
            message = f"`{step}` loses {loss:.4g}, over the budget {self.max_loss:g}; " + ("undone" if weaker is None else f"trying `{weaker}`")
            refused.append(Remark("missed", step.name, "", message, {"loss": loss, "max_loss": self.max_loss}))
            if weaker is None:
                break
            step = weaker
        return PassRecord(str(step), 0, seconds, refused)


def restore(model: ir.Model, saved: ir.Model) -> None:
    """Give `model` the contents of `saved`, which must not be used afterwards."""
    model.graph, model.ir_version = saved.graph, saved.ir_version
    model.metadata_props.clear()
    model.metadata_props.update(saved.metadata_props)
