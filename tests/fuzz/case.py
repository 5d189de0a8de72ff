"""What is tried, and what came of it."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

FINE, UNJUDGED, REFUSED, FINDING = "fine", "unjudged", "refused", "finding"


@dataclasses.dataclass(frozen=True)
class Case:
    """One input. It is made again from its kind and seed, and from fewer of its parts when it is minimized.

    Attributes:
        model: the bytes of the file.
        pipeline: passes as text; None = those of `level`.
        samples: whether the run gets samples.
        check: whether every pass is checked for its numbers, too.
        parts: what it is made of besides the model: passes, or mutations, as text.
    """

    kind: str
    seed: int
    model: bytes
    base: str = ""
    pipeline: str | None = None
    level: int = 1
    target: str = "cpu{tune=off}"
    samples: bool = False
    check: bool = False
    parts: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`what` is fine, unjudged (right in form, and the input itself does not run), refused (one honest line), or a finding."""

    what: Literal["fine", "unjudged", "refused", "finding"]
    stage: str = ""
    message: str = ""
    trace: str = ""

    @classmethod
    def of(cls, answer: dict[str, Any]) -> Verdict:
        return cls(**{f.name: answer[f.name] for f in dataclasses.fields(cls) if f.name in answer})
