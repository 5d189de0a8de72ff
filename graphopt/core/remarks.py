"""What passes did and did not do, as data: every hit says what, every near miss says why."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

Kind = Literal["applied", "missed", "warning"]
Progress = Callable[[str, float], None]  # called with what is done now, and the fraction of all work


@dataclasses.dataclass(frozen=True)
class Remark:
    """One remark. `node` is the name of the node (or value) it is about; `facts` holds JSON values only."""

    kind: Kind
    pass_name: str
    node: str
    message: str
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        where = f" at `{self.node}`" if self.node else ""
        return f"{self.kind} {self.pass_name}{where}: {self.message}"

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "node": self.node, "message": self.message, "facts": dict(self.facts)}


class Remarks:
    """A list of remarks; `current` names the pass that speaks."""

    def __init__(self) -> None:
        self.current = "load"
        self._all: list[Remark] = []

    def __iter__(self) -> Iterator[Remark]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def since(self, mark: int) -> list[Remark]:
        """The remarks added after `len(remarks)` was `mark`."""
        return self._all[mark:]

    def applied(self, node: str, message: str, **facts: Any) -> None:
        self._all.append(Remark("applied", self.current, node, message, facts))

    def missed(self, node: str, message: str, **facts: Any) -> None:
        self._all.append(Remark("missed", self.current, node, message, facts))

    def warning(self, node: str, message: str, **facts: Any) -> None:
        self._all.append(Remark("warning", self.current, node, message, facts))


def plural(count: int, noun: str, many: str = "") -> str:
    """`1 node`, `2 nodes`: a count in a message."""
    return f"{count} {noun if count == 1 else many or noun + 's'}"
