"""Kind 10: what a new user meets."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from test_api import BLOCK, RELU, model
from typer.testing import CliRunner, Result

import graphopt
from graphopt.cli.root import app
from graphopt.run import ort


def cli(*arguments: str | Path, code: int = 0) -> Result:
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == code, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done


def error(*arguments: str | Path) -> str:
    """The error of a command that must fail, which is one line."""
    text = cli(*arguments, code=1).stderr.rstrip("\n")
    assert text.startswith("error: ")
    assert "internal" not in text
    return text


def saved(folder: Path, text: str) -> Path:
    onnx.save(model(text), folder / "in.onnx")
    return folder / "in.onnx"


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """The command line in a process of its own, as a shell starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "graphopt", *arguments], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | environment, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


# ---- view -----------------------------------------------------------------------------------------------------------------------------


def test_view_serves_the_file_and_leaves_it_as_it_was(tmp_path: Path) -> None:
    pytest.importorskip("netron", reason="netron is not installed")
    source = saved(tmp_path, RELU)
    before = source.read_bytes()
    child = start(tmp_path, "view", "in.onnx", "--no-browser", "--port", "0")
    try:
        assert child.stdout is not None
        told = child.stdout.readline()
        assert told.startswith("in.onnx is shown at http://localhost:")
        url = told.split()[4].rstrip(";")
        local = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        assert b"/data/in.onnx" in local.open(url, timeout=30).read()
        assert local.open(f"{url}/data/in.onnx", timeout=30).read() == before
        taken = start(tmp_path, "view", "in.onnx", "--no-browser", "--port", url.rpartition(":")[2])
        _, text = taken.communicate(timeout=60)
        assert (taken.returncode, text.count("\n")) == (1, 1)
        assert "give another --port" in text
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=30)
        assert (child.returncode, out, err) == (0, "", "")
    finally:
        child.kill()
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("in.onnx", before)]


def test_view_without_netron_and_without_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(tmp_path, RELU)
    monkeypatch.setitem(sys.modules, "netron", None)
    assert "pip install 'graphopt[view]'" in error("view", source)
    assert "there is no such file" in error("view", tmp_path / "absent.onnx")
    assert f"give {source}" in error("view", tmp_path)
    (tmp_path / "folder").mkdir()
    assert "-O0 -o model.onnx` writes one" in error("view", tmp_path / "folder")


def test_no_help_loses_what_stands_in_brackets() -> None:
    assert "the extra `view`" in " ".join(start(Path.cwd(), "--help").communicate(timeout=60)[0].split())
    texts = (place.read_text(encoding="utf-8") for place in Path(graphopt.__file__).parent.joinpath("cli").glob("*.py"))
    assert not [found for text in texts for found in re.findall(r"\"\"\".*\[[a-z]+\].*\"\"\"|help=\".*\[[a-z]+\]", text)]


# ---- options --------------------------------------------------------------------------------------------------------------------------


def test_levels_that_there_are(tmp_path: Path) -> None:
    """The help offers none that every target refuses, and the message of a wrong one is true."""
    source, out = saved(tmp_path, RELU), tmp_path / "out.onnx"
    assert "3 also" not in cli("optimize", "--help").stdout
    for level in ("9", "3"):
        text = " ".join(cli("optimize", source, "-o", out, "-O", level, code=2).stderr.replace("│", " ").split())
        assert f"target cpu has the levels 0, 1, 2, found {level}" in text
    assert not out.exists()


@pytest.mark.parametrize(("text", "value"), [("1%", 0.01), ("0.5%", 0.005), ("0.25", 0.25), ("0", 0.0)])
def test_a_loss_in_percent(tmp_path: Path, text: str, value: float) -> None:
    source = saved(tmp_path, BLOCK)
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).normal(size=(1, 4, 8)).astype(np.float32))
    run = ("optimize", source, "-o", tmp_path / "out.onnx", "-O2", "--no-measure", "--json", "--target", "cpu{tune=off}")
    report = cli(*run, "--samples", tmp_path / "x.npz", "--max-loss", text).stdout
    assert f'"max_loss": {value}' in report or f"within the budget {value:g}" in report


@pytest.mark.parametrize("text", ["1%%", "one", "-1", "-1%", "nan", ""])
def test_a_loss_that_is_no_fraction(tmp_path: Path, text: str) -> None:
    cli("optimize", saved(tmp_path, RELU), "-o", tmp_path / "out.onnx", "-O2", "--max-loss", text, code=2)


