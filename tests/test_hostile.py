"""Models are data from strangers: each of these is handled, or refused in one line, with bounded time and memory; nothing of it is executed."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import graphopt
from graphopt.core.errors import GraphoptError, LoadError, SaveError
from graphopt.io.save import save

SECONDS = 10  # of processor time, for one input
MEMORY = 6 << 30  # bytes of address space beyond what is in use
X, Y = (helper.make_tensor_value_info(name, 1, ["n", 4]) for name in "xy")
node = helper.make_node


@pytest.fixture
def bounded() -> Iterator[None]:
    """Less address space than what these files claim to need, and a limit of time."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if sys.platform == "linux" else 0
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    start = time.process_time()
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert time.process_time() - start < SECONDS


def model(
    nodes: Sequence[Any], weights: Sequence[Any] = (), inputs: Sequence[Any] = (X,), outputs: Sequence[Any] = (Y,), domain: str = ""
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    imports = [helper.make_opsetid("", 17), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def constant(name: str, value: Any, dtype: Any = np.int64) -> TensorProto:
    return numpy_helper.from_array(np.array(value, dtype), name)


def outcome(source: Path) -> str:
    """What optimize says; empty = it went through."""
    said = ""
    try:
        graphopt.optimize(source)
    except GraphoptError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 1000
    return said


# ---- data files -----------------------------------------------------------------------------------------------------------------------


def external(location: str, offset: object = 0, length: object = 64, dims: Sequence[int] = (4, 4)) -> onnx.ModelProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return model([node("MatMul", ["x", "w"], ["y"])], [tensor])


DATA = {
    "above": (external("../secret.bin"), "outside the model's folder"),
    "absolute": (external("/etc/passwd"), "outside the model's folder"),
    "device": (external("/dev/zero"), "outside the model's folder"),
    "link": (external("link.bin"), "a link to .*secret.bin, outside the model's folder"),
    "missing": (external("nothing.bin"), "is missing"),
    "pipe": (external("pipe.bin"), "is missing"),
    "folder": (external("."), "is missing"),
    "negative": (external("good.bin", -8), "has the offset `-8`"),
    "letters": (external("good.bin", 0, "many"), "has the length `many`"),
    "too long": (external("good.bin", 0, 2**62), "bytes of its data file instead of 64"),
    "too short": (external("good.bin", 0, 64, (2**20, 2**20)), "bytes of its data file instead of 4398046511104"),
    "beyond the end": (external("good.bin", 2**40), "has 64 bytes, and `w` ends at byte"),
    "negative size": (external("good.bin", 0, 64, (-4, -4)), "has the shape"),
}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes in folders")
@pytest.mark.parametrize("case", DATA)
@pytest.mark.usefixtures("bounded")
def test_data_files(case: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(64))
    (folder / "good.bin").write_bytes(bytes(64))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    os.mkfifo(folder / "pipe.bin")
    proto, message = DATA[case]
    onnx.save(proto, folder / "m.onnx")
    with pytest.raises(LoadError, match=message) as caught:
        graphopt.load(folder / "m.onnx")
    assert "\n" not in str(caught.value)


def test_links_of_a_model_cache_are_followed(tmp_path: Path) -> None:
    """A cache keeps every file under its hash in one folder, and links of the right names in another."""
    blobs, shown = tmp_path / "blobs", tmp_path / "snapshots" / "one"
    blobs.mkdir()
    shown.mkdir(parents=True)
    (blobs / "a1").write_bytes(external("m.onnx.data").SerializeToString())
    (blobs / "b2").write_bytes(np.eye(4, dtype=np.float32).tobytes())
    (shown / "m.onnx").symlink_to(blobs / "a1")
    (shown / "m.onnx.data").symlink_to(blobs / "b2")
    assert outcome(shown / "m.onnx") == ""


def test_a_sparse_file_of_many_gigabytes_is_not_read(tmp_path: Path) -> None:
    """Too short for what the model says: nobody finds out by reading it."""
    with (tmp_path / "w.bin").open("wb") as file:
        file.truncate(64 << 30)
    onnx.save(external("w.bin", 0, 4 << 36, (1 << 18, 1 << 18)), tmp_path / "m.onnx")
    with pytest.raises(LoadError, match="has 68719476736 bytes, and `w` ends at byte"):
        graphopt.load(tmp_path / "m.onnx")


# ---- graphs ---------------------------------------------------------------------------------------------------------------------------


def nested_functions(depth: int) -> onnx.ModelProto:
    """Each calls the next one twice: 2 ** depth nodes."""
    proto = model([node("F0", ["x"], ["y"], domain="loc")], domain="loc")
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("loc", 1)]
    for k in range(depth):
        twice = [node(f"F{k + 1}", ["a"], ["t"], domain="loc"), node(f"F{k + 1}", ["t"], ["b"], domain="loc")]
        proto.functions.append(helper.make_function("loc", f"F{k}", ["a"], ["b"], twice if k < depth - 1 else [node("Relu", ["a"], ["b"])], imports))
    return proto


def recursive() -> onnx.ModelProto:
    proto = nested_functions(3)
    proto.functions[2].node[0].CopyFrom(node("F0", ["a"], ["b"], domain="loc"))
    return proto


def nested_ifs(depth: int) -> onnx.ModelProto:
    out = helper.make_tensor_value_info("o", 1, None)
    inner = helper.make_graph([node("Identity", ["x"], ["o"])], "b", [], [out])
    for _ in range(depth):
        other = helper.make_graph([node("Neg", ["x"], ["o"])], "e", [], [out])
        inner = helper.make_graph([node("If", ["c"], ["o"], then_branch=inner, else_branch=other)], "b", [], [out])
    condition = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    return model([node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)], inputs=[X, condition])


