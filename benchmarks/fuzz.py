"""The long mode of tests/fuzz: random graphs, damaged files and random pipelines, judged until the count or the time is used up.

    python benchmarks/fuzz.py [--kind graphs|blocks|bytes|structure|pipelines ...] [--count N] [--seed S] [--time 10m] [--jobs 1] [--out FOLDER]
    python benchmarks/fuzz.py --kind pipelines --seed 51 --show [--keep 0,2]

FOLDER gets counts.json (inputs by kind and verdict, added up over runs), refusals.txt (each message once, with how often it came) and, for each
finding that has not been seen, KIND-SEED/ with the input, the finding and the command that makes it again. A finding is minimized: it is made
of as few mutations or passes as still give it.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import json
import re
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from fuzz.case import FINDING, REFUSED, Verdict  # noqa: E402
from fuzz.make import KINDS, make  # noqa: E402
from fuzz.worker import Cases  # noqa: E402

TRIES = 40  # judgements that minimizing one finding may cost


class Run:
    """What was tried and found, by all workers."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.refusals: collections.Counter[str] = collections.Counter()
        self.seen: set[str] = set()
        self._lock = threading.Lock()
        out.mkdir(parents=True, exist_ok=True)
        counted = out / "counts.json"
        self.earlier: dict[str, dict[str, int]] = json.loads(counted.read_text()) if counted.is_file() else {}

    def note(self, kind: str, verdict: Verdict) -> bool:
        """Count a verdict; True for a finding that is new."""
        with self._lock:
            self.counts[kind][verdict.what] += 1
            if verdict.what == REFUSED:
                self.refusals[signature(verdict)] += 1
            new = verdict.what == FINDING and signature(verdict) not in self.seen
            if verdict.what == FINDING:
                self.seen.add(signature(verdict))
            if sum(c.total() for c in self.counts.values()) % 200 == 0:
                self.write()
            return new

    def save(self, found: tuple[str, int], verdict: Verdict, keep: list[int] | None) -> None:
        kind, seed = found
        folder = self.out / f"{kind}-{seed}"
        folder.mkdir(exist_ok=True)
        case = make(kind, seed, keep)
        chosen = "" if keep is None else f" --keep {','.join(map(str, keep)) or 'none'}"
        command = f"python benchmarks/fuzz.py --kind {kind} --seed {seed} --show{chosen}"
        folder.joinpath("model.onnx").write_bytes(case.model)
        lines = [
            verdict.message,
            f"in: {verdict.stage}",
            f"made from: {case.base}",
            f"pipeline: {case.pipeline or f'-O{case.level}'} for {case.target}",
        ]
        folder.joinpath("finding.txt").write_text("\n".join([*lines, *case.parts, f"again: {command}", "", verdict.trace]), encoding="utf-8")
        print(f"{kind} {seed} [{verdict.stage}] {verdict.message[:300]}\n    {command}", flush=True)

    def write(self) -> None:
        """Counts, with those of earlier runs, and refusals."""
        kinds = {**self.earlier, **self.counts}
        total = {kind: dict(collections.Counter(self.earlier.get(kind, {})) + collections.Counter(self.counts.get(kind, {}))) for kind in kinds}
        self.out.joinpath("counts.json").write_text(json.dumps(total, indent=1))
        refused = "\n".join(f"{count:6d}  {text}" for text, count in self.refusals.most_common())
        self.out.joinpath("refusals.txt").write_text(refused + "\n", encoding="utf-8")


def table(counts: dict[str, Any]) -> str:
    """Inputs by kind, as Markdown."""
    rows = ["| kind | inputs | right | legal, but the input itself runs nowhere | refused in one line | findings |", "|---|---|---|---|---|---|"]
    for kind, c in counts.items():
        c = collections.Counter(c)
        rows.append(f"| {kind} | {sum(c.values())} | {c['fine']} | {c['unjudged']} | {c['refused']} | {c['finding']} |")
    return "\n".join(rows)


