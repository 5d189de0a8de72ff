"""Equivalent spellings of a piece of graph, and which one was chosen where. The rewrite driver asks; `driver/lowering/choose.py` decides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir

from graphopt.core.contract import Alternative, Pass, Piece, PieceKind


def table_passes(table: Sequence[Alternative]) -> list[Pass]:
    """Every pass of the table once, in the order of the rows."""
    return list(dict.fromkeys(step for spelling in table for step in spelling.passes))


class Choices:
    """Which passes of the table may fire at which node. Where nothing was chosen, those of the default spellings."""

    def __init__(self, table: Sequence[Alternative]) -> None:
        self._owners: dict[Pass, set[PieceKind]] = {}
        self._defaults: set[tuple[PieceKind, Pass]] = set()
        self._chosen: dict[ir.Node, dict[PieceKind, Alternative]] = {}
        seen: set[PieceKind] = set()
        for spelling in table:
            for step in spelling.passes:
                self._owners.setdefault(step, set()).add(spelling.kind)
                if spelling.kind not in seen:
                    self._defaults.add((spelling.kind, step))
            seen.add(spelling.kind)

    def choose(self, piece: Piece, spelling: Alternative) -> None:
        for node in piece.nodes:
            self._chosen.setdefault(node, {})[spelling.kind] = spelling

    def allows(self, step: Pass, node: ir.Node) -> bool:
        """Whether a pass may be anchored at this node; a pass that is in no table always may."""
        kinds = self._owners.get(step)
        if kinds is None:
            return True
        chosen = self._chosen.get(node, {})
        return any(step in chosen[kind].passes if kind in chosen else (kind, step) in self._defaults for kind in kinds)

    def carry(self, old: Iterable[ir.Node], new: Iterable[ir.Node]) -> None:
        """Nodes that replace others inherit what was chosen for them."""
        inherited: dict[PieceKind, Alternative] = {}
        for node in old:
            inherited.update(self._chosen.get(node, {}))
        if inherited:
            for node in new:
                self._chosen[node] = dict(inherited)
