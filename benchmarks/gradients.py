"""Forward and backward pass of the torch executor against the module that the file came from.

    python benchmarks/gradients.py FOLDER FILE.onnx ... [--batch 32] [--length 40] [--rounds 7]

FOLDER is a Hugging Face encoder, each FILE an export of it with the inputs input_ids and attention_mask. Each file is run as it was exported
and after the passes that fuse. Interleaved, one thread, processor time, the median of the rounds; the outputs are compared first.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FUSED = "canonicalize, simplify, fuse-norm, fuse-activation, fuse-rotary, fuse-attention"


def main() -> None:
    import torch
    from transformers import AutoModel

    import graphopt
    from graphopt.run.torch.model import TorchModel

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    for name, default in (("--batch", 32), ("--length", 40), ("--rounds", 7)):
        parser.add_argument(name, type=int, default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = AutoModel.from_pretrained(arguments.folder, local_files_only=True).eval()
    ids = torch.randint(1000, module.config.vocab_size, (arguments.batch, arguments.length))
    mask = torch.ones_like(ids)
    mask[::3, arguments.length * 2 // 3 :] = 0
    feeds = {"input_ids": ids, "attention_mask": mask}
    runs: dict[str, tuple[Any, Callable[[], Any]]] = {"module": (module, lambda: module(**feeds).last_hidden_state)}
    for file in arguments.files:
        exported = graphopt.load(file)
        fused = graphopt.optimize(file, FUSED, target="cpu{tune=off vendor=false}", promise=False).model
        for name, graph in ((file.stem, exported), (f"{file.stem}, fused", fused)):
            executor = TorchModel(graph)
            runs[name] = executor, lambda executor=executor: next(iter(executor(feeds).values()))
    with torch.no_grad():
        expected = runs["module"][1]()
        for name, (_, function) in runs.items():
            error = (function() - expected).abs().max().item()
            assert error < 1e-4, f"{name} is off by {error}"
    report(timed(runs, arguments.rounds))


def timed(runs: dict[str, tuple[Any, Callable[[], Any]]], rounds: int) -> dict[str, list[float]]:
    """Name -> median seconds of the forward pass alone, and of forward and backward."""
    import torch

    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in runs}
    for _ in range(rounds):
        for name, (module, function) in runs.items():
            with torch.no_grad():
                start = time.process_time()
                function()
                found[name][0].append(time.process_time() - start)
            module.zero_grad(set_to_none=True)
            start = time.process_time()
            function().square().mean().backward()
            found[name][1].append(time.process_time() - start)
    return {name: [statistics.median(times) for times in pair] for name, pair in found.items()}


def report(seconds: dict[str, list[float]]) -> None:
    forward, both = seconds["module"]
    for name, (own, own_both) in seconds.items():
        print(f"{name:32} forward {own * 1e3:7.0f} ms {own / forward:5.2f}x   with backward {own_both * 1e3:7.0f} ms {own_both / both:5.2f}x")


if __name__ == "__main__":
    main()
