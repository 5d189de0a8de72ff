"""What can be shown and written: elements for people, values for tools. A report of a new kind is one subclass."""

from __future__ import annotations

import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from graphopt.core import places
from graphopt.core.errors import SaveError
from graphopt.report.elements import Element
from graphopt.report.words import plain
from graphopt.report.writers import html, markdown

_PAGES = {".html": html.page, ".md": markdown.page}
SUFFIXES = (".json", *_PAGES)


class Document(ABC):
    """`title` heads its pages."""

    title: ClassVar[str] = "graphopt"

    @abstractmethod
    def elements(self) -> Sequence[Element]:
        """In the order in which they are read."""

    def as_dict(self) -> Any:
        """JSON values; by default the elements as they are."""
        return {"elements": [element.as_dict() for element in self.elements()]}

    def json(self) -> str:
        """A number that JSON has not is the text `inf`, `-inf` or `nan`."""
        return json.dumps(plain(self.as_dict()), indent=1)

    def write(self, path: str | Path) -> None:
        """Write `.json`, `.html` (one file that needs nothing else) or `.md`, whole or not at all.

        Raises:
            SaveError: another suffix, or the file cannot be written.
        """
        with self.staged(path):
            pass

    @contextlib.contextmanager
    def staged(self, path: str | Path) -> Iterator[None]:
        """As `write`, around something else: see `places.staged`. The body may change what is written."""
        path = checked(path)
        with places.staged(path, lambda: self._text(path.suffix)):
            yield

    def _text(self, suffix: str) -> str:
        return self.json() + "\n" if suffix == ".json" else _PAGES[suffix](self.title, self.elements())


def checked(path: str | Path) -> Path:
    """The path of a report, before any work.

    Raises:
        SaveError: no writer has this suffix.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise SaveError(f"a report is {' or '.join(f'FILE{suffix}' for suffix in SUFFIXES)}, found {path}")
    return path
