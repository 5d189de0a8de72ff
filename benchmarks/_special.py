"""What the rules of _shrink.py and _every.py cannot know of single architectures: fields, lengths of text, inputs."""

from __future__ import annotations

from typing import Any

OVERRIDES: dict[str, dict[str, Any]] = {}
LENGTHS: dict[str, tuple[int, int]] = {}
INPUTS: dict[str, tuple[tuple[str, str], ...]] = {}