# ---- where it runs --------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such locale")
def test_a_plain_ascii_locale(tmp_path: Path) -> None:
    """Help, names of files that are not ASCII, also inside of a model, and an error that names one."""
    os.mkdir(tmp_path / "größe")
    large = model(BLOCK.replace("8, 32", "8, 999").replace("32, 8", "999, 8"))
    onnx.save(large, tmp_path / "größe" / "ü.onnx", save_as_external_data=True, location="gewichte_ü.data")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    for arguments, code, part in (
        (("optimize", "--help"), 0, "An .onnx file"),
        (("optimize", "größe/ü.onnx", "-o", "größe/ö.onnx", "--report", "ä.html", "--shapes", "1x4"), 0, "speed-up"),
        (("inspect", "größe/ß.onnx"), 1, "größe/ß.onnx: No such file"),
    ):
        child = start(tmp_path, *arguments, **ascii_only)
        out, err = child.communicate(timeout=120)
        assert (child.returncode, part in out + err) == (code, True), out + err
        assert "Traceback" not in err
    assert (tmp_path / "größe" / "ö.onnx").is_file()
    assert "größe/ü.onnx" in (tmp_path / "ä.html").read_text(encoding="utf-8")


def test_text_samples_without_their_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts.txt").write_text("one\ntwo\n")
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    run = ("optimize", saved(tmp_path, RELU), "-o", tmp_path / "out.onnx", "--samples", tmp_path / "texts.txt")
    assert "text samples need an extra that is not installed" in error(*run, "--tokenizer", tmp_path / "tokenizer.json")
    assert "pip install 'graphopt[text]'" in error(*run, "--tokenizer", tmp_path / "tokenizer.json")


def test_a_shape_without_a_length(tmp_path: Path) -> None:
    """`16` would be read as 16x16; it is refused before any work, but for a model that has a batch alone."""
    out = tmp_path / "out.onnx"
    for command in (("optimize", saved(tmp_path, BLOCK), "-o", out), ("bench", saved(tmp_path, BLOCK))):
        assert "a batch without a length, which the model has in `seq`; write 1x16" in error(*command, "--shapes", "16")
    assert "16" in cli("optimize", saved(tmp_path, RELU), "-o", out, "--shapes", "16").stdout


def test_a_file_that_is_there_and_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(tmp_path, RELU)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert error("inspect", source) == f"error: {source}: Permission denied; it is there, and cannot be read"


# ---- folders --------------------------------------------------------------------------------------------------------------------------

