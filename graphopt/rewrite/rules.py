"""The base of passes that are local rewrites: a pass author writes `match` (pure) and `build`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Generic

import onnx_ir as ir

from graphopt.core.contract import Context, Pass
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.engine import Driver
from graphopt.rewrite.match import M, Miss

_ROUNDS = 8  # rewrites that undo each other stop here


class RewritePass(Pass, Generic[M]):
    """A local rewrite, anchored at op types; `"some.domain::Gelu"` names another domain."""

    anchors: ClassVar[frozenset[str]]

    @abstractmethod
    def match(self, node: ir.Node, ctx: Context) -> M | Miss | None:
        """Pure. None = not even close; Miss = a near miss with its reason."""

    @abstractmethod
    def build(self, op: Builder, m: M) -> Sequence[ir.Value]:
        """Replacements for `m.outputs`, in order."""

    def run(self, model: ir.Model, ctx: Context) -> int:
        total, driver = 0, Driver(model, ctx)
        for _ in range(_ROUNDS):
            applied, misses = driver.round(self)
            total += applied
            if not applied:
                break
            driver.clean()
            ctx.invalidate()
        else:
            ctx.remarks.warning("", f"{self.name} still changes the graph after {_ROUNDS} rounds; stopped there")
        for miss in misses:
            ctx.remarks.missed(miss.node.name or "", miss.reason + (f"; {miss.hint}" if miss.hint else ""))
        return total