def document(out: Path) -> None:
    """Write the table of a folder's counts into docs/fuzzing.md."""
    page = ROOT / "docs" / "fuzzing.md"
    counts = json.loads((out / "counts.json").read_text())
    made = table(
        {kind: counts[kind] for kind in KINDS if kind in counts}
        | {"all": dict(sum(map(collections.Counter, counts.values()), collections.Counter()))}
    )
    text = re.sub(r"(?s)(<!-- counts -->).*(<!-- /counts -->)", lambda found: f"{found[1]}\n{made}\n{found[2]}", page.read_text(encoding="utf-8"))
    page.write_text(text, encoding="utf-8")


def signature(verdict: Verdict) -> str:
    """A message without what differs from one input to the next: names, numbers, places; the head of a traceback's last frame."""
    text = re.sub(r"`[^`]*`|'[^']*'|\"[^\"]*\"", "_", verdict.message.partition("\n")[0])
    text = re.sub(r"\[[^\]]*\]|\{[^}]*\}|\([^)]*\)|/\S+|\bn{20,}\b|[-+]?\d[\d.e+-]*", "#", text)
    frames = re.findall(r'File "[^"]*?/(\w+\.py)", line (\d+)', verdict.trace)
    return f"{verdict.stage}: {text[:160]}" + (f" @{frames[-1][0]}:{frames[-1][1]}" if frames and text.startswith("internal") else "")


def minimize(cases: Cases, kind: str, seed: int, verdict: Verdict) -> tuple[Verdict, list[int] | None]:
    """The finding with as few parts as still give it, leaving out one part after the other."""
    parts, wanted = list(range(len(make(kind, seed).parts))), signature(verdict)
    left, tries = list(parts), 0
    for part in parts:
        if len(left) < 2 or tries >= TRIES:
            break
        rest, tries = [p for p in left if p != part], tries + 1
        found = cases.judge(kind, seed, rest)
        if found.what == FINDING and signature(found) == wanted:
            left, verdict = rest, found
    return verdict, None if left == parts else left


def work(run: Run, kinds: list[str], seeds: range, until: float) -> None:
    with tempfile.TemporaryDirectory(prefix="graphopt-fuzz-") as folder:
        cases = Cases(Path(folder))
        try:
            for seed in seeds:
                for kind in kinds:
                    if time.monotonic() > until:
                        return
                    verdict = cases.judge(kind, seed)
                    if run.note(kind, verdict):
                        run.save((kind, seed), *minimize(cases, kind, seed, verdict))
        finally:
            cases.stop()


def show(kind: str, seed: int, keep: list[int] | None) -> None:
    """One input, in this process."""
    from fuzz.judge import Judge

    case = make(kind, seed, keep)
    folder = Path(tempfile.mkdtemp(prefix="graphopt-fuzz-"))
    print(f"{case.base} | {case.pipeline or f'-O{case.level}'} | {case.target} | samples: {case.samples}\n" + "\n".join(case.parts) + f"\n{folder}")
    verdict = Judge(case, folder, lambda stage: None).verdict()
    print(f"{verdict.trace}\n{verdict.what} [{verdict.stage}] {verdict.message}")


def seconds(text: str) -> float:
    """`90`, `90s`, `10m` or `2h`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected a time such as 90s, 10m or 2h, found {text}")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="repeatable; all of them by default")
    parser.add_argument("--count", type=int, default=100, help="inputs of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the first input; they count up")
    parser.add_argument("--time", type=seconds, default=float("inf"), help="stop after 90s, 10m or 2h")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir(), "graphopt-fuzz"))
    parser.add_argument("--show", action="store_true", help="only the input of --kind and --seed, in this process")
    parser.add_argument("--keep", help="with --show: the numbers of the parts that stay, such as 0,2")
    parser.add_argument("--docs", action="store_true", help="only write the counts of --out into docs/fuzzing.md")
    options = parser.parse_args()
    if options.docs:
        return document(options.out)
    kinds = list(dict.fromkeys(options.kind or KINDS))
    if options.show:
        keep = None if options.keep is None else [] if options.keep == "none" else [int(k) for k in options.keep.split(",")]
        return show(kinds[0], options.seed, keep)
    run, until = Run(options.out), time.monotonic() + options.time
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        shares = [range(options.seed + k, options.seed + options.count, options.jobs) for k in range(options.jobs)]
        for done in concurrent.futures.as_completed([pool.submit(work, run, kinds, share, until) for share in shares]):
            done.result()
    run.write()
    print(table(run.counts))
    return None


if __name__ == "__main__":
    main()
