"""Elements and their writers: what each writer makes of a line, a text, a table and a plot, and that a report from outside needs no more."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import types
import warnings
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from rich.console import Console
from test_api import BLOCK, FEEDS, RELU, model
from test_plugin import ONE_FILE

import graphopt
from graphopt.cli import demo_race, shell
from graphopt.core import places
from graphopt.core.errors import PipelineError, SaveError
from graphopt.core.remarks import plural
from graphopt.driver.optimize import optimize
from graphopt.report import document
from graphopt.report.document import Document
from graphopt.report.elements import Element, Line, Plot, Table, Text
from graphopt.report.listing import Cached
from graphopt.report.report import Measured, Timing

ODD = "a|b <b> & [bold]x[/bold] *y* _z_ :smile: `c|d<e>` snake_case"


@dataclasses.dataclass(frozen=True)
class Weather(Document):
    """A report that the package does not know."""

    title = "weather <today>"

    degrees: float

    def elements(self) -> Sequence[Element]:
        return [
            Line(ODD),
            Text("two  blanks\n``` and <pre>"),
            Table(("where", "degrees", "why"), [("here", self.degrees, "2 nodes stay"), ("a|b", 10, "")], "a <table>", "lrl"),
            Plot("warmth", [("noon", 30.0, float("inf")), ("night", -5.0, 20.0)], "sun", "shade & wind", "K", tick=20),
            Line("for a page only", detail=True),
        ]


def shown(*elements: Element, width: int = 100) -> str:
    from graphopt.report.writers import terminal

    out = StringIO()
    terminal.show(elements, Console(file=out, width=width, highlight=False))
    return out.getvalue()


# ---- each writer --------------------------------------------------------------------------------------------------------------------


def test_terminal() -> None:
    lines = [line.rstrip() for line in shown(*Weather(3.5).elements()).splitlines()]
    assert lines == [
        ODD,
        "two  blanks",
        "``` and <pre>",
        "a <table>",
        "",
        " where   degrees   why",
        " ──────────────────────────────",
        " here        3.5   2 nodes stay",
        " a|b          10",
        "",
        "noon   ==============================          o  30.0, inf",
        "night                      o                      -5.0, 20.0",
        "warmth, K: bar, sun; ring, shade & wind",
    ]


def test_a_line_is_broken_and_a_text_is_not() -> None:
    assert [line.rstrip() for line in shown(Line("one two three"), width=8).splitlines()] == ["one two", "three"]
    assert shown(Text("one two three"), width=8).splitlines() == ["one two three"]


def test_markdown(tmp_path: Path) -> None:
    Weather(3.5).write(tmp_path / "w.md")
    assert (
        (tmp_path / "w.md").read_text()
        == r"""# weather &lt;today>

a|b &lt;b> &amp; \[bold\]x\[/bold\] \*y\* \_z\_ :smile: `c|d<e>` snake_case

````
two  blanks
``` and <pre>
````

## a &lt;table>

| where | degrees | why |
| --- | ---: | --- |
| here | 3.5 | 2 nodes stay |
| a\|b | 10 |  |

```
noon   ==============================          o  30.0, inf
night                      o                      -5.0, 20.0
warmth, K: bar, sun; ring, shade & wind
```

for a page only
"""
    )


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("# x", r"\# x"), ("1. x", r"1\. x"), ("- x", r"\- x"), ("> x", r"\> x"), ("12 changes", "12 changes"),
        ("a\nb", "a b"), ("__x__", r"\_\_x\_\_"), ("a \\ b ` c", r"a \\ b \` c"),
    ],
)  # fmt: skip
def test_markdown_of_a_line_that_looks_like_more(text: str, written: str) -> None:
    from graphopt.report.writers import markdown

    assert markdown.page("t", [Line(text)]) == f"# t\n\n{written}\n"


def test_markdown_of_code_in_a_table() -> None:
    from graphopt.report.writers import markdown

    assert markdown.page("t", [Table(("x",), [("`a|b<c>`\nd",)])]).splitlines()[-1] == r"| `a\|b<c>` d |"


def test_html(tmp_path: Path) -> None:
    Weather(3.5).write(tmp_path / "w.html")
    page = (tmp_path / "w.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "<h1>weather &lt;today&gt;</h1>" in page
    assert "<p>a|b &lt;b&gt; &amp; [bold]x[/bold] *y* _z_ :smile: <code>c|d&lt;e&gt;</code> snake_case</p>" in page
    assert "<pre>two  blanks\n``` and &lt;pre&gt;</pre>" in page
    assert '<h2>a &lt;table&gt;</h2>\n<table><tr><th>where</th><th class="number">degrees</th><th>why</th></tr>' in page
    assert '<tr><td>here</td><td class="number">3.5</td><td>2 nodes stay</td></tr>' in page, "a message that begins with a digit is no number"
    assert "<p>for a page only</p>" in page
    body = ElementTree.fromstring(page[page.index("<body>") : page.index("</body>") + len("</body>")])
    svg = "{http://www.w3.org/2000/svg}"
    plot = body.find(f"{svg}svg")
    assert plot is not None
    assert [bar.attrib["width"] for bar in plot.iter(f"{svg}rect")] == ["420.0", "0.0"]
    assert [ring.attrib["cx"] for ring in plot.iter(f"{svg}circle")] == ["730.0", "450.0"], "what is infinite reaches the border"
    assert [mark.text for mark in plot.iter(f"{svg}text")][:3] == ["0", "20", "40"]


