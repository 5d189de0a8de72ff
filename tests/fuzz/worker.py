"""The process in which cases are judged, as it may die: `python tests/fuzz/worker.py --worker FILE`; FILE holds the stage it is in."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import resource
import signal
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]
from _worker import Worker, serve  # type: ignore[import-not-found]  # noqa: E402

from fuzz.case import FINDING, UNJUDGED, Verdict  # type: ignore[import-not-found]  # noqa: E402

SECONDS = 300  # of wall time; the judge counts processor time itself, and this catches what waits for ever
MEMORY = 8 << 30  # bytes of address space
QUIET = ("baseline", "input at the default level")  # a death here is that of the input


class Cases:
    """Judges cases one after another; a death or a hang is a verdict like any other."""

    def __init__(self, folder: Path) -> None:
        self.note = folder / "stage"
        self._worker = Worker(__file__, [str(self.note)], SECONDS, 500)

    def judge(self, kind: str, seed: int, keep: list[int] | None = None, *, light: bool = False) -> Verdict:
        self.note.write_text("start")
        answer: dict[str, Any] = self._worker.ask(json.dumps({"kind": kind, "seed": seed, "keep": keep, "light": light}))
        if "failed" not in answer:
            return Verdict.of(answer)
        stage = self.note.read_text()
        return Verdict(UNJUDGED if stage in QUIET else FINDING, stage, f"{answer['failed']} (in: {stage})")

    def stop(self) -> None:
        self._worker.stop()


def _answer(note: Path, key: str) -> dict[str, Any]:
    from fuzz.judge import Judge
    from fuzz.make import make

    asked = json.loads(key)
    note.write_text("make")
    if asked["kind"] == "planted-death":  # of the test that shows that a death is a verdict
        os.kill(os.getpid(), signal.SIGSEGV)
    case = make(asked["kind"], asked["seed"], asked["keep"], light=asked["light"])
    with tempfile.TemporaryDirectory(prefix="graphopt-fuzz-") as folder:
        return dataclasses.asdict(Judge(case, Path(folder), lambda stage: note.write_text(stage) and None).verdict())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    place = Path(sys.argv[2])
    os.environ.setdefault("GRAPHOPT_CACHE", str(place.with_name("tuning.sqlite")))
    serve(lambda key: _answer(place, key))
