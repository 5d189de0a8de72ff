"""Before/after cases for passes: the author writes the graph, the pipeline and the remark; every other check is added here.

A `.test` file holds cases. `//` starts a comment line. A case is a title line, options, the graph before, and what is expected:

    === A11 (ii): epsilon of shape [1]
    pipeline: canonicalize, fuse-norm
    applied: LayerNormalization
    --- before
    (float[B,S,8] x) => (float[B,S,8] y) <float[8] gamma, float[1] eps = {1e-5}> { ... }
    --- after
    (float[B,S,8] x) => (float[B,S,8] y) <float[8] gamma, float[8] ones> { ... }

Instead of `--- after`: `--- unchanged` (the last pass changes nothing; such a case must say why, by `missed: text` if the pass says it, else
by `why: text`), or `--- ops` with the exact number of nodes by type (`LayerNormalization 1, Add 2`; types that are not named are free;
`Gemm 0` forbids), or `--- error` with a text that the one-line error must hold.
Options: `pipeline`, `why`, `applied` / `missed` / `warning` (a text that such a remark must hold; repeatable), `sizes` (`B=2 S=0, B=1 S=4`
instead of two default sizes for every symbol), `ort-broken` (the runtime's own optimizer computes this input wrongly, so that only its
unoptimized numbers are compared), `ir` and `opset` (of the graph before), `samples` (so many seeded batches for passes that ask for samples; the
first ones are those on which numbers are compared), `target` (`cpu{tune=off}`: the passes of its lowerings and spellings may be named, too, and
it is in the context), `loss` (see below), `resizes` (names of outputs that get another size on purpose; their numbers are not
compared), `retypes` (names of inputs and outputs that get another type on purpose). A weight that is declared without values gets seeded random ones, the same for the same name.

What is checked for every case: the ONNX checker and the normal form after the pipeline; pipeline text round-trips; the count of changes of
every pass is honest; a second run of the pipeline changes nothing, if its passes are exact; inputs and outputs are the same; and the numbers are
those of the graph before, run without runtime optimizations, at every size: |d| <= 1e-5 * (1 + max |baseline|) for float32
(graphopt.run.distance.TOLERANCE). With `loss: 0.01`, for passes that are not exact: the relative L2 distance over all batches is at most that, and
more than a tenth of it, so that no bound is a blank cheque.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graphopt
from graphopt.core.contract import Context, Pass, Target
from graphopt.core.errors import GraphoptError, PassError
from graphopt.core.pipeline import PassManager, PassRecord, parse, render
from graphopt.core.registry import passes, targets
from graphopt.core.remarks import Remark, Remarks
from graphopt.graph.dims import symbols
from graphopt.graph.interface import RESIZED, RETYPED, interface
from graphopt.graph.questions import all_nodes
from graphopt.graph.text import diff, graph_text
from graphopt.graph.verify import verify
from graphopt.run.distance import Squares, compare_outputs
from graphopt.run.ort import session
from graphopt.run.roles import random_feed

Array = np.ndarray[Any, Any]
Weights = Mapping[str, Array]
_SIZES = ((3, 5, 7, 2), (1, 6, 4, 3))  # of the symbols, in the order in which they appear
_KINDS = ("applied", "missed", "warning")
_EXPECTED = ("after", "unchanged", "ops", "error")


@dataclasses.dataclass(frozen=True)
class Case:
    """One case of a `.test` file; `expect` is after, unchanged, ops or error, `expected` its text."""

    name: str
    before: str
    expect: str
    expected: str
    pipeline: str
    remarks: tuple[tuple[str, str], ...] = ()
    sizes: tuple[Mapping[str, int], ...] = ()
    broken: bool = False
    ir_version: int = 10
    opset: int = 23
    samples: int = 0
    target: str = ""
    loss: float | None = None
    resizes: tuple[str, ...] = ()
    retypes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a pipeline made of a graph that passed all checks."""

    model: ir.Model
    records: Sequence[PassRecord]
    remarks: Sequence[Remark]

    @property
    def ops(self) -> collections.Counter[str]:
        return collections.Counter(n.op_type for n in all_nodes(self.model))

    @property
    def changes(self) -> int:
        """Of the last pass."""
        return self.records[-1].changes

    def said(self, kind: str, text: str) -> bool:
        return any(r.kind == kind and text in str(r) for r in self.remarks)

    def written(self) -> bytes:
        return ir.to_proto(self.model).SerializeToString()


