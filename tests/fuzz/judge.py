"""One case, from the file to the numbers of the artifact. A stage is named before it starts, as the process may die in it."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

import graphopt
from fuzz.case import FINDING, FINE, REFUSED, UNJUDGED, Case, Verdict  # type: ignore[import-not-found]
from graphopt.core.errors import GraphoptError, LoadError, PassError, PipelineError, VerifyError
from graphopt.core.pipeline import parse
from graphopt.core.registry import passes
from graphopt.graph.questions import grain
from graphopt.graph.text import graph_text
from graphopt.run import reference
from graphopt.run.distance import TOLERANCE, compare_outputs, excess
from graphopt.run.ort import session
from graphopt.run.samples import runnable_samples

Array = np.ndarray[Any, Any]
Outputs = list[dict[str, Array]]
SECONDS = 10.0  # of processor time that one stage of the product may take
OWN = ("load", "optimize", "save", "artifact", "default level", "again", "repeat")  # a death here is ours; in the others the input's own
_NUDGE = 1e-6  # relative: a graph that answers this by more than the tolerance tells nothing about rounding
_INPUTS = (LoadError, PipelineError)
_NO_KERNEL = "Could not find an implementation"
_BLAME = "the passes left a broken graph"  # must not be said of what the input brought
_CAUGHT = "cannot be brought into normal form"  # the door's last resort: an exception that nobody expected
_LINE = 1200  # letters; a message that is longer than this helps nobody


class Found(Exception):
    """A finding; the text says what."""


class Judge:
    """Judges one case in a folder of its own."""

    def __init__(self, case: Case, folder: Path, tell: Callable[[str], None]) -> None:
        self.case, self.folder, self.tell = case, folder, tell
        self.at = "load"
        self.source = folder / "model.onnx"
        self.source.write_bytes(case.model)

    def verdict(self) -> Verdict:
        """Whatever happens, but for a death of the process or a hang, which whoever asks must see."""
        try:
            return self._judge()
        except Found as found:
            return Verdict(FINDING, self.at, str(found))
        except GraphoptError as error:
            return self._refused(error)
        except Exception as error:  # noqa: BLE001 -- any other exception is what is looked for
            return Verdict(FINDING, self.at, f"internal: {type(error).__name__}: {_first(error)}", traceback.format_exc())

    def _judge(self) -> Verdict:
        with self._stage("load"):
            loaded = graphopt.load(self.source)
        self.grain = grain(loaded)
        engine, feeds = self._baseline(loaded)
        options: dict[str, Any] = {"level": self.case.level, "target": self.case.target, "promise": False}
        options["gate"] = self.case.seed % 8 == 0  # off, it hides nothing that a pass broke
        options["verify_each"] = self.case.kind == "pipelines" or self.case.seed % 3 == 0
        if self.case.samples:
            options["samples"] = [dict(feed) for feed in feeds] or None
        options["check_numerics"] = self.case.check and bool(feeds) and self.case.seed % 2 == 0
        self.options = options
        result = self._optimize("optimize", self.source, options)
        artifact = self._save(result, "artifact.onnx")
        self._interface(artifact, engine is not None and engine.engine == "onnxruntime")
        exact = self._exact()
        if engine is not None:
            self._numbers(engine, feeds, artifact, exact)
        if self.case.seed % 8 == 0:
            self._repeat(options, artifact)
        if exact and self._steady_pipeline():
            self._again(options, artifact)
        return Verdict(FINE if engine is not None else UNJUDGED)

    # ---- stages ---------------------------------------------------------------------------------------------------------------------------

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        self.at = name
        self.tell(name)
        start = time.process_time()
        yield
        if name in OWN and time.process_time() - start > SECONDS:
            raise Found(f"hang: {time.process_time() - start:.1f} s of processor time")

    def _baseline(self, loaded: ir.Model) -> tuple[Any, Outputs]:
        """The engine that runs the input, and feeds that it takes; none where nothing runs it."""
        with self._stage("baseline"):
            for load in (lambda m: session(m, optimize=False), reference.session):
                try:
                    engine = load(self.case.model)
                    feeds = list(runnable_samples(loaded, engine))
                except (GraphoptError, ValueError, RecursionError):  # the input's own fault
                    continue
                return engine, feeds[:2]
        return None, []

    def _optimize(self, stage: str, source: Path, options: Mapping[str, Any]) -> graphopt.Result:
        with self._stage(stage):
            return graphopt.optimize(source, self.case.pipeline, **options)

    def _save(self, result: graphopt.Result, name: str) -> Path:
        with self._stage("save"):
            return Path(result.save(self.folder / name).files[0])

    def _exact(self) -> bool:
        text = self.case.pipeline
        return self.case.level < 2 if text is None else all(step.exact for step in parse(text, passes()))

    def _steady_pipeline(self) -> bool:
        """Whether a second run must find nothing: so for a level, and for one pass; of any order of passes, a later one may make work for an earlier."""
        return self.case.pipeline is None or len(parse(self.case.pipeline, passes())) < 2

    def _interface(self, artifact: Path, runs: bool) -> None:
        """Names, order, dtypes and declared sizes are those of the file that came; a pass that changes them on purpose is not exact, and what a file
        says that does not run may be mended."""
        before, after = onnx.load_model_from_string(self.case.model), onnx.load(artifact)
        stored = {t.name for t in before.graph.initializer} if before.ir_version < 4 else set()
        for what in ("input", "output"):
            old = [v for v in getattr(before.graph, what) if v.name not in stored]
            new = list(getattr(after.graph, what))
            if [v.name for v in old] != [v.name for v in new]:
                raise Found(f"interface: the {what}s were {[v.name for v in old]}, and are {[v.name for v in new]}")
            for a, b in zip(old, new, strict=True):
                if runs and self._exact() and not self._illegal() and not _same_type(a.type, b.type):
                    raise Found(f"interface: {what} {a.name} was {_shown(a.type)}, and is {_shown(b.type)}")

    def _numbers(self, engine: Any, feeds: Outputs, artifact: Path, exact: bool) -> None:
        with self._stage("baseline"):
            expected, again = ([_run(engine, feed) for feed in feeds] for _ in range(2))
            pairs = [(name, a[name], b[name]) for a, b in zip(expected, again, strict=True) for name in a]
            unsteady = {name for name, a, b in pairs if compare_outputs({name: a}, {name: b})}
            expected = [{name: array for name, array in outputs.items() if name not in unsteady} for outputs in expected]
        if engine.engine != "onnxruntime":
            self._by_reference(engine, feeds, expected, artifact, exact)
            return
        with self._stage("artifact"):
            try:
                plain = session(artifact, optimize=False)
            except GraphoptError as error:
                if _NO_KERNEL in str(error) and "bfloat16" in (self.case.pipeline or ""):
                    return
                raise Found(f"the artifact does not load: {error}") from error
            self._compare(engine, plain, feeds, expected, exact, "optimizations off")
        if self._full_level(feeds, expected):
            self._fully(engine, feeds, expected, artifact, exact)

    def _by_reference(self, engine: Any, feeds: Outputs, expected: Outputs, artifact: Path, exact: bool) -> None:
        """The runtime does not run the input; the reference knows no vendor's operators."""
        if all(node.domain in ("", "ai.onnx") for node in onnx.load(artifact).graph.node):
            with self._stage("artifact"):
                self._compare(engine, reference.session(artifact), feeds, expected, exact, "reference")

    def _full_level(self, feeds: Outputs, expected: Outputs) -> bool:
        """Whether the runtime's default level computes the input as it should."""
        with self._stage("input at the default level"):
            try:
                full = session(self.case.model)
                return not any(compare_outputs(a, {k: v for k, v in _run(full, f).items() if k in a}) for f, a in zip(feeds, expected, strict=True))
            except GraphoptError:
                return False

    def _fully(self, engine: Any, feeds: Outputs, expected: Outputs, artifact: Path, exact: bool) -> None:
        with self._stage("default level"):
            try:
                full = session(artifact)
            except GraphoptError as error:
                if self.options["gate"]:
                    raise Found(f"the artifact does not load at the default level: {error}") from error
                full = None
            if full is not None:
                self._compare(engine, full, feeds, expected, exact, "default level")
                return
        self.options["gate"] = True  # without it, an artifact came out that the runtime cannot open: with it, another must
        self._numbers(engine, feeds, self._save(self._optimize("optimize", self.source, self.options), "gated.onnx"), exact)

    def _compare(self, engine: Any, found: Any, feeds: Outputs, expected: Outputs, exact: bool, where: str) -> None:
        for feed, right in zip(feeds, expected, strict=True):
            try:
                given = _run(found, feed)
            except GraphoptError as error:
                raise Found(f"the artifact does not run ({where}): {error}") from error
            if list(right) != [name for name in given if name in right]:
                raise Found(f"the artifact gives {list(given)} instead of {list(right)} ({where})")
            for name in right:
                difference = self._beyond(name, right[name], given[name]) if exact else _form(name, right[name], given[name])
                if difference is not None and not (exact and _shaky(engine, feed, name, right[name])):
                    raise Found(f"wrong number ({where}): {difference}")

    def _beyond(self, name: str, right: Array, found: Array) -> str | None:
        """What is beyond the rounding of the graph that came."""
        if right.dtype.name not in TOLERANCE and self.grain != "codes":
            difference = compare_outputs({name: right}, {name: found})
            return None if difference is None else str(difference)
        off = excess({name: right}, {name: found}, self.grain)
        return str(off) if off.times > 1 else None

    def _repeat(self, options: Mapping[str, Any], artifact: Path) -> None:
        other = self._save(self._optimize("repeat", self.source, options), "repeat.onnx")
        if other.read_bytes() != artifact.read_bytes():
            raise Found("the same run twice writes other bytes")

    def _again(self, options: Mapping[str, Any], artifact: Path) -> None:
        options = {**options, "check_numerics": False}
        result = self._optimize("again", artifact, options)
        changed = [r.name for r in result.report.passes if r.changes]
        if not changed or _same_graph(artifact, self._save(result, "again.onnx")):
            return
        vendored = any(node.domain == "com.microsoft" for node in onnx.load(artifact).graph.node)
        if vendored and (changed == ["canonicalize"] or self.case.pipeline is not None):
            return  # a small weight that is stored once for two readers of another layout, folded; what shared an input with a lowered product
        raise Found(f"a second run over the artifact changes it: {', '.join(changed)}")

    # ---- refusals -------------------------------------------------------------------------------------------------------------------------

    def _refused(self, error: GraphoptError) -> Verdict:
        cause = error.cause if isinstance(error, PassError) else error
        text = str(error)
        trace = "".join(traceback.format_exception(error))
        if not isinstance(cause, GraphoptError):
            return Verdict(FINDING, self.at, f"internal: {type(cause).__name__}: {_first(cause)} [{text.partition(' failed:')[0]}]", trace)
        if _NO_KERNEL in text and "bfloat16" in (self.case.pipeline or ""):
            return Verdict(REFUSED, self.at, "the runtime lacks kernels of bfloat16")
        if isinstance(cause, VerifyError) and not (self._illegal() and _BLAME not in text):
            return Verdict(FINDING, self.at, text, trace)
        if self.at not in ("load", "optimize"):
            return Verdict(FINDING, self.at, f"{type(error).__name__}: {text}", trace)
        if _CAUGHT in text:
            return Verdict(FINDING, self.at, text, trace)
        if "\n" in text and not isinstance(cause, (PipelineError, VerifyError)):
            return Verdict(FINDING, self.at, f"a refusal of several lines: {text}", trace)
        if len(text) > _LINE and not isinstance(cause, (PipelineError, VerifyError)):
            return Verdict(FINDING, self.at, f"a refusal of {len(text)} letters: {text}", trace)
        return Verdict(REFUSED, self.at, f"{type(cause).__name__}: {text.replace(str(self.source), 'MODEL')}")

    def _illegal(self) -> bool:
        """Whether the file that came is no legal model, in the eyes of the onnx package."""
        try:
            onnx.checker.check_model(onnx.load_model_from_string(self.case.model), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError, RuntimeError):
            return True
        return False


