"""Where two models differ on samples: their outputs, and block by block where the error enters.

The blocks are read off one model, fused for it; a value inside is found in both by its name, which rewrites keep. Each block is measured twice:
as the models run, so that errors pile up, and alone, fed with the values of A, which shows what the block itself adds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Unpack

import numpy as np
import onnx_ir as ir

from graphopt.calibration.padding import Kept, Padding
from graphopt.core.contract import Array
from graphopt.core.errors import GraphoptError
from graphopt.core.remarks import Remarks, plural
from graphopt.core.replay import Batch
from graphopt.graph import interface
from graphopt.io import load
from graphopt.report.blocks import block_ends
from graphopt.report.document import Document
from graphopt.report.elements import Element, Line, Plot, Table
from graphopt.report.words import called, head, plain
from graphopt.run.distance import Running, arrays_in
from graphopt.run.observe import exposed
from graphopt.run.samples import Samples, runnable_samples

ROUNDING = 100.0  # dB; a block that is closer than this differs by the rounding of float32 sums in another order
_CHANNELS = 5
_EXACT, _STRANGER = 120.0, 40.0  # dB; a value so much further off than the outputs (which count as exact at most) is another of the same name


@dataclasses.dataclass(frozen=True)
class OutputDifference:
    """One output of both models.

    Attributes:
        snr: signal-to-noise ratio in dB, 10 log10(||a||^2 / ||a - b||^2); inf where nothing differs.
        l2: ||a - b|| / ||a||.
        cosine: mean cosine of the rows (last axis); `cosine_min`: the smallest.
        max_abs: max |a - b|, in units of the output.
        channels: (index on the last axis, relative l2 of that channel), the largest share of the error first.
    """

    name: str
    snr: float
    l2: float
    cosine: float
    cosine_min: float
    max_abs: float
    channels: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class BlockDifference:
    """One block of the structure, at the value where it ends (the one that differs most, where it ends at several).

    Attributes:
        name: embeddings, `layer 3 attention`, `layer 3 ffn`, head.
        value: the name of that value in both models.
        snr: in dB, as the models run: with every error from before.
        own: in dB, of this block of B alone, fed with the values of A.
        l2, cosine, max_abs: as for outputs.
    """

    name: str
    value: str
    snr: float
    own: float
    l2: float
    cosine: float
    max_abs: float


@dataclasses.dataclass(frozen=True)
class Comparison(Document):
    """How B differs from A. `note` says why inner values were not (or not all) compared."""

    title: ClassVar[str] = "graphopt compare"

    a: str
    b: str
    samples: int
    made_up: bool
    outputs: tuple[OutputDifference, ...]
    blocks: tuple[BlockDifference, ...]
    note: str = ""

    @property
    def enters(self) -> BlockDifference | None:
        """The block that alone adds most; None where no block adds more than rounding."""
        worst = min(self.blocks, key=lambda block: block.own, default=None)
        return None if worst is None or worst.own >= ROUNDING else worst

    @property
    def verdict(self) -> str:
        """Where the error enters, in one line."""
        if not self.blocks:
            return f"where the error enters is not known: {self.note}"
        if self.enters is None:
            least = min(b.own for b in self.blocks)
            how = f"adds more than rounding (each at least {least:.0f} dB alone)" if least < math.inf else "adds anything (equal in every bit)"
            return f"no block of {len(self.blocks)} {how}"
        return f"the error enters most in {self.enters.name}: {self.enters.own:.1f} dB alone, at `{self.enters.value}`"

    def as_dict(self) -> dict[str, Any]:
        """JSON values; an infinite ratio is the text `inf` or `-inf`."""
        facts = dataclasses.asdict(self) | {"enters": None if self.enters is None else self.enters.name, "verdict": self.verdict}
        found: dict[str, Any] = plain(facts)
        return found

    def elements(self) -> Sequence[Element]:
        """Every output with its worst channels, every block with its error, and where the error enters."""
        title = f"outputs on {plural(self.samples, 'batch', 'batches')}{', made up' if self.made_up else ''}"
        columns = ("output", "SNR dB", "relative L2", "cosine", "smallest", "max |d|", "worst channels (relative L2)")
        found: list[Element] = [
            head(A=self.a, B=self.b),
            Table(columns, [_output_row(x) for x in self.outputs], title, "lrrrrrl"),
        ]
        if self.blocks:
            ratios = [(x.name, x.snr, x.own) for x in self.blocks]
            found.append(Plot("signal-to-noise ratio", ratios, "as the models run", "the block alone", "dB", tick=20, detail=True))
            columns = ("block", "SNR dB", "alone", "relative L2", "cosine", "max |d|", "value")
            rows = [(x.name, f"{x.snr:.1f}", f"{x.own:.1f}", f"{x.l2:.3g}", f"{x.cosine:.6f}", f"{x.max_abs:.3g}", x.value) for x in self.blocks]
            found.append(Table(columns, rows, "blocks, in order", "lrrrrrl"))
        return [*found, Line(self.verdict), *([Line(self.note)] if self.note and self.blocks else [])]


def compare(
    a: Any, b: Any, *, samples: Any = None, tokenizer: Any = None, threads: int = 1, plugins: Sequence[str] = (), **options: Unpack[load.LoadOptions]
) -> Comparison:
    """Run two models on the same samples and measure how far B is from A; positions of padding (of A) do not count.

    Args:
        a, b: what `graphopt.load` takes; neither is changed. ONNX Runtime's CPU provider runs both.
        samples: what `Samples.load` takes; by default three batches that are made up by type.
        tokenizer: for samples that are text.
        threads: of the runtime; 0 = its choice.
        plugins: files or modules that bring passes, as the blocks are read by passes.
        options: of loading, for both models.

    Raises:
        GraphoptError: the models have different inputs or outputs.
        LoadError, SampleError, TargetError: a model cannot be read or run, or samples do not fit.
    """
    from graphopt.run import guarded

    (first, graph), (second, other) = (load.load_both(x, remarks=Remarks(), **options) for x in (a, b))
    check_same_interface(first, second)
    sessions = [guarded.session(x, threads=threads) for x in (first, second)]
    given = runnable_samples(graph, sessions[0]) if samples is None else Samples.load(samples, graph, tokenizer=tokenizer)
    outputs: dict[str, Running] = {str(v.name): Running() for v in first.graph.outputs}
    ends, note = block_ends(graph, other, first, second, tuple(plugins))
    padding = Padding(first)
    for feed in given:
        left, right = (s.run(feed) for s in sessions)
        for name in outputs:
            _check_arrays(name, left[name], right[name])
        _add(outputs, padding.kept(feed), left, right)
    del sessions
    found = tuple(_output(name, running) for name, running in outputs.items())
    blocks: tuple[BlockDifference, ...] = ()
    if ends:
        try:
            blocks, note = _blocks(first, second, given, padding, ends, min([_EXACT, *(x.snr for x in found)]) - _STRANGER, threads)
        except GraphoptError as error:
            note = f"a model does not run with its inner values shown ({error})"
    return Comparison(called(a), called(b), len(given), samples is None, found, blocks, note)


def check_same_interface(a: ir.Model, b: ir.Model) -> None:
    """Names and types of inputs and outputs, and ranks and static sizes of inputs; symbols may have other names, and the order may differ. What
    a file declares of its outputs may be wrong: their arrays are compared when they are there.

    Raises:
        GraphoptError: names the first one that differs.
    """
    left, right = interface.interface(a), interface.interface(b)
    for what, ours, theirs in (("inputs", left.inputs, right.inputs), ("outputs", left.outputs, right.outputs)):
        known = {port.name: port for port in theirs}
        if set(known) != {port.name for port in ours}:
            names = [", ".join(p.name for p in ports) or "none" for ports in (ours, theirs)]
            raise GraphoptError(f"the models cannot be compared: A has the {what} {names[0]}, B has {names[1]}; export both with the same {what}")
        for port in ours:
            types = {port.dtype, known[port.name].dtype} - {"?"}
            if len(types) > 1 or (what == "inputs" and not _fit(port.dims, known[port.name].dims)):
                raise GraphoptError(f"the models cannot be compared: of their {what}, A has `{port}` and B has `{known[port.name]}`")


def _fit(a: Sequence[int | str | None] | None, b: Sequence[int | str | None] | None) -> bool:
    if a is None or b is None:
        return True
    return len(a) == len(b) and all(x == y or not (isinstance(x, int) and isinstance(y, int)) for x, y in zip(a, b, strict=True))


def _check_arrays(name: str, a: Any, b: Any) -> None:
    ours, theirs = (dict(arrays_in(value, name)) for value in (a, b))
    for at in {**ours, **theirs}:
        left, right = (f"{x[at].dtype}{list(x[at].shape)}" if at in x else "nothing" for x in (ours, theirs))
        if left != right:
            raise GraphoptError(f"the models cannot be compared: output `{at}` is {left} of A and {right} of B")


def _blocks(
    a: ir.Model, b: ir.Model, samples: Samples, padding: Padding, ends: Mapping[str, Sequence[str]], floor: float, threads: int
) -> tuple[tuple[BlockDifference, ...], str]:
    """Run both with the ends of blocks as outputs, and B a second time with every block fed by A. What is below `floor` dB is left out."""
    from graphopt.run import ort

    names = list(dict.fromkeys(v for values in ends.values() for v in values))
    padding.about(names)
    left, right = (ort.session(exposed(x, names), threads=threads) for x in (a, b))
    together, alone = ({name: Running() for name in names} for _ in range(2))
    cut: Any = None
    strangers: list[str] = []
    for feed in samples:
        base, other = left.run(feed), right.run(feed)
        if cut is None:
            names = [name for name in names if isinstance(base[name], np.ndarray) and isinstance(other[name], np.ndarray)]
            names = [name for name in names if base[name].dtype.kind == other[name].dtype.kind == "f"]  # types that were not declared
            strangers = [name for name in names if _snr(base[name], other[name]) < floor]
            names = [name for name in names if name not in strangers]
            cut = ort.session(_cut(b, {name: other[name] for name in names}), threads=threads)
        made, kept = cut.run(_feed(cut, feed, base, other)), padding.kept(feed)
        for sums, arrays in ((together, other), (alone, made)):
            _add({name: sums[name] for name in names}, kept, base, {name: _like(arrays[name], base[name]) for name in names})
    found = {block: [v for v in values if v in names] for block, values in ends.items()}
    rows = tuple(_block(block, values, together, alone) for block, values in found.items() if values)
    many = plural(len(strangers), "value of the same name holds other numbers and was", "values of the same name hold other numbers and were")
    note = f"{many} left out, such as `{strangers[0]}`" if strangers else ""
    return rows, note


def _add(sums: Mapping[str, Running], kept: Kept, base: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """One batch, without padding."""
    shown, then = (kept.counted({name: arrays[name] for name in sums}) for arrays in (base, other))
    for name, running in sums.items():
        running.add(shown[name], then[name])


def _snr(a: Array, b: Array) -> float:
    """In dB; -inf where they cannot be compared."""
    if a.shape != b.shape:
        return -math.inf
    running = Running()
    running.add(a, _like(b, a))
    return running.snr


def _like(array: Array, model: Array) -> Array:
    """In the width of the other model, as float16 beside float32 is no other value."""
    return array if array.dtype == model.dtype else array.astype(model.dtype)


def _cut(model: ir.Model, seen: Mapping[str, Array]) -> ir.Model:
    """A copy whose blocks read the named values from inputs `NAME/given`, and give what they make of them as outputs."""
    copy = exposed(model, seen)
    ends = list(copy.graph.outputs)
    copy.graph.outputs.clear()
    for value in ends:
        array = seen[str(value.name)]
        given = ir.Value(name=f"{value.name}/given", type=ir.TensorType(ir.DataType.from_numpy(array.dtype)))
        given.shape = ir.Shape([None] * array.ndim)
        copy.graph.inputs.append(given)
        value.replace_all_uses_with(given)
    copy.graph.outputs.extend(ends)
    return copy


def _feed(session: Any, feed: Batch, base: Mapping[str, Array], other: Mapping[str, Array]) -> dict[str, Array]:
    given = {f"{name}/given": np.ascontiguousarray(_like(base[name], other[name])) for name in other}
    return {port.name: given[port.name] if port.name in given else feed[port.name] for port in session.inputs}


def _block(name: str, values: Sequence[str], together: Mapping[str, Running], alone: Mapping[str, Running]) -> BlockDifference:
    worst = min(values, key=lambda v: alone[v].snr)
    running = together[worst]
    return BlockDifference(name, worst, running.snr, alone[worst].snr, running.l2, running.cosine, running.max_abs)


def _output(name: str, running: Running) -> OutputDifference:
    channels = tuple(running.worst_channels(_CHANNELS))
    return OutputDifference(name, running.snr, running.l2, running.cosine, running.cosine_min, running.max_abs, channels)


def _output_row(x: OutputDifference) -> tuple[str, ...]:
    channels = ", ".join(f"{channel} ({share:.2g})" for channel, share in x.channels)
    return (x.name, f"{x.snr:.1f}", f"{x.l2:.3g}", f"{x.cosine:.6f}", f"{x.cosine_min:.6f}", f"{x.max_abs:.3g}", channels)