def deep_message(depth: int) -> bytes:
    """graph.node.attribute.g.node..., written as bytes: no protobuf library writes it."""

    def field(tag: int, body: bytes) -> bytes:
        size, length = b"", len(body)
        while length > 127:
            size, length = size + bytes([length & 127 | 128]), length >> 7
        return bytes([tag]) + size + bytes([length]) + body

    body = b""
    for _ in range(depth):
        body = field(0x0A, field(0x2A, field(0x32, body)))
    return field(0x3A, body)


def filled(op: str) -> onnx.ModelProto:
    """A constant of 2^40 elements, computed."""
    one, many = constant("one", [1.0], np.float32), constant("many", [2**20, 2**20] if op != "Tile" else [2**40])
    made = {"ConstantOfShape": ["many"], "Expand": ["one", "many"], "Tile": ["one", "many"]}[op]
    return model([node(op, made, ["c"]), node("ReduceMax", ["c"], ["r"], keepdims=0), node("Add", ["x", "r"], ["y"])], [one, many])


def endless_loop() -> onnx.ModelProto:
    value = [helper.make_tensor_value_info(n, 1, ["n", 4]) for n in ("s", "so")]
    flags = [helper.make_tensor_value_info(n, TensorProto.BOOL, []) for n in ("ci", "co")]
    count = helper.make_tensor_value_info("i", TensorProto.INT64, [])
    body = helper.make_graph([node("Identity", ["ci"], ["co"]), node("Neg", ["s"], ["so"])], "b", [count, flags[0], value[0]], [flags[1], value[1]])
    return model([node("Loop", ["m", "c", "x"], ["y"], body=body)], [constant("m", 2**62), constant("c", True, bool)])


BAD = np.full((4, 4), np.nan, np.float32)
GRAPHS: dict[str, tuple[Callable[[], onnx.ModelProto | bytes], str]] = {
    "cycle": (lambda: model([node("Add", ["x", "b"], ["a"]), node("Relu", ["a"], ["b"]), node("Neg", ["b"], ["y"])]), "its nodes form a cycle"),
    "a node that reads itself": (lambda: model([node("Add", ["x", "y"], ["y"])]), "its nodes form a cycle"),
    "one name twice": (lambda: model([node("Relu", ["x"], ["a"]), node("Neg", ["a"], ["a"]), node("Neg", ["a"], ["y"])]), "'a' is redeclared"),
    "nested Ifs": (lambda: nested_ifs(20), ""),
    "deep message": (lambda: deep_message(3000), "what no ONNX parser reads"),
    "functions that double": (lambda: nested_functions(30), "unfold to 536,870,912 nodes"),
    "functions that call each other": (recursive, "calls itself"),
    "huge constant": (lambda: filled("ConstantOfShape"), ""),
    "huge Expand": (lambda: filled("Expand"), ""),
    "huge Tile": (lambda: filled("Tile"), ""),
    "huge input": (
        lambda: model([node("Relu", ["x"], ["y"])], (), *([helper.make_tensor_value_info(n, 1, [2**40, 2**40])] for n in "xy")),
        "",
    ),
    "NaN and infinite weights": (
        lambda: model([node("MatMul", ["x", "w"], ["t"]), node("Add", ["t", "b"], ["y"])], [constant("w", BAD, np.float32), constant("b", [np.inf] * 4, np.float32)]),
        "",
    ),
    "unknown domain": (lambda: model([node("Zap", ["x"], ["y"], domain="evil.example")], domain="evil.example"), ""),
    "unknown operator": (lambda: model([node("Zap", ["x"], ["y"])]), ""),
    "a text of 50 MB": (lambda: model([node("Relu", ["x"], ["y"], doc_string="a" * 50_000_000)]), ""),
    "a name of 3 MB": (lambda: model([node("Relu", ["x"], ["y"], name="n" * 3_000_000)]), ""),
    "20,000 attributes": (lambda: model([node("Relu", ["x"], ["y"], **{f"a{k}": k for k in range(20000)})]), "has no attribute"),
    "5,000 axes": (lambda: model([node("Relu", ["x"], ["y"])], (), *([helper.make_tensor_value_info(n, 1, [1] * 5000)] for n in "xy")), ""),
    "division by zero": (
        lambda: model([node("Div", ["a", "b"], ["c"]), node("Cast", ["c"], ["f"], to=1), node("Add", ["x", "f"], ["y"])], [constant("a", [1]), constant("b", [0])]),
        "",
    ),
    "a loop of 2^62 rounds": (endless_loop, ""),
    "a pickle": (lambda: pickle.dumps({"a": 1}), "what no ONNX parser reads"),
}  # fmt: skip


