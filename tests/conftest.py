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


TIMED = {"test_promise", "test_tuning", "test_demo", "test_readme", "test_portable"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules that race models are `timed` as a whole; elsewhere a test that compares times says so by itself."""
    for item in items:
        if item.path.stem in TIMED:
            item.add_marker(pytest.mark.timed)


@pytest.fixture(autouse=True)
def untimed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of what is fused must not depend on how fast this machine is just now: only tests of the promise time the artifact."""
    if request.path.stem not in TIMED:
        monkeypatch.setattr("graphopt.driver.job._promised", lambda promise, *rest: bool(promise))
