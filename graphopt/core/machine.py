"""The machine: which processor it is, as a text that is equal where timings are comparable, and how much memory is free."""

from __future__ import annotations

import dataclasses
import functools
import platform
import re
from pathlib import Path

# What decides which kernels a runtime takes; the model name of a virtual machine says little.
_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "sve")


@functools.cache
def processor() -> str:
    """Such as `Intel(R) Xeon(R) Processor @ 2.80GHz (avx2 avx512f avx512_vnni)`."""
    text = _read("/proc/cpuinfo")
    name = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    have = set(flags.group(1).split()) if flags else set()
    features = " ".join(f for f in _FEATURES if f in have)
    label = name.group(1).strip() if name else platform.processor() or platform.machine() or "unknown processor"
    return f"{label} ({features})" if features else label


def free_memory() -> int | None:
    """Bytes that can be had without swapping, where the system tells."""
    found = re.search(r"^MemAvailable:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    return None if found is None else int(found.group(1)) * 1024


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")[:20_000]
    except OSError:
        return ""


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a timing depends on besides the piece: the processor, the runtime with its build, its provider, and the threads.

    `in_process`: it computes in this process, on the processor; then the time of one thread can be told from that of other processes.
    """

    processor: str
    runtime: str
    provider: str
    threads: int
    in_process: bool = False

    @property
    def own_threads(self) -> int | None:
        """What `run.clock.steady_clock` asks for."""
        return self.threads if self.in_process else None
