"""The architecture, checked: who may import whom, where vendor ops may be named, and what a start of the command line may cost."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "onnxruntime", "onnxscript", "onnxsim", "transformers", "tokenizers", "safetensors", "optuna", "gensim"}
AT_START = HEAVY | {"numpy", "onnx", "onnx_ir", "sympy", "onnx_shape_inference"}  # what the start of the command line must not import

# Dependency direction: a module imports from its own row and the rows above it. A new file needs a place here.
ROWS = [
    {"errors", "console"},
    {"options", "spool"},
    {"remarks", "fuel"},
    {"core"},
    {"choices", "machine"},
    {
        "graph",
        "dims",
        "shape_rules",
        "shapes",
        "analysis",
        "slicing",
        "text",
        "run",
        "spelling",
        "convert",
        "respell",
        "fold",
        "opset",
        "inline",
        "repair",
        "notices",
        "reading",
        "normalize",
    }
    | {"sizes", "feeds", "sources", "samples", "distance", "measure", "interface", "verify", "save", "knapsack"},
    {"rewrite"},
    {"pipeline", "remove", "unfused"},
    {
        "registry",
        "listing",
        "card",
        "frontend",
        "export",
        "huggingface",
        "instruments",
        "reduce",
        "transaction",
        "report",
        "html",
        "loss",
        "bench",
        "result",
    }
    | {"extract", "tunecache", "tuning", "promise"},
    {"api"},
    {"inspect", "demo"},
    {"blocks", "comparison"},
    {"tables"},
    {"cli", "cli_tune", "cli_compare"},
    {"__main__"},
]
ROW = {name: number for number, row in enumerate(ROWS) for name in row}


def modules(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, f"{folder}/ holds no module"
    return found


def imports(tree: ast.AST, *, module_level: bool = False) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of every import that runs; `module_level` leaves out those inside functions. Type-only imports do not run."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for other in node.orelse:
                yield from imports(other, module_level=module_level)
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield prefix, node.lineno
            separator = "" if prefix.endswith(".") else "."
            yield from ((f"{prefix}{separator}{alias.name}", node.lineno) for alias in node.names)
        elif not (module_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
            yield from imports(node, module_level=module_level)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def place(path: Path) -> str:
    """`graphopt/run/ort.py` -> `run`."""
    return path.relative_to(ROOT / "graphopt").parts[0].removesuffix(".py")


def test_every_core_module_has_a_place() -> None:
    names = {place(path) for path in modules("graphopt")} - {"__init__"}
    assert names <= set(ROW), f"say where {sorted(names - set(ROW))} stands in ROWS of {__file__}"


def test_a_wheel_holds_every_package() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = config["package-dir"]
    listed = {name: folders.get(name, name.replace(".", "/")) for name in config["packages"]}
    there = {init.parent.relative_to(ROOT).as_posix() for folder in folders.values() for init in (ROOT / folder).rglob("__init__.py")}
    assert set(listed.values()) == there


def test_dependency_direction() -> None:
    wrong = []
    for path in modules("graphopt"):
        here = place(path)
        if here not in ROW:  # the test above says so
            continue
        for name, line in imports(parse(path)):
            parts = name.split(".")
            if parts[0] == "graphopt" and len(parts) > 1 and ROW.get(parts[1], -1) > ROW[here]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}, which stands below {here}")
    assert not wrong, "\n".join(wrong)


def test_core_names_passes_and_targets_by_text_only() -> None:
    for path in modules("graphopt"):
        found = [f"{path.name}:{line} {name}" for name, line in imports(parse(path)) if re.match(r"graphopt\.(passes|targets)(\.|$)", name)]
        assert not found, found


@pytest.mark.parametrize("folder", ["passes", "targets"])
def test_nobody_imports_a_sibling(folder: str) -> None:
    public = {path.stem for path in modules(folder) if not path.stem.startswith("_")}
    for path in modules(folder):
        for name, line in imports(parse(path)):
            assert not re.match(r"graphopt\.(passes|targets)(\.|$)", name), f"{path}:{line} imports {name}; use `.` for private helpers"
            sibling = name.lstrip(".").split(".")[0] if name.startswith(".") else ""
            assert sibling not in public, f"{path}:{line} imports the sibling {sibling}; what two share is an analysis, or a private module"


@pytest.mark.parametrize("folder", ["passes", "targets"])
def test_passes_and_targets_stay_flat(folder: str) -> None:
    deep = [str(path) for path in modules(folder) if path.parent != ROOT / folder]
    assert not deep, f"subfolders are not installed: {deep}"


def literals(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """String constants that are not docstrings."""
    docs = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body and isinstance(node.body[0], ast.Expr):
            docs.add(id(node.body[0].value))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value, node.lineno


@pytest.mark.parametrize("folder", ["graphopt", "passes"])
def test_vendor_ops_live_in_targets_only(folder: str) -> None:
    wrong = [f"{path}:{line}" for path in modules(folder) for text, line in literals(parse(path)) if "com.microsoft" in text]
    assert not wrong, f"com.microsoft is named outside targets/: {wrong}"


@pytest.mark.parametrize("folder", ["graphopt", "passes", "targets"])
def test_heavy_imports_are_lazy(folder: str) -> None:
    allowed = set((ROOT / "graphopt" / "run" / "torch").glob("*.py"))  # whoever imports one wants torch
    wrong = []
    for path in modules(folder):
        found = [f"{path}:{line} {name}" for name, line in imports(parse(path), module_level=True) if name.split(".")[0] in HEAVY]
        wrong += [] if path in allowed else found
    assert not wrong, wrong


@pytest.mark.parametrize("arguments", [["--help"], ["passes"], ["targets"], ["optimize", "--help"], ["--version"]])
def test_start_is_cheap(arguments: list[str]) -> None:
    code = (
        "import json, sys\nfrom graphopt.cli import app\n"
        f"try: app({arguments!r})\nexcept SystemExit as end: code = end.code\n"
        "print('\\n' + json.dumps([code or 0, sorted({m.split('.')[0] for m in sys.modules})]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    code_, loaded = json.loads(done.stdout.splitlines()[-1])
    assert code_ == 0, done.stderr
    assert not AT_START & set(loaded), f"`graphopt {' '.join(arguments)}` imports {sorted(AT_START & set(loaded))}"


def test_import_of_the_package_is_cheap() -> None:
    code = "import sys, graphopt, graphopt.registry; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout.split()
    assert not AT_START & set(loaded)


def test_public_names_exist() -> None:
    import graphopt

    for name in graphopt.__all__:
        assert getattr(graphopt, name) is not None


def texts() -> Iterator[tuple[Path, str]]:
    skipped = {"build", "dist", "__pycache__"}
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        hidden = parts[0].startswith(".") and parts[0] not in (".ci", ".gitignore")
        if path.is_file() and not hidden and not any(p in skipped or p.endswith(".egg-info") for p in parts):
            try:
                yield path, path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def test_nothing_names_a_workplace_or_a_package_host() -> None:
    banned = [
        r"(?<![\w.])/" + r"work/",
        r"(?<![\w-])shared" + r"/(measure|data|sketches|cases|facts|design)",
        "py" + r"pi\.org",
        r"pythonhosted" + r"\.org",
    ]
    found = [f"{path.relative_to(ROOT)}: {m.group()}" for path, text in texts() for m in re.finditer("|".join(banned), text)]
    assert not found, found