@pytest.mark.parametrize("case", GRAPHS)
@pytest.mark.usefixtures("bounded")
def test_graphs(case: str, tmp_path: Path) -> None:
    made, message = GRAPHS[case]
    proto = made()
    (tmp_path / "m.onnx").write_bytes(proto if isinstance(proto, bytes) else proto.SerializeToString())
    said = outcome(tmp_path / "m.onnx")
    assert (message in said) if message else not said, said


# ---- folders --------------------------------------------------------------------------------------------------------------------------


class Evil:
    """A pickle that touches a file when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


BERT = {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 20, "max_position_embeddings": 8}  # fmt: skip


@pytest.mark.parametrize("kind", ["code", "pickle", "safetensors", "json", "huge"])
def test_nothing_of_a_folder_is_executed(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    folder, touched = tmp_path / "model", tmp_path / "executed"
    folder.mkdir()
    config: dict[str, Any] = dict(BERT)
    if kind == "code":
        config = {"model_type": "evil", "architectures": ["EvilModel"], "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.EvilModel"}}
        (folder / "evil.py").write_text(f"import os\nos.system('touch {touched}')\nclass C: pass\nclass EvilModel: pass\n")
    if kind in ("code", "pickle"):
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(touched)))
    else:
        (folder / "model.safetensors").write_bytes((2**60 if kind == "safetensors" else 2).to_bytes(8, "little") + b"{}")
    if kind == "huge":
        config |= {"hidden_size": 2**30, "num_hidden_layers": 10**6, "vocab_size": 2**40, "intermediate_size": 2**40}
    (folder / "config.json").write_text("[" * 100_000 if kind == "json" else json.dumps(config))
    with pytest.raises(LoadError) as caught:
        graphopt.load(folder)
    assert "\n" not in str(caught.value)
    assert not touched.exists()


# ---- interrupts and faults --------------------------------------------------------------------------------------------------------------


def big(path: Path) -> Path:
    """Larger than the limit that the next test sets."""
    weights = np.random.default_rng(0).standard_normal((400, 4)).astype(np.float32)
    wide = helper.make_tensor_value_info("x", 1, ["n", 400])
    layers = [node("MatMul", ["x", "w"], ["h"]), node("Mul", ["h", "one"], ["i"]), node("Relu", ["i"], ["y"])]
    proto = model(layers, [numpy_helper.from_array(weights, "w"), constant("one", 1, np.float32)], [wide])
    onnx.save(proto, path)
    return path


def run(*arguments: object, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    def prepare() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-m", "graphopt", "optimize", *map(str, arguments), "--no-measure"]
    return subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=prepare, timeout=120)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on the size of a file")
def test_a_full_disk_ends_with_one_line_and_no_file(tmp_path: Path) -> None:
    """As a limit on the size of a file, which needs no disk of one's own; an output that is there already stays."""
    source, out = big(tmp_path / "m.onnx"), tmp_path / "out.onnx"
    before = source.read_bytes()
    out.write_bytes(b"old")
    done = run(source, "-o", out, limit=4096)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "File too large" in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "out.onnx"]
    assert (out.read_bytes(), source.read_bytes()) == (b"old", before)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_process_leaves_no_output(tmp_path: Path) -> None:
    """It dies while it writes; the next run is not disturbed by what it left."""
    source, out = big(tmp_path / "m.onnx"), tmp_path / "out.onnx"
    code = "import os, signal\nimport graphopt.io.save as save\nsave.to_bytes = lambda model: os.kill(os.getpid(), signal.SIGKILL)\n"
    code += f"import graphopt\ngraphopt.optimize({str(source)!r}, promise=False).save({str(out)!r})"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == -signal.SIGKILL
    assert not out.exists()
    assert run(source, "-o", out).returncode == 0
    assert out.exists()


def test_the_data_of_another_model_are_not_overwritten(tmp_path: Path) -> None:
    """Neither by a data file of ours, nor by an output of that name."""
    source = big(tmp_path / "m.onnx")
    onnx.save(onnx.load(source), tmp_path / "other.onnx", save_as_external_data=True, location="out.onnx.data", size_threshold=0)
    onnx.save(onnx.load(source), tmp_path / "third.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    result = graphopt.optimize(source, promise=False)
    with pytest.raises(SaveError, match=r"out\.onnx\.data: it holds the weights of .*other\.onnx"):
        save(result.model, tmp_path / "out.onnx", external=True)
    with pytest.raises(SaveError, match=r"weights\.bin: it holds the weights of .*third\.onnx"):
        result.save(tmp_path / "weights.bin")
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_a_second_run_over_an_artifact_changes_nothing(tmp_path: Path) -> None:
    first, second = tmp_path / "1.onnx", tmp_path / "2.onnx"
    graphopt.optimize(big(tmp_path / "m.onnx"), promise=False).save(first)
    assert graphopt.optimize(first, promise=False).report.changes == 0
    graphopt.optimize(first, promise=False).save(second)
    assert first.read_bytes() == second.read_bytes()
