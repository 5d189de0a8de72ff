"""factorize on real models, at 10 to 50 % fewer operations: quality, size and speed, in float32 and as int8.

    python benchmarks/factorize.py minilm MINILM.onnx --text LINES.txt --reviews RATED.tsv [--limit N] [--budgets 0.1,0.3] [--only "NAME;NAME"]
    python benchmarks/factorize.py smol SMOLLM2.onnx [--only "NAME;NAME"]

The models are exports of `_models.py`. LINES.txt: unlabelled text, one sample a line, of which 512 are used to calibrate; RATED.tsv: mean rating,
tab, review. Operations: of the whole model at 8 x 64 tokens. Prints the rows of docs/benchmarks.md as they come.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from _structure import main

METHODS = {
    "whitened": "",
    "joint": "joint=true",
    "joint sequential": "joint=true sequential=true",
    "plain": "method=svd",
    "ASVD": "method=asvd",
    "whitened without sensitivity": "sensitivity=false",
}
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


def rows(budgets: Sequence[float]) -> Iterator[tuple[str, str, str]]:
    yield from ((how, f"factorize{{budget={budget} {given}}}", f"{how} {budget}") for how, given in METHODS.items() for budget in budgets)


if __name__ == "__main__":
    main(__doc__, rows, SMOL, lines=512)
