"""How many attention blocks a tool fuses in the models of the zoo, and whether the numbers still hold.

    python benchmarks/coverage.py FOLDER [--tools graphopt,onnxruntime,onnxscript,onnxsim,none] [--only NAME,...] [--routes ROUTE,...]
                                  [--json FILE] [--remarks]

FOLDER is what benchmarks/zoo.py wrote. The rule for numbers: every output of every feed is compared with torch, which ran the same
implementation of attention (sdpa or eager) that was exported; the error is max|d| / (1e-9 + max|torch|) per output, and at most 1e-4. All
positions count, also padded ones, except those where torch's own number is not finite. Where the exported file itself, run with
all optimizations off, is as far from torch, and the evaluator of the ONNX project agrees that the file means that (or cannot run it,
for sizes that the exporter made fixed), the exporter is at fault: then the tool has to agree with the file, and the row says so.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import _page
import _tools
from _worker import Worker, reason, serve

TOLERANCE = 1e-4
Fed = dict[str, tuple[dict[str, Any], dict[str, Any]]]


def load_feeds(path: Path) -> Fed:
    """Case -> (inputs, what torch computes)."""
    import numpy as np

    cases: Fed = {}
    with np.load(path) as stored:
        for key in stored.files:
            case, part, name = key.split("/", 2)
            cases.setdefault(case, ({}, {}))[part == "out"][name] = stored[key]
    return cases


def run(model: bytes, cases: Fed, optimize: bool = True) -> dict[str, Any]:
    """Case -> outputs by name, or the reason why it does not run."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001
        return dict.fromkeys(cases, f"load: {reason(error)}")
    names, inputs = [x.name for x in session.get_outputs()], {x.name for x in session.get_inputs()}
    found: dict[str, Any] = {}
    for case, (feed, _) in cases.items():
        try:
            found[case] = dict(zip(names, session.run(names, {k: v for k, v in feed.items() if k in inputs}), strict=True))
        except Exception as error:  # noqa: BLE001
            found[case] = f"run: {reason(error)}"
    return found


def distance(got: Any, wanted: Mapping[str, Any]) -> float | str:
    """The largest relative error over the outputs, where the wanted numbers are finite; or why it cannot be said."""
    import numpy as np

    if isinstance(got, str):
        return got
    worst = 0.0
    for a, b in zip(got.values(), wanted.values(), strict=False):
        if a.shape != b.shape:
            return f"shape {list(a.shape)}, expected {list(b.shape)}"
        known = np.isfinite(b)
        if known.any():
            error = np.abs(np.where(known, a, 0) - np.where(known, b, 0)).max() / (1e-9 + np.abs(b[known]).max())
            worst = max(worst, float(error) if np.isfinite(error) else float("inf"))
    return worst


def reference(model: Any, cases: Fed, case: str, double: bool = False) -> Any:
    """One case by the evaluator of the ONNX project, which follows the standard to the letter."""
    from onnx.reference import ReferenceEvaluator

    feed = {k: v.astype("float64") if double and v.dtype == "float32" else v for k, v in cases[case][0].items()}
    try:
        evaluator = ReferenceEvaluator(model)
        return dict(zip(evaluator.output_names, evaluator.run(None, feed), strict=True))
    except Exception as error:  # noqa: BLE001
        return f"reference: {reason(error)}"


