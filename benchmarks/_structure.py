"""What the benchmarks of structural compression share: their arguments, calibration text, the files that are judged, and their tables."""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import multiprocessing
import sys
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
from graphopt.compress.prune.criterion import Ranking
from graphopt.compress.prune.importance import Importance
from graphopt.compress.prune.removable import Removable
from graphopt.core.contract import Context
from graphopt.core.pipeline import PassManager, parse
from graphopt.core.registry import passes, targets
from graphopt.graph.size import flops, size
from graphopt.io.save import save
from graphopt.run import race as bench
from graphopt.run.clock import steady_clock
from graphopt.run.ort import session
from graphopt.run.samples import Samples

Rows = Iterable[tuple[str, str, str]]  # name, pipeline, and what it shares its rankings of heads and neurons with
BUDGETS = (0.1, 0.2, 0.3, 0.4, 0.5)
COLUMNS = (
    "fewer operations", "how", "probe loss, int8", "cosine, float32", "cosine, int8", "Pearson, int8", "MB, int8", "speed-up, float32", "int8",
    "seconds of one core",
)  # fmt: skip
COSINES = 500  # texts that the float32 file is judged on
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
    """What every row starts from, and is judged by.

    `source`: the file of the exact model, in standard operators; operations are counted at 8 x 64 tokens.
    """

    source: Path
    feeds: Sequence[Mapping[str, Any]]
    judge: _quality.Judge
    folder: Path

    def rows(self, wanted: Mapping[int, tuple[str, str]]) -> dict[int, Row]:
        """What the pipelines make of the model, as two files each, and how good they are; all but the speed."""
        exact, known, found = graphopt.load(self.source), dict[Importance, _Known](), {}
        count = min(COSINES, len(self.judge.texts))
        for number, (how, pipeline) in wanted.items():
            model, seconds = changed(exact, pipeline, Samples(self.feeds), known)
            saved = 1 - flops(model, _SIZES).total / flops(exact, _SIZES).total
            files = written(model, self.folder, str(number))
            cosine = _quality.cosine(self.judge.base[:count], _quality.embed(files[0], self.judge.texts[:count]))
            found[number] = Row(how, saved, self.judge.of(files[1]), cosine, files, seconds)
            print(found[number].text("to be timed", ""), file=sys.stderr, flush=True)
        return found


@dataclasses.dataclass
class _Known:
    """`rankings`: of the candidates of a model in their order; `seconds`: what they took."""

    rankings: list[Ranking | None]
    seconds: float


