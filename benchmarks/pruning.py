"""Heads and neurons pruned by every criterion, at 10 to 50 % fewer multiplications, without training: quality, size and speed.

    python benchmarks/pruning.py minilm MINILM.onnx --text LINES.txt --reviews RATED.tsv [--limit N] [--budgets 0.1,0.3] [--only "NAME;NAME"]
    python benchmarks/pruning.py smol SMOLLM2.onnx [--only "NAME;NAME"]

Arguments and columns are those of benchmarks/factorize.py.
"""

from __future__ import annotations

import argparse
import tempfile
import time
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
CRITERIA = {
    "obs, refitted": "importance=obs",
    "obs, not refitted": "importance=obs refit=false",
    "fisher, refitted": "importance=fisher",
    "taylor, refitted": "importance=taylor",
    "reconstruction, refitted": "importance=reconstruction",
    "magnitude, refitted": "importance=magnitude",
    "magnitude, not refitted": "importance=magnitude refit=false",
    "random, refitted": "importance=random",
    "random, not refitted": "importance=random refit=false",
}
HEADS = {"heads by attention, refitted": "importance=attention", "heads by entropy, refitted": "importance=entropy", "heads by obs, refitted": ""}
SMOL = {
    "ffn 10 %": "prune-ffn{flops=0.1}",
    "ffn 20 %": "prune-ffn{flops=0.2}",
    "ffn 30 %": "prune-ffn{flops=0.3}",
    "heads 5 %": "prune-heads{flops=0.05}",
    "heads 10 %": "prune-heads{flops=0.1}",
    "both 10 %": "prune{flops=0.1}",
    "both 20 %": "prune{flops=0.2}",
    "both 20 %, magnitude": "prune{flops=0.2 importance=magnitude}",
}


def minilm(options: argparse.Namespace) -> None:
    samples = Samples(calibration(options.text, 1024))
    with tempfile.TemporaryDirectory() as name:
        bench = start(options.model, options.reviews, Path(name), options.limit)
        rows = [(how, f"prune{{flops={b} {given}}}") for how, given in CRITERIA.items() for b in options.budgets]
        rows += [(how, f"prune-heads{{flops={b} {given}}}") for how, given in HEADS.items() for b in options.budgets if b <= 0.2]
        for how, text in rows:
            if options.only and how not in options.only:
                continue
            begin, model = time.process_time(), bench.exact.clone()
            PassManager(parse(text, passes())).run(model, Context(model, samples=samples))
            bench.row(model, how, time.process_time() - begin)


def smol(options: argparse.Namespace) -> None:
    from weight_only import tokens

    held_out, seen = tokens(0, 40, 8), tokens(40, 300, 16)
    samples = Samples([feed_of(row[None]) for row in seen])
    exact = graphopt.load(options.model)
    PassManager(parse(targets()["cpu"]().pipeline(1), passes())).run(exact, Context(exact))
    total = flops(exact, {"batch": 1, "seq": 256}).total
    print("| fewer operations | how | perplexity | MB | seconds of one core |\n|---|---|---|---|---|", flush=True)
    for how, text in {"as it is": "", **SMOL}.items():
        if options.only and how not in options.only:
            continue
        begin, model = time.process_time(), exact.clone()
        PassManager(parse(text, passes())).run(model, Context(model, samples=samples))
        seconds, saved = time.process_time() - begin, 1 - flops(model, {"batch": 1, "seq": 256}).total / total
        with tempfile.TemporaryDirectory() as name:
            path = Path(name, "model.onnx")
            graphopt.optimize(model, "", target="cpu{tune=off}", promise=False).save(path)
            del model
            print(f"| {saved:.1%} | {how} | {perplexity(session(path), held_out):.2f} | {size(path) / 1e6:.0f} | {seconds:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("minilm", "smol"))
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--reviews", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--budgets", type=lambda text: tuple(map(float, text.split(","))), default=BUDGETS)
    parser.add_argument("--only", type=lambda text: tuple(text.split(";")), default=(), help="names of rows, separated by semicolons")
    options = parser.parse_args()
    if options.job == "minilm" and (options.text is None or options.reviews is None):
        parser.error("minilm needs --text and --reviews")
    minilm(options) if options.job == "minilm" else smol(options)


if __name__ == "__main__":
    main()
