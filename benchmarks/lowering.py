"""Is the artifact faster than its input, and than what the other tools make of the same file?

    python benchmarks/lowering.py --folder DIR [--zoo FOLDER] [--only TEXT] [--no-smol] [--json FILE] [--write docs/benchmarks.md]

DIR keeps the exported models and the timings of the tuner between runs; --zoo is what benchmarks/zoo.py wrote. Every model is timed in a
process of its own: input, graphopt -O1, onnxruntime.transformers' optimizer, onnxsim and onnxslim, all in interleaved warm blocks, runtime
optimizations on, one thread, in processor time (what other processes take does not count). A tool whose numbers differ by more than 1e-3 of
the largest output counts as wrong, and is not timed. Models below a millisecond are timed three times, and the slowest verdict counts. Then
MiniLM as int8 against quantize_dynamic.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import _models
import _tools
from _worker import Worker, reason, serve

SHAPES, LONG = [(1, 16), (1, 128), (8, 64)], [(1, 16), (1, 128)]
PEERS = ("onnxruntime", "onnxsim", "onnxslim")
BEGIN, END = "<!-- lowering: begin -->", "<!-- lowering: end -->"
_CLOSE = 1e-3


def measure(path: Path, shapes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """One model: what each tool makes of it, whether that is right, and how fast it is."""
    import graphopt
    from graphopt.run import race as bench

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.perf_counter()
        result = graphopt.optimize(path, level=1, shapes=",".join(f"{b}x{s}" for b, s in shapes))
        seconds = time.perf_counter() - start
        result.save(folder / "graphopt.onnx")
        files: dict[str, Any] = {"input": path, "graphopt": folder / "graphopt.onnx"}
        failed: dict[str, str] = {}
        for tool in PEERS:
            try:
                files[tool] = list(_tools.TOOLS[tool](path).runs.values())[-1]
            except Exception as error:  # noqa: BLE001  a tool that fails is a result here
                failed[tool] = reason(error, 100)
        feeds = bench.feeds_for([graphopt.load(path)], shapes)
        sessions, feeds = _sessions(files, feeds, failed)
        races = [race(sessions, feeds)]
        if min(races[0].seconds["input"]) < 1e-3:
            races += [race(sessions, feeds) for _ in range(2)]
    taken = [f"{r.pass_name}: {r.message}" for kind in ("missed", "warning") for r in result.report.remarks(kind) if "taken back" in r.message]
    chosen = [r.message for r in result.report.remarks("applied") if r.pass_name == "choose-spellings"]
    return {"seconds": seconds, "failed": failed, "races": [r.as_dict() for r in races], "taken_back": taken, "chosen": chosen}


def _sessions(files: Mapping[str, Any], feeds: dict[str, Any], failed: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those that run and are right, and the feeds that the input takes."""
    import numpy as np

    from graphopt.run import race as bench
    from graphopt.run.ort import session

    sessions: dict[str, Any] = {}
    base: dict[str, dict[str, Any]] = {}
    plain = bench.Picky(session(files["input"], optimize=False))
    for name, feed in list(feeds.items()):
        try:
            base[name] = plain.run(feed)
        except Exception:  # noqa: BLE001  the input itself does not run at this size
            del feeds[name]
    del plain
    if not feeds:
        raise RuntimeError("the input runs at none of the sizes")
    for tool, file in files.items():
        try:
            made = bench.Picky(session(file))
            for name, feed in feeds.items():
                got = made.run(feed)
                for output, expected in base[name].items():
                    if expected.dtype.kind == "f":
                        known = np.isfinite(expected)
                        error = np.abs(got[output][known] - expected[known]).max(initial=0) / (1e-9 + np.abs(expected[known]).max(initial=0))
                        if not error <= _CLOSE:
                            raise RuntimeError(f"wrong by {error:.1e} at {name}")
            sessions[tool] = made
        except Exception as error:  # noqa: BLE001
            failed[tool] = reason(error, 100)
    return sessions, feeds


def race(sessions: Mapping[str, Any], feeds: Mapping[str, Any]) -> Any:
    """Interleaved warm blocks in processor time; the longer a run, the fewer."""
    from graphopt.run import race as bench
    from graphopt.run.clock import steady_clock

    return bench.race(sessions, feeds, clock=steady_clock(1))


def verdict(row: Mapping[str, Any], tool: str, base: str = "input") -> tuple[float, float] | None:
    """(geometric mean, worst shape) of `tool` over `base`, of the run in which it did worst; None if one of them was not timed."""
    found = []
    for race in row.get("races", ()):
        models = race["models"]
        if tool not in models or base not in models:
            return None
        ratios = [b / t for b, t in zip(models[base]["milliseconds"], models[tool]["milliseconds"], strict=True)]
        found.append((math.exp(statistics.fmean(math.log(r) for r in ratios)), min(ratios)))
    return min(found) if found else None


def mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(v) for v in values)) if values else float("nan")


def int8(path: Path) -> dict[str, Any]:
    """MiniLM: plain float32, quantize_dynamic per channel, graphopt -O2 for `quantized`, timed in one run; with quality."""
    import graphopt
    from graphopt.cli import demo_race as demo
    from graphopt.graph.size import size
    from graphopt.run import race as bench
    from graphopt.run.ort import session

    texts, human = demo._lee()
    with tempfile.TemporaryDirectory() as name:
        files = {"plain float32": path, "quantize_dynamic, per channel": Path(name, "q.onnx"), "graphopt -O2": Path(name, "g.onnx")}
        demo.quantize_dynamic(path, files["quantize_dynamic, per channel"])
        graphopt.optimize(path, level=2, target="quantized").save(files["graphopt -O2"])
        sessions = {label: bench.Picky(session(file)) for label, file in files.items()}
        embedded = {label: demo.embed(s, _models.minilm_folder() / "tokenizer.json", texts) for label, s in sessions.items()}
        timed = race(sessions, bench.feeds_for([graphopt.load(path)], [*SHAPES, (32, 128)]))
        base = embedded["plain float32"]
        quality = {
            label: {"mb": size(files[label]) / 1e6, "pearson": demo.pearson(e, human), "cosine": float((e * base).sum(-1).mean())}
            for label, e in embedded.items()
        }
    return {"race": timed.as_dict(), "quality": quality}


# ---- the tables -----------------------------------------------------------------------------------------------------------------------


def table(rows: Mapping[str, dict[str, Any]], *, times: bool) -> list[str]:
    """Speed-up over the input (geometric mean over the shapes, worst shape in brackets)."""
    lines = [
        f"| model | {'ms, input | ' if times else ''}graphopt -O1 | ORT optimizer | onnxsim | onnxslim |",
        "|---|" + "---|" * (5 if times else 4),
    ]
    for name, row in rows.items():
        if "races" not in row:
            lines.append(f"| {name} | not measured: {row['failed']} |" + " |" * (4 if times else 3))
            continue
        cells = [_cell(row, tool) for tool in ("graphopt", *PEERS)]
        given = [" ".join(f"{t:.1f}" for t in row["races"][0]["models"]["input"]["milliseconds"])] if times else []
        lines.append(f"| {name} | {' | '.join([*given, *cells])} |")
    means = []
    for tool in ("graphopt", *PEERS):
        found = [v[0] for row in rows.values() if (v := verdict(row, tool)) is not None]
        means.append(f"**{mean(found):.2f}x** of {len(found)}" if found else "-")
    lines.append(f"| geometric mean | {'| ' if times else ''}{' | '.join(means)} |")
    return lines


def _cell(row: Mapping[str, Any], tool: str) -> str:
    found = verdict(row, tool)
    if found is None:
        return "wrong" if "wrong" in row["failed"].get(tool, "") else "fails"
    return f"{found[0]:.2f}x ({found[1]:.2f})"


def judged(rows: Mapping[str, dict[str, Any]]) -> list[str]:
    """What the promise asks, counted: not slower than the input, and than each peer."""
    lines = []
    for base in ("input", *PEERS):
        found = {name: v for name, row in rows.items() if (v := verdict(row, "graphopt", base)) is not None}
        slower = [f"{name} {v[0]:.2f}x ({v[1]:.2f})" for name, v in found.items() if v[0] < 0.98 or v[1] < 0.95]
        told = "not slower than " + ("the input" if base == "input" else base)
        lines.append(f"- {told}: {len(found) - len(slower)} of {len(found)}" + (f"; slower: {', '.join(slower[:12])}" if slower else ""))
    return lines


def int8_table(found: Mapping[str, Any]) -> list[str]:
    shapes = found["race"]["shapes"]
    lines = [f"| file | MB | ms at {' '.join(shapes)} | speed-up | Pearson | cosine |", "|---|---|---|---|---|---|"]
    for label, quality in found["quality"].items():
        timed = found["race"]["models"][label]
        ms = " ".join(f"{t:.1f}" for t in timed["milliseconds"])
        lines.append(f"| {label} | {quality['mb']:.0f} | {ms} | {timed['speedup']:.2f}x | {quality['pearson']:.4f} | {quality['cosine']:.4f} |")
    return lines


