"""The command line: one file a command."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphopt.core.hand_on import hand_on

if TYPE_CHECKING:
    from graphopt.cli.root import app, main

__all__ = [
    "app", "main",
]  # fmt: skip
__getattr__ = hand_on(__name__, __all__, ("root",))
