"""The keywords of a run, stated once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graphopt.core.contract import Metric, Target
from graphopt.core.remarks import Progress
from graphopt.io.load import LoadOptions


class RunOptions(LoadOptions, total=False):
    """Keywords of `optimize`, which tells what they mean, and of `Job.make`, which knows their defaults."""

    level: int
    target: str | Target
    samples: Any
    tokenizer: Any
    metric: Metric | None
    max_loss: float | None
    require: Sequence[str]
    plugins: Sequence[str]
    verify_each: bool
    check_numerics: bool
    time: bool
    print_changed: bool
    dump: str | Path | None
    fuel: int | None
    promise: bool | None
    gate: bool
    shapes: str | None
    progress: Progress | None
    out: str | Path | None
    writes: Sequence[str | Path]
    repro: str | Path | None
    with_weights: bool
