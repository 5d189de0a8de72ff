"""Bisect fuel: every change of a graph burns one unit; with a limit, the first N changes happen and no other."""

from __future__ import annotations


class Fuel:
    """Counts changes; `limit=None` never runs out."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit, self.burned = limit, 0

    @property
    def empty(self) -> bool:
        return self.limit is not None and self.burned >= self.limit

    def burn(self) -> bool:
        """True if one more change may happen."""
        if self.empty:
            return False
        self.burned += 1
        return True

    def back_to(self, burned: int) -> None:
        """Give back what was burned since then, by changes that were undone."""
        self.burned = burned
