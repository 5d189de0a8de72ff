"""What was timed before: an SQLite file in the user's cache folder, that several processes may use at once and that may be deleted at any time.

A row is the time of one spelling of one piece at one size, on one machine (processor, runtime with its build, provider, threads). A profile
can be exported as JSON on the device and imported where the model is built.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from graphopt.core.errors import GraphoptError
from graphopt.core.machine import Machine

T = TypeVar("T")
FORMAT = "graphopt-tuning-2"  # 2: the key of a piece holds what its small constants say
_COLUMNS = ("processor", "runtime", "provider", "threads", "piece", "spelling", "shape", "seconds", "description", "measured")
_CREATE = """create table if not exists timings_2 (
    processor text not null, runtime text not null, provider text not null, threads integer not null, piece text not null, spelling text not null,
    shape text not null, seconds real not null, description text not null, measured real not null,
    primary key (processor, runtime, provider, threads, piece, spelling))"""
_PATIENCE = 5.0  # seconds to wait for another process


@dataclasses.dataclass(frozen=True)
class Timed:
    """Median `seconds` of `spelling` of a piece. `piece` is the fingerprint of its operators, types and sizes; `shape` the sizes of the model."""

    piece: str
    spelling: str
    shape: str
    seconds: float
    description: str


def cache_path() -> Path:
    """GRAPHOPT_CACHE (a file, or a folder), or tuning.sqlite in XDG_CACHE_HOME/graphopt or ~/.cache/graphopt."""
    given = os.environ.get("GRAPHOPT_CACHE")
    if given:
        path = Path(given)
        return path / "tuning.sqlite" if path.is_dir() or not path.suffix else path
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "graphopt" / "tuning.sqlite"


class Cache:
    """The timings. `problem` says why the file could not be used; reading then gives nothing, and writing keeps nothing."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = cache_path() if path is None else path
        self.problem: str | None = None

    def find(self, machine: Machine, pieces: Iterable[str], *, any_runtime: bool = False) -> dict[tuple[str, str], float]:
        """(piece, spelling) -> seconds on this machine; with `any_runtime` also what other versions of the runtime took, the latest first."""
        wanted = list(dict.fromkeys(pieces))

        def read(connection: sqlite3.Connection) -> dict[tuple[str, str], float]:
            found: dict[tuple[str, str], float] = {}
            for piece in wanted:
                rows = connection.execute(
                    "select spelling, seconds from timings_2 where processor = ? and provider = ? and threads = ? and piece = ?"
                    " and (runtime = ? or ?) order by measured",
                    (machine.processor, machine.provider, machine.threads, piece, machine.runtime, any_runtime),
                )
                found.update({(piece, spelling): seconds for spelling, seconds in rows})
            return found

        return self._use(read, {})

    def add(self, machine: Machine, timed: Iterable[Timed]) -> None:
        where = (machine.processor, machine.runtime, machine.provider, machine.threads)
        rows = [(*where, *dataclasses.astuple(t), time.time()) for t in timed]  # in the order of _COLUMNS
        self._use(lambda connection: self._insert(connection, rows), None)

    def rows(self) -> list[dict[str, Any]]:
        """Everything, newest first."""
        query = f"select {', '.join(_COLUMNS)} from timings_2 order by measured desc, piece, seconds"
        return self._use(lambda c: [dict(zip(_COLUMNS, row, strict=True)) for row in c.execute(query)], [])

    def export(self) -> str:
        return json.dumps({"format": FORMAT, "timings": self.rows()}, indent=1)

    def take(self, text: str) -> int:
        """Import what `export` gave; returns how many rows.

        Raises:
            GraphoptError: it is no such text, or the cache cannot be written.
        """
        rows = list(_parsed(text))
        self._use(lambda connection: self._insert(connection, rows), None)
        self.require()
        return len(rows)

    def clear(self) -> None:
        """Forget everything; a file that is no database is removed."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise GraphoptError(f"cannot remove {self.path}: {error.strerror}") from error

    def require(self) -> None:
        if self.problem is not None:
            raise GraphoptError(self.problem)

    @staticmethod
    def _insert(connection: sqlite3.Connection, rows: Iterable[tuple[Any, ...]]) -> None:
        connection.executemany(f"insert or replace into timings_2 values ({', '.join('?' * len(_COLUMNS))})", rows)

    def _use(self, action: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        """One short transaction; a file that cannot be used is a `problem`, never a crash."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(sqlite3.connect(self.path, timeout=_PATIENCE)) as connection, connection:
                connection.execute(_CREATE)
                return action(connection)
        except (sqlite3.Error, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            self.problem = f"the tuning cache {self.path} cannot be used ({reason}); `graphopt tune clear` removes it, GRAPHOPT_CACHE names another"
            return otherwise


def _parsed(text: str) -> Iterator[tuple[Any, ...]]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise GraphoptError(f"not a tuning profile: {error}; `graphopt tune export FILE` writes one") from error
    if not isinstance(found, Mapping) or found.get("format") != FORMAT or not isinstance(found.get("timings"), list):
        raise GraphoptError(f"not a tuning profile of the format {FORMAT}; `graphopt tune export FILE` writes one")
    for number, row in enumerate(found["timings"], start=1):
        if not isinstance(row, Mapping) or set(row) != set(_COLUMNS):
            raise GraphoptError(f"tuning profile, row {number}: expected {', '.join(_COLUMNS)}")
        numbers = (row["threads"], row["seconds"], row["measured"])
        if not all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in numbers) or not row["seconds"] > 0:
            raise GraphoptError(f"tuning profile, row {number}: threads, seconds and measured must be numbers, seconds above 0")
        yield tuple(row[column] for column in _COLUMNS)
