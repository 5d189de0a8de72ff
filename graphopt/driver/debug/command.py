"""A run as a command line that does it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

_FLAGS = {  # option -> flag, for those with a value; a list gives the flag once for each
    "target": "--target", "plugins": "--plugin", "samples": "--samples", "tokenizer": "--tokenizer", "metric": "--metric", "max_loss": "--max-loss",
    "require": "--require", "fuel": "--fuel", "shapes": "--shapes", "task": "--task", "check": "--check", "command": "--check-command",
    "out": "--output", "threads": "--threads",
}  # fmt: skip
_SWITCHES = {"verify_each": "--verify-each", "check_numerics": "--check-numerics", "with_past": "--with-past"}


def spelled(verb: str, model: str, pipeline: str | None, options: Mapping[str, Any]) -> str:
    """`graphopt VERB MODEL ...` for the options that differ from their defaults; those that no flag says are left out."""
    words = ["graphopt", verb, model]
    if pipeline is not None:
        words += ["--pipeline", pipeline]
    elif options.get("level") is not None:
        words += ["-O", str(options["level"])]
    for name, flag in _FLAGS.items():
        value = options.get(name)
        many = value if isinstance(value, Sequence) and not isinstance(value, str) else [] if value is None else [value]
        words += [word for one in many if str(one) != "" for word in (flag, str(one))]
    words += [flag for name, flag in _SWITCHES.items() if options.get(name)]
    words += ["--no-measure"] if options.get("promise") is False and verb == "optimize" else []
    words += ["--no-gate"] if options.get("gate") is False else []
    for name, dims in (options.get("input_shapes") or {}).items():
        words += ["--input-shape", f"{name}:{','.join(map(str, dims))}"]
    return shlex.join(words)
