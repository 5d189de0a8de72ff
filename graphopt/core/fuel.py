"""Bisect fuel: every change of a graph burns one unit; with a limit, the first N changes happen and no other."""

from __future__ import annotations

from collections.abc import Collection, Hashable


class Fuel:
    """Counts changes; `limit=None` never runs out.

    Args:
        skip: numbers of changes, from 1, that are left out alone. They are counted, so that all up to them keep their numbers. What only tidies
            up (dead nodes) is never left out.
    """

    def __init__(self, limit: int | None = None, skip: Collection[int] = ()) -> None:
        self.limit, self.skip, self.burned = limit, frozenset(skip), 0
        self._left_out: dict[Hashable, int] = {}  # what -> its number

    @property
    def empty(self) -> bool:
        return self.limit is not None and self.burned >= self.limit

    @property
    def why(self) -> str:
        """Why `burn` said no, for a remark."""
        return "the fuel is used up" if self.empty else "this change is left out"

    def burn(self, what: Hashable = None) -> bool:
        """True if one more change may happen; if not, others still may, unless it is `empty`.

        Args:
            what: names the change for who will ask again, such as the next round of a rewrite: what was left out once stays so.
        """
        if self.empty or (what is not None and what in self._left_out):
            return False
        self.burned += 1
        if self.burned not in self.skip:
            return True
        if what is not None:
            self._left_out[what] = self.burned
        return False

    def rewound(self, burned: int, limit: int | None) -> Fuel:
        """As this one was after `burned` units, with another limit: to repeat what came then."""
        fuel = Fuel(limit, self.skip)
        fuel.burned, fuel._left_out = burned, {what: number for what, number in self._left_out.items() if number <= burned}
        return fuel

    def back_to(self, burned: int) -> None:
        """Give back what was burned since then, by changes that were undone."""
        self.burned = burned