DECODER = {
    "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PART = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64, "projection_dim": 16}
FOLDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "distilbert": ("DistilBertModel", {"vocab_size": 100, "dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 64}),
    "llama": ("LlamaForCausalLM", DECODER),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM", DECODER | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    ),
    "clip": (
        "CLIPModel",
        {"text_config": PART | {"vocab_size": 100, "max_position_embeddings": 32, "eos_token_id": 99, "bos_token_id": 98, "pad_token_id": 0},
         "vision_config": PART | {"image_size": 32, "patch_size": 8}, "projection_dim": 16},
    ),
}  # fmt: skip


def folder(kind: str, into: Path) -> Any:
    """A small random model of this kind, saved, and the module."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch = pytest.importorskip("torch", reason="torch is not installed")
    torch.manual_seed(0)
    name, options = FOLDERS[kind]
    cls = getattr(transformers, name)
    module = cls(cls.config_class(**options)).eval()
    module.save_pretrained(into)
    return module


def test_with_past_where_there_is_no_cache(tmp_path: Path) -> None:
    folder("distilbert", tmp_path)
    assert "DistilBertModel keeps no key/value cache" in error("inspect", tmp_path, "--with-past")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2-moe", "clip"])
def test_folders_that_torch_exports_only_as_asked(kind: str, tmp_path: Path) -> None:
    """Experts in a form that ONNX has; texts and images together, of which there are not equally many."""
    import torch

    module = folder(kind, tmp_path)
    session = ort.session(graphopt.load(tmp_path), optimize=False)
    for texts, length, images in ((2, 7, 3), (3, 11, 1)):
        ids = torch.randint(3, 98, (texts, length))
        feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if kind == "clip":
            feeds["pixel_values"] = torch.randn(images, 3, 32, 32)
        name = "logits_per_image" if kind == "clip" else "logits"
        with torch.no_grad():
            expected = module(**feeds)[name].numpy()
        found = session.run({key: value.numpy() for key, value in feeds.items()})[name]
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= 1e-5 * (1 + np.abs(expected).max())


@pytest.mark.slow
def test_texts_for_a_decoder_with_a_cache(tmp_path: Path) -> None:
    """The cache is fed empty."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    folder("llama", tmp_path / "llama")
    words = {f"w{k}": k for k in range(100)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(" ".join(f"w{(7 * k * n) % 97 + 3}" for k in range(1, 5 + n)) for n in range(1, 20)))
    run = ("optimize", tmp_path / "llama", "-o", tmp_path / "out.onnx", "--with-past", "--no-measure", "--json")
    step = (
        "--pipeline",
        "canonicalize, quantize{mode=weight-only bits=4 method=gptq}",
        "--samples",
        texts,
        "--tokenizer",
        tmp_path / "tokenizer.json",
    )
    report = json.loads(cli(*run, *step).stdout)
    assert report["loss"]["value"] is not None
    assert [row["changes"] > 0 for row in report["passes"] if row["name"].startswith("quantize")] == [True]


def test_a_name_of_the_module_excludes_its_nodes(tmp_path: Path) -> None:
    """In a file that torch wrote, whose nodes are called node_linear_14, and in an export of ours, which names the module."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")

    class Net(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.body, self.lm_head = torch.nn.Linear(32, 32), torch.nn.Linear(32, 64)

        def forward(self, x: Any) -> Any:
            return self.lm_head(torch.relu(self.body(x)))

    example = (torch.randn(3, 5, 32),)
    torch.onnx.export(Net().eval(), example, tmp_path / "net.onnx", dynamo=True, opset_version=18, verbose=False, external_data=False)
    for source, options in ((tmp_path / "net.onnx", {}), (Net().eval(), {"example_inputs": example})):
        result = graphopt.optimize(source, "canonicalize, quantize{exclude=lm_head/*}", target="cpu{tune=off}", **options)  # type: ignore[arg-type]
        told = [x.message for x in result.report.remarks("missed") if "excluded by exclude=lm_head/*" in x.message]
        assert len(told) == 1
        assert any(r.name.startswith("quantize") and r.changes for r in result.report.passes)
    assert any("lm_head/linear" in str(node.name) for node in graphopt.load(Net().eval(), example_inputs=example).graph)


# ---- what a run says of itself --------------------------------------------------------------------------------------------------------

LIAR = '''
import dataclasses

import onnx_ir as ir

from graphopt import Pass


@dataclasses.dataclass(frozen=True)
class Liar(Pass):
    """Says that it is exact."""

    def run(self, model, ctx):
        for value in model.graph.initializers.values():
            if value.const_value.size > 32:
                value.const_value = ir.tensor(value.const_value.numpy() * 3, name=value.name)
        return 1
'''


def test_a_pass_that_claims_to_be_exact_and_is_not_is_told(tmp_path: Path) -> None:
    (tmp_path / "liar.py").write_text(LIAR)
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).normal(size=(2, 4, 8)).astype(np.float32))
    run = ("optimize", saved(tmp_path, BLOCK), "-o", tmp_path / "out.onnx", "--no-measure", "--plugin", tmp_path / "liar.py")
    judged = (*run, "--samples", tmp_path / "x.npz", "--json", "--pipeline")

    def warnings(pipeline: str) -> list[str]:
        passes = json.loads(cli(*judged, pipeline, "--no-gate").stdout)["passes"]
        return [x["message"] for row in passes for x in row["remarks"] if x["kind"] == "warning"]

    taken_back = json.loads(cli(*judged, "canonicalize, liar").stdout)
    assert [row["changes"] for row in taken_back["passes"] if row["name"] == "liar"] == [0], "the gate takes it back; without the gate:"
    assert taken_back["loss"]["value"] < 1e-6
    (told,) = warnings("canonicalize, liar")
    assert told.startswith("the loss is ")
    assert told.endswith("claims to be exact; --check-numerics names the one that is not")
    assert "pass 2 `liar`" in error(*run, "--pipeline", "canonicalize, liar", "--check-numerics")
    assert warnings("canonicalize, fuse-norm, fuse-activation") == []
    assert warnings("liar, quantize") == [], "a lossy pass may have a loss"


@pytest.mark.slow
def test_what_torch_writes_beside_its_weights_is_optimized(tmp_path: Path) -> None:
    """torch.onnx.export(dynamo=True) to a path leaves even small weights in a data file."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    module, x = torch.nn.Linear(512, 100).eval(), torch.randn(2, 512)
    torch.onnx.export(module, (x,), tmp_path / "linear.onnx", dynamo=True, opset_version=18, verbose=False)
    for level in ("-O0", "-O1", "-O2"):
        out = tmp_path / f"out{level}.onnx"
        cli("optimize", tmp_path / "linear.onnx", "-o", out, level, "--no-measure")
        found = next(iter(ort.session(out).run({onnx.load(out).graph.input[0].name: x.numpy()}).values()))
        expected = module(x).detach().numpy()
        assert np.abs(found - expected).max() <= (1e-5 if level != "-O2" else 0.05) * (1 + np.abs(expected).max())


def test_a_report_page_is_complete(tmp_path: Path) -> None:
    """Which command made it, of what, where and when; and one of a thing is no plural."""
    source = saved(tmp_path, RELU)
    child = start(tmp_path, "optimize", str(source), "-o", "out.onnx", "--report", "r.html", "--shapes", "1x4", "--pipeline", "canonicalize")
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, out + err
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    told = dict(re.findall(r"<tr><td>([a-z ]+)</td><td>(.*?)</td></tr>", page))
    assert told["command"] == f"graphopt optimize {source} -o out.onnx --report r.html --shapes 1x4 --pipeline canonicalize"
    assert {"model", "pipeline", "target", "threads", "versions", "processor", "date"} <= set(told)
    assert re.search(r"\b1 [a-z]+s\b", re.sub(r"<[^>]*>", " ", page)) is None
