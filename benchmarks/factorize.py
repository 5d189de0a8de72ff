"""factorize on real models, at 10 to 50 % fewer operations: quality, size and speed, in float32 and as int8.

    python benchmarks/factorize.py minilm MINILM.onnx --text LINES.txt --reviews RATED.tsv [--limit N] [--budgets 0.1,0.3] [--only NAME,NAME]
    python benchmarks/factorize.py smol SMOLLM2.onnx [--only NAME,NAME]

The models are exports of `_models.py`. LINES.txt: unlabelled text, one sample a line, of which 512 are used to calibrate; RATED.tsv: mean rating,
tab, review. Operations: of the whole model at 8 x 64 tokens. Prints the rows of docs/benchmarks.md as they come.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
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

BUDGETS = (0.1, 0.2, 0.3, 0.4, 0.5)
METHODS = {
    "whitened": "",
    "joint": "joint=true",
    "joint sequential": "joint=true sequential=true",
    "plain": "method=svd",
    "ASVD": "method=asvd",
    "whitened without sensitivity": "sensitivity=false",
}
COLUMNS = (
    "fewer operations", "how", "probe loss, int8", "cosine, float32", "cosine, int8", "Pearson, int8", "MB, int8", "speed-up, float32", "int8",
    "seconds of one core",
)  # fmt: skip
SHAPES = ((1, 16), (1, 128), (8, 64))
SMOL = {
    "plain": "factorize{budget=0.1 method=svd sensitivity=false}",
    "whitened without sensitivity": "factorize{budget=0.1 sensitivity=false}",
    "joint without sensitivity": "factorize{budget=0.1 joint=true sensitivity=false}",
    "joint": "factorize{budget=0.1 joint=true}",
    "joint 20 %": "factorize{budget=0.2 joint=true}",
    "1 layer": "drop-layers{count=1}",
    "2 layers": "drop-layers{count=2}",
    "4 layers": "drop-layers{count=4}",
    "2 attentions": "drop-layers{count=2 what=attention}",
    "4 attentions": "drop-layers{count=4 what=attention}",
    "2 FFNs": "drop-layers{count=2 what=ffn}",
}


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


def minilm(options: argparse.Namespace) -> None:
    samples = Samples(calibration(options.text))
    exact = graphopt.load(options.model)
    PassManager(parse(targets()["cpu"]().pipeline(1), passes())).run(exact, Context(exact))
    total = flops(exact, {"batch": 8, "seq": 64}).total
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, base8 = _written(exact, folder, "float32")
        judge = _quality.judge(base, options.reviews, limit=options.limit)
        print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
        _row("0", "int8 only", judge, (base, base8), (base, base8), 0.0)
        for how, given in METHODS.items():
            for budget in options.budgets if not options.only or how in options.only else ():
                start, model = time.process_time(), exact.clone()
                PassManager(parse(f"factorize{{budget={budget} {given}}}", passes())).run(model, Context(model, samples=samples))
                seconds = time.process_time() - start
                saved = 1 - flops(model, {"batch": 8, "seq": 64}).total / total
                _row(f"{saved:.1%}", how, judge, (base, base8), _written(model, folder, "cut"), seconds)


def _written(model: Any, folder: Path, name: str) -> tuple[Path, Path]:
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


def smol(options: argparse.Namespace) -> None:
    from weight_only import tokens

    held_out, seen = tokens(0, 40, 8), tokens(40, 300, 16)
    samples = Samples([feed_of(row[None]) for row in seen])
    exact = graphopt.load(options.model)
    PassManager(parse(targets()["cpu"]().pipeline(1), passes())).run(exact, Context(exact))
    total = flops(exact, {"batch": 1, "seq": 256}).total
    print("| fewer operations | how | perplexity | MB | seconds of one core |\n|---|---|---|---|---|", flush=True)
    for how, text in _asked(options.only):
        start, model = time.process_time(), exact.clone()
        PassManager(parse(text, passes())).run(model, Context(model, samples=samples))
        seconds = time.process_time() - start
        saved = 1 - flops(model, {"batch": 1, "seq": 256}).total / total
        with tempfile.TemporaryDirectory() as name:
            path = Path(name, "model.onnx")
            graphopt.optimize(model, "", target="cpu{tune=off}", promise=False).save(path)
            del model
            print(f"| {saved:.1%} | {how} | {perplexity(session(path), held_out):.2f} | {size(path) / 1e6:.0f} | {seconds:.0f} |", flush=True)


def _asked(only: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    table: Mapping[str, str] = {"as it is": "", **SMOL}
    yield from ((how, text) for how, text in table.items() if not only or how in only)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("minilm", "smol"))
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--reviews", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--budgets", type=lambda text: tuple(map(float, text.split(","))), default=BUDGETS)
    parser.add_argument("--only", type=lambda text: tuple(text.split(",")), default=(), help="names of rows, separated by commas")
    options = parser.parse_args()
    if options.job == "minilm" and (options.text is None or options.reviews is None):
        sys.exit("minilm needs --text and --reviews")
    minilm(options) if options.job == "minilm" else smol(options)


if __name__ == "__main__":
    main()