def test_json(tmp_path: Path) -> None:
    Weather(3.5).write(tmp_path / "w.json")
    line, text, table, plot, detail = json.loads((tmp_path / "w.json").read_text())["elements"]
    assert line == {"kind": "line", "detail": False, "text": ODD}
    assert (text["kind"], detail["detail"]) == ("text", True)
    assert (table["columns"], table["rows"]) == (["where", "degrees", "why"], [["here", 3.5, "2 nodes stay"], ["a|b", 10, ""]])
    assert plot["rows"] == [["noon", 30.0, "inf"], ["night", -5.0, 20.0]]


def test_values_that_json_has_not() -> None:
    found: Any = {"a": np.float32(0.5), "b": {3, 1}, "c": (np.int64(2), float("nan")), "d": Path("x"), "e": [True, None, float("-inf")]}

    class Odd(Weather):
        def as_dict(self) -> Any:
            return found

    assert json.loads(Odd(0).json()) == {"a": 0.5, "b": ["1", "3"], "c": [2, "nan"], "d": "x", "e": [True, None, "-inf"]}


def test_a_command_prints_a_report_from_outside(capsys: pytest.CaptureFixture[str]) -> None:
    shell.show(Weather(3.5))
    assert "2 nodes stay" in capsys.readouterr().out
    shell.show(Weather(3.5), as_json=True)
    assert json.loads(capsys.readouterr().out)["elements"]
    shell.show("as [bold] it\nstands")
    assert capsys.readouterr().out == "as [bold] it\nstands\n"


# ---- one way to write ---------------------------------------------------------------------------------------------------------------


def test_the_help_names_the_suffixes(tmp_path: Path) -> None:
    assert [part.removeprefix("FILE") for part in shell.REPORTS.split("|")] == list(document.SUFFIXES)
    with pytest.raises(SaveError, match=r"a report is FILE\.json or FILE\.html or FILE\.md, found .*w\.txt"):
        Weather(1).write(tmp_path / "w.txt")


def test_a_report_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.md"
    path.write_text("before")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(places.os, "replace", fail)
        with pytest.raises(SaveError, match=r"cannot write .*w\.md: No space left"):
            Weather(1).write(path)
    with pytest.raises(ValueError), Weather(1).staged(path):
        raise ValueError
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("w.md", "before")]
    for elsewhere, why in ((tmp_path / "absent" / "w.md", "there is no folder"), (tmp_path, "a report is")):
        with pytest.raises(SaveError, match=why):
            Weather(1).write(elsewhere)


@pytest.mark.parametrize(("count", "text"), [(0, "0 nodes"), (1, "1 node"), (2, "2 nodes")])
def test_one_of_a_thing_is_no_plural(count: int, text: str) -> None:
    assert plural(count, "node") == text


# ---- the reports of the package -----------------------------------------------------------------------------------------------------


