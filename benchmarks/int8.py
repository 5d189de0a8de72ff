"""How right int8 activations stay: one scale for a tensor beside one for each row.

    python benchmarks/int8.py [--smol FILE.onnx --tokens FILE.npz] [--only minilm|smol]

MiniLM: Pearson with human similarity on the Lee documents, and the mean cosine to the float32 embeddings. --smol is a decoder
(input_ids, attention_mask -> logits) and --tokens an .npz with `test` and `calibration` of token ids [rows, length]: perplexity on `test`.
Prefill is timed at 1 x length, one thread, float32 and int8 in turn, medians. The share of multiply-accumulates in integers is counted from
the lowered graph: every multiply with a stored weight, the output head too; attention scores are no such multiply and are left out.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from _perplexity import feed_of, perplexity
from _ratio import speedup

import graphopt
from graphopt.cli import demo_race as demo
from graphopt.run import race as bench
from graphopt.run.ort import session

EXACT = "canonicalize, simplify, simplify-masks, canonicalize, fuse-norm, fuse-activation, fuse-rotary, fuse-attention"
FORMS = ("quantize", "quantize{rows=auto}", "quantize{rows=true}")
SMOOTH = ("smooth, quantize", "smooth{rows=true}, quantize{rows=true}")
_INTEGER = ("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul")


def integer_share(model: Any) -> float:
    """Multiply-accumulates of a token in integers, as a fraction of those with a stored weight."""
    integer = total = 0
    for node in model.graph:
        stored = node.inputs[1] if len(node.inputs) > 1 else None
        if node.op_type not in (*_INTEGER, "MatMul", "Gemm") or stored is None:
            continue
        while stored.const_value is None and stored.producer() is not None and stored.producer().op_type in ("Transpose", "DequantizeLinear"):
            stored = stored.producer().inputs[0]
        if stored.const_value is None:
            continue
        total += stored.const_value.size
        integer += stored.const_value.size if node.op_type in _INTEGER else 0
    return integer / total


def smol(path: Path, tokens: Path) -> None:
    data = np.load(tokens)
    samples = [feed_of(row[None]) for row in data["calibration"]]
    base = session(path)
    print(f"| SmolLM2 float32 | perplexity {perplexity(base, data['test']):.2f} | 1.00x | 0 % |", flush=True)
    for form in (*FORMS, *SMOOTH):
        result = graphopt.optimize(path, f"{EXACT}, {form}", target="quantized{tune=off}", samples=samples, promise=False)
        runner = session(result.model)
        ratio = speedup(base, runner, feed_of(data["test"][:1]))
        print(f"| {form} | perplexity {perplexity(runner, data['test']):.2f} | {ratio:.2f}x | {integer_share(result.model):.0%} |", flush=True)


def minilm() -> None:
    """Every form beside float32 and the peer, interleaved, at the shapes of the demo."""
    model, (texts, human) = demo._model_dir(), demo._lee()
    background = (Path(demo._folder_of("gensim"), "test", "test_data", "lee_background.cor")).read_text(encoding="utf-8", errors="replace")
    samples, tokenizer = background.strip().splitlines()[40:72], model / "tokenizer.json"
    with tempfile.TemporaryDirectory() as name:
        source, peer = Path(name, "minilm.onnx"), Path(name, "peer.onnx")
        graphopt.optimize(model, level=0, promise=False).save_input(source)
        demo.quantize_dynamic(source, peer)
        sessions = {"float32": demo._session(source), "onnxruntime quantize_dynamic": demo._session(peer)}
        for number, form in enumerate(FORMS):
            result = graphopt.optimize(source, f"{EXACT}, {form}", target="quantized{tune=off}", samples=samples, tokenizer=tokenizer, promise=False)
            result.save(Path(name, f"{number}.onnx"))
            sessions[form] = demo._session(Path(name, f"{number}.onnx"))
        timings = bench.race(sessions, bench.feeds_for([ir.load(source)], demo.SHAPES))
        before = demo.embed(sessions["float32"], tokenizer, texts)
        print("| file | Pearson | cosine | ms at " + " ".join(timings.shapes) + " | speed-up | over quantize_dynamic |")
        for form, runner in sessions.items():
            after, ratio = demo.embed(runner, tokenizer, texts), timings.speedup(form) / timings.speedup("onnxruntime quantize_dynamic")
            spent = " ".join(f"{1e3 * t:.1f}" for t in timings.seconds[form])
            cosine = float((before * after).sum(-1).mean())
            print(f"| {form} | {demo.pearson(after, human):.4f} | {cosine:.4f} | {spent} | {timings.speedup(form):.2f}x | {ratio:.2f}x |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smol", type=Path)
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--only", choices=("minilm", "smol"))
    chosen = parser.parse_args()
    if chosen.only != "smol":
        minilm()
    if chosen.only != "minilm" and chosen.smol is not None:
        if chosen.tokens is None:
            parser.error("--smol needs --tokens")
        smol(chosen.smol, chosen.tokens)


if __name__ == "__main__":
    main()
