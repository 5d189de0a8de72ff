"""Where files may be written: checked before any work, whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from graphopt.core.errors import SaveError


def data_file(out: Path) -> Path:
    """Where the weights of `out` go if they do not go into it."""
    return out.with_name(out.name + ".data")


def check_places(files: Iterable[Path], sources: Iterable[str] = (), dumped: Iterable[Path] = ()) -> None:
    """Refuse files that must not be written: files of the input, one file for two outputs, folders, devices and pipes; and folders where
    nothing can be written.

    Args:
        files: one that is the folder of another is a folder that will be made, or is there.
        sources: the files of the input.
        dumped: more files, in a folder that need not be there yet.

    Raises:
        SaveError: names the file.
    """
    files, seen = list(files), set[str]()
    made = {file.absolute() for file in files} & {file.absolute().parent for file in files}
    for file in (*files, *dumped):
        if file.absolute() not in made:
            _check_file(file, sources)
        elif os.path.lexists(file) and not os.path.isdir(file):
            raise SaveError(f"cannot write {file}: it is a file, and a folder goes there; choose another name")
        place = os.path.realpath(file)
        if place in seen:
            raise SaveError(f"cannot write {file}: another output of this run goes there; choose another name")
        seen.add(place)
    for folder, file in {file.absolute().parent: file for file in reversed(files)}.items():
        if folder in made and not os.path.isdir(folder):
            continue
        if not os.path.isdir(folder):
            raise SaveError(f"cannot write {file}: there is no folder {folder}; create it first")
        try:
            with beside(folder / "graphopt"):
                pass
        except OSError as error:
            raise SaveError(f"cannot write into the folder {folder}: {error.strerror or error}; choose another one") from None


def _check_file(file: Path, sources: Iterable[str]) -> None:
    if os.path.isdir(file):
        raise SaveError(f"cannot write {file}: it is a folder; name a file")
    if not os.path.exists(file):
        return
    if not os.path.isfile(file) or (os.path.islink(file) and os.readlink(file).startswith("/proc/")):  # /dev/stdout leads to /proc
        raise SaveError(f"cannot write {file}: it is a device, a pipe or a socket, and would be replaced; name a file")
    if any(os.path.exists(source) and os.path.samefile(file, source) for source in sources):
        raise SaveError(f"cannot write {file}: it belongs to the input, which is never touched; choose another name")


@contextlib.contextmanager
def beside(out: Path) -> Iterator[Path]:
    """A folder beside the output, on the same file system, that is gone at the end whatever happens."""
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def staged(path: Path, text: Callable[[], str]) -> Iterator[None]:
    """Write a text file around something else: drafted beside `path` before the body, so that what cannot be written shows before the body
    has left anything, and put in place after it, with what the body has changed; not at all if the body fails.

    Raises:
        SaveError: the file cannot be written.
    """
    check_places((path,))
    with beside(path.absolute()) as folder:
        draft = folder / path.name
        with _named(path):
            draft.write_text(text(), encoding="utf-8")
        yield
        with _named(path):
            draft.write_text(text(), encoding="utf-8")
            os.replace(draft, path)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        SaveError: the file cannot be written.
    """
    with staged(path, lambda: text):
        pass


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SaveError(f"cannot write {path}: {error.strerror or error}") from error
