"""The page of docs/ that says which attention blocks of every architecture are fused: written from what zoo.py --every and coverage.py found."""

from __future__ import annotations

import collections
import datetime
import importlib.metadata
import platform
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import _every

Entry = Mapping[str, Any]
FAMILIES = ("text", "encoder-decoder", "vision", "audio", "multimodal", "other")
_PACKAGES = ("torch", "transformers", "onnx", "onnx-ir", "onnxruntime", "onnxscript")
_INTRO = """# Coverage: every architecture of transformers

Written by `benchmarks/coverage.py` on {date}: {versions}, Python {python}; CPU, one thread. Reproduce, or go on, with

```sh
python benchmarks/zoo.py DIR --every      # builds and exports; a second run goes on where the last one stopped
python benchmarks/coverage.py DIR --tools graphopt-untimed --json DIR/rows.json --write docs/coverage.md
```

- **Types**: {types} of the {every} of `CONFIG_MAPPING`{rest}; {parts} of them are parts of others and have no class of a model of their own, {plain}
  have no attention. Of the other {candidates}, {built} could be built small: by rules for the names of the fields of the configuration
  (2 layers, or one of each kind; width 64; 4 heads), inputs by the names of the parameters of `forward`, random
  weights large enough that a wrong scale or mask shows.
- **Expected blocks** are counted in torch: softmax(a product of two activations, changed elementwise) times a third, or a call of
  `scaled_dot_product_attention`, whose result reaches an output.
- **Fused and right**: as in [benchmarks.md](benchmarks.md). Every output for every feed (two lengths; right and left padding, holes, a row that
  is masked throughout; batch 1, 2 and 3) of the fused graph and of the artifact of `-O1`, with runtime optimizations off and at the default
  level, is within 1e-4 of torch; where the file as exported is not, of the file. The lowering is chosen without timing here.
"""


def page(index: Mapping[str, Entry], rows: Mapping[str, Entry], routes: Iterable[str], whole: Callable[[Entry], bool]) -> str:
    """Markdown. `index`: entries of zoo.json; `rows`: what one tool made of each file; both by MODEL.ROUTE."""
    routes = [r for r in routes if any(k.endswith(f".{r}") and "same" not in e and "unbuilt" not in e for k, e in index.items())]
    parts = [_intro(index), _by_route(index, rows, routes, whole), _by_family(index, rows, routes)]
    parts += [_misses(index, rows, whole), _wrong(rows), _exporter(rows), _refused(index, routes), _unbuilt(index), _all(index, rows, routes)]
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


def _split(key: str) -> tuple[str, str]:
    name, _, route = key.rpartition(".")
    return name, route


def _intro(index: Mapping[str, Entry]) -> str:
    states: dict[str, Entry] = {}
    for key, entry in index.items():
        name = _split(key)[0]
        states[name] = entry if "blocks" in entry or name not in states else states[name]
    every = len(_every.names())
    parts = sum("part of another" in e.get("unbuilt", "") for e in states.values())
    plain = sum("no attention" in e.get("unbuilt", "") for e in states.values())
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in _PACKAGES)
    return _INTRO.format(
        date=datetime.datetime.now(datetime.UTC).date(), versions=versions, python=platform.python_version().rpartition(".")[0], types=len(states),
        every=every, rest="" if len(states) >= every else ", in the order of the alphabet (the export took more time than there was: run it again)",
        parts=parts, plain=plain, candidates=len(states) - parts - plain, built=sum("blocks" in e for e in states.values()),
    )  # fmt: skip


def _by_route(index: Mapping[str, Entry], rows: Mapping[str, Entry], routes: list[str], whole: Callable[[Entry], bool]) -> str:
    columns = (
        "route", "types exported", "blocks fused and right", "models whole and right", "wrong or failing", "not exportable", "the file does not run",
    )  # fmt: skip
    lines = ["## Counts", "", f"| {' | '.join(columns)} |", "|---|---|---|---|---|---|---|"]
    for route in routes:
        mine = {k: r for k, r in rows.items() if _split(k)[1] == route}
        judged = [r for r in mine.values() if "broken" not in r and not _late(r)]
        failed = sum("failed" in e for k, e in index.items() if _split(k)[1] == route)
        bad = sum(r.get("status") != "ok" for r in judged)
        right = f"{_blocks(judged)} | {sum(map(whole, judged))} / {len(judged)}"
        lines.append(f"| {route} | {len(mine)} | {right} | {bad} | {failed} | {sum('broken' in r for r in mine.values())} |")
    return "\n".join(lines)


def _late(row: Entry) -> bool:
    return str(row.get("failed", "")).startswith("took more than")


def _blocks(rows: Iterable[Entry]) -> str:
    rows = list(rows)
    fused = sum(min(r["found"], r["expected"]) for r in rows if r.get("status") == "ok")
    return f"{fused} / {sum(r.get('expected', 0) for r in rows)}" if rows else "-"


