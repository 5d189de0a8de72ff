"""What a report is made of: lines, texts, tables, plots. Plain data; every writer knows these four, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Element:
    """`detail`: for a page that is kept, and too much for a terminal."""

    detail: bool = False

    def as_dict(self) -> dict[str, Any]:
        return {"kind": type(self).__name__.lower()} | dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Line(_Element):
    """A sentence; a writer may break it. What stands between backticks is code."""

    text: str


@dataclasses.dataclass(frozen=True)
class Text(_Element):
    """Lines as they stand, such as a docstring or a log."""

    text: str


@dataclasses.dataclass(frozen=True)
class Table(_Element):
    """Cells are written by `str`. `align` has one letter a column, l or r; by default every column is left-aligned."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    title: str = ""
    align: str = ""

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), "a row has one cell for each column"
        assert not self.align or len(self.align) == len(self.columns), "the alignment has one letter for each column"

    def right(self, column: int) -> bool:
        return self.align[column : column + 1] == "r"


@dataclasses.dataclass(frozen=True)
class Plot(_Element):
    """Two numbers a row, a bar and a ring, from 0 up; what is infinite reaches the border.

    Attributes:
        rows: label, length of the bar, place of the ring.
        bar, ring: what they stand for.
        unit: of both.
        tick: units between two marks of the axis.
    """

    title: str
    rows: Sequence[tuple[str, float, float]]
    bar: str
    ring: str
    unit: str
    tick: float

    @property
    def top(self) -> float:
        """The right border: the first mark behind every finite number."""
        finite = (x for row in self.rows for x in row[1:] if abs(x) < float("inf"))
        return max(self.tick, *(self.tick * (x // self.tick + 1) for x in finite), 0.0)

    def share(self, x: float) -> float:
        """Where `x` stands between 0 and the right border, from 0 to 1."""
        return min(max(x, 0.0), self.top) / self.top


Element = Line | Text | Table | Plot
