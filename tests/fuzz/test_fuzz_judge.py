"""The judge finds what is planted: a raw exception, a wrong number, a death of the process, a hang, another interface."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from harness import build  # type: ignore[import-not-found]

from fuzz import judge as judging  # type: ignore[import-not-found]
from fuzz.case import FINDING, FINE, REFUSED, Case, Verdict  # type: ignore[import-not-found]
from graphopt.core.errors import LoadError
from graphopt.core.registry import passes

GRAPH = "(float[B,4] x) => (float[B,4] y) <float[4] w> { a = Add(x, w)  y = Relu(a) }"


def judge(tmp_path: Path, pipeline: str = "canonicalize", text: str = GRAPH) -> Verdict:
    case = Case("planted", 1, build(text).SerializeToString(), pipeline=pipeline)
    return judging.Judge(case, tmp_path, lambda stage: None).verdict()


def plant(monkeypatch: pytest.MonkeyPatch, act: Any) -> None:
    """`act(model)` happens in the pass canonicalize."""
    monkeypatch.setattr(passes()["canonicalize"], "run", lambda self, model, ctx: act(model))


def test_what_is_right_is_fine(tmp_path: Path) -> None:
    assert judge(tmp_path).what == FINE


def test_a_raw_exception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(model: ir.Model) -> int:
        raise KeyError("axis")

    plant(monkeypatch, act)
    found = judge(tmp_path)
    assert (found.what, found.stage) == (FINDING, "optimize")
    assert found.message.startswith("internal: KeyError")


def test_a_wrong_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(model: ir.Model) -> int:
        for node in model.graph:
            if node.op_type == "Relu":
                node.op_type = "Tanh"
                return 1
        return 0

    plant(monkeypatch, act)
    found = judge(tmp_path)
    assert found.what == FINDING
    assert found.message.startswith("wrong number (optimizations off): output `y`")


def test_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(model: ir.Model) -> int:
        until = time.process_time() + 0.2
        while time.process_time() < until:
            pass
        return 0

    plant(monkeypatch, act)
    monkeypatch.setattr(judging, "SECONDS", 0.15)
    assert judge(tmp_path).message.startswith("hang: ")


def test_another_interface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(model: ir.Model) -> int:
        model.graph.inputs[0].name = "z"
        return 1

    plant(monkeypatch, act)
    found = judge(tmp_path)
    assert found.what == FINDING
    assert "interface" in found.message


def test_a_refusal_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert judge(tmp_path, "canonicalize{no-such=1}").what == REFUSED

    def act(model: ir.Model) -> int:
        raise LoadError("short " * 500)

    plant(monkeypatch, act)
    assert "letters" in judge(tmp_path).message


def test_a_death_is_a_verdict(tmp_path: Path) -> None:
    """The process that judges is killed; whoever asked gets a finding that names the stage, and the next case is judged."""
    from fuzz.worker import Cases  # type: ignore[import-not-found]

    cases = Cases(tmp_path)
    try:
        assert cases.judge("planted-death", 0).what == FINDING
        assert dataclasses.replace(cases.judge("bytes", 0, light=True), message="", trace="").what != FINDING
    finally:
        cases.stop()
