"""What the benchmarks of structural compression share: their arguments, calibration text, the files that are judged, and their tables."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import _models
import _quality
import numpy as np
from _perplexity import feed_of, perplexity

import graphopt
from graphopt import bench
from graphopt.core import Context
from graphopt.measure import flops, latency, size, steady_clock
from graphopt.pipeline import PassManager, parse
from graphopt.registry import passes, targets
from graphopt.run.ort import session
from graphopt.samples import Samples

Rows = Iterable[tuple[str, str]]  # name, pipeline
BUDGETS = (0.1, 0.2, 0.3, 0.4, 0.5)
COLUMNS = (
    "fewer operations", "how", "probe loss, int8", "cosine, float32", "cosine, int8", "Pearson, int8", "MB, int8", "speed-up, float32", "int8",
    "seconds of one core",
)  # fmt: skip
SHAPES = ((1, 16), (1, 128), (8, 64))
_SIZES, _DECODER = {"batch": 8, "seq": 64}, {"batch": 1, "seq": 256}


def calibration(file: Path, count: int = 512, batch: int = 32) -> list[dict[str, Any]]:
    """Batches of lines of like length, so that little of them is padding."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(_models.minilm_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(128)
    tokenizer.enable_padding()
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    rng = np.random.default_rng(0)
    picked = sorted((lines[k] for k in rng.permutation(len(lines))[:count]), key=len)
    feeds = []
    for first in range(0, len(picked), batch):
        rows = tokenizer.encode_batch(picked[first : first + batch])
        feeds.append({"input_ids": np.array([r.ids for r in rows]), "attention_mask": np.array([r.attention_mask for r in rows])})
    return [feeds[k] for k in rng.permutation(len(feeds))]


@dataclasses.dataclass(frozen=True)
class Bench:
    """An exact model, its float32 and int8 files, and the judge of their embeddings; operations are counted at 8 x 64 tokens."""

    exact: Any
    files: tuple[Path, Path]
    judge: _quality.Judge
    folder: Path

    def row(self, model: Any, how: str, seconds: float) -> None:
        """Print what became of the model, beside the exact one."""
        saved = 1 - flops(model, _SIZES).total / flops(self.exact, _SIZES).total
        _row(f"{saved:.1%}", how, self.judge, self.files, written(model, self.folder, "cut"), seconds)


def fused(file: Path) -> Any:
    """The model behind the exact passes of -O1."""
    exact = graphopt.load(file)
    PassManager(parse(targets()["cpu"]().pipeline(1), passes())).run(exact, Context(exact))
    return exact


def changed(exact: Any, pipeline: str, samples: Samples) -> tuple[Any, float]:
    """What a pipeline makes of a model, and the processor time that it takes."""
    begin, model = time.process_time(), exact.clone()
    PassManager(parse(pipeline, passes())).run(model, Context(model, samples=samples))
    return model, time.process_time() - begin


def start(file: Path, reviews: Path, folder: Path, limit: int | None) -> Bench:
    """Load and fuse MiniLM, write its files, and print the head of the table and the row of int8 alone."""
    exact = fused(file)
    files = written(exact, folder, "float32")
    bench_ = Bench(exact, files, _quality.judge(files[0], reviews, limit=limit), folder)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    _row("0", "int8 only", bench_.judge, files, files, 0.0)
    return bench_


def minilm(options: argparse.Namespace, rows: Rows, lines: int) -> None:
    samples = Samples(calibration(options.text, lines))
    with tempfile.TemporaryDirectory() as name:
        table = start(options.model, options.reviews, Path(name), options.limit)
        for how, pipeline in rows:
            model, seconds = changed(table.exact, pipeline, samples)
            table.row(model, how, seconds)


def smol(options: argparse.Namespace, rows: Rows) -> None:
    from weight_only import tokens

    held_out, seen = tokens(0, 40, 8), tokens(40, 300, 16)
    samples, exact = Samples([feed_of(row[None]) for row in seen]), fused(options.model)
    total = flops(exact, _DECODER).total
    print("| fewer operations | how | perplexity | MB | seconds of one core |\n|---|---|---|---|---|", flush=True)
    for how, pipeline in rows:
        model, seconds = changed(exact, pipeline, samples)
        saved = 1 - flops(model, _DECODER).total / total
        with tempfile.TemporaryDirectory() as name:
            path = Path(name, "model.onnx")
            graphopt.optimize(model, "", target="cpu{tune=off}", promise=False).save(path)
            del model
            print(f"| {saved:.1%} | {how} | {perplexity(session(path), held_out):.2f} | {size(path) / 1e6:.0f} | {seconds:.0f} |", flush=True)


def main(description: str | None, rows: Callable[[Sequence[float]], Rows], decoder: Mapping[str, str], *, lines: int) -> None:
    """The command of a benchmark: `rows` of MiniLM for the budgets, and those of the decoder, by name; `lines` of text calibrate."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("minilm", "smol"))
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--reviews", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--budgets", type=lambda text: tuple(map(float, text.split(","))), default=BUDGETS)
    parser.add_argument("--only", type=lambda text: tuple(text.split(";")), default=(), help="names of rows, separated by semicolons")
    options = parser.parse_args()
    if options.job == "minilm" and (options.text is None or options.reviews is None):
        parser.error("minilm needs --text and --reviews")
    table = list(rows(options.budgets)) if options.job == "minilm" else [("as it is", ""), *decoder.items()]
    wanted = [(how, pipeline) for how, pipeline in table if not options.only or how in options.only]
    minilm(options, wanted, lines) if options.job == "minilm" else smol(options, wanted)


def written(model: Any, folder: Path, name: str) -> tuple[Path, Path]:
    """The float32 and the int8 file."""
    paths = folder / f"{name}.onnx", folder / f"{name}-int8.onnx"
    graphopt.optimize(model, "", target="cpu{tune=off}", promise=False).save(paths[0])
    graphopt.optimize(model, "quantize", target="quantized{tune=off}", promise=False).save(paths[1])
    return paths


def _row(saved: str, how: str, judge: _quality.Judge, base: tuple[Path, Path], files: tuple[Path, Path], seconds: float) -> None:
    count = min(1000, len(judge.texts))
    cosine = _quality.cosine(judge.base[:count], _quality.embed(files[0], judge.texts[:count]))
    found = judge.of(files[1])
    faster = _race(base[0], files)
    print(
        f"| {saved} | {how} | {found.loss:.2%} +- {found.error:.2%} | {cosine:.4f} | {found.cosine:.4f} | {found.pearson:.4f} | "
        f"{size(files[1]) / 1e6:.1f} | {faster[0]:.2f}x | {faster[1]:.2f}x | {seconds:.0f} |",
        flush=True,
    )


def _race(base: Path, files: tuple[Path, Path]) -> tuple[float, float]:
    """Speed-up over `base`, geometric mean over SHAPES: interleaved warm blocks in processor time."""
    sessions = {"base": bench.Picky(session(base)), "float32": bench.Picky(session(files[0])), "int8": bench.Picky(session(files[1]))}
    feeds = bench.feeds_for([graphopt.load(base)], list(SHAPES))
    timed = latency(sessions, feeds, rounds=4, block=3, clock=steady_clock(1))
    return timed.speedup("float32"), timed.speedup("int8")
