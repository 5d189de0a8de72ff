"""What a pass changed, as a diff that people can read: coloured on a terminal, and what is long is elided."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

_COLOURS = {"+": "green", "-": "red", "@": "cyan"}
_WEIGHT = re.compile(r".\s*%\S* = ")  # a line of a weight; that of a node has the type of its output before the sign
_SHOWN = 4  # weights of a run of them
_LONG = re.compile(r"(?<=[(\[{])[^()\[\]{}]{120,}|(?<=[({])[^(){}]{160,}")  # a list, or what a node reads, which hides the rest of its line


def show(head: str, diff: str, console: Console | None = None) -> None:
    """Print a head and a unified diff on stderr; without colours where that is no terminal, or NO_COLOR is set."""
    plain = {"no_color": True, "color_system": None} if os.environ.get("NO_COLOR") else {}
    console = console or Console(stderr=True, highlight=False, soft_wrap=True, **plain)  # type: ignore[arg-type]
    console.print(Text(head, style="bold"))
    for line in lines(diff):
        console.print(Text(line, style=_COLOURS.get(line[:1], "")))


def lines(diff: str) -> Iterator[str]:
    """The lines of a unified diff: of many weights in a row some and a count, and long lists as their beginning and a hash."""
    for (sign, weights), run in itertools.groupby(diff.splitlines(), lambda line: (line[:1], bool(_WEIGHT.match(line)))):
        found = [_LONG.sub(_elided, line) for line in run]
        if weights and len(found) > _SHOWN + 1:
            found[_SHOWN:] = [f"{sign}  ... and {len(found) - _SHOWN} more weights"]
        yield from found


def _elided(found: re.Match[str]) -> str:
    """As far as the last comma that fits, and a hash, by which two that differ look different."""
    text = found[0]
    start = text[:80].rpartition(", ")[0] or text[:80]
    return f"{start}, ... {text.count(',') + 1} in all, #{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"
