"""One job after another in a child process that is killed and replaced when it hangs or dies."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

_JOBS = 60  # then a fresh process: exporters keep memory


class Worker:
    """`ask` sends a key to `script --worker ARGUMENTS`, which answers by `serve`."""

    def __init__(self, script: str, arguments: Sequence[str], seconds: float, jobs: int = _JOBS) -> None:
        self.command = [sys.executable, script, "--worker", *arguments]
        self.seconds, self.jobs, self.done = seconds, jobs, 0
        self.child: subprocess.Popen[bytes] | None = None

    def ask(self, key: str) -> dict[str, Any]:
        """The answer for a key, or {"failed": reason} if there was none in time."""
        if self.child is None or self.done >= self.jobs:
            self.stop()
            self.child, self.done = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL), 0
        child = self.child
        assert child.stdin is not None
        assert child.stdout is not None
        self.done += 1
        try:
            child.stdin.write(f"{key}\n".encode())
            child.stdin.flush()
            ready, _, _ = select.select([child.stdout], [], [], self.seconds)
            line = child.stdout.readline() if ready else b""
        except BrokenPipeError:
            ready, line = [child.stdout], b""
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self.stop()
        return {"failed": f"the process died (exit code {child.returncode})" if ready else f"took more than {self.seconds:.0f} s"}

    def stop(self) -> None:
        if self.child is not None:
            self.child.kill()
            self.child.wait()
            self.child = None


def serve(answer: Callable[[str], dict[str, Any]]) -> None:
    """The child's side: one JSON line for every key; whatever libraries print goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            result = answer(line.strip())
        except Exception as error:  # noqa: BLE001  a tool that fails is a result here
            result = {"failed": reason(error)}
        print(json.dumps(result), file=out, flush=True)


def reason(error: BaseException, length: int = 240) -> str:
    """The innermost cause, as one line; of onnxruntime's long texts the node and the message."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(x.strip() for x in str(error).splitlines() if x.strip())
    found = re.search(r"running (\w+) node\. Name:'([^']*)' Status Message: (.*)", text)
    if found:
        message = re.sub(r"^/\S+ .* was false\.? *", "", found[3])
        text = f"{found[1]} `{found[2]}`: {message}"
    return f"{type(error).__name__}: {text}"[:length]
