"""What a check said of graphs, by their contents, in a file: a search that was interrupted is run again, and goes on where it was."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import onnx_ir as ir

from graphopt.core.errors import SaveError
from graphopt.core.places import write_text
from graphopt.driver.bisect import Check
from graphopt.driver.lowering.cache import cache_path
from graphopt.graph.questions import graphs
from graphopt.graph.text import graph_text

_EVERY = 1.0  # seconds between two writes
_SMALL = 4096  # bytes up to which a digest is made again
_ROOMS = ("graphopt", "graphopt.passes", "graphopt.targets")


class Memo:
    """Verdicts by the contents of graphs, kept for one search: `about` is all that they depend on, and another search has another file.

    Attributes:
        path: in the folder of the tuning cache.
        problem: why nothing is kept, if nothing is.
        known: verdicts that were read from an earlier run.
    """

    def __init__(self, about: Iterable[str], path: Path | None = None) -> None:
        key = hashlib.sha256("\0".join([*about, _code()]).encode()).hexdigest()[:24]
        self.path = cache_path().parent / "debug" / f"{key}.json" if path is None else path
        self.problem: str | None = None
        self.contents = Contents()
        self._said: dict[str, str | None] = self._read()
        self.known, self._written = len(self._said), time.monotonic()

    def remember(self, key: str, said: str | None) -> None:
        self._said[key] = said
        if time.monotonic() - self._written > _EVERY:
            self.flush()

    def recall(self, key: str) -> tuple[bool, str | None]:
        """Whether there is a verdict, and which."""
        return key in self._said, self._said.get(key)

    def keep(self, check: Check) -> Check:
        """The same check, which asks about each graph once."""

        def asked(model: ir.Model) -> str | None:
            key = "check " + self.contents.of(model)
            there, said = self.recall(key)
            if not there:
                self.remember(key, said := check(model))
            return said

        return asked

    def flush(self) -> None:
        """Write it, whole or not at all."""
        self._written = time.monotonic()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, json.dumps(self._said))
        except (OSError, SaveError) as error:
            self.problem = f"an interrupted search will start anew, as its state cannot be kept: {error}"

    def forget(self) -> None:
        """The search has ended."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> dict[str, str | None]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # there is none, or it is not one of ours: the search starts anew
            return {}
        return found if isinstance(found, dict) else {}


class Contents:
    """Digests of graphs with their weights; what is written about them (metadata) does not count. A weight that graphs share is read once."""

    def __init__(self) -> None:
        self._weights: dict[int, tuple[ir.TensorProtocol, str]] = {}  # by identity; the tensor is held, so that no other takes its place

    def of(self, model: ir.Model) -> str:
        digest = hashlib.sha256(graph_text(model, weights=False).encode())
        for graph in graphs(model):
            for name, value in graph.initializers.items():
                digest.update(f"{name}={'' if value.const_value is None else self._weight(value.const_value)}\n".encode())
        return digest.hexdigest()[:32]

    def _weight(self, tensor: ir.TensorProtocol) -> str:
        found = self._weights.get(id(tensor)) or (tensor, hashlib.sha256(tensor.tobytes()).hexdigest())
        if tensor.nbytes > _SMALL:
            self._weights[id(tensor)] = found
        return found[1]


def _code() -> str:
    """When the code of the product changed last: verdicts about another state of it are worth nothing."""
    folders = [place for room in _ROOMS if (spec := find_spec(room)) is not None for place in spec.submodule_search_locations or ()]
    return str(max((file.stat().st_mtime_ns for folder in folders for file in Path(folder).rglob("*.py")), default=0))
