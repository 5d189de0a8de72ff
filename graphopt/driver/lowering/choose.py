"""Lowering is measured: equivalent spellings of each piece of a graph are timed where the model will run, and what wins is chosen.

Every distinct piece becomes a small model of its own (extract.py), is spelled in each way that the target's table lists, and all
spellings are timed side by side. Equal pieces are timed once, and what was timed before comes out of a cache (cache.py). A spelling
must be faster than the default one by more than the noise; without measurement the defaults of the table decide.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from graphopt.core.contract import Alternative, Context, Pass, Piece, PieceKind, Session, Target
from graphopt.core.errors import GraphoptError, TargetError
from graphopt.driver.lowering import extract
from graphopt.driver.lowering.cache import Cache, Timed
from graphopt.graph.dims import Bindings
from graphopt.graph.questions import all_nodes
from graphopt.rewrite.choices import Choices
from graphopt.run import guarded, race
from graphopt.run.clock import NOISE, geometric_mean
from graphopt.run.roles import random_feed

FLOOR = 1e-5  # seconds over all sizes together, that a spelling must win beyond the noise: below that the clock decides, not the kernel
TIMING_SECONDS = 20.0  # seconds for all timing of one model; what is left over goes by the table
_REFUSED = 1e6  # seconds: what the cache says of a spelling that the runtime does not run at these sizes
_BYTES = 512 * 2**20  # activations of a piece, at most


@dataclasses.dataclass(frozen=True)
class ChooseSpellings(Pass):
    """Times the equivalent spellings of the target's table and chooses; the lowerings after it then fire where they were chosen."""

    def run(self, model: ir.Model, ctx: Context) -> int:
        if ctx.target is None:
            raise TargetError("choose-spellings reads the table of a target, and the context has none; give Context(model, target=...)")
        table = ctx.target.spellings()
        if not table:
            return 0
        ctx.choices = Choices(table)
        tuner = _Tuner(ctx.target, model, ctx)
        for kind in dict.fromkeys(spelling.kind for spelling in table):
            tuner.decide(kind, [s for s in table if s.kind == kind])
        tuner.close()
        return 0


@dataclasses.dataclass
class _Variant:
    """One spelling of one piece: the small model, and the key that its timings have in the cache."""

    spelling: Alternative
    model: ir.Model
    key: str


