"""See the values inside a graph while it runs on samples, batch after batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import onnx_ir as ir

from graphopt.core.contract import Array
from graphopt.core.errors import GraphoptError, SampleError
from graphopt.run import Feeds
from graphopt.run.distance import arrays_in


def observable(model: ir.Model, value: ir.Value) -> bool:
    """True for what `shown` can show: a value of the main graph, not one that a subgraph computes, or is handed (the state of a loop)."""
    node = value.producer()
    home = value.graph if value.is_graph_input() else None if node is None else node.graph
    return home is model.graph


def shown(
    model: ir.Model, values: Iterable[ir.Value], samples: Iterable[Feeds], *, optimize: bool = True
) -> Iterator[tuple[Feeds, dict[ir.Value, Array]]]:
    """Run the graph on every sample: what it was fed, and the array of each value; nothing is kept, so memory does not grow with the samples.

    Args:
        model: a graph that ONNX Runtime can run (standard operators); it is not changed.
        values: of the main graph.
        optimize: False switches the runtime's own optimizations off.

    Raises:
        SampleError: there was no sample.
        GraphoptError: a value cannot be observed.
        TargetError: the graph does not run.
    """
    from graphopt.run import ort

    names = {value: str(value.name) for value in values}
    hidden = [name for value, name in names.items() if not observable(model, value)]
    if hidden:
        raise GraphoptError(f"`{hidden[0]}` is computed inside a subgraph, where it cannot be observed")
    inside, none = exposed(model, names.values()), True
    session = ort.session(inside, optimize=optimize) if inside.graph.outputs else None  # one without outputs does not run
    for feed in samples:
        found, none = {**feed, **({} if session is None else session.run(feed))}, False
        yield feed, {value: found[name] for value, name in names.items()}
    if none:
        raise SampleError("calibration gave 0 samples: the source is empty, or a generator that was used before")


@dataclasses.dataclass(frozen=True)
class Limited:
    """Batches until they hold so many rows: the elements of the largest integer input, else batch entries. They start anew at each iteration."""

    samples: Iterable[Feeds]
    rows: int

    def __iter__(self) -> Iterator[Feeds]:
        seen = 0
        for feed in self.samples:
            yield feed
            seen += _rows(feed)
            if seen >= self.rows:
                return


def extent(samples: Iterable[Feeds]) -> dict[str, int]:
    """How many batches there are, and their `rows` (see `Limited`: tokens, where ids are fed), padding included."""
    rows = [_rows(feed) for feed in samples]
    return {"batches": len(rows), "rows": sum(rows)}


def _rows(feed: Feeds) -> int:
    arrays = [a for _, a in arrays_in(list(feed.values()))]
    return max((a.size for a in arrays if a.dtype.kind in "iu"), default=max((len(a) for a in arrays if a.ndim), default=1))


def exposed(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """A copy (the weights are shared) whose only outputs are the named values; what only the old outputs needed is not run."""
    copy = model.clone()
    made = {str(v.name): v for node in copy.graph for v in node.outputs if v.name}
    wanted = [made[name] for name in dict.fromkeys(names) if name in made]
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(wanted)
    return copy
