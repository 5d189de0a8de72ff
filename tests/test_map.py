"""The map of CONTRIBUTING.md is true: one of each thing (tests/map) is added to a copy of the sources by the words of its table, and works there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from test_plugin import ffn, ops

ROOT = Path(__file__).resolve().parent.parent
NEW = ROOT / "tests" / "map"
FOLDERS = ("graphopt", "passes", "targets")
LINES = {  # the new line in another file, and the one that it stands before
    "graphopt/io/load.py": ('    "my_format.MyFormat",\n', '    "onnx_file.OnnxFile",\n'),
    "graphopt/cli/root.py": ('    "my_command",\n', '    "lists.passes",\n'),
}
TEXT = '<ir_version: 8, opset_import: ["" : 17]> g (float[n] x) => (float[n] y) { a = Neg(x) b = Neg(a) y = Relu(b) }'
CHECKS = "room or follow or siblings or circle or by_text or sibling or flat or vendor or heavy"  # of test_architecture: what reads files only


def table() -> dict[str, tuple[str, str, str]]:
    """What -> the file to add, the file to touch or nothing, and the example."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if re.match(r"\| an? ", line)]
    paths = [[re.findall(r"`([\w/]+\.py)`", cell) for cell in row[1:]] for row in rows]
    for row, (add, touch, example) in zip(rows, paths, strict=True):
        assert (len(add), len(example)) == (1, 1), row
        assert len(touch) == 1 or (not touch and row[2].startswith("nothing")), row
    return {row[0]: (add[0], touch[0] if touch else "", example[0]) for row, (add, touch, example) in zip(rows, paths, strict=True)}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sources as they are installed, and one more of each thing. Beside it, `repository` has them as they stand here."""
    folder = tmp_path_factory.mktemp("map")
    here, there = folder / "repository", folder / "site"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, here / name, ignore=shutil.ignore_patterns("__pycache__"))
    for add, touch, _ in table().values():
        assert not (here / add).exists()
        shutil.copy(NEW / add, here / add)
        if touch:
            new, behind = LINES[touch]
            text = (here / touch).read_text(encoding="utf-8")
            assert text.count(behind) == 1
            (here / touch).write_text(text.replace(behind, new + behind), encoding="utf-8")
    shutil.copytree(here / "graphopt", there / "graphopt")
    for name in FOLDERS[1:]:
        shutil.copytree(here / name, there / "graphopt" / name)
    return there


def run(site: Path, *arguments: object, code: int = 0) -> str:
    """What a command of the copy prints."""
    command, environment = [sys.executable, "-m", *map(str, arguments)], os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=site, env=environment)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def test_the_table_names_eight_things_and_what_it_names_is_there() -> None:
    rows = table()
    assert len(rows) == 8
    assert {add for add, _, _ in rows.values()} == {path.relative_to(NEW).as_posix() for path in NEW.rglob("*.py")}
    assert {touch for _, touch, _ in rows.values() if touch} == set(LINES)
    for add, _, example in rows.values():
        assert (ROOT / example).is_file()
        assert Path(add).parent == Path(example).parent


def test_the_copy_keeps_the_order_of_the_rooms(site: Path) -> None:
    repository = site.with_name("repository")
    (repository / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "test_architecture.py", repository / "tests")
    shutil.copy(ROOT / "pyproject.toml", repository)
    found = run(site, "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", repository, repository / "tests" / "test_architecture.py", "-k", CHECKS)
    assert re.search(r"\b1[0-9] passed", found), found


def test_a_pass_a_recognizer_a_target_and_an_input_format(site: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.mine", tmp_path / "out.onnx"
    source.write_text(TEXT)
    common = ("graphopt", "optimize", source, "-o", out, "--no-measure", "--json", "--target", "my-target")
    report = json.loads(run(site, *common, "-O1", "--verify-each", "--check-numerics"))
    assert (report["target"]["name"], report["pipeline"], report["changes"]) == ("my-target", "my-pass", 1)
    assert ops(out) == ["Relu"]
    assert json.loads(run(site, *common, "-O0"))["changes"] == 0
    assert ops(out) == ["Neg", "Neg", "Relu"], "the artifact is ONNX, also where no pass changed anything"
    source.write_text("nonsense")
    assert f"error: {source}: expected ONNX as text" in run(site, *common, code=1)


def test_a_criterion_and_a_metric(site: Path, tmp_path: Path) -> None:
    source, _ = ffn(tmp_path)
    out = tmp_path / "out.onnx"
    step = ("--pipeline", "prune-ffn{ratio=0.5 multiple=1 importance=my-criterion refit=false}", "--metric", "my-metric{at=2}")
    report = json.loads(run(site, "graphopt", "optimize", source, "-o", out, "--no-measure", "--json", *step))
    assert report["loss"]["how"] == "relative fall of the metric"
    assert report["loss"]["value"] != 0
    kept = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(out).graph.initializer}
    first = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(source).graph.initializer}
    assert any(array.shape == (32, 16) and (array == first["down"][:32]).all() for array in kept.values()), "the later half is gone"


def test_a_command_and_a_report(site: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.mine"
    source.write_text(TEXT)
    assert re.search(r"my-command +Count the operators of a model", run(site, "graphopt", "--help"))
    shown = run(site, "graphopt", "my-command", source, "--report", tmp_path / "out.md")
    assert re.search(r"Neg +2\b", shown)
    assert "| Neg | 2 |" in (tmp_path / "out.md").read_text()
    assert json.loads(run(site, "graphopt", "my-command", source, "--json"))["elements"][1]["rows"] == [["Neg", 2], ["Relu", 1]]
