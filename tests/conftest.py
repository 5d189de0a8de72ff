"""What every test needs: a tuning cache of its own, so that no run reads or writes the user's."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def tuning_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    os.environ["GRAPHOPT_CACHE"] = str(tmp_path_factory.mktemp("cache") / "tuning.sqlite")
    yield
    del os.environ["GRAPHOPT_CACHE"]
