"""What a model is made of."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

from graphopt.io.load import load
from graphopt.report.document import Document
from graphopt.report.elements import Element, Line, Table


@dataclasses.dataclass(frozen=True)
class MyReport(Document):
    """How many nodes an operator has."""

    title: ClassVar[str] = "operators"

    counts: Mapping[str, int]

    def elements(self) -> Sequence[Element]:
        return [Line("What the model is made of"), Table(("operator", "nodes"), list(self.counts.items()), align="lr")]


def count(source: str) -> MyReport:
    return MyReport(collections.Counter(node.op_type for node in load(source).graph))
