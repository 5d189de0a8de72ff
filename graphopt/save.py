"""Another name of `graphopt.io.save`, for targets that are written against it."""

from __future__ import annotations

from graphopt.io.save import save, save_as_is

__all__ = ["save", "save_as_is"]
