"""Heads and neurons pruned by every criterion, at 10 to 50 % fewer multiplications, without training: quality, size and speed.

    python benchmarks/pruning.py minilm MINILM.onnx --text LINES.txt --reviews RATED.tsv [--limit N] [--budgets 0.1,0.3] [--only "NAME;NAME"]
    python benchmarks/pruning.py smol SMOLLM2.onnx [--only "NAME;NAME"]

Arguments and columns are those of benchmarks/factorize.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from _structure import main

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
HEADS = {f"heads by {criterion}, refitted": f"importance={criterion}" for criterion in ("attention", "entropy", "obs")}
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


def rows(budgets: Sequence[float]) -> Iterator[tuple[str, str, str]]:
    yield from ((how, f"prune{{flops={budget} {given}}}", given.split()[0]) for how, given in CRITERIA.items() for budget in budgets)
    yield from ((how, f"prune-heads{{flops={budget} {given}}}", given) for how, given in HEADS.items() for budget in budgets if budget <= 0.2)


if __name__ == "__main__":
    main(__doc__, rows, SMOL, lines=1024)
