"""Where batches come from: files, and text behind a tokenizer."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import onnx_ir as ir

from graphopt.core.errors import SampleError, require
from graphopt.core.replay import Batch
from graphopt.graph.dims import fed_inputs

TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")  # what a tokenizer can give; a model takes those that it has


class Files(Sequence[Batch]):
    """.npz files, each read when its turn comes."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Files: ...
    def __getitem__(self, index: int | slice) -> Batch | Files:
        return Files(self._paths[index]) if isinstance(index, slice) else _read_npz(self._paths[index])


def open_path(path: Path) -> Sequence[Batch] | list[str]:
    if path.is_dir():
        files = sorted(path.glob("*.npz"))
        if not files:
            raise SampleError(f"{path} has no .npz file; each one is a batch with an array for every input")
        return Files(files)
    if not path.is_file():
        raise SampleError(f"{path} does not exist; give a .npz file, a folder of them, or a text file")
    if path.suffix == ".npz":
        return Files([path])
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise SampleError(f"{path} is neither .npz nor text; give a .npz file, a folder of them, or a text file") from error


def encode(texts: Sequence[str], tokenizer: Any, batch: int, max_length: int) -> Iterator[Batch]:
    """Batches of tokens, each padded to its longest text."""
    if tokenizer is None:
        raise SampleError("text samples need a tokenizer; add --tokenizer tokenizer.json (or tokenizer=... in Python)")
    if isinstance(tokenizer, (str, os.PathLike)):
        kind = require("text samples", "text", "tokenizers", error=SampleError).Tokenizer
        try:
            tokenizer = kind.from_file(os.fspath(tokenizer))
        except Exception as error:
            raise SampleError(f"{os.fspath(tokenizer)} is no tokenizer.json: {error}") from error
    tokenizer = type(tokenizer).from_str(tokenizer.to_str())  # the caller's stays as it is
    padding = {k: v for k, v in (tokenizer.padding or {}).items() if k in ("direction", "pad_id", "pad_type_id", "pad_token")}
    tokenizer.enable_padding(**padding)
    tokenizer.enable_truncation(max_length)
    for start in range(0, len(texts), batch):
        rows = tokenizer.encode_batch(list(texts[start : start + batch]))
        ids = np.array([row.ids for row in rows], np.int64)
        mask = np.array([row.attention_mask for row in rows], np.int64)
        types = np.array([row.type_ids for row in rows], np.int64)
        yield dict(zip(TEXT_INPUTS, (ids, mask, types, np.maximum(mask.cumsum(1) - 1, 0)), strict=True))


def with_empty_past(batches: Iterator[Batch], model: ir.Model) -> Iterator[Batch]:
    """Batches of text for a decoder with a cache of keys and values [batch, heads, past, size], before which nothing was said: past is 0."""
    caches = {str(v.name): v for v in fed_inputs(model) if "past" in str(v.name) and v.dtype is not None and v.dtype.is_floating_point()}
    for batch in batches:
        rows = len(batch["input_ids"])
        empty = {
            name: np.zeros([rows if axis == 0 else size if isinstance(size, int) else 0 for axis, size in enumerate(v.shape)], v.dtype.numpy())
            for name, v in caches.items()
            if v.shape is not None and v.dtype is not None
        }
        yield batch | empty


def _read_npz(path: Path) -> Batch:
    try:
        archive = np.load(path, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise SampleError(f"{path} is a .npy file, one array without a name; write it with numpy.savez, under the names of the inputs")
        with archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error, EOFError, AttributeError, NotImplementedError) as error:
        raise SampleError(f"{path} cannot be read as a .npz file of plain arrays: {error}") from error