# ---- graphs -------------------------------------------------------------------------------------------------------------------------------


def build(text: str, weights: Weights | None = None, *, ir_version: int = 10, opset: int = 23) -> onnx.ModelProto:
    """A model from ONNX text, with or without its header; declared values that nothing makes become weights."""
    if not text.lstrip().startswith("<ir_version"):
        body = text.strip()
        body = body if re.match(r"[A-Za-z_]\w*\s*\(", body) else f"g {body}"
        text = f'<ir_version: {ir_version}, opset_import: ["": {opset}]>\n{body}'
    proto = onnx.parser.parse_model(text)
    graph = proto.graph
    made = {v.name for v in (*graph.input, *graph.initializer)} | {o for n in graph.node for o in n.output}
    for info in list(graph.value_info):
        if info.name in made:
            continue
        array = (weights or {}).get(info.name)
        graph.initializer.append(onnx.numpy_helper.from_array(_random(info) if array is None else array, info.name))
        graph.value_info.remove(info)
    for name, array in (weights or {}).items():
        if name not in {i.name for i in graph.initializer}:
            graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return proto


def _random(info: onnx.ValueInfoProto) -> Array:
    kind = info.type.tensor_type
    shape = [d.dim_value for d in kind.shape.dim]
    rng = np.random.default_rng(zlib.crc32(info.name.encode()))
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    if np.issubdtype(dtype, np.integer):
        return rng.integers(-100 if np.issubdtype(dtype, np.signedinteger) else 0, 100, shape).astype(dtype)
    return np.asarray(rng.standard_normal(shape)).astype(dtype)


def sizes_of(model: ir.Model) -> list[dict[str, int]]:
    """Two sizes for every symbol of the inputs."""
    names = list(symbols(model))
    assert len(names) <= len(_SIZES[0]), f"more symbols than sizes: {names}"
    return [dict(zip(names, sizes, strict=False)) for sizes in (_SIZES if names else _SIZES[:1])]


# ---- checks -------------------------------------------------------------------------------------------------------------------------------


def check(
    source: onnx.ModelProto | ir.Model,
    pipeline: str,
    *,
    sizes: Sequence[Mapping[str, int]] = (),
    feeds: Sequence[Mapping[str, Array]] = (),
    broken: bool = False,
    again: bool = True,
    samples: int = 0,
    target: str = "",
    loss: float | None = None,
    resizes: Sequence[str] = (),
    retypes: Sequence[str] = (),
) -> Outcome:
    """Run a pipeline over a model and check all that holds in every case.

    Args:
        feeds: to compare on, besides random ones at `sizes`.
        broken: the runtime's own optimizer is not trusted with the result.
        again: False for a pass that may change more in a second run; passes that are not exact may in any case.
        samples: so many batches for the passes; the first are among those that are compared.
        target: its lowerings and spellings may stand in the pipeline, too.
        loss: the bound of the relative L2 distance, instead of rounding.
        resizes: outputs that change their size; their numbers are not compared.
        retypes: inputs and outputs that change their type.
    """
    original = source.SerializeToString() if isinstance(source, onnx.ModelProto) else None
    model, remarks = _load(source)
    public = interface(model)
    bindings = list(sizes or sizes_of(model))
    batches = [*feeds, *(random_feed(model, b, turn=k) for k, b in enumerate(bindings))]
    seen = [random_feed(model, b, turn=k) for k, b in enumerate(itertools.islice(itertools.cycle(bindings), samples))]
    lowered = parse(target, targets(), "target")[0] if target else None
    known = _known(lowered)

    def context(told: Remarks | None) -> Context:
        return Context(model, target=lowered, samples=seen or None, remarks=told)

    records = _run(model, pipeline, context(remarks), known)
    verify(model, interface=public)
    resized, exact = model.graph.meta.get(RESIZED, ()), all(step.exact for step in parse(pipeline, known))
    assert sorted(resized) == sorted(resizes), f"outputs of another size: {sorted(resized)}, expected {sorted(resizes)}"
    retyped = model.graph.meta.get(RETYPED, ())
    assert sorted(retyped) == sorted(retypes), f"inputs and outputs of another type: {sorted(retyped)}, expected {sorted(retypes)}"
    assert loss is None or not exact, "every pass is exact: no loss is allowed"
    compare(source, model, batches, broken=broken, loss=loss, without=resizes)
    if again and exact:
        text = graph_text(model)
        counts = [(r.name, r.changes) for r in _run(model, pipeline, context(None), known)]
        assert all(changes == 0 for _, changes in counts), f"a second run changes something: {counts}\n{diff(text, graph_text(model))}"
    if isinstance(source, onnx.ModelProto):
        assert source.SerializeToString() == original, "the caller's model was changed"
    return Outcome(model, records, list(remarks))