def test_the_head_of_a_page(tmp_path: Path) -> None:
    onnx.save(model(BLOCK), tmp_path / "block.onnx")
    result = optimize(tmp_path / "block.onnx", samples=FEEDS, target="cpu{tune=off threads=2}", promise=False)
    result.report.write(tmp_path / "r.md")
    page = (tmp_path / "r.md").read_text()
    for key, value in {
        "model": str(tmp_path / "block.onnx"), "pipeline": result.report.pipeline, "changed by": "canonicalize, fuse-norm, fuse-activation",
        "threads": "2", "versions": "graphopt ", "processor": "", "date": "20",
    }.items():  # fmt: skip
        assert f"| {key} | {value}" in page
    assert "target | cpu{threads=2 tune=off}" in page
    assert "relative L2" in next(line for line in page.splitlines() if line.startswith("loss ")), "a loss has a unit"
    assert "relative L2" in next(line for line in str(result.report).splitlines() if line.startswith("loss "))
    assert "| applied | fuse-norm |" in page, "every remark is on the page"
    assert "versions" not in shown(*result.report.elements())


def test_a_report_with_everything() -> None:
    report = optimize(model(BLOCK), promise=False, target="cpu{tune=off}").report
    report.latency, report.speed_up = [Timing("1x16", 2.0, 1.0)], Measured(2.0)
    lines = [line.split() for line in shown(*report.elements()).splitlines()]
    assert ["1x16", "2.00", "1.00", "2.00x"] in lines
    assert ["geometric", "mean", "2.00x"] in lines
    report.output = dataclasses.replace(report.output, bytes=report.input.bytes * 2)
    assert "2.00x larger" in shown(*report.elements())


def test_the_cache_is_a_table_for_each_machine() -> None:
    row = {"runtime": "ort", "provider": "CPU", "threads": 1, "spelling": "sum (x)", "shape": "1x2", "description": "2 Adds", "seconds": 0.001}
    text = shown(*Cached([row | {"processor": "p"}, row | {"processor": "q", "threads": 2}], "c.sqlite").elements())
    assert "p | ort | CPU | 1 thread\n" in text
    assert "q | ort | CPU | 2 threads\n" in text
    assert "2 Adds   sum        1.0000" in text
    assert text.endswith("2 timings in c.sqlite\n")
    assert shown(*Cached([row | {"processor": "p"}], "c.sqlite").elements()).endswith("1 timing in c.sqlite\n")


def test_blocks_of_a_comparison_are_read_with_the_plugins() -> None:
    with pytest.raises(PipelineError, match="absent"):
        graphopt.compare(model(BLOCK), model(BLOCK), plugins=["absent.py"])


def test_the_demo_leaves_logging_and_warnings_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = []
    fake = types.SimpleNamespace(
        QuantType=types.SimpleNamespace(QInt8=0), quantize_dynamic=lambda *_, **__: levels.append(logging.root.manager.disable)
    )
    monkeypatch.setitem(sys.modules, "onnxruntime.quantization", fake)
    for before in (logging.NOTSET, logging.WARNING, logging.ERROR):
        logging.disable(before)
        try:
            demo_race.quantize_dynamic(Path("a"), Path("b"))
            assert logging.root.manager.disable == before
        finally:
            logging.disable(logging.NOTSET)
    assert levels == [logging.WARNING, logging.WARNING, logging.ERROR]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    filters = list(warnings.filters)
    monkeypatch.setattr(demo_race, "_folder_of", lambda package: Path())
    monkeypatch.setattr(demo_race, "_lee", lambda: ([], np.zeros((0, 0))))
    monkeypatch.setattr(demo_race, "_build", stop)
    with pytest.raises(KeyboardInterrupt):
        demo_race.run(fast=True)
    assert warnings.filters == filters


def test_a_rewrite_of_one_node_says_node(tmp_path: Path) -> None:
    plugin = tmp_path / "one.py"
    plugin.write_text(ONE_FILE.format(name="ToNeg", op="Neg"))
    report = graphopt.optimize(model(RELU), pipeline="to-neg", plugins=[str(plugin)], target="cpu{tune=off}", gate=False).report  # it is wrong
    assert [remark.message for remark in report.remarks("applied") if remark.pass_name == "to-neg"] == ["1 node -> Neg"]
