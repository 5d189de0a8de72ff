"""Numbers and counts as words."""

from __future__ import annotations

from typing import Any


def rise_text(rise: dict[str, Any]) -> str:
    return f"{rise['what']} {rise['before']} -> {rise['after']}: {rise['reason']}"


def megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 100_000 else f"{nbytes / 1e3:.1f} kB"


def plural(count: int, noun: str, many: str = "") -> str:
    return f"{count} {noun if count == 1 else many or noun + 's'}"


def _plain(value: object) -> Any:
    """Numbers of numpy and sets, as JSON has neither."""
    if hasattr(value, "item"):
        return value.item()
    if isinstance(value, (set, frozenset, tuple)):
        return sorted(map(str, value)) if not isinstance(value, tuple) else list(value)
    return str(value)
