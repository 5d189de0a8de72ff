"""See the values inside a graph while it runs on samples: calibration, Hessians and importance all reduce them, batch after batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping

import onnx_ir as ir

from graphopt.core.contract import Array
from graphopt.core.errors import GraphoptError, SampleError
from graphopt.run import Feeds

Reducer = Callable[[Array], None]


def observable(model: ir.Model, value: ir.Value) -> bool:
    """True for what `observe` can show: a value of the main graph, not one that is computed inside a subgraph."""
    node = value.producer()
    return value.is_graph_input() or (node is not None and node.graph is model.graph)


def observe(model: ir.Model, samples: Iterable[Feeds], reducers: Mapping[ir.Value, Reducer], *, optimize: bool = True) -> int:
    """Run the graph on every sample and hand each value to its reducer; nothing is kept, so memory does not grow with the samples.

    Args:
        model: a graph that ONNX Runtime can run (standard operators); it is not changed.
        reducers: for each value (of the main graph), what is called with its array once a batch.
        optimize: False switches the runtime's own optimizations off.

    Returns:
        the number of samples.

    Raises:
        SampleError: there was no sample.
        GraphoptError: a value cannot be observed.
        TargetError: the graph does not run.
    """
    from graphopt.run import ort

    hidden = [str(v.name) for v in reducers if not observable(model, v)]
    if hidden:
        raise GraphoptError(f"`{hidden[0]}` is computed inside a subgraph, where it cannot be observed")
    names = {str(value.name): reduce for value, reduce in reducers.items()}
    inputs, count = {str(v.name) for v in model.graph.inputs}, 0
    session = None if inputs >= set(names) else ort.session(exposed(model, names), optimize=optimize)  # a session without outputs does not run
    for feed in samples:
        outputs = {} if session is None else session.run(feed)
        for name, reduce in names.items():
            reduce(feed[name] if name in inputs else outputs[name])
        count += 1
    if not count:
        raise SampleError("calibration gave 0 samples: the source is empty, or a generator that was used before")
    return count


@dataclasses.dataclass(frozen=True)
class Limited:
    """The first batches of `samples`, as often as they can be iterated; see `limited`."""

    samples: Iterable[Feeds]
    rows: int

    def __iter__(self) -> Iterator[Feeds]:
        seen = 0
        for feed in self.samples:
            yield feed
            seen += max((a.size for a in feed.values() if a.dtype.kind in "iu"), default=max((len(a) for a in feed.values() if a.ndim), default=1))
            if seen >= self.rows:
                return


def limited(samples: Iterable[Feeds], rows: int) -> Limited:
    """Batches until they hold so many rows: the elements of the largest integer input, else batch entries. They start anew at each iteration."""
    return Limited(samples, rows)


def exposed(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """A copy (the weights are shared) whose only outputs are the named values; what only the old outputs needed is not run."""
    copy = model.clone()
    made = {str(v.name): v for node in copy.graph for v in node.outputs if v.name}
    wanted = [made[name] for name in dict.fromkeys(names) if name in made]
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(wanted)
    return copy
