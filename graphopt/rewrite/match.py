"""What a rewrite found: a match to replace, or a near miss with its reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import onnx_ir as ir


@dataclasses.dataclass(frozen=True)
class Match:
    """What to replace: `nodes` disappear, and each of `outputs` (made by them) gets a replacement. Subclasses add facts."""

    nodes: tuple[ir.Node, ...]
    outputs: tuple[ir.Value, ...]

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the `applied` remark says about this match (JSON values)."""
        return {}


@dataclasses.dataclass(frozen=True)
class Miss:
    """A near miss: it looked right, but must not be rewritten. `hint` tells the user what would help."""

    node: ir.Node
    reason: str
    hint: str = ""


M = TypeVar("M", bound=Match)