class _Remembering(Context):
    """Rankings are made once for all rows that ask for the same, and their time is counted in each."""

    def __init__(self, model: Any, samples: Samples, known: dict[Importance, _Known]) -> None:
        super().__init__(model, samples=samples)
        self._rankings, self.borrowed = known, 0.0

    def get(self, analysis: Any) -> Any:
        if not isinstance(analysis, Importance):
            return super().get(analysis)
        candidates = super().get(Removable(analysis.resize)).candidates
        known = self._rankings.get(analysis)
        if known is None:
            begin, found = time.process_time(), super().get(analysis)
            self._rankings[analysis] = _Known([found.get(c) for c in candidates], time.process_time() - begin)
            return found
        self.borrowed += known.seconds
        return {c: ranking for c, ranking in zip(candidates, known.rankings, strict=True) if ranking is not None}


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table. `cosine`: of the float32 file; `seconds`: of one core, to make the model."""

    how: str
    saved: float
    quality: _quality.Quality
    cosine: float
    files: tuple[Path, Path]
    seconds: float

    def text(self, *speedups: str) -> str:
        q, megabytes = self.quality, size(self.files[1]) / 1e6
        return (
            f"| {self.saved:.1%} | {self.how} | {q.loss:.2%} +- {q.error:.2%} | {self.cosine:.4f} | {q.cosine:.4f} | {q.pearson:.4f} | "
            f"{megabytes:.1f} | {' | '.join(speedups)} | {self.seconds:.0f} |"
        )


def fused(file: Path) -> Any:
    """The model behind the exact passes of -O1."""
    exact = graphopt.load(file)
    PassManager(parse(targets()["cpu"]().pipeline(1), passes())).run(exact, Context(exact))
    return exact


def changed(exact: Any, pipeline: str, samples: Samples, known: dict[Importance, _Known] | None = None) -> tuple[Any, float]:
    """What a pipeline makes of a model, and the processor time that it takes; rankings are taken from `known`, and put there."""
    begin, model = time.process_time(), exact.clone()
    context = _Remembering(model, samples, {} if known is None else known)
    PassManager(parse(pipeline, passes())).run(model, context)
    return model, time.process_time() - begin + context.borrowed


def minilm(options: argparse.Namespace, rows: Rows, lines: int) -> None:
    """Make and judge the rows in `--processes` at once; then time all files in one interleaved run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        exact, source = fused(options.model), folder / "exact.onnx"
        save(exact, source)
        base = written(exact, folder, "base")[0]
        bench_ = Bench(source, calibration(options.text, lines), _quality.judge(base, options.reviews, limit=options.limit), folder)
        jobs: dict[str, dict[int, tuple[str, str]]] = {}
        for number, (how, pipeline, group) in enumerate([("int8 only", "", ""), *rows]):
            jobs.setdefault(group, {})[number] = how, pipeline
        made: dict[int, Row] = {}
        with concurrent.futures.ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn"), _single, max_tasks_per_child=1) as pool:
            for future in [pool.submit(bench_.rows, job) for job in sorted(jobs.values(), key=len, reverse=True)]:
                made |= future.result()
        speedups = raced(base, [path for row in made.values() for path in row.files])
        print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
        for _, row in sorted(made.items()):
            print(row.text(*(f"{speedups[path]:.2f}x" for path in row.files)))


def _single() -> None:
    import torch

    torch.set_num_threads(1)


def smol(options: argparse.Namespace, rows: Rows) -> None:
    from weight_only import tokens

    held_out, seen = tokens(0, 40, 8), tokens(40, 300, 16)
    samples, exact = Samples([feed_of(row[None]) for row in seen]), fused(options.model)
    total = flops(exact, _DECODER).total
    print("| fewer operations | how | perplexity | MB | seconds of one core |\n|---|---|---|---|---|", flush=True)
    known: dict[Importance, _Known] = {}
    for how, pipeline, _ in rows:
        model, seconds = changed(exact, pipeline, samples, known)
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
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--budgets", type=lambda text: tuple(map(float, text.split(","))), default=BUDGETS)
    parser.add_argument("--only", type=lambda text: tuple(text.split(";")), default=(), help="names of rows, separated by semicolons")
    options = parser.parse_args()
    if options.job == "minilm" and (options.text is None or options.reviews is None):
        parser.error("minilm needs --text and --reviews")
    known = [("as it is", "", ""), *((how, pipeline, how) for how, pipeline in decoder.items())]
    wanted = [row for row in (rows(options.budgets) if options.job == "minilm" else known) if not options.only or row[0] in options.only]
    minilm(options, wanted, lines) if options.job == "minilm" else smol(options, wanted)


def written(model: Any, folder: Path, name: str) -> tuple[Path, Path]:
    """The float32 and the int8 file."""
    paths = folder / f"{name}.onnx", folder / f"{name}-int8.onnx"
    graphopt.optimize(model, "", target="cpu{tune=off}", promise=False).save(paths[0])
    graphopt.optimize(model, "quantize", target="quantized{tune=off}", promise=False).save(paths[1])
    return paths


def raced(base: Path, files: Sequence[Path]) -> dict[Path, float]:
    """Speed-ups over `base`, geometric mean over SHAPES: interleaved warm blocks in processor time."""
    sessions = {str(path): bench.Picky(session(path)) for path in (base, *files)}
    feeds = bench.feeds_for([graphopt.load(base)], list(SHAPES))
    timed = bench.race(sessions, feeds, clock=steady_clock(1), effort=bench.CHOICE)
    return {path: timed.speedup(str(path)) for path in files}
