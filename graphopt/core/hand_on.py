"""Packages that hand on the names of their modules, each imported when it is first used, so that `graphopt --help` starts at once."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any


def hand_on(package: str, names: Sequence[str], modules: Sequence[str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package: each of `names` is looked for in its `modules`, in their order."""

    def get(name: str) -> Any:
        for module in modules if name in names else ():
            found = vars(importlib.import_module(f"{package}.{module}"))
            if name in found:
                return found[name]
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get
