"""How far a lossy pass goes, stated once: `weaker`, the bisection of a transaction and a search all read it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

_CLOSE = 1.1  # two settings whose amounts differ by less have none between them


@dataclasses.dataclass(frozen=True)
class Dial:
    """An option that says how far, from `mild`, the mildest setting worth trying, to its value now.

    Attributes:
        option: a number, whole if `mild` is, or a tuple, of which fewer items are milder.
        by: the part of the amount that a milder setting keeps.
        rises: milder settings are larger (`rank=64` loses less than `rank=16`).
        rest: the amount is what the option leaves of 1 (`energy=0.95` loses 0.05).
        unset: what None stands for, where none of the pass' `ways` is given.
    """

    option: str
    mild: float = 0.01
    by: float = 0.5
    rises: bool = False
    rest: bool = False
    unset: float | None = None

    def milder(self, value: Any) -> Any | None:
        """The next setting; None at the end."""
        now, mild = self._amount(value), self._amount(self.mild)
        if self.rises:
            return self._value(value, min(math.ceil(now / self.by), mild)) if now < mild else None
        return self._value(value, max(now * self.by, mild)) if now > mild else None

    def between(self, value: Any, milder: Any) -> Any | None:
        """A setting between two; None where there is none."""
        a, b = self._amount(value), self._amount(milder)
        if isinstance(self.mild, int):
            return self._value(value, (a + b) / 2) if abs(a - b) > 1 else None
        return self._value(value, math.sqrt(a * b)) if max(a, b) > _CLOSE * min(a, b) else None

    def _amount(self, value: Any) -> float:
        return float(len(value) if isinstance(value, tuple) else 1 - value if self.rest else value)

    def _value(self, like: Any, amount: float) -> Any:
        if isinstance(self.mild, int):
            return like[: int(amount)] if isinstance(like, tuple) else int(amount)
        short = float(f"{amount:.4g}")
        return round(1 - short, 8) if self.rest else short


@dataclasses.dataclass(frozen=True)
class Switch:
    """A setting that can be milder in one way: where `option` is `strong`, these options change."""

    option: str
    strong: Any
    mild: Mapping[str, Any]


Dials = tuple[Dial | Switch, ...]


def turned(one: Any, move: Callable[[Dial, Any], Any | None]) -> Any | None:
    """The pass with every dial in use moved; None if none moves."""
    values = {dial.option: moved for dial, value in in_use(one) if (moved := move(dial, value)) is not None}
    return dataclasses.replace(one, **values) if values else None


def in_use(one: Any) -> list[tuple[Dial, Any]]:
    """The dials of a pass that are given, and their values."""
    found = []
    for dial in one.dials:
        if isinstance(dial, Dial):
            value = getattr(one, dial.option)
            value = dial.unset if value is None and not one.ways.given(one) else value
            found += [(dial, value)] if value not in (None, ()) else []
    return found


def switched(one: Any) -> Any | None:
    """The pass with its first strong switch turned to mild; None if there is none."""
    for switch in one.dials:
        if isinstance(switch, Switch) and getattr(one, switch.option) == switch.strong:
            return dataclasses.replace(one, **switch.mild)
    return None
