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

from _perplexity import feed_of, perplexity
from _structure import calibration, start

import graphopt
from graphopt.core import Context
from graphopt.measure import flops, size
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


def minilm(options: argparse.Namespace) -> None:
    samples = Samples(calibration(options.text))
    with tempfile.TemporaryDirectory() as name:
        bench = start(options.model, options.reviews, Path(name), options.limit)
        for how, given in METHODS.items():
            for budget in options.budgets if not options.only or how in options.only else ():
                begin, model = time.process_time(), bench.exact.clone()
                PassManager(parse(f"factorize{{budget={budget} {given}}}", passes())).run(model, Context(model, samples=samples))
                bench.row(model, how, time.process_time() - begin)


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