def _known(target: Target | None) -> Mapping[str, type[Pass]]:
    """The registered passes, and those that a target lowers by."""
    own = () if target is None else (*target.lowerings(), *(step for spelling in target.spellings() for step in spelling.passes))
    return collections.ChainMap({step.name: type(step) for step in own}, passes())  # type: ignore[arg-type]


def _load(source: onnx.ModelProto | ir.Model) -> tuple[ir.Model, Remarks]:
    remarks = Remarks()
    return graphopt.load(source, remarks=remarks), remarks


def _run(model: ir.Model, pipeline: str, context: Context, known: Mapping[str, type[Pass]]) -> list[PassRecord]:
    """Run the pipeline pass by pass; text round-trips, and a pass that counts no change left the graph as it was."""
    steps = parse(pipeline, known)
    assert [str(p) for p in parse(render(steps), known)] == [str(p) for p in steps], f"`{pipeline}` does not round-trip"
    records = []
    for step in steps:
        text = graph_text(model)
        (record,) = PassManager([step]).run(model, context)
        changed = text != graph_text(model)
        assert changed == bool(record.changes), f"{step} counted {record.changes} changes\n{diff(text, graph_text(model))}"
        records.append(record)
    return records


def compare(
    base: onnx.ModelProto | ir.Model,
    model: ir.Model,
    batches: Sequence[Mapping[str, Array]],
    *,
    broken: bool = False,
    loss: float | None = None,
    without: Sequence[str] = (),
) -> None:
    """Same numbers as `base` without runtime optimizations, both without them and (unless `broken`) with them; `without`: not these outputs."""
    baseline = session(base, optimize=False)
    for optimize in (False,) if broken else (False, True):
        other, moved = session(model, optimize=optimize), Squares()
        for batch in batches:
            expected, found = ({k: v for k, v in s.run(dict(batch)).items() if k not in without} for s in (baseline, other))
            moved.add(expected, found)
            if loss is not None:
                continue
            difference = compare_outputs(expected, found)
            sizes = {k: v.shape for k, v in batch.items()}
            assert difference is None, f"{difference}, at {sizes}, runtime optimizations {'on' if optimize else 'off'}\n{graph_text(model)}"
        if loss is not None:
            told = f"the outputs move by {moved.relative:.4g} (relative L2), runtime optimizations {'on' if optimize else 'off'}"
            assert moved.relative <= loss, f"{told}, more than loss: {loss:g}\n{graph_text(model)}"
            assert moved.relative > loss / 10, f"{told}, less than a tenth of loss: {loss:g}"


def check_case(case: Case) -> Outcome:
    """Everything that a `.test` case asks for; of a case that ends in an error there is no outcome but the graph before."""
    proto = build(case.before, ir_version=case.ir_version, opset=case.opset)
    options = {"broken": case.broken, "samples": case.samples, "target": case.target, "loss": case.loss}
    options |= {"resizes": case.resizes, "retypes": case.retypes}
    if case.expect == "error":
        return _check_error(case, proto, options)
    outcome = check(proto, case.pipeline, sizes=case.sizes, **options)
    for kind, text in case.remarks:
        assert outcome.said(kind, text), f"no remark `{kind}` says `{text}`; there are:\n" + "\n".join(map(str, outcome.remarks))
    if case.expect == "unchanged":
        assert outcome.changes == 0, f"{outcome.records[-1].name} changed the graph:\n{graph_text(outcome.model)}"
    elif case.expect == "ops":
        wanted = _counts(case.expected)
        found = {op: outcome.ops[op] for op in wanted}
        assert found == wanted, f"{found} instead of {wanted}:\n{graph_text(outcome.model)}"
    else:
        wanted_model, _ = _load(build(case.expected, ir_version=case.ir_version, opset=case.opset))
        assert canonical(outcome.model) == canonical(wanted_model), diff(canonical(wanted_model), canonical(outcome.model), context=99)
    return outcome