class Judge:
    """Who is to blame for a number that is off: the tool, or the file that it was given."""

    def __init__(self, path: Path, cases: Fed) -> None:
        self.path, self.cases = path, cases
        self.file = run(path.read_bytes(), cases, optimize=False)
        self.known: dict[str, float | str] = {}
        self.doubled: dict[str, float | str] = {}

    def error(self, case: str, got: Any) -> float | str:
        return distance(got, self.cases[case][1])

    def never_runs(self) -> str:
        """The reason, if neither onnxruntime nor the reference can run the file: then there is nothing to optimize."""
        reasons = [got for got in self.file.values() if isinstance(got, str)]
        if len(reasons) < len(self.file):
            return ""
        first = reference(str(self.path), self.cases, next(iter(self.cases)))
        return reasons[0] if isinstance(first, str) else ""

    def illegal(self) -> str:
        """The reason, if onnxruntime does not load the file and the standard forbids it, too (the reference may still compute something)."""
        import onnx

        if not all(isinstance(got, str) and got.startswith("load: ") for got in self.file.values()):
            return ""
        try:
            onnx.checker.check_model(onnx.load(self.path), full_check=True)
        except Exception as error:  # noqa: BLE001
            return reason(error)
        return ""

    def from_file(self, case: str, got: Any) -> str:
        """How far the tool is from the file, where the file itself is far from torch."""
        file = self.file[case]
        if isinstance(file, str) or isinstance(got, str) or not _bad(self.error(case, file)):
            return ""
        return f"{distance(got, file):.1e} from the file, which is {self.error(case, file):.1e} from torch"

    def rounding(self, case: str) -> float | str:
        """How far the file is from itself in double precision: far where 1e6 is subtracted from all scores of a row, say."""
        if case not in self.doubled:
            self.doubled[case] = distance(reference(_double(self.path), self.cases, case, double=True), self.file[case])
        return self.doubled[case]

    def excuse(self, case: str, got: Any) -> str:
        """Why the exporter is to blame, or "". Where onnxruntime alone misreads the file, the tool could have helped: no excuse."""
        file = self.file[case]
        if not isinstance(file, str) and not _bad(self.error(case, file)):
            return ""
        if case not in self.known:
            self.known[case] = self.error(case, reference(str(self.path), self.cases, case))
        found, apart = self.known[case], "" if isinstance(file, str) else distance(got, file)
        if not isinstance(file, str) and _bad(apart):
            own = self.rounding(case)
            known = not isinstance(own, str) and not isinstance(apart, str) and own > TOLERANCE and apart <= 4 * own
            return f"rounding decides: the file is {own:.1e} from itself in double precision" if known else ""
        if not _bad(found):
            return ""
        if isinstance(found, str) and isinstance(file, str):
            return found
        own = self.error(case, file) if isinstance(found, str) else found
        return own if isinstance(own, str) else f"the file differs from torch by {own:.1e}"


def _double(path: Path) -> Any:
    """The model in double precision."""
    import numpy as np
    import onnx

    model, single, double = onnx.load(path), onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE
    graph = model.graph
    attributes = [a for n in graph.node for a in n.attribute]
    tensors = [*graph.initializer, *(a.t for a in attributes if a.type == onnx.AttributeProto.TENSOR)]
    for tensor in [t for t in tensors if t.data_type == single]:
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    for to in [a for n in graph.node if n.op_type == "Cast" for a in n.attribute if a.name == "to" and a.i == single]:
        to.i = double
    for value in [v for v in (*graph.input, *graph.output) if v.type.tensor_type.elem_type == single]:
        value.type.tensor_type.elem_type = double
    del graph.value_info[:]
    return model


