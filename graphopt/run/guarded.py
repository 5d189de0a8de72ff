"""Open and run a model where a crash of the runtime ends no process of the user: in a worker process that may die.

The worker is started when it is first asked, serves many probes, and is started anew when it died. So a probe costs one load and one run.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from graphopt.core.contract import Array, Session, Target
from graphopt.core.errors import TargetError
from graphopt.run import Feeds, Port, in_size, in_width, one_line, ort, worker
from graphopt.run.worker import Settings

if TYPE_CHECKING:
    import onnx

PATIENCE = 120.0  # seconds for one load and one run, and as long again for each gigabyte of the model
_LARGE = 2**28  # bytes of a model whose memory the worker gives back by ending


class Died(TargetError):
    """The runtime killed its process, or did not come back within the time limit."""


def probe(
    model: ir.Model | onnx.ModelProto | bytes | str | os.PathLike[str],
    feed: Feeds | None = None,
    settings: Settings | None = None,
    *,
    limit: float | None = None,
) -> dict[str, Array]:
    """Open a model as `settings` say, run it once, and give its outputs by name; without a feed it is only opened.

    Args:
        model: as for `run.ort.session`.
        limit: seconds after which the worker is killed; by default PATIENCE and more for large models.

    Raises:
        Died: the runtime killed the process; the text names the signal and what the runtime said last.
        TargetError: the runtime refuses the model, or failed to run it; one line.
    """
    source, _keep = ort.loadable(model)
    size = os.path.getsize(source) if isinstance(source, str) else len(source)
    if feed is not None and isinstance(model, ir.Model):
        ports = list(map(Port.of, model.graph.inputs))
        feed = in_size(in_width(feed, ports), ports)
    with _LOCK:
        try:
            return _worker().ask(source, settings or ort.settings(), feed, PATIENCE * (1 + size / 2**30) if limit is None else limit)
        finally:
            if size > _LARGE:
                end()


def opened(target: Target, model: ir.Model, feed: Feeds | None = None) -> Session:
    """A session in this process of a finished model that was probed first: for whatever is timed or judged before the gate has seen it.

    Raises:
        TargetError: as `Target.probe`, and `Target.session`.
    """
    target.probe(model, feed)
    return target.session(model)


def session(model: ir.Model | str | os.PathLike[str], *, threads: int = 1) -> ort.OrtSession:
    """`run.ort.session` of a model of the user, which may end the process that loads it: another one loads it first.

    Raises:
        TargetError: the runtime refuses the model, or dies of it; one line.
    """
    probe(model, None, ort.settings(threads))
    return ort.session(model, threads=threads)


def end() -> None:
    """End the worker, if there is one; the next probe starts another."""
    global _current
    current, _current = _current, None
    if current is not None and current.owner == os.getpid():
        current.end()


# ---- the process ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Worker:
    """A running worker process. `owner`: the process that started it; one that was forked from that one must not talk to it."""

    process: subprocess.Popen[bytes]
    said: Any  # a file: what the runtime prints
    owner: int

    def ask(self, source: str | bytes, settings: Settings, feed: Feeds | None, limit: float) -> dict[str, Array]:
        late = threading.Event()

        def kill() -> None:
            late.set()
            self.process.kill()

        self.said.truncate(0)
        timer = threading.Timer(limit, kill)
        timer.daemon = True
        timer.start()
        phase = "cannot load the model"
        try:
            self._send((source, dataclasses.asdict(settings), None if feed is None else dict(feed), [os.path.abspath(place) for place in sys.path]))
            answer = pickle.load(self.process.stdout)  # type: ignore[arg-type]
            if answer == worker.OPENED:
                phase = "failed to run the model"
                answer = pickle.load(self.process.stdout)  # type: ignore[arg-type]
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            how = self._how()
            end()
            why = f"it did not come back within {limit:.0f} s" if late.is_set() else how
            raise Died(f"onnxruntime {phase}: {why}") from error
        except BaseException:  # Ctrl-C between question and answer: what comes from this worker now answers nothing
            end()
            raise
        finally:
            timer.cancel()
        if isinstance(answer, str):
            raise TargetError(f"onnxruntime {phase}: {one_line(Exception(answer))}")
        return answer  # type: ignore[no-any-return]

    def _send(self, request: tuple[Any, ...]) -> None:
        assert self.process.stdin is not None
        pickle.dump(request, self.process.stdin, protocol=5)
        self.process.stdin.flush()

    def _how(self) -> str:
        """How the process died, and the last that it said."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5.0)
        code = self.process.returncode or 0
        if code == -signal.SIGKILL:
            return "the process was killed, as the system does where memory ends"
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        self.said.seek(0)
        text = one_line(Exception(self.said.read().decode(errors="replace")[-400:] or "nothing more was said"))
        return f"it ended the process by {name} ({text})"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.said):
            with contextlib.suppress(OSError):  # a request that could not be sent is still in the buffer
                stream.close()  # type: ignore[union-attr]


_current: _Worker | None = None
_LOCK = threading.RLock()


def _worker() -> _Worker:
    global _current
    if _current is None or _current.owner != os.getpid() or _current.process.poll() is not None:
        end()
        _current = _start()
    return _current


def _start() -> _Worker:
    """A Python that starts with this process's interpreter and environment, whatever the main module is, and shares none of its streams."""
    if not sys.executable:
        raise TargetError("no worker process can be started: this interpreter does not know its own program (sys.executable)")
    said = tempfile.TemporaryFile()  # noqa: SIM115 -- it lives as long as the worker
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONFAULTHANDLER"}  # its pages would hide what the runtime said
    process = subprocess.Popen(
        [sys.executable, "-P", worker.__file__],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, env=environment, start_new_session=True,
    )  # fmt: skip
    return _Worker(process, said, os.getpid())


atexit.register(end)