def _check_error(case: Case, proto: onnx.ModelProto, options: Mapping[str, Any]) -> Outcome:
    with pytest.raises(GraphoptError) as raised:
        check(proto, case.pipeline, sizes=case.sizes, **options)
    cause = raised.value.cause if isinstance(raised.value, PassError) else raised.value
    assert isinstance(cause, GraphoptError), f"a raw error: {raised.value}"
    assert case.expected in str(cause), f"the error does not say `{case.expected}`, but: {cause}"
    return Outcome(_load(proto)[0], [], [])


def canonical(model: ir.Model) -> str:
    """The graph without names and order; large weights without their contents, which the numbers check."""
    return re.sub(r" #[0-9a-f]+", "", graph_text(model, canonical=True))


def _counts(text: str) -> dict[str, int]:
    pairs = (item.split() for item in re.split(r"[,\n]", text) if item.strip())
    return {op: int(number) for op, number in pairs}


# ---- the file format ----------------------------------------------------------------------------------------------------------------------


def read_cases(path: Path) -> Iterator[Case]:
    """The cases of one file.

    Raises:
        ValueError: the file breaks the format; the text names the case.
    """
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("//")]
    for block in re.split(r"^=== *", "\n".join(lines), flags=re.M)[1:]:
        title, _, rest = block.partition("\n")
        head, *parts = re.split(r"^--- *(.*)\n?", rest, flags=re.M)
        sections = [(kind.strip(), body.strip()) for kind, body in zip(parts[::2], parts[1::2], strict=True)]
        if len(sections) != 2 or sections[0][0] != "before" or sections[1][0] not in _EXPECTED:
            raise ValueError(f"{path.name}, `{title}`: expected `--- before` and one of {', '.join(_EXPECTED)}; found {[k for k, _ in sections]}")
        yield _case(f"{path.stem}: {title.strip()}", head, sections[0][1], *sections[1])


def _case(name: str, head: str, before: str, expect: str, expected: str) -> Case:
    options = [tuple(part.strip() for part in line.split(":", 1)) for line in head.splitlines() if line.strip()]
    keys = [o[0] for o in options]
    known = {"pipeline", "why", "sizes", "ort-broken", "ir", "opset", "samples", "target", "loss", "resizes", "retypes", *_KINDS}
    if unknown := set(keys) - known:
        raise ValueError(f"{name}: unknown option {sorted(unknown)}; there are {sorted(known)}")
    single = {o[0]: o[-1] for o in options if o[0] not in _KINDS}
    remarks = tuple((o[0], o[1]) for o in options if o[0] in _KINDS)
    if "pipeline" not in single:
        raise ValueError(f"{name}: no pipeline")
    if expect == "unchanged" and "why" not in single and not any(kind == "missed" for kind, _ in remarks):
        raise ValueError(f"{name}: a negative case names the reason: `missed: text` or `why: text`")
    sizes = tuple({k: int(v) for k, v in (pair.split("=") for pair in item.split())} for item in single.get("sizes", "").split(",") if item.strip())
    numbers = {"ir_version": int(single.get("ir", 10)), "opset": int(single.get("opset", 23))}
    loss = float(single["loss"]) if "loss" in single else None
    return Case(
        name, before, expect, expected, single["pipeline"], remarks, sizes, "ort-broken" in single, **numbers,
        samples=int(single.get("samples", 0)), target=single.get("target", ""), loss=loss, resizes=tuple(single.get("resizes", "").split()),
        retypes=tuple(single.get("retypes", "").split()),
    )  # fmt: skip