def judge(key: str, tool: str, folder: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """One row: what the tool did with one file."""
    path, cases = folder / f"{key}.onnx", load_feeds(folder / entry["feeds"])
    judged = Judge(path, cases)
    broken = judged.never_runs()
    if broken:
        return {"broken": broken}
    start = time.time()
    try:
        results = _tools.TOOLS[tool](path)
    except Exception:
        if judged.illegal():
            return {"broken": judged.illegal()}
        raise
    seconds = time.time() - start
    rows = []
    for made in results:
        rows.append(measure(judged, made) | {"expected": entry["blocks"], "cases": len(cases), "seconds": round(seconds, 2)})
        if rows[-1]["status"] == "ok":
            return rows[-1]
    return min(rows, key=lambda row: len(row["bad"]))


def measure(judged: Judge, made: _tools.Output) -> dict[str, Any]:
    """What a result fuses, and its numbers."""
    worst, bad, exporter = 0.0, {}, {}
    runs = [(stage if optimize else f"{stage}-off", model, optimize) for stage, model in made.runs.items() for optimize in (True, False)]
    for stage, model, optimize in runs:
        for case, got in run(model, judged.cases, optimize).items():
            error = judged.error(case, got)
            excuse = judged.excuse(case, got) if _bad(error) else ""
            if excuse:
                exporter[case] = excuse
            elif _bad(error):
                bad[f"{stage} {case}"] = judged.from_file(case, got) or error
            worst = max(worst, 0.0 if isinstance(error, str) or excuse else error)
    fails = any(isinstance(v, str) and not v[0].isdigit() for v in bad.values())
    return {
        "found": _tools.blocks(made.counted), "left": _tools.primitives(made.counted), "error": worst,
        "status": "fails" if fails else "wrong" if bad else "ok", "bad": bad, "exporter": exporter, "missed": made.missed,
        "file": {case: _short(judged.error(case, got)) for case, got in judged.file.items() if _bad(judged.error(case, got))},
    }  # fmt: skip


def _short(error: float | str) -> float | str:
    return error if isinstance(error, str) else float(f"{error:.1e}")


def _bad(error: float | str) -> bool:
    return isinstance(error, str) or not error <= TOLERANCE


def describe(key: str, tool: str, row: dict[str, Any]) -> str:
    if "broken" in row:
        return f"{key:34} the file does not run: {row['broken']}"
    if "failed" in row:
        return f"{key:34} {tool:11} FAILS  {row['failed']}"
    left = " ".join(f"{k}:{v}" for k, v in row["left"].items() if v)
    text = f"{key:34} {tool:11} {row['found']}/{row['expected']} {row['status']:5} {row['error']:.1e} {row['seconds']:5.1f}s {left}"
    return text + _grouped(row["bad"], "") + _grouped(row["exporter"], "exporter: ")


def _grouped(errors: Mapping[str, float | str], prefix: str) -> str:
    """Numbers on one line; a reason once, with the cases that it stops."""
    numbers = [f"{case} {error:.1e}" for case, error in errors.items() if not isinstance(error, str)]
    text = f"\n    {prefix}{', '.join(numbers)}" if numbers else ""
    for message in dict.fromkeys(e for e in errors.values() if isinstance(e, str)):
        text += f"\n    {prefix}{', '.join(case for case, e in errors.items() if e == message)}: {message}"
    return text


def _route(key: str) -> str:
    return key.rpartition(".")[2]


def whole(row: dict[str, Any]) -> bool:
    return row.get("status") == "ok" and row["found"] >= row["expected"]


def blame(row: Mapping[str, Any]) -> str:
    """What is wrong with a row that is not right."""
    cases = {stage_case.split(" ", 1)[1]: error for stage_case, error in row.get("bad", {}).items()}
    apart = [e for e in cases.values() if isinstance(e, str) and " from the file" in e and float(e.split(" ")[0]) > TOLERANCE]
    if cases and not apart and all(case in row["file"] for case in cases):
        return "where the file itself is"
    return "only in fully masked rows" if cases and row["status"] == "wrong" and all(" empty" in case for case in cases) else ""


def table(rows: Mapping[str, Mapping[str, Any]], index: Mapping[str, Any], tools: list[str], routes: list[str]) -> str:
    """Markdown: one line per route and tool; blocks count only where the numbers hold."""
    lines = ["| route | tool | blocks fused and right | models whole and right | wrong or failing |", "|---|---|---|---|---|"]
    for route in routes:
        for tool in tools:
            mine = {k: r for k, r in rows[tool].items() if _route(k) == route and "broken" not in r}
            expected = sum(index[k]["blocks"] for k in mine)
            fused = sum(min(r["found"], r["expected"]) for r in mine.values() if r.get("status") == "ok")
            bad = [blame(r) for r in mine.values() if r.get("status") != "ok"]
            details = ", ".join(f"{bad.count(b)} {b}" for b in sorted(set(bad)) if b)
            wrong = f"{len(bad)}" + (f" ({details})" if details else "")
            lines.append(f"| {route} | {tool} | {fused} / {expected} | {sum(map(whole, mine.values()))} / {len(mine)} | {wrong} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tools", default="graphopt", help=", ".join(_tools.TOOLS))
    parser.add_argument("--only", default="", help="names, separated by commas")
    parser.add_argument("--routes", default="dynamo18,dynamo23,script17,script17-eager")
    parser.add_argument("--json", type=Path, help="write every row there; a row that is there already is kept, unless --only names it")
    parser.add_argument("--write", type=Path, help="write the page of docs/ about all of them there")
    parser.add_argument("--again", action="store_true", help="also judge what is there")
    parser.add_argument("--remarks", action="store_true", help="also print what was missed in models that are whole")
    parser.add_argument("--seconds", type=float, default=300, help="a longer run counts as hanging")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    index = json.loads((given.folder / "zoo.json").read_text())
    if given.worker:
        return serve(lambda line: judge(*line.split(" "), given.folder, index[line.split(" ")[0]]))
    routes, tools, names = given.routes.split(","), given.tools.split(","), set(filter(None, given.only.split(",")))
    keys = [k for k, e in index.items() if "feeds" in e and _route(k) in routes and (not names or k.rpartition(".")[0] in names)]
    rows: dict[str, dict[str, Any]] = {tool: {} for tool in tools}
    if given.json and given.json.exists():
        rows |= json.loads(given.json.read_text())["rows"]
    worker = Worker(__file__, [str(given.folder)], given.seconds)
    for tool in tools:
        for key in [k for k in keys if given.again or names or k not in rows[tool]]:
            row = rows[tool][key] = worker.ask(f"{key} {tool}")
            print(describe(key, tool, row), flush=True)
            if "missed" in row and (given.remarks or not whole(row)):
                print(*(f"    missed {m}" for m in row["missed"]), sep="\n", flush=True)
            if given.json:
                given.json.write_text(json.dumps({"index": index, "rows": rows}, indent=1))
    worker.stop()
    if given.write:
        given.write.write_text(_page.page(index, rows[tools[0]], routes, whole))
    return print(table(rows, index, tools, routes))


if __name__ == "__main__":
    sys.exit(main())
