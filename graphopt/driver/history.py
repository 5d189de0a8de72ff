"""What a run looked like on its way."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.core.contract import Context, Pass
from graphopt.core.pipeline import Instrument
from graphopt.core.remarks import Progress


class History(Instrument):
    """The graph as it was before every step (clones that share the weights), the fuel burned until then, and how far the run is.

    Args:
        first_lowering, total: the position of the first lowering, and of the last step; positions count from 1.
    """

    def __init__(self, first_lowering: int, total: int, tell: Progress = lambda text, done: None) -> None:
        self.first, self.total, self.tell = first_lowering, max(1, total), tell
        self.at: dict[int, ir.Model] = {}
        self.burned: dict[int, int] = {}
        self._fresh: ir.Model | None = None  # a clone that is still what the graph is

    def before(self, step: Pass, position: int, model: ir.Model, ctx: Context) -> None:
        self.tell(f"{position}/{self.total} {step}", (position - 1) / self.total)
        self._fresh = model.clone() if self._fresh is None else self._fresh
        self.at.setdefault(position, self._fresh)
        self.burned.setdefault(position, ctx.fuel.burned)

    def after(self, step: Pass, position: int, changes: int, seconds: float, model: ir.Model, ctx: Context) -> None:
        if changes:
            self._fresh = None

    @property
    def graph(self) -> ir.Model | None:
        """The graph before the first lowering."""
        return self.at.get(self.first)
