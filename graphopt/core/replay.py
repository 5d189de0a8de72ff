"""What can be read only once (a generator) is written to disk, to be read again."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

Batch = dict[str, Any]  # name -> array; for an input that is no tensor: a list of arrays, a dict, or None


class Spool(Sequence[Batch]):
    """Named arrays in a temporary folder, one .npz file a batch; the folder goes when the spool does."""

    def __init__(self, batches: Iterable[Mapping[str, Any]]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="graphopt-samples-")
        self._kinds: list[dict[str, np.dtype[Any] | None]] = []  # None: what is no array, as an object
        for batch in batches:
            self._kinds.append({name: getattr(x, "dtype", None) for name, x in batch.items()})
            np.savez(self._file(len(self._kinds) - 1), *map(_boxed, batch.values()))  # text is pickled: nobody else writes to this folder
            del batch  # so that one batch is alive when the next one is made

    def __len__(self) -> int:
        return len(self._kinds)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | Sequence[Batch]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        kinds = self._kinds[index]
        with np.load(self._file(index % len(self)), allow_pickle=True) as archive:
            return {name: _as(archive[f"arr_{k}"], kind) for k, (name, kind) in enumerate(kinds.items())}

    def __iter__(self) -> Iterator[Batch]:
        return (self[k] for k in range(len(self)))

    def _file(self, number: int) -> Path:
        return Path(self._folder.name, f"{number}.npz")


def _boxed(value: Any) -> Any:
    """What is no array as one of a single object."""
    if hasattr(value, "dtype"):
        return value
    box = np.empty((), object)
    box[()] = value
    return box


def _as(array: np.ndarray[Any, Any], kind: np.dtype[Any] | None) -> Any:
    """Types that numpy lacks, such as bfloat16, come back from a file as bytes of their width."""
    if kind is None:
        return array[()]
    return array if array.dtype == kind else array.view(kind)
