"""What rounding the attention probabilities of MiniLM costs: linear and power-of-two codes side by side, alone and beside int8 weights.

Run by hand: `pip install -e '.[demo]'`, then `python benchmarks/probabilities.py`. Prints the table of docs/benchmarks.md.
"""

from __future__ import annotations

import graphopt
from graphopt import demo
from graphopt.bench import Picky
from graphopt.run.ort import session

CODES = ("", "bits=8", "codes=log bits=4", "codes=log bits=3", "bits=4")
AFTER = {"float32": "", "int8 weights": ", fuse-norm, fuse-activation, quantize{mode=dynamic}"}


def main() -> None:
    folder, (texts, human) = demo._model_dir(), demo._lee()
    base = None
    print("| probabilities | " + " | ".join(f"Pearson, {name} | cosine, {name}" for name in AFTER) + " |")
    print("|---" * (1 + 2 * len(AFTER)) + "|")
    for codes in CODES:
        cells = []
        for rest in AFTER.values():
            step = f", quantize-probabilities{{{codes}}}" if codes else ""
            result = graphopt.optimize(folder, f"canonicalize{step}{rest}", target="quantized{tune=off}", promise=False)
            found = demo.embed(Picky(session(result.model)), folder / "tokenizer.json", texts)
            base = found if base is None else base
            cells.append(f"{demo.pearson(found, human):.4f} | {float((found * base).sum(-1).mean()):.4f}")
        print(f"| {codes or 'as they are'} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