def section(found: Mapping[str, Any]) -> str:
    import onnxruntime

    from graphopt.core.machine import processor

    lines = [
        "## Measured lowering: -O1 against its input and the other tools",
        "",
        f"`python benchmarks/lowering.py`, {found['date']}; {processor()}, {os.cpu_count()} cores, one thread,",
        f"onnxruntime {onnxruntime.__version__}; load average {found['load'][0]:.1f} before and {found['load'][1]:.1f} after (1.0 is this benchmark",
        "alone; above it others shared the caches and cores, and single rows can be off by some per cent). Processor time, interleaved warm blocks.",
        "Speed-up over the input: geometric mean over batch x length of 1x16, 1x128, 8x64 (SmolLM2: the first two), and the worst of these in",
        "brackets. Of three runs, where a model takes less than a millisecond, the worst is shown.",
        "",
        *table(found["real"], times=True),
        "",
        *judged(found["real"]),
    ]
    if found["zoo"]:
        lines += ["", f"The zoo: {len(found['zoo'])} small models (width 64, two layers), each by several exporters.", "", *judged(found["zoo"])]
        lines += ["", "<details><summary>every model of the zoo</summary>", "", *table(found["zoo"], times=False), "", "</details>"]
    if found.get("int8"):
        lines += ["", "### MiniLM as dynamic int8", "", *int8_table(found["int8"])]
    return "\n".join([BEGIN, *lines, END])


def write(path: Path, text: str) -> None:
    """Replace the section in the file, or append it."""
    old = path.read_text(encoding="utf-8") if path.exists() else "# Benchmarks\n"
    head, found, rest = old.partition(BEGIN)
    tail = rest.partition(END)[2] if found else ""
    path.write_text(f"{head.rstrip()}\n\n{text}\n{tail.lstrip()}".rstrip() + "\n", encoding="utf-8")


def answer(key: str) -> dict[str, Any]:
    job = json.loads(key)
    if job["job"] == "int8":
        return int8(Path(job["file"]))
    return measure(Path(job["file"]), [tuple(s) for s in job["shapes"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where exported models and timings are kept")
    parser.add_argument("--zoo", type=Path, help="folder of small models")
    parser.add_argument("--only", default="", help="models whose name holds this text")
    parser.add_argument("--no-smol", action="store_true")
    parser.add_argument("--no-real", action="store_true", help="the zoo alone")
    parser.add_argument("--no-int8", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--from-json", type=Path, nargs="+", help="write the tables of earlier runs, put together")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        serve(answer)
        return
    found = joined([json.loads(file.read_text()) for file in options.from_json]) if options.from_json else gather(options)
    if options.json and not options.from_json:
        options.json.write_text(json.dumps(found, indent=1))
    text = section(found)
    print(text)
    if options.write:
        write(options.write, text)


def joined(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several runs as one: the rows of all, the latest int8 table, the highest load."""
    found: dict[str, Any] = {"date": runs[-1]["date"], "real": {}, "zoo": {}, "load": [max(r["load"][k] for r in runs) for k in (0, 1)]}
    for run in runs:
        found["real"] |= run["real"]
        found["zoo"] |= run["zoo"]
        found["int8"] = run.get("int8") or found.get("int8")
    return found


def gather(options: argparse.Namespace) -> dict[str, Any]:
    if options.folder is None:
        sys.exit("--folder DIR is needed")
    os.environ.setdefault("GRAPHOPT_CACHE", str(options.folder / "tuning.sqlite"))
    models = {} if options.no_real else _models.real(options.folder, smol=not options.no_smol)
    zoo = {p.stem: p for p in sorted(options.zoo.glob("*.onnx"))} if options.zoo else {}
    before = os.getloadavg()[0]
    worker = Worker(__file__, [], 1500.0)
    found: dict[str, Any] = {"date": datetime.date.today().isoformat(), "real": {}, "zoo": {}}
    for kind, files in (("real", models), ("zoo", zoo)):
        for name, path in files.items():
            if options.only not in name:
                continue
            job = {"job": "speed", "file": str(path), "shapes": LONG if name == _models.SMOL else SHAPES}
            row = found[kind][name] = worker.ask(json.dumps(job))
            told = {tool: v for tool in ("graphopt", *PEERS) if (v := verdict(row, tool)) is not None}
            print(f"{name}: {row.get('seconds', 0):.1f} s  " + "  ".join(f"{t} {v[0]:.2f} ({v[1]:.2f})" for t, v in told.items()), file=sys.stderr)
            for line in (*row.get("taken_back", ()), *([str(row["failed"])] if row.get("failed") else ())):
                print(f"    {line}", file=sys.stderr)
    if models and not options.no_int8:
        found["int8"] = worker.ask(json.dumps({"job": "int8", "file": str(models["MiniLM-L6 sdpa 18"])}))
    worker.stop()
    found["load"] = (before, os.getloadavg()[0])
    return found


if __name__ == "__main__":
    main()
