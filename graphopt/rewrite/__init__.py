"""Changes of a graph: what a pass author subclasses, and the one driver behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphopt.core.hand_on import hand_on

if TYPE_CHECKING:
    from graphopt.rewrite.builder import Builder
    from graphopt.rewrite.dead import remove_dead
    from graphopt.rewrite.engine import Driver
    from graphopt.rewrite.insert import Inserter
    from graphopt.rewrite.match import Match, Miss
    from graphopt.rewrite.rules import RewritePass

__all__ = [
    "Builder", "Driver", "Inserter", "Match", "Miss", "RewritePass", "remove_dead",
]  # fmt: skip
__getattr__ = hand_on(__name__, __all__, ("builder", "dead", "engine", "insert", "match", "rules"))
