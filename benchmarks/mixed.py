"""Uniform widths beside mixed ones, weight by weight and head by head: size, quality, speed.

    python benchmarks/mixed.py [--smol FILE.onnx] [--only minilm|smol] [NAME ...]

MiniLM: Pearson with human similarity on the Lee documents, the mean cosine to the float32 embeddings, and the geometric mean of the speed-up over
float32 at the shapes of the demo. Effects are measured on 16 other texts (Lee background documents 40 to 55). --smol is the decoder of `_models.py`
(input_ids, attention_mask -> logits): perplexity on 8 x 256 tokens of the documents 0 to 39, and the speed of a prefill of 1 x 256. Effects are
measured on 128 tokens of the documents from 40 on. One thread, interleaved, processor time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import onnx_ir as ir
from _perplexity import feed_of, perplexity
from int8 import EXACT, speedup
from weight_only import tokens

import graphopt
from graphopt.cli import demo_race as demo
from graphopt.run import race as bench
from graphopt.run.ort import session

PLAIN = "float32"
UNIFORM = {"int8": "quantize{mode=weight-only block=64}", "int4": "quantize{mode=weight-only bits=4}"}
GPTQ = "quantize{mode=weight-only bits=4 method=gptq}"
INTEGER = {"dynamic int8": "quantize"}
MINILM = {
    **UNIFORM,
    "int4, GPTQ": GPTQ,
    **INTEGER,
    **{f"mixed, loss {loss}": f"mix-precision{{loss={loss}}}" for loss in (0.05, 0.1, 0.15)},
    **{f"mixed by heads, loss {loss}": f"mix-precision{{heads=true loss={loss}}}" for loss in (0.05, 0.1, 0.15)},
    "mixed with GPTQ, loss 0.1": f'mix-precision{{choices=int8+"{GPTQ}" loss=0.1}}',
    "fastest, loss 0.1": "mix-precision{choices=dynamic cost=time loss=0.1}",
}
SMOL = {
    **UNIFORM,
    "mixed, loss 0.1": "mix-precision{loss=0.1}",
    "mixed, loss 0.2": "mix-precision{loss=0.2}",
    "mixed by heads, loss 0.2": "mix-precision{heads=true loss=0.2}",
}


def made(source: Any, pipeline: str, path: Path, samples: Any, **given: Any) -> tuple[float, str]:
    """Writes the artifact, unless it is there; seconds, and how many parts got which choice."""
    note = path.with_suffix(".json")
    if not note.exists():
        start = time.time()
        result = graphopt.optimize(source, f"{EXACT}, {pipeline}", target="quantized{tune=off}", samples=samples, promise=False, **given)
        result.save(path)
        last = [r.message for r in result.report.remarks("applied") if r.pass_name == "mix-precision"][-1:]
        note.write_text(json.dumps([time.time() - start, "".join(last).partition(";")[0]]), encoding="utf-8")
    seconds, parts = json.loads(note.read_text(encoding="utf-8"))
    return seconds, parts


def file_of(folder: Path, model: str, variant: str) -> Path:
    return folder / f"{model} {variant}.onnx".replace(" ", "-").replace(",", "")


def minilm(names: list[str], folder: Path, *, speed: bool) -> None:
    model, (texts, human) = demo._model_dir(), demo._lee()
    background = Path(demo._folder_of("gensim"), "test", "test_data", "lee_background.cor").read_text(encoding="utf-8", errors="replace")
    samples, tokenizer = background.strip().splitlines()[40:56], model / "tokenizer.json"
    variants = {PLAIN: "", **(MINILM if not names else {name: MINILM[name] for name in names})}
    files = {variant: file_of(folder, "minilm", variant) for variant in variants}
    source = folder / "minilm-export.onnx"
    if not source.exists():
        graphopt.optimize(model, level=0, promise=False).save_input(source)
    notes = {variant: made(source, pipeline, files[variant], samples, tokenizer=tokenizer) for variant, pipeline in variants.items()}
    sessions = {variant: demo._session(path) for variant, path in files.items()}
    timings = bench.race(sessions, bench.feeds_for([ir.load(files[PLAIN])], demo.SHAPES)) if speed else None
    base = demo.embed(sessions[PLAIN], tokenizer, texts)
    print("| MiniLM | parts | MB | Pearson | cosine | speed-up | seconds to make |\n|---|---|---|---|---|---|---|")
    for variant, runner in sessions.items():
        after, (seconds, parts) = demo.embed(runner, tokenizer, texts), notes[variant]
        size, cosine = files[variant].stat().st_size / 1e6, float((after * base).sum(-1).mean())
        faster = "" if timings is None else f"{timings.speedup(variant):.2f}x"
        print(f"| {variant} | {parts} | {size:.1f} | {demo.pearson(after, human):.4f} | {cosine:.4f} | {faster} | {seconds:.0f} |", flush=True)


def smol(path: Path, names: list[str], folder: Path, *, speed: bool) -> None:
    held_out, seen = tokens(0, 40, 8), tokens(40, 300, 1)
    base, feed = session(path), feed_of(held_out[:1])
    print("| SmolLM2 | parts | MB | perplexity | speed-up | seconds to make |\n|---|---|---|---|---|---|")
    print(f"| {PLAIN} | | {path.stat().st_size / 1e6:.1f} | {perplexity(base, held_out):.2f} | | |", flush=True)
    for variant in names or SMOL:
        file = file_of(folder, "smol", variant)
        seconds, parts = made(path, SMOL[variant], file, [feed_of(seen[:, :128])])
        runner = session(file)
        faster = f"{speedup(base, runner, feed):.2f}x" if speed else ""
        row = f"{file.stat().st_size / 1e6:.1f} | {perplexity(runner, held_out):.2f} | {faster} | {seconds:.0f}"
        print(f"| {variant} | {parts} | {row} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smol", type=Path)
    parser.add_argument("--only", choices=("minilm", "smol"))
    parser.add_argument("--keep", type=Path, help="a folder for the artifacts; those that are there are not made again")
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("names", nargs="*", help="of the rows; by default all")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.keep or Path(temporary)
        if chosen.only != "smol":
            minilm([name for name in chosen.names if name in MINILM], folder, speed=not chosen.no_speed)
        if chosen.only != "minilm" and chosen.smol is not None:
            smol(chosen.smol, [name for name in chosen.names if name in SMOL], folder, speed=not chosen.no_speed)


if __name__ == "__main__":
    main()
