"""How many times faster one session is than another, on a machine that others use too."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

ROUNDS = 15


def speedup(base: Any, other: Any, feed: dict[str, Any], rounds: int = ROUNDS) -> float:
    """Median processor time of `base` over that of `other`, in turn."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 2):
        for runner, spent in zip((base, other), seconds, strict=True):
            start = time.process_time()
            runner.run(feed)
            spent.append(time.process_time() - start)
    return float(np.median(seconds[0][2:]) / np.median(seconds[1][2:]))