def _run(engine: Any, feed: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs by name, those of a sequence by name and number; what is absent is left out."""
    found: dict[str, Array] = {}
    for name, value in engine.run(feed).items():
        parts = {f"{name}.{k}": part for k, part in enumerate(value)} if isinstance(value, list) else {name: value}
        found |= {key: np.asarray(part) for key, part in parts.items() if part is not None}
    return found


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


def _form(name: str, right: Array, found: Array) -> str | None:
    """What a lossy pass must not do either: another rank or type, a number that is none."""
    if right.ndim != found.ndim or right.dtype.kind != found.dtype.kind:
        return f"output `{name}` is {found.dtype}{list(found.shape)}, expected {right.dtype}{list(right.shape)}"
    if right.dtype.kind == "f" and bool(np.isfinite(right).all() and np.isnan(found).any()):
        return f"output `{name}` has become NaN"
    return None


def _same_graph(a: Path, b: Path) -> bool:
    """But for the names of what is inside."""
    one, other = (graph_text(ir.load(path), canonical=True) for path in (a, b))
    return one == other


def _shaky(engine: Any, feed: Mapping[str, Array], name: str, right: Array) -> bool:
    """Whether the input's own number moves as far when what it is fed moves by a rounding: then the difference tells nothing."""
    rng = np.random.default_rng(0)
    for _ in range(2):
        nudged = {k: (v * (1 + _NUDGE * rng.standard_normal(v.shape))).astype(v.dtype) if v.dtype.kind == "f" else v for k, v in feed.items()}
        try:
            moved = _run(engine, nudged)[name]
        except GraphoptError:
            return False
        if moved.shape != right.shape or compare_outputs({name: right}, {name: moved}, 1e-4) is not None:
            return True
    return False


def _same_type(a: onnx.TypeProto, b: onnx.TypeProto) -> bool:
    if a.WhichOneof("value") != "tensor_type" or b.WhichOneof("value") != "tensor_type":
        return a.WhichOneof("value") == b.WhichOneof("value")
    x, y = a.tensor_type, b.tensor_type
    if x.elem_type != y.elem_type:
        return False
    if not x.HasField("shape"):
        return True
    if not y.HasField("shape") or len(x.shape.dim) != len(y.shape.dim):
        return False
    return all(
        not d.WhichOneof("value") or (d.dim_value, d.dim_param) == (e.dim_value, e.dim_param) for d, e in zip(x.shape.dim, y.shape.dim, strict=True)
    )


def _shown(kind: onnx.TypeProto) -> str:
    return " ".join(str(kind).split())
