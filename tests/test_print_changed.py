"""--print-changed: a diff that people can read."""

from __future__ import annotations

from io import StringIO

import pytest
from test_api import BLOCK, model

import graphopt
from graphopt.graph.text import diff
from graphopt.report.writers import changes

WEIGHTS = "\n".join(f"  %w{k} = f32[4,4] #0000000{k}" for k in range(9))
GRAPH = f"graph (%x: f32[4]) -> (%y: f32[4]) {{\n{WEIGHTS}\n  %h: f32[4] = Relu(%x)\n  %y: f32[4] = Neg(%h)\n}}\n"


def drawn(text: str, monkeypatch: pytest.MonkeyPatch, terminal: bool = True, **environment: str) -> str:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", **environment}.items():
        monkeypatch.setenv(name, value)
    out = StringIO()
    out.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stderr", out)
    changes.show("--- head", text)
    return out.getvalue()


def test_colours_are_for_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = diff(GRAPH, GRAPH.replace("Relu", "Abs"))
    shown = drawn(text, monkeypatch)
    assert "\x1b[31m-  %h: f32[4] = Relu(%x)\x1b[0m" in shown
    assert "\x1b[32m+  %h: f32[4] = Abs(%x)\x1b[0m" in shown
    assert "\n   %y: f32[4] = Neg(%h)\n" in shown, "what stays is context, without a colour"
    for plain in (drawn(text, monkeypatch, terminal=False), drawn(text, monkeypatch, NO_COLOR="1"), drawn(text, monkeypatch, TERM="dumb")):
        assert plain == f"--- head\n{text}"


def test_many_weights_are_counted() -> None:
    after = GRAPH.replace(WEIGHTS, "  %one = f32[4] #00000001")
    assert list(changes.lines(diff(GRAPH, after))) == [
        "@@ -1,12 +1,4 @@", " graph (%x: f32[4]) -> (%y: f32[4]) {", *(f"-{line}" for line in WEIGHTS.splitlines()[:4]), "-  ... and 5 more weights",
        "+  %one = f32[4] #00000001", "   %h: f32[4] = Relu(%x)", "   %y: f32[4] = Neg(%h)",
    ]  # fmt: skip


def test_a_long_list_is_elided_and_its_change_still_shows() -> None:
    before, after = (GRAPH.replace("Neg(%h)", f"Pad(%h) {{pads=[{', '.join(map(str, [*range(200), last]))}]}}") for last in (7, 8))
    old, new = (line for line in changes.lines(diff(before, after)) if line[0] in "+-")
    assert len(old) < 160
    assert "pads=[0, 1, 2," in old
    assert "201 in all, #" in old
    assert old[1:] != new[1:]


def test_a_run_prints_what_every_pass_changed(capsys: pytest.CaptureFixture[str]) -> None:
    graphopt.optimize(model(BLOCK), "canonicalize, fuse-norm", target="cpu{tune=off}", print_changed=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    told = captured.err[captured.err.index("--- after pass 2 `fuse-norm`: 1 change\n") :].splitlines()
    assert any(line.startswith("+") and "LayerNormalization(%x" in line for line in told)
    assert any(line.startswith("-") and "ReduceMean(" in line for line in told)
    assert any(line.startswith(" ") and "MatMul(" in line for line in told), "context"
    assert "\x1b" not in captured.err
