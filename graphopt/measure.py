"""The one place that measures: latency, size, parameters, FLOPs, and how far two sets of outputs are apart."""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import onnx_ir as ir

from graphopt.core import Array, Session
from graphopt.distance import Difference, Distance, compare_outputs, distance, relative_l2
from graphopt.errors import LoadError
from graphopt.graph import all_nodes, parameters
from graphopt.sizes import Bindings, size_of

if TYPE_CHECKING:
    import onnx

__all__ = [
    "Difference", "Distance", "Flops", "Timings", "compare_outputs", "distance", "flops", "latency", "parameters", "relative_l2", "size",
    "steady_clock",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Timings:
    """Median seconds of each model at each shape; the first model is the baseline of every ratio."""

    shapes: tuple[str, ...]
    seconds: Mapping[str, tuple[float, ...]]

    @property
    def baseline(self) -> str:
        return next(iter(self.seconds))

    def ratios(self, name: str) -> tuple[float, ...]:
        """How many times faster than the baseline, at each shape."""
        return tuple(b / t for b, t in zip(self.seconds[self.baseline], self.seconds[name], strict=True))

    def speedup(self, name: str) -> float:
        """The geometric mean of the ratios."""
        return math.exp(statistics.fmean(math.log(r) for r in self.ratios(name)))

    def not_slower(self, name: str) -> bool:
        """Geometric mean >= 0.98 and no shape < 0.95: what noise allows an equally fast model."""
        return self.speedup(name) >= 0.98 and min(self.ratios(name)) >= 0.95

    def as_dict(self) -> dict[str, Any]:
        return {
            "shapes": list(self.shapes),
            "models": {
                name: {"milliseconds": [round(t * 1e3, 4) for t in seconds], "speedup": round(self.speedup(name), 4)}
                for name, seconds in self.seconds.items()
            },
        }


def latency(
    sessions: Mapping[str, Session],
    feeds: Mapping[str, Mapping[str, Array]],
    *,
    rounds: int = 5,
    block: int = 4,
    progress: Callable[[float], None] | None = None,
    clock: Callable[[], float] | None = None,
) -> Timings:
    """Time models side by side, in interleaved warm blocks.

    In each round every model runs `block` + 1 times in a row and the first run is not counted: a model that is served stays in the caches.
    Rounds take turns over all models, so that a drift of the machine hits all alike. Reported is the median over all counted runs.

    Args:
        sessions: name -> model; the first is the baseline.
        feeds: label of a shape, such as "8x64" -> inputs.
        progress: called with the fraction done.
        clock: gives seconds; by default the wall clock. See `steady_clock`.
    """
    names, done, total = list(sessions), 0, len(feeds) * rounds * len(sessions)
    medians: dict[str, list[float]] = {name: [] for name in names}
    for feed in feeds.values():
        runs: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                runs[name] += _block(sessions[name], feed, block, clock or time.perf_counter)
                done += 1
                if progress is not None:
                    progress(done / total)
        for name in names:
            medians[name].append(statistics.median(runs[name]))
    return Timings(tuple(feeds), {name: tuple(seconds) for name, seconds in medians.items()})


def steady_clock(threads: int | None) -> Callable[[], float]:
    """The clock for a runtime that computes in `threads` threads of this process (None: elsewhere, or not known).

    For one thread it is the processor time of this process, which is the wall clock of an idle machine: what other processes take does not
    count. Nothing else in the process may compute meanwhile.
    """
    return time.process_time if threads == 1 else time.perf_counter


def _block(session: Session, feed: Mapping[str, Array], runs: int, clock: Callable[[], float]) -> list[float]:
    session.run(feed)
    times = []
    for _ in range(runs):
        start = clock()
        session.run(feed)
        times.append(clock() - start)
    return times


def size(path: str | os.PathLike[str]) -> int:
    """Bytes of a model on disk with its external data, each file once; of a folder, everything in it.

    Raises:
        LoadError: the file, or one that it refers to, is missing.
    """
    path = Path(path)
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if not path.is_file():
        raise LoadError(f"{path} does not exist")
    files = {path.resolve()}
    if path.suffix == ".onnx":
        import onnx

        try:
            proto = onnx.load(os.fspath(path), load_external_data=False)
        except Exception as error:
            raise LoadError(f"{path} is not an ONNX file: {error}") from error
        files |= {(path.parent / place).resolve() for place in _external(proto.graph)}
    absent = sorted(str(file) for file in files if not file.is_file())
    if absent:
        raise LoadError(f"{path} refers to {', '.join(absent)}, which does not exist; put it beside the model")
    return sum(file.stat().st_size for file in files)


def _external(graph: onnx.GraphProto) -> Iterator[str]:
    tensors = list(graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            tensors += [attribute.t, *attribute.tensors]
            for inner in (attribute.g, *attribute.graphs):
                yield from _external(inner)
    for tensor in tensors:
        yield from (entry.value for entry in tensor.external_data if entry.key == "location")


class Flops(NamedTuple):
    """Floating-point (or integer) operations of one run, and the nodes whose shapes are not known at these sizes: not counted."""

    total: int
    unknown: tuple[str, ...]


def flops(model: ir.Model, bindings: Bindings) -> Flops:
    """Operations of MatMul, Gemm, Conv and Attention in standard ONNX, two for a multiply-add; a loop body counts once.

    Args:
        bindings: a size for every symbol of the inputs.
    """
    total, unknown = 0, []
    for node in all_nodes(model):
        count = node_flops(node, bindings)
        total += count or 0
        if count is None:
            unknown.append(node.name or node.op_type)
    return Flops(total, tuple(unknown))


def node_flops(node: ir.Node, bindings: Bindings) -> int | None:
    """Operations of one node as `flops` counts them; None where its shapes are not known at these sizes."""
    count = _COUNTS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    try:
        return 0 if count is None else count(node, bindings)
    except _UnknownShape:
        return None


class _UnknownShape(Exception):
    pass


def _shape(value: ir.Value | None, bindings: Bindings) -> tuple[int, ...]:
    sizes = [size_of(dim, bindings) for dim in value.shape] if value is not None and value.shape is not None else [None]
    if None in sizes:
        raise _UnknownShape
    return tuple(s for s in sizes if s is not None)


def _matmul(node: ir.Node, bindings: Bindings) -> int:
    inner = _shape(node.inputs[0], bindings)[-1]
    return 2 * inner * math.prod(_shape(node.outputs[0], bindings))


def _gemm(node: ir.Node, bindings: Bindings) -> int:
    transposed = "transA" in node.attributes and node.attributes["transA"].as_int()
    inner = _shape(node.inputs[0], bindings)[0 if transposed else 1]
    return 2 * inner * math.prod(_shape(node.outputs[0], bindings))


def _conv(node: ir.Node, bindings: Bindings) -> int:
    kernel = _shape(node.inputs[1], bindings)
    return 2 * math.prod(kernel[1:]) * math.prod(_shape(node.outputs[0], bindings))


def _conv_transpose(node: ir.Node, bindings: Bindings) -> int:
    kernel = _shape(node.inputs[1], bindings)
    return 2 * math.prod(kernel[1:]) * math.prod(_shape(node.inputs[0], bindings))


def _attention(node: ir.Node, bindings: Bindings) -> int:
    """Q K^T and P V, over past and present keys; [B,S,heads*dim] or [B,heads,S,dim]."""
    query, key, value = (_shape(v, bindings) for v in node.inputs[:3])
    past = node.inputs[4] if len(node.inputs) > 4 else None
    keys = key[-2] + (_shape(past, bindings)[-2] if past is not None else 0)
    if len(query) == 4:
        pairs, dims = math.prod(query[:3]) * keys, query[3] + value[3]
        return 2 * pairs * dims
    heads, kv_heads = (node.attributes[name].as_int() for name in ("q_num_heads", "kv_num_heads"))
    return 2 * query[0] * query[1] * keys * (query[2] + value[2] // kv_heads * heads)


_COUNTS: Mapping[str, Callable[[ir.Node, Bindings], int]] = {
    "MatMul": _matmul, "MatMulInteger": _matmul, "QLinearMatMul": _matmul, "Gemm": _gemm, "Attention": _attention,
    "Conv": _conv, "ConvInteger": _conv, "QLinearConv": _conv, "ConvTranspose": _conv_transpose,
}  # fmt: skip
