"""How near the heads of an encoder come to reading by position alone, with and without a cut of their weights, and what that costs.

    python benchmarks/positional.py MINILM.onnx --text LINES.txt [--lines 512] [--fused]

Half of the lines show the weights, the other half are embedded: cosine to the embeddings of the exact model. One thread. The tolerances are those of
`threshold-attention{constant=..}`: the largest difference of any weight of a head, over all rows of all lines, padding left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import _quality
import numpy as np
from _structure import calibration

import graphopt
from graphopt.core.contract import Context
from graphopt.core.pipeline import PassManager, parse
from graphopt.core.registry import passes
from graphopt.run.ort import session
from graphopt.run.samples import Samples

CUTS = {"none": "threshold=1e-30"} | {f"{x} of the row's largest": f"threshold={x} relative=true" for x in (0.1, 0.5, 0.9)}
TOLERANCES = (0.1, 0.5, 0.9)


def cut(file: Path, text: str, first: str, feeds: list[dict[str, Any]]) -> tuple[Any, list[Any]]:
    model = graphopt.load(file)
    records = PassManager(parse(f"{first}, threshold-attention{{{text}}}", passes())).run(model, Context(model, samples=Samples(feeds)))
    return model, list(records[-1].remarks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--lines", type=int, default=512)
    parser.add_argument("--fused", action="store_true")
    options = parser.parse_args()
    first = "canonicalize, fuse-attention" if options.fused else "canonicalize"
    lines = [line for line in options.text.read_text(encoding="utf-8").splitlines() if line.strip()]
    order = np.random.default_rng(0).permutation(len(lines))  # the first ones are those of `calibration`
    held_out = [lines[k] for k in order[options.lines // 2 : options.lines]]
    feeds, base = calibration(options.text, options.lines // 2), _quality.embed(options.model, held_out)
    print("| cut | weights that are zero | cosine | nearest head | median of the heads | heads within 0.1, 0.5, 0.9: cosine with these replaced |")
    print("|---|---|---|---|---|---|", flush=True)
    for name, text in CUTS.items():
        model, remarks = cut(options.model, f"{text} constant=1e-9", first, feeds)
        heads = [(h["deviation"], f"{r.facts['layer']}:{h['head']} {h['form']}") for r in remarks for h in r.facts.get("heads", ())]
        zero = np.mean([r.facts["sparsity"] for r in remarks if "sparsity" in r.facts])
        found = []
        for tolerance in TOLERANCES:
            count = sum(gap <= tolerance for gap, _ in heads)
            changed = cut(options.model, f"{text} constant={tolerance}", first, feeds)[0] if count else None
            found.append("0" if changed is None else f"{count}: {_quality.cosine(base, _quality.embed(session(changed), held_out)):.4f}")
        gap, which = min(heads)
        cosine, median = _quality.cosine(base, _quality.embed(session(model), held_out)), np.median([g for g, _ in heads])
        print(f"| {name} | {zero:.1%} | {cosine:.4f} | {which}, {gap:.3f} | {median:.3f} | {'; '.join(found)} |", flush=True)


if __name__ == "__main__":
    main()
