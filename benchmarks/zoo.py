"""Small models of many Transformer architectures, exported by several routes, with what torch computes for hard feeds.

    python benchmarks/zoo.py FOLDER [--every] [--only NAME,...] [--routes dynamo18,dynamo23,script17,script17-eager] [--again]

The folder gets NAME.ROUTE.onnx, NAME.IMPLEMENTATION.npz (feeds, and the outputs of torch) and zoo.json (what is there, and what could not be
exported, with the reason of the exporter). The weights are random, and large enough that a wrong scale or mask shows.
The models are those of _architectures.py, or with --every all types that the installed transformers knows (_every.py): first all by the first
route, then all by the next. A second run goes on where the last one was stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import _every
import _feeds
from _architectures import LAYERS, ZOO, Architecture
from _modules import MODULES
from _worker import Worker, reason, serve

ROUTES = ("dynamo18", "script17-eager", "script17", "dynamo23")
MOST_MEMORY = 12 << 30  # bytes of addresses that one child may hold


class Model:
    """A built architecture: a torch module that takes the inputs in order, and gives a tuple of arrays."""

    def __init__(self, name: str, implementation: str) -> None:
        self.row, self.blocks, self.facts = ZOO[name], ZOO[name].blocks, {"family": ZOO[name].kind}
        self.inner, self.implementation = _build(name, self.row, implementation)
        spread(self.inner)
        config = getattr(self.inner, "config", None)
        past = self.row.kind == "past"
        heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 0)
        self.cache = {"layers": LAYERS if past else 0, "kv_heads": heads if past else 0}
        self.module = wrapped(self)

    def feeds(self) -> list[tuple[str, dict[str, Any]]]:
        """Named feeds; the first is the example for the exporter."""
        return [(str(c), _feeds.feed(self.row.kind, c, seed, **self.cache)) for seed, c in enumerate(_feeds.cases(self.row.kind))]

    def axes(self, name: str) -> dict[int, str]:
        """The axes of an input that may change from feed to feed; equal names are equal sizes."""
        return _feeds.axes(name, self.row.kind)

    def call(self, feed: dict[str, Any]) -> tuple[Any, ...]:
        """What the model computes: its main output, the asked for others, and the cache."""
        if not self.row.config:
            return (self.inner(*feed.values()),)
        given = {_feeds.CALLED.get(k, k): v for k, v in feed.items() if not k.startswith("past.")}
        if self.row.kind == "past":
            import transformers

            pairs = [(feed[f"past.{i}.key"], feed[f"past.{i}.value"]) for i in range(LAYERS)]
            given["past_key_values"] = transformers.DynamicCache(pairs)
        out = self.inner(**given, **self.row.call, return_dict=True)
        names = [k for k in ("logits", "last_hidden_state", "language_output") if getattr(out, k, None) is not None][:1]
        found = [getattr(out, k) for k in (*names, *self.row.outputs)]
        cache = out.past_key_values.layers if self.row.kind == "past" else ()
        tensors = [t for x in found for t in (x if isinstance(x, (tuple, list)) else (x,))]
        return (*tensors, *(t for layer in cache for t in (layer.keys, layer.values)))


def _build(name: str, row: Architecture, implementation: str) -> tuple[Any, str]:
    import torch

    torch.manual_seed(0)
    wanted = row.implementation or implementation
    if not row.config:
        return MODULES[name]().eval(), wanted
    import transformers

    config = getattr(transformers, row.config)(**row.overrides)
    if "use_cache" in row.call:
        config.use_cache = row.call["use_cache"]
    config._experts_implementation = "batched_mm"  # the default kernel has no ONNX spelling
    kind = getattr(transformers, row.model)
    try:
        return kind._from_config(config, attn_implementation=wanted).eval(), wanted
    except (ValueError, ImportError):  # the class has no such implementation
        return kind._from_config(config, attn_implementation="eager").eval(), "eager"


def spread(module: Any) -> None:
    """Weights as a trained model has them: attention that is far from uniform, norms that differ from one, biases that are not zero."""
    import torch

    torch.manual_seed(1)
    tables = {id(m.weight) for m in module.modules() if isinstance(m, torch.nn.Embedding)}
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
                continue
            inputs = parameter[0].numel() if parameter.dim() != 3 else parameter.shape[-1]
            parameter.normal_(0, 0.7 if id(parameter) in tables else 1 / math.sqrt(inputs))


def wrapped(model: Any) -> Any:
    import torch

    names = list(model.feeds()[0][1])

    class Positional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model.inner

        def forward(self, *inputs: Any) -> Any:
            return model.call(dict(zip(names, inputs, strict=True)))

    return Positional().eval()


def export(name: str, route: str, folder: Path, kind: Any) -> dict[str, Any]:
    """Export one model by one route, and save what torch computes; the entry for zoo.json. `kind`: Model, or that of _every.py."""
    import numpy as np
    import torch

    start = time.time()
    base, _, eager = route.partition("-")
    try:
        model = kind(name, eager or "sdpa")
    except _every.NoModel as why:
        return {"unbuilt": str(why)}
    if not model.blocks:
        return model.facts | {"unbuilt": "it has no attention"}
    if eager and kind(name, "sdpa").implementation == model.implementation:
        return {"same": base}  # one implementation only: the other route is this file
    torch.backends.mha.set_fastpath_enabled(False)  # torch's fused encoder layer has no ONNX spelling
    feeds = model.feeds()
    with torch.no_grad():
        results = [model.module(*feed.values()) for _, feed in feeds]
    outputs = ["out", *(f"out{i}" for i in range(1, len(results[0])))]
    stored = f"{name}.{model.implementation}.npz"
    arrays = {f"{number} {case}/in/{k}": v.numpy() for number, (case, feed) in enumerate(feeds) for k, v in feed.items()}
    for number, ((case, _), result) in enumerate(zip(feeds, results, strict=True)):
        arrays |= {f"{number} {case}/out/{k}": v.numpy() for k, v in zip(outputs, result, strict=True)}
    np.savez(folder / stored, **arrays)
    entry = model.facts | {"blocks": model.blocks, "implementation": model.implementation}
    try:
        _write(model, feeds[0][1], outputs, base, folder / f"{name}.{route}.onnx")
    except Exception as error:  # noqa: BLE001  an exporter that fails is a result here
        return entry | {"failed": reason(error)}
    return entry | {"feeds": stored, "seconds": round(time.time() - start, 1)}


def _write(model: Any, example: dict[str, Any], outputs: list[str], route: str, path: Path) -> None:
    import torch

    names, arguments = list(example), tuple(example.values())
    dynamic = {name: model.axes(name) for name in names}
    with torch.no_grad():
        if route.startswith("dynamo"):
            shapes = (tuple(dict.fromkeys(axes, torch.export.Dim.AUTO) for axes in dynamic.values()),)
            program = torch.onnx.export(
                model.module, arguments, dynamo=True, opset_version=int(route.removeprefix("dynamo")), dynamic_shapes=shapes,
                input_names=names, output_names=outputs, external_data=False, verbose=False,
            )  # fmt: skip
            program.save(str(path))
            return
        torch.onnx.export(
            model.module, arguments, str(path), dynamo=False, opset_version=int(route.removeprefix("script")),
            input_names=names, output_names=outputs, dynamic_axes=dynamic | {k: {0: "batch"} for k in outputs},
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--every", action="store_true", help="all types of the installed transformers, in place of the table")
    parser.add_argument("--only", default="", help="names, separated by commas")
    parser.add_argument("--routes", default=",".join(ROUTES))
    parser.add_argument("--again", action="store_true", help="also export what is there")
    parser.add_argument("--seconds", type=float, default=300, help="a longer export counts as hanging")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--list", action="store_true", help="print the names")
    given = parser.parse_args()
    if given.worker:
        return _work(given.folder, _every.Model if given.every else Model)
    names = _every.names() if given.every else list(ZOO)
    if given.list:
        return print("\n".join(names))
    given.folder.mkdir(parents=True, exist_ok=True)
    index = given.folder / "zoo.json"
    done = json.loads(index.read_text()) if index.exists() else {}
    worker = Worker(__file__, [str(given.folder), *(["--every"] if given.every else [])], given.seconds)
    wanted = [n for n in names if not given.only or n in given.only.split(",")]
    for key in [f"{name}.{route}" for route in given.routes.split(",") for name in wanted]:
        name = key.rpartition(".")[0]
        if key in done and not given.again:
            continue
        unbuilt = next((done[k] for k in (f"{name}.{r}" for r in ROUTES) if "unbuilt" in done.get(k, {})), None)
        done[key] = unbuilt if unbuilt and not given.again else worker.ask(key)
        part = index.with_suffix(".part")
        part.write_text(json.dumps(done, indent=1))
        part.replace(index)
        print(key, next((done[key][k] for k in ("unbuilt", "failed", "same", "seconds") if k in done[key]), ""), flush=True)
    worker.stop()
    return None


def _work(folder: Path, kind: Any) -> None:
    import torch

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    serve(lambda key: export(*key.rpartition(".")[::2], folder, kind))


if __name__ == "__main__":
    sys.exit(main())
