"""The architecture, checked: who may import whom, where vendor ops may be named, and what a start of the command line may cost."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "onnxruntime", "onnxscript", "onnxsim", "transformers", "tokenizers", "safetensors", "optuna", "gensim", "netron"}
AT_START = HEAVY | {"numpy", "onnx", "onnx_ir", "sympy", "onnx_shape_inference"}  # what the start of the command line must not import

# The rooms of graphopt/, passes/ and targets/, and from which others each may import. A module imports from its own room and from these.
ROOMS = {
    "core": "",
    "graph": "core",
    "rewrite": "core graph",
    "run": "core graph",
    "analysis": "core graph",
    "io": "core graph rewrite analysis",
    "calibration": "core graph run analysis",
    "metrics": "core graph run",
    "compress": "core graph rewrite run io analysis calibration",
    "report": "core graph run io analysis calibration",
    "driver": "core graph rewrite run io analysis calibration report",
    "cli": "core graph rewrite run io analysis calibration report driver",
    "passes": "core graph rewrite run io analysis calibration compress",
    "targets": "core graph rewrite run io analysis driver/lowering",
}
SIBLINGS = {"compress"}  # rooms whose sub-rooms do not import from each other, only from the room itself
OUTSIDE = {"graphopt/__init__.py", "graphopt/__main__.py", "graphopt/save.py"}  # doors: they hand on what is inside
CROWD = 12  # modules in one folder, at most; passes/ and targets/ are flat by design


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
    """`graphopt/run/torch/table.py` -> `graphopt.run.torch.table`; `passes/smooth.py` -> `graphopt.passes.smooth`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "graphopt" else ("graphopt", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {place(path): path for folder in ("graphopt", "passes", "targets") for path in modules(folder)}


def room(module: str) -> str:
    """`graphopt.run.torch.table` -> `run`; empty for what stands in no room."""
    return "" if FILES[module].relative_to(ROOT).as_posix() in OUTSIDE else module.split(".")[1]


def reads(module: str) -> dict[str, int]:
    """The modules of this repository that `module` imports when it runs, and the line; a lazy package that hands on names counts itself."""
    path, found = FILES[module], dict[str, int]()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for name, line in imports(parse(path)):
        level = len(name) - len(name.lstrip("."))
        parts = package.split(".")
        full = ".".join([*parts[: len(parts) - level + 1], *filter(None, [name[level:]])]) if level else name
        if full in FILES and full != module:
            found.setdefault(full, line)
    return {name: line for name, line in found.items() if not any(other.startswith(name + ".") and found[other] == line for other in found)}


READS = {module: reads(module) for module in FILES}


def test_every_module_stands_in_a_room() -> None:
    lost = [m for m in FILES if room(m) and room(m) not in ROOMS]
    assert not lost, f"say in ROOMS of {__file__} what {lost} may import"


def test_no_room_is_crowded() -> None:
    for folder in {path.parent for module, path in FILES.items() if room(module) not in ("passes", "targets")}:
        inside = sorted(path.name for path in folder.glob("*.py") if path.name != "__init__.py")
        assert len(inside) <= CROWD, f"{folder.relative_to(ROOT)} holds {len(inside)} modules; make a room in it: {inside}"


def test_imports_follow_the_order_of_the_rooms() -> None:
    wrong = []
    for module, others in READS.items():
        here = room(module)
        if not here:
            continue
        may = {here, *ROOMS[here].split()}
        for other, line in others.items():
            there = other.split(".")[1:]
            if not any(there[: len(door)] == door for door in (name.split("/") for name in may)):
                wrong.append(f"{FILES[module].relative_to(ROOT)}:{line} imports {other}; {here} may import {ROOMS[here] or 'nothing'}")
    assert not wrong, "\n".join(wrong)


def test_sub_rooms_do_not_import_from_their_siblings() -> None:
    wrong = []
    for module, others in READS.items():
        mine = module.split(".")[2:-1]
        for other in others if room(module) in SIBLINGS else ():
            its = other.split(".")[2:-1]
            if room(other) == room(module) and its and its[:1] != mine[:1]:
                wrong.append(f"{module} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_no_circle() -> None:
    """At file level, also inside a room. An import inside a function counts, too."""
    left = {module: set(others) for module, others in READS.items()}
    while free := [module for module, others in left.items() if not others & left.keys()]:
        for module in free:
            del left[module]
    while idle := [module for module in left if not any(module in left[other] for other in left)]:  # they only lead into a circle
        for module in idle:
            del left[module]
    assert not left, "a circle runs through " + ", ".join(f"{m} ({', '.join(sorted(others & left.keys()))})" for m, others in left.items())


def test_no_package_hands_on_the_name_of_its_own_module() -> None:
    """`from graphopt.graph import verify` must not mean the function on one day, and the module on another."""
    for module, path in FILES.items():
        if path.name == "__init__.py" and module != "graphopt":
            handed = set(vars(importlib.import_module(module)).get("__all__", ()))
            assert not handed & {other.stem for other in path.parent.glob("*.py")}, module


def test_a_wheel_holds_every_package() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = config["package-dir"]
    listed = {name: folders.get(name, name.replace(".", "/")) for name in config["packages"]}
    there = {init.parent.relative_to(ROOT).as_posix() for folder in folders.values() for init in (ROOT / folder).rglob("__init__.py")}
    assert set(listed.values()) == there


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
    """One module at the door knows the name, too: it reads what such operators in the input mean, and writes none."""
    door = ROOT / "graphopt" / "io" / "runtime_ops" / "read.py"
    wrong = [f"{path}:{line}" for path in modules(folder) if path != door for text, line in literals(parse(path)) if "com.microsoft" in text]
    assert not wrong, f"com.microsoft is named outside targets/: {wrong}"


def test_one_module_reads_attention_nodes() -> None:
    """What an Attention node says is asked of AttentionNode; an executor of the operator takes its attributes by name, as arguments."""
    room = ROOT / "graphopt"
    free = {room / "graph" / "attention_node.py", room / "io" / "runtime_ops" / "attention.py"}  # the second: a runtime's operators of these names
    paths = {path for folder in ("graphopt", "passes", "targets") for path in modules(folder)} - free
    names = {"q_num_heads", "kv_num_heads", "is_causal"}
    wrong = [f"{path}:{line} {text}" for path in sorted(paths) for text, line in literals(parse(path)) if text in names]
    assert not wrong, wrong


@pytest.mark.parametrize("folder", ["graphopt", "passes", "targets"])
def test_heavy_imports_are_lazy(folder: str) -> None:
    allowed = set((ROOT / "graphopt" / "run" / "torch").rglob("*.py"))  # whoever imports one wants torch
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
    code = "import sys, graphopt, graphopt.core.registry; print(*sorted({m.split('.')[0] for m in sys.modules}))"
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