class _Tuner:
    def __init__(self, target: Target, model: ir.Model, ctx: Context) -> None:
        self.target, self.model, self.ctx = target, model, ctx
        self.mode = target.tune if ctx.tune else "off"
        self.machine = target.machine()
        self.elsewhere = target.processor is not None
        self.cache = Cache()
        self.sizes = race.sizes_for(model, race.shapes_of(target))
        self.spent = 0.0
        self.by_table: dict[str, str] = {}

    def decide(self, kind: PieceKind, spellings: Sequence[Alternative]) -> None:
        """Choose for every piece of one kind; equal pieces are looked at once."""
        groups: dict[str, list[Piece]] = {}
        small: dict[str, ir.Model] = {}
        for piece in self.ctx.get(kind):
            found = extract.extract(piece, self.model)
            text = "" if found is None else extract.signature(found, None)
            groups.setdefault(text, []).append(piece)
            if found is not None:
                small.setdefault(text, found)
        for text, pieces in groups.items():
            chosen = self._choose(small[text], spellings, pieces) if text and len(spellings) > 1 else spellings[0]
            for piece in pieces:
                assert self.ctx.choices is not None
                self.ctx.choices.choose(piece, chosen)

    def _choose(self, small: ir.Model, spellings: Sequence[Alternative], pieces: Sequence[Piece]) -> Alternative:
        default = spellings[0]
        variants = [] if self.mode == "off" or self.machine is None else self._variants(small, spellings)
        if len(variants) == 1:
            return default
        times = self._times(small, variants) if variants else {}
        if times:
            return self._judge(variants, times, pieces[0].nodes[-1].name or "", len(pieces))
        self.by_table[default.kind_name] = default.name
        return default

    def _variants(self, small: ir.Model, spellings: Sequence[Alternative]) -> list[_Variant]:
        """The spellings that differ; of equal ones the first."""
        found: dict[str, _Variant] = {}
        for spelling in spellings:
            model = small.clone()
            own = Context(model, target=self.target)
            for step in spelling.passes:
                step.run(model, own)
            ops = " ".join(f"{n.domain}.{n.op_type}".lstrip(".") for n in all_nodes(model))
            found.setdefault(extract.signature(model, None), _Variant(spelling, model, f"{spelling.label} ({ops})"))
        return list(found.values())

    def _times(self, small: ir.Model, variants: Sequence[_Variant]) -> dict[str, dict[str, float]]:
        """Sizes -> spelling -> seconds, of the sizes at which all spellings are known or could be timed."""
        assert self.machine is not None
        keys: dict[str, str] = {}
        for label, sizes in self.sizes.items():
            need = extract.cost(small, sizes)
            if need is not None and need <= _BYTES:
                keys[label] = extract.fingerprint(extract.signature(small, sizes))
        known = self.cache.find(self.machine, keys.values(), any_runtime=self.elsewhere)
        times: dict[str, dict[str, float]] = {}
        missing: dict[str, str] = {}
        for label, key in keys.items():
            row = {v.spelling.name: known.get((key, v.key)) for v in variants}
            if None not in row.values():
                times[label] = {name: seconds for name, seconds in row.items() if seconds is not None}
            else:
                missing[label] = key
        if missing and self.mode == "on" and not self.elsewhere and self.target.runs_here() and self.spent < TIMING_SECONDS:
            start = time.perf_counter()
            times.update(self._measure(small, variants, missing))
            self.spent += time.perf_counter() - start
        return times

    def _measure(self, small: ir.Model, variants: Sequence[_Variant], keys: Mapping[str, str]) -> dict[str, dict[str, float]]:
        assert self.machine is not None
        sessions: dict[str, Session] = {}
        try:
            feed = random_feed(small, self.sizes[next(iter(keys))])
        except ValueError:
            return {}
        for variant in variants:
            try:
                sessions[variant.spelling.name] = guarded.opened(self.target, variant.model, feed)
            except GraphoptError as error:
                self.ctx.remarks.missed("", f"{variant.spelling.label}: {error}")
        if variants[0].spelling.name not in sessions:
            return {}
        found: dict[str, dict[str, float]] = {}
        for label, key in keys.items():
            row = self._race(small, sessions, self.sizes[label])
            if row and min(row.values()) * NOISE < row[variants[0].spelling.name]:  # a slow moment of the machine must not choose: win twice
                again = self._race(small, sessions, self.sizes[label])
                row = {name: min(seconds, again[name]) for name, seconds in row.items() if name in again}
            if row:
                found[label] = {v.spelling.name: row.get(v.spelling.name, _REFUSED) for v in variants}
                told = extract.describe(small, self.sizes[label])
                self.cache.add(self.machine, [Timed(key, v.key, label, found[label][v.spelling.name], told) for v in variants])
        return found

    def _race(self, small: ir.Model, sessions: Mapping[str, Session], sizes: Bindings) -> dict[str, float]:
        """Seconds of each; a spelling that the runtime refuses at this size leaves this race."""
        try:
            feed = random_feed(small, sizes)
        except ValueError:
            return {}
        refused = race.refusals(sessions, [feed])
        for name, why in refused.items():
            self.ctx.remarks.missed("", f"`{name}` does not run at {dict(sizes)}: {why}")
        if next(iter(sessions)) in refused:
            return {}
        able = {name: session for name, session in sessions.items() if name not in refused}
        timed = race.race(able, {"": feed}, clock=race.clock_of(self.target), effort=race.CHOICE)
        return {name: seconds[0] for name, seconds in timed.seconds.items()}

    def _judge(self, variants: Sequence[_Variant], times: Mapping[str, Mapping[str, float]], node: str, count: int) -> Alternative:
        default = variants[0].spelling
        names = [v.spelling.name for v in variants]
        gain = {n: geometric_mean([row[default.name] / row[n] for row in times.values()]) for n in names}
        saved = {n: sum(row[default.name] - row[n] for row in times.values()) for n in names}
        best = max(names, key=lambda n: gain[n])
        facts: dict[str, Any] = {
            "pieces": count,
            "milliseconds": {label: {n: round(s * 1e3, 4) for n, s in row.items()} for label, row in times.items()},
            "speed_up": {n: round(gain[n], 3) for n in names},
        }
        told = ", ".join(f"{n} {gain[n]:.2f}x" if gain[n] > 1e-3 else f"{n} does not run" for n in names if n != default.name)
        kind = default.kind_name
        if best != default.name and gain[best] >= NOISE and saved[best] >= FLOOR:
            self.ctx.remarks.applied(node, f"{kind}: `{best}` for {count} pieces ({told} as fast as `{default.name}`)", **facts)
            return next(v.spelling for v in variants if v.spelling.name == best)
        within = "; within the noise" if best != default.name else ""
        self.ctx.remarks.applied(node, f"{kind}: `{default.name}`, the default, for {count} pieces ({told} as fast{within})", **facts)
        return default

    def close(self) -> None:
        """Say what was not measured, and why."""
        if self.cache.problem is not None:
            self.ctx.remarks.warning("", self.cache.problem)
        if not self.by_table:
            return
        told = ", ".join(f"{kind} `{name}`" for kind, name in self.by_table.items())
        self.ctx.remarks.missed("", f"not measured, {self._why()}: the default table decides: {told}", **self.by_table)

    def _why(self) -> str:
        if self.mode == "off":
            return "tune=off"
        if self.machine is None or not (self.elsewhere or self.mode == "cache" or self.target.runs_here()):
            return f"{self.target.name} cannot run here"
        if self.mode == "cache" or self.elsewhere:
            return "the tuning cache has no such timings" + (f" of {self.machine.processor}" if self.elsewhere else "")
        if self.spent >= TIMING_SECONDS:
            return f"{TIMING_SECONDS:.0f} s of timing are over"
        return "the sizes of the piece are not known, or it does not run alone"
