"""Opening a model by ONNX Runtime, also as a process of its own: as a script this file answers requests on its standard streams.

The runtime may kill the process that it runs in. What is not trusted yet is opened and run here first; `graphopt.run.guarded` keeps the process.
Only numpy and onnxruntime are imported, so that it starts quickly.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

SILENT = 4  # only fatal messages: every error comes back as an exception, and is one line there


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a model is opened.

    Attributes:
        threads: intra-op threads; 0 lets the runtime choose.
        level: of runtime optimizations: `all` is the runtime's default, and `off` the only one whose numbers are a baseline.
        providers: execution providers, best first; a pair is a name and the options of that provider.
        entries: of the session's configuration.
        saved_to: where the runtime writes the graph that it made of the model, if anywhere.
    """

    threads: int = 1
    level: str = "all"
    providers: Sequence[str | tuple[str, Mapping[str, str]]] = ("CPUExecutionProvider",)
    entries: Mapping[str, str] = dataclasses.field(default_factory=dict)
    saved_to: str = ""


def inference(source: str | bytes, settings: Settings) -> Any:
    """The InferenceSession of a file, or of its bytes."""
    import onnxruntime

    levels = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    known = {"all": levels.ORT_ENABLE_ALL, "extended": levels.ORT_ENABLE_EXTENDED, "off": levels.ORT_DISABLE_ALL}
    options.graph_optimization_level = known[settings.level]
    options.intra_op_num_threads, options.inter_op_num_threads = settings.threads, 1
    options.log_severity_level = SILENT
    if settings.saved_to:
        options.optimized_model_filepath = settings.saved_to
    for key, value in settings.entries.items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(source, options, providers=list(settings.providers))


# ---- the process ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Request:
    """Open `source` (`settings`: the fields of Settings), and run it once on `feed` (None: open only).

    `path`: where the process that asks finds its modules. It comes as a plain tuple: a class would have to be imported to be read.
    """

    source: str | bytes
    settings: Mapping[str, Any]
    feed: Mapping[str, Any] | None
    path: Sequence[str]


OPENED = "opened"  # the first of two answers: what comes next is about the run


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer until the requests end: OPENED, then the outputs by name; or, in place of either, an error as text."""
    while True:
        try:
            request: Request = Request(*pickle.load(requests))
        except EOFError:
            return
        sys.path.extend(place for place in request.path if place not in sys.path)
        try:
            session = inference(request.source, Settings(**request.settings))
            _answer(answers, OPENED)
            names = [output.name for output in session.get_outputs()]
            values = None if request.feed is None else session.run(names, dict(request.feed))
            _answer(answers, {} if values is None else dict(zip(names, values, strict=True)))
        except Exception as error:  # noqa: BLE001 -- whatever the runtime raises is the answer
            _answer(answers, str(error) or type(error).__name__)
        session = values = request = None  # type: ignore[assignment]  # its memory is free before the next one comes


def _answer(answers: IO[bytes], what: object) -> None:
    answers.write(pickle.dumps(what, protocol=5))  # whole or not at all: there are values that cannot be sent
    answers.flush()


def _alone(parent: int) -> None:
    """Ends with the process that asks, also where that was killed; leaves no core file; and is the first to go where memory ends."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Nothing that the runtime prints, and no Ctrl-C, may come between requests and answers."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    _alone(os.getppid())
    serve(requests, answers)


if __name__ == "__main__":
    main()
