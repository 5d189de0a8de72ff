"""Replay every pass, level and target over small models, and tell what changed: graphs, weights, remarks, reports, files and errors.

Usage: python tests/replay.py record FILE.json.gz     before a change that must change nothing
       python tests/replay.py check FILE.json.gz      after it; exit code 1 if a case differs
       python tests/replay.py list

It imports public names only, and writes graphs down by itself, so that it does not depend on what it checks. Times are left out everywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import gzip
import io
import json
import logging
import os
import runpy
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from replay_cases import ALIKE, FUSE, FUSED, LARGE, LEVELS, UNFUSED  # type: ignore[import-not-found]
from replay_models import MODELS, SMALL, feeds, folder  # type: ignore[import-not-found]
from replay_text import digest, lines, plain, weights  # type: ignore[import-not-found]

import graphopt
from graphopt.analysis.attention import Attentions
from graphopt.analysis.linear import Linears

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
Parts = dict[str, str]  # what a case gave: a text for each part


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    run: Callable[[], Parts]


def cases() -> Iterator[Case]:
    """All of them, in the order in which they run."""
    for model in SMALL:
        for target, (levels, models) in LEVELS.items():
            for level in levels if model in models else ():
                yield Case(f"{model} -O{level} {target}", functools.partial(optimized, model, level=level, target=target))
        yield Case(f"{model} runs", functools.partial(runs, model))
        yield Case(f"{model} facts", functools.partial(facts, model))
        yield Case(f"{model} inspect", functools.partial(command, "inspect", model, "--json"))
    for before, table in ((FUSE, FUSED), ("canonicalize", UNFUSED)):
        for text, models in table.items():
            for model in models:
                name = f"{model} {'fused' if before == FUSE else 'unfused'}, {text}"
                yield Case(name, functools.partial(optimized, model, f"{before}, {text}", samples=True))
    weaker = f"{FUSE}, prune-ffn{{ratio=0.5 multiple=1}}, prune-heads{{ratio=0.5}}, quantize{{mode=weight-only bits=4}}"
    for model in ALIKE:
        yield Case(f"{model} max-loss", functools.partial(optimized, model, weaker, samples=True, max_loss=0.05))
        yield Case(f"{model} metric", functools.partial(optimized, model, weaker, samples=True, max_loss=0.02, judged=True))
        yield Case(f"{model} no samples", functools.partial(optimized, model, weaker))
        yield Case(f"{model} fuel", functools.partial(optimized, model, weaker, samples=True, fuel=9))
        yield Case(f"{model} checked", functools.partial(optimized, model, FUSE, verify_each=True, check_numerics=True))
        yield Case(f"{model} compare", functools.partial(compared, model))
    yield Case("bert command", functools.partial(command, "optimize", "bert", "-o", "OUT", "--no-measure", "--json", "--target", "cpu{tune=off}"))
    yield Case("bert wrong command", functools.partial(command, "optimize", "bert", "-o", "OUT", "--pipeline", "canonicalise"))
    yield Case("llama folder", functools.partial(from_folder, "llama_past"))
    for model in MODELS:
        if model not in SMALL:
            for target, levels in LARGE.items():
                for level in levels:
                    yield Case(f"{model} -O{level} {target}", functools.partial(optimized, model, level=level, target=target))


# ---- what a case gives --------------------------------------------------------------------------------------------------------------------


@functools.cache
def source(model: str) -> Any:
    return MODELS[model]()


def guarded(run: Callable[[], Parts]) -> Parts:
    """Its parts; an error is one as well."""
    try:
        return run()
    except Exception as error:  # noqa: BLE001 -- a crash is what a replay must show
        return {"error": f"{type(error).__name__}: {error}"}


def optimized(
    model: str, pipeline: str | None = None, *, target: str = "cpu{tune=off}", samples: bool = False, judged: bool = False, **options: Any
) -> Parts:
    given: Any = source(model)
    if judged:
        options["metric"] = metric(given)
    return result_parts(graphopt.optimize(given, pipeline, target=target, samples=feeds(given) if samples else None, promise=False, **options))


def result_parts(result: Any) -> Parts:
    told = {k: v for k, v in result.report.as_dict().items() if k not in ("graphopt", "passes", "latency", "speed_up", "changes")}
    remarks = [{"pass": r.pass_name, **r.as_dict()} for record in result.report.passes for r in record.remarks]
    parts = {
        "remarks": "\n".join(plain(remark) for remark in remarks),
        "changes": "\n".join(f"{record.name}: {record.changes}" for record in result.report.passes),
        "report": plain(told, indent=1),
    }
    for name, graph in (("graph", result.graph), ("lowered", result.model)):
        parts |= {name: "\n".join(lines(graph)), f"{name} weights": "\n".join(weights(graph))}
    return parts | guarded(lambda: {"file": saved(result)})


def saved(result: Any) -> str:
    with tempfile.TemporaryDirectory() as own:
        result.save(Path(own) / "out.onnx")
        return "\n".join(f"{p.name} {p.stat().st_size} bytes #{digest(p.read_bytes())}" for p in sorted(Path(own).iterdir()))


def metric(given: Any) -> Callable[[Any], float]:
    """One over one plus the distance from what the input model gives."""
    from graphopt.run.ort import session

    batches = feeds(given)
    base = [next(iter(session(given, optimize=False).run(batch).values())) for batch in batches]

    def score(other: Any) -> float:
        found = [next(iter(other.run(batch).values())) for batch in batches]
        return float(1 / (1 + np.mean([np.abs(a - b).mean() for a, b in zip(base, found, strict=True)])))

    return score


def runs(model: str) -> Parts:
    """The numbers of the three ways to run a graph."""
    from graphopt.run import ort, reference, torch

    graph = graphopt.load(source(model))
    ways = {"onnxruntime": functools.partial(ort.session, optimize=False), "reference": reference.session, "torch": torch.session}

    def outputs(way: Callable[[Any], Any]) -> str:
        session = way(graph)
        rows = [(k, name, array) for k, feed in enumerate(feeds(source(model))) for name, array in session.run(feed).items()]
        return "\n".join(f"{k} {name} {array.dtype}{list(array.shape)} #{digest(np.ascontiguousarray(array).tobytes())}" for k, name, array in rows)

    parts: Parts = {}
    for name, way in ways.items():
        found = guarded(lambda way=way: {"": outputs(way)})  # type: ignore[misc]
        parts[name] = next(iter(found.values()))
    return parts


def facts(model: str) -> Parts:
    graph = graphopt.optimize(source(model), "canonicalize", target="cpu{tune=off}").graph
    ctx = graphopt.Context(graph)
    attention = [f"{node.name}: {plain(found)}" for node, found in ctx.get(Attentions()).items()]
    return {"attention": "\n".join(attention), "linears": "\n".join(plain(found) for found in ctx.get(Linears()))}


def compared(model: str) -> Parts:
    with tempfile.TemporaryDirectory() as own:
        result = graphopt.optimize(source(model), level=2, target="quantized{tune=off}", promise=False)
        result.save(Path(own) / "b.onnx")
        found = graphopt.compare(source(model), Path(own) / "b.onnx", samples=feeds(source(model)))
        return {"comparison": found.json().replace(own, "TMP"), "verdict": found.verdict}


def command(name: str, model: str, *rest: str) -> Parts:
    """The command line, in this process."""
    given, out, told = source(model), io.StringIO(), io.StringIO()
    with tempfile.TemporaryDirectory() as own:
        if isinstance(given, onnx.ModelProto):
            onnx.save(given, Path(own) / "model.onnx")
        path = Path(own) / "model.onnx" if isinstance(given, onnx.ModelProto) else given
        before, code = sys.argv, 0
        sys.argv = ["graphopt", name, str(path), *(f"{own}/out.onnx" if word == "OUT" else word for word in rest)]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(told):
                runpy.run_module("graphopt", run_name="__main__")
        except SystemExit as end:
            code = end.code  # type: ignore[assignment]
        finally:
            sys.argv = before
        text, errors = (x.getvalue().replace(own, "TMP") for x in (out, told))
    with contextlib.suppress(ValueError):
        text = plain(json.loads(text), indent=1)
    return {"stdout": text, "stderr": errors, "exit code": str(code)}


def from_folder(model: str) -> Parts:
    with tempfile.TemporaryDirectory() as own:
        result = graphopt.optimize(folder(model, Path(own)), with_past=True, target="cpu{tune=off}", promise=False)
        return {k: v.replace(own, "TMP") for k, v in result_parts(result).items()}


# ---- record and check ---------------------------------------------------------------------------------------------------------------------


def replay(chosen: Iterable[Case]) -> Iterator[tuple[str, Parts]]:
    for case in chosen:
        start = time.perf_counter()
        parts = guarded(case.run)
        print(
            f"{time.perf_counter() - start:7.2f} s  {case.name}{'  (' + parts['error'].splitlines()[0][:90] + ')' if 'error' in parts else ''}",
            flush=True,
        )
        yield case.name, parts


def record(chosen: Sequence[Case], path: Path) -> int:
    texts: dict[str, str] = {}
    found: dict[str, dict[str, str]] = {}
    for name, parts in replay(chosen):
        found[name] = {part: digest(text.encode()) for part, text in parts.items()}
        texts |= {digest(text.encode()): text for text in parts.values()}
    data = json.dumps({"cases": found, "texts": texts}).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return 0


def check(chosen: Sequence[Case], path: Path, limit: int) -> int:
    data = path.read_bytes()
    known = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    names, differing = {case.name for case in chosen}, []
    for name, parts in replay(case for case in chosen if case.name in known["cases"]):
        before = known["cases"][name]
        wrong = [part for part in {**before, **parts} if before.get(part) != (digest(parts[part].encode()) if part in parts else None)]
        if wrong:
            differing.append(name)
            print(f"          DIFFERS in {', '.join(wrong)}")
        for part in wrong:
            rows = difflib.unified_diff(
                known["texts"].get(before.get(part), "").splitlines(), parts.get(part, "").splitlines(), "before", "now", n=0, lineterm=""
            )
            shown = [row[:300] for row in rows if not row.startswith("@@")][2:]
            print(
                "\n".join(f"          {part}: {row}" for row in shown[:limit])
                + (f"\n          {part}: ... {len(shown) - limit} more" if len(shown) > limit else "")
            )
    unknown = sorted(names - set(known["cases"]))
    print(f"{len(differing)} of {len(names) - len(unknown)} cases differ" + "".join(f"\n  {name}" for name in differing))
    print("".join(f"not recorded: {name}\n" for name in unknown), end="")
    return 1 if differing else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Replay every pass over small models, and tell what changed.")
    parser.add_argument("action", choices=("record", "check", "list"))
    parser.add_argument("file", type=Path, nargs="?", help="FILE.json or FILE.json.gz")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="cases whose name holds this; repeatable")
    parser.add_argument("--lines", type=int, default=12, help="of a diff, at most")
    options = parser.parse_args()
    chosen = [case for case in cases() if not options.only or any(text in case.name for text in options.only)]
    if options.action == "list":
        print("\n".join(case.name for case in chosen))
        return 0
    if options.file is None:
        parser.error("a file is needed")
    if any(os.environ.get(name) != "1" for name in THREADS):  # they are read when numpy is imported
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | dict.fromkeys(THREADS, "1"))
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with contextlib.suppress(ImportError):
        import torch

        torch.set_num_threads(1)
    print(f"graphopt of {Path(str(graphopt.__file__)).parent}")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as own:
        os.environ["GRAPHOPT_CACHE"] = str(Path(own) / "tuning.sqlite")
        code = record(chosen, options.file) if options.action == "record" else check(chosen, options.file, options.lines)
    print(f"{len(chosen)} cases in {time.perf_counter() - start:.0f} s")
    return code


if __name__ == "__main__":
    sys.exit(main())
