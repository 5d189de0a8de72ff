"""What a run has to say: elements, and the writers for a terminal, HTML, Markdown and JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphopt.core.hand_on import hand_on

if TYPE_CHECKING:
    from graphopt.report.report import Measured, Report, Timing

__all__ = [
    "Measured", "Report", "Timing",
]  # fmt: skip
__getattr__ = hand_on(__name__, __all__, ("report",))