def _by_family(index: Mapping[str, Entry], rows: Mapping[str, Entry], routes: list[str]) -> str:
    lines = ["By what the models read (types in brackets):", "", f"| family | {' | '.join(routes)} |", f"|---|{'---|' * len(routes)}"]
    for family in FAMILIES:
        cells = []
        for route in routes:
            mine = [r for k, r in rows.items() if _split(k)[1] == route and index[k].get("family") == family and "broken" not in r and not _late(r)]
            cells.append(f"{_blocks(mine)} ({len(mine)})" if mine else "-")
        if any(c != "-" for c in cells):
            lines.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _misses(index: Mapping[str, Entry], rows: Mapping[str, Entry], whole: Callable[[Entry], bool]) -> str:
    reasons: dict[str, dict[str, list[str]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for key, row in rows.items():
        if "missed" not in row or whole(row) or row["found"] >= row["expected"]:
            continue
        name, route = _split(key)
        text = [m.split(": ", 1)[1] for m in row["missed"] if m.startswith("fuse-attention")]
        for reason in dict.fromkeys(_general(t) for t in text) or ["no remark"]:
            reasons[reason][name].append(f"{route} {row['found']}/{row['expected']}")
    if not reasons:
        return ""
    said = "The reason is the remark of fuse-attention, without names of nodes. A model with several remarks stands at each."
    lines = ["## Every miss, by reason", "", said, "", "| reason | types: blocks fused / expected |", "|---|---|"]
    for reason, found in sorted(reasons.items(), key=lambda item: -len(item[1])):
        types = [f"{name} ({', '.join(where)})" for name, where in sorted(found.items())]
        lines.append(f"| {_cell(reason)} | {'; '.join(types)} |")
    return "\n".join(lines)


def _wrong(rows: Mapping[str, Entry]) -> str:
    bad = {k: r for k, r in rows.items() if "broken" not in r and not _late(r) and r.get("status") != "ok"}
    late = [k for k, r in rows.items() if _late(r)]
    head = "## Wrong numbers and failures\n\n" + (f"Not judged in the time given: {', '.join(late)}.\n\n" if late else "")
    if not bad:
        return f"{head}None."
    lines = [head.rstrip("\n"), "", "| file | what |", "|---|---|"]
    for key, row in sorted(bad.items()):
        what = row.get("failed") or "; ".join(f"{case}: {error}" for case, error in list(row["bad"].items())[:2])
        lines.append(f"| {key} | {_cell(what)} |")
    return "\n".join(lines)


def _exporter(rows: Mapping[str, Entry]) -> str:
    faults: dict[str, list[str]] = collections.defaultdict(list)
    for key, row in rows.items():
        route = _split(key)[1]
        if "broken" in row:
            faults[f"{route}: the file runs nowhere: {_general(row['broken'])[:120]}"].append(_split(key)[0])
            continue
        masked = {case for case in row.get("exporter", {}) if case.endswith(("empty", "left"))}
        if set(row.get("exporter", {})) - masked:
            faults[f"{route}: fails or is off at another size, or with another mask, than the example's"].append(_split(key)[0])
        elif masked:
            faults[f"{route}: rows that see no key differ from torch"].append(_split(key)[0])
    if not faults:
        return ""
    head = ["## Where the file as exported is not what torch computes", "", "Such a file is compared with itself.", ""]
    lines = [*head, "| route, fault | files | types |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {_cell(fault)} | {len(found)} | {_some(found)} |" for fault, found in sorted(faults.items()))])


def _refused(index: Mapping[str, Entry], routes: list[str]) -> str:
    errors: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    for key, entry in index.items():
        name, route = _split(key)
        if "failed" in entry and route in routes:
            errors[route, _general(entry["failed"])[:140]].append(name)
    if not errors:
        return ""
    lines = ["## Not exportable, with the error of the exporter", "", "| route | error | types |", "|---|---|---|"]
    for (route, error), found in sorted(errors.items(), key=lambda item: (item[0][0], -len(item[1]))):
        lines.append(f"| {route} | {_cell(error)} | {', '.join(sorted(found))} |")
    return "\n".join(lines)


def _unbuilt(index: Mapping[str, Entry]) -> str:
    reasons: dict[str, set[str]] = collections.defaultdict(set)
    for key, entry in index.items():
        if "unbuilt" in entry:
            reasons[_general(entry["unbuilt"])[:140]].add(_split(key)[0])
    said = "What the rules of benchmarks/_shrink.py and benchmarks/_every.py do not build, with the error of the library."
    lines = ["## No small model", "", said, "", "| reason | types |", "|---|---|"]
    for reason, found in sorted(reasons.items(), key=lambda item: -len(item[1])):
        lines.append(f"| {_cell(reason)} | {', '.join(sorted(found))} |")
    return "\n".join(lines) if reasons else ""


def _all(index: Mapping[str, Entry], rows: Mapping[str, Entry], routes: list[str]) -> str:
    names = sorted({_split(k)[0] for k in rows})
    lines = ["<details><summary>Every model: blocks fused / expected</summary>", "", f"| type | class | {' | '.join(routes)} |",
             f"|---|---|{'---|' * len(routes)}"]  # fmt: skip
    for name in names:
        entries = [index.get(f"{name}.{route}", {}) for route in routes]
        kind = next(e["class"] for e in entries if "class" in e)
        lines.append(f"| {name} | {kind} | {' | '.join(_one(rows.get(f'{name}.{route}'), e) for route, e in zip(routes, entries, strict=True))} |")
    return "\n".join([*lines, "", "</details>"])


def _one(row: Entry | None, entry: Entry) -> str:
    if row is None:
        return f"as {entry['same']}" if "same" in entry else "not exportable" if "failed" in entry else ""
    if "broken" in row or "failed" in row:
        return "does not run" if "broken" in row else "fails"
    return f"{row['found']} / {row['expected']}" + ("" if row["status"] == "ok" else f" {row['status']}")


def _general(text: str) -> str:
    """A reason without the names of nodes and without numbers, so that equal ones meet."""
    text = re.sub(r"`[^`]*`", "", text.removeprefix("not fused: "))
    text = re.sub(r"\d+(\.\d+)?(e[-+]?\d+)?", "N", re.sub(r"0x[0-9a-f]+|\bs\d+\b", "N", text))
    return re.sub(r"\s+", " ", text).strip()


def _cell(text: Any) -> str:
    return str(text).replace("|", "\\|")


def _some(names: Iterable[str], most: int = 12) -> str:
    names = sorted(set(names))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
