"""What the openvino target makes of an encoder, against the CPU provider of the same package, in float32.

    PYTHON benchmarks/openvino.py MODEL.onnx [...] [--threads 1] [--json FILE]

PYTHON has onnxruntime-openvino (it replaces onnxruntime) and graphopt: `pip install onnxruntime-openvino`, then `pip install --no-deps -e .` with
numpy, onnx, onnx-ir, onnx-shape-inference, typer and rich beside it. All rows of one model are timed in interleaved warm blocks
(graphopt.bench) in one process, so that they can be compared with each other; the first row is the baseline. `error` is the largest difference to
the input without runtime optimizations, divided by 1 + the largest output.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

SHAPES = [(1, 16), (1, 128), (8, 64), (32, 128)]


def measure(path: Path, threads: int) -> dict[str, Any]:
    import graphopt
    from graphopt import bench
    from graphopt.api import parse_target
    from graphopt.run.ort import session

    cpu, openvino = (
        parse_target(f"{text}{{{options}}}") for text, options in (("cpu", f"threads={threads} tune=off"), ("openvino", f"threads={threads}"))
    )
    rows: dict[str, Any] = {
        "input, CPU provider": session(path, threads=threads),
        "graphopt -O1 cpu": graphopt.optimize(path, target=cpu).session(),
        "input, OpenVINO provider": _plain(path, openvino),
    }
    result = graphopt.optimize(path, target=openvino)
    rows["graphopt -O1 openvino"] = result.session()
    feeds = bench.feeds_for([graphopt.load(path)], SHAPES)
    exact = session(path, optimize=False)
    expected = {label: exact.run(feed) for label, feed in feeds.items()}
    sessions = {name: s for name, s in rows.items() if not isinstance(s, str)}
    errors = {name: max(_error(expected[label], s.run(feed)) for label, feed in feeds.items()) for name, s in sessions.items()}
    timings = bench.race(sessions, feeds)
    table = [
        {"name": name, "ms": [t * 1e3 for t in timings.seconds[name]], "speed_up": timings.speedup(name), "error": errors[name]} for name in sessions
    ]
    refused = [{"name": name, "reason": s} for name, s in rows.items() if isinstance(s, str)]
    return {
        "model": path.name,
        "shapes": timings.shapes,
        "rows": table,
        "refused": refused,
        "falls_back": result.report.as_dict()["target"]["falls_back"],
    }


def _plain(path: Path, openvino: Any) -> Any:
    """The given file through the provider; the reason where it refuses it."""
    from graphopt.errors import TargetError
    from graphopt.run.ort import session

    try:
        return session(path, threads=openvino.threads, providers=(*openvino.providers(), "CPUExecutionProvider"))
    except TargetError as error:
        return str(error)


def _error(expected: dict[str, Any], found: dict[str, Any]) -> float:
    return max(float(np.abs(found[k] - e).max() / (1 + np.abs(e).max())) for k, e in expected.items() if e.dtype.kind == "f")


def text(found: dict[str, Any], threads: int) -> str:
    import onnxruntime

    lines = [
        f"{found['model']}, onnxruntime-openvino {onnxruntime.__version__}, {threads} thread{'s' * (threads > 1)}, milliseconds",
        "",
        f"| row | {' | '.join(found['shapes'])} | speed-up | error |",
        f"|---|{'---|' * (len(found['shapes']) + 2)}",
    ]
    for row in found["rows"]:
        times = " | ".join(f"{t:.1f}" for t in row["ms"])
        lines += [f"| {row['name']} | {times} | {row['speed_up']:.2f}x | {row['error']:.0e} |"]
    lines += [f"| {row['name']} | refused: {row['reason']} |" for row in found["refused"]]
    lines.append(f"\nnodes that fall back to the CPU provider: {len(found['falls_back'])}\n")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="MiniLM and others through the OpenVINO provider, float32.")
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    import onnxruntime

    if "OpenVINOExecutionProvider" not in onnxruntime.get_available_providers():
        print("this python's onnxruntime has no OpenVINO provider; see the head of this file", file=sys.stderr)
        return 1
    every = [measure(path, options.threads) for path in options.models]
    print("\n".join(text(found, options.threads) for found in every))
    if options.json:
        options.json.write_text(json.dumps(every, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
