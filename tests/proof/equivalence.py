"""Proof by many random cases: a rewrite is applied, and both graphs are evaluated in float64 by the ONNX reference.

In float64 nothing is excused by rounding: what differs by more than 1e-12 is another function. A graph that is rewritten in float32 (norms are
only fused there) is evaluated as if every float were a double, with the same constants.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import graphopt
from graphopt.core.contract import Context, Pass
from graphopt.core.pipeline import PassManager, parse
from graphopt.core.registry import passes
from graphopt.graph.serialize import to_proto
from graphopt.graph.verify import verify
from graphopt.run import reference

Array = np.ndarray[Any, Any]
Random = np.random.Generator
SIZES = (1, 3, 2)  # that a symbol takes: 1 is where a wrong broadcast hides
TOLERANCE = 1e-12  # of the largest number of an output, in float64


class Graph:
    """A graph that is being written, node by node."""

    def __init__(self, rng: Random, dtype: Any = np.float64, opset: int = 23) -> None:
        self.rng, self.dtype, self.opset = rng, np.dtype(dtype), opset
        self.inputs: dict[str, tuple[Any, tuple[int | str, ...]]] = {}
        self.weights: dict[str, Array] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.outputs: list[str] = []
        self._count = itertools.count()

    def input(self, *shape: int | str, dtype: Any = None) -> str:
        name = f"x{len(self.inputs)}"
        self.inputs[name] = (np.dtype(dtype or self.dtype), shape)
        return name

    def const(self, value: Any, dtype: Any = None) -> str:
        name = f"c{len(self.weights)}"
        self.weights[name] = np.asarray(value, dtype or self.dtype)
        return name

    def ints(self, *values: int) -> str:
        return self.const(values, np.int64)

    def add(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        return self.several(op_type, 1, *inputs, **attributes)[0]

    def several(self, op_type: str, count: int, *inputs: str, **attributes: Any) -> list[str]:
        names = [f"v{next(self._count)}" for _ in range(count)]
        self.nodes.append(helper.make_node(op_type, inputs, names, name=f"{op_type}_{names[0]}", **attributes))
        return names

    def output(self, *names: str) -> None:
        self.outputs += [name for name in names if name not in self.outputs]

    def pick(self, *choices: Any) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def chance(self, share: float = 0.5) -> bool:
        return bool(self.rng.random() < share)

    def proto(self) -> onnx.ModelProto:
        """The types of the outputs are inferred; their shapes are not stated."""
        inputs = [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(d), list(s)) for n, (d, s) in self.inputs.items()]
        outputs = [onnx.ValueInfoProto(name=name) for name in self.outputs]
        weights = [numpy_helper.from_array(a, n) for n, a in self.weights.items()]
        graph = helper.make_graph(self.nodes, "g", inputs, outputs, weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)
        types = {v.name: v.type for v in onnx.shape_inference.infer_shapes(model).graph.output}
        for value in model.graph.output:
            value.type.tensor_type.elem_type = types[value.name].tensor_type.elem_type
            if types[value.name].tensor_type.HasField("shape"):
                value.type.tensor_type.shape.SetInParent()
            for _ in types[value.name].tensor_type.shape.dim:
                value.type.tensor_type.shape.dim.add()
        return model

    def feeds(self) -> Iterator[dict[str, Array]]:
        """Each symbol takes each size once; then the special numbers."""
        symbols = sorted({d for _, shape in self.inputs.values() for d in shape if isinstance(d, str)})
        for turn in range(len(SIZES) if symbols else 1):
            sizes = {name: SIZES[(turn + k) % len(SIZES)] for k, name in enumerate(symbols)}
            yield {name: self._numbers(dtype, [sizes.get(d, d) for d in shape]) for name, (dtype, shape) in self.inputs.items()}  # type: ignore[call-overload,misc]

    def _numbers(self, dtype: Any, shape: Sequence[int]) -> Array:
        if dtype.kind == "b":
            return self.rng.random(shape) < 0.5
        if dtype.kind in "iu":
            return self.rng.integers(0, 5, shape).astype(dtype)
        array = self.rng.standard_normal(shape) * self.pick(1.0, 1.0, 30.0)
        return np.asarray(array).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Rewritten:
    """What a pipeline did to one random graph."""

    changes: int
    rules: Mapping[str, int]  # rule -> how often, as the pass says
    ops: frozenset[str]
    missed: tuple[str, ...]


def rewritten(graph: Graph, pipeline: str | Sequence[Pass], *, tolerance: float = TOLERANCE, feeds: Sequence[Mapping[str, Array]] = ()) -> Rewritten:
    """Run the pipeline over the graph, and compare both in float64.

    Raises:
        AssertionError: another number, shape or type; it shows both graphs.
    """
    proto = graph.proto()
    model = graphopt.load(proto)
    known = passes()
    ctx = Context(model, passes=known)
    records = PassManager(parse(pipeline, known) if isinstance(pipeline, str) else pipeline).run(model, ctx)
    verify(model)
    before, after = (reference.session(doubled(p)) for p in (proto, to_proto(model)))
    for feed in feeds or list(graph.feeds()):
        wide = {k: v.astype(np.float64) if v.dtype.kind == "f" else v for k, v in feed.items()}
        expected, found = before.run(wide), after.run(wide)
        for name, array in expected.items():
            complaint = differs(array, found[name], tolerance)
            shapes = {k: v.shape for k, v in feed.items()}
            assert not complaint, f"{name}: {complaint} at {shapes}\n{onnx.printer.to_text(proto)}\n->\n{onnx.printer.to_text(to_proto(model))}"
    rules: dict[str, int] = {}
    for remark in (r for record in records for r in record.remarks if r.kind == "applied"):
        rule = str(remark.facts.get("rule", remark.pass_name))
        rules[rule] = rules.get(rule, 0) + int(remark.facts.get("count", 1))
    missed = tuple(r.message for record in records for r in record.remarks if r.kind == "missed")
    return Rewritten(sum(r.changes for r in records), rules, frozenset(n.op_type for n in model.graph), missed)


def differs(expected: Array, found: Array, tolerance: float) -> str:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return f"{expected.dtype}{expected.shape} became {found.dtype}{found.shape}"
    if expected.dtype.kind not in "fc":
        return "" if np.array_equal(expected, found) else f"{expected.tolist()} became {found.tolist()}"
    if not np.array_equal(np.isnan(expected), np.isnan(found)):
        return "NaN elsewhere"
    with np.errstate(all="ignore"):
        off = np.where((expected == found) | np.isnan(expected), 0, np.abs(expected - found))
    scale = np.abs(expected[np.isfinite(expected)]).max(initial=1)
    return "" if (off <= tolerance * scale).all() else f"off by {off.max()} at a scale of {scale}"


def doubled(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with doubles in place of float32, constants and all."""
    wide = onnx.ModelProto.FromString(proto.SerializeToString())
    for info in (*wide.graph.input, *wide.graph.output, *wide.graph.value_info):
        if info.type.tensor_type.elem_type == TensorProto.FLOAT:
            info.type.tensor_type.elem_type = TensorProto.DOUBLE
    for tensor in wide.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    for node in wide.graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.DOUBLE
            if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == TensorProto.FLOAT:
                attribute.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(attribute.t).astype(np.float64)))
    return wide


def proved(
    domain: Callable[[Graph], None], pipeline: str | Sequence[Pass], count: int, *, seed: int = 0, dtype: Any = np.float64, **options: Any
) -> list[Rewritten]:
    """`count` random graphs of a domain."""
    found = []
    for number in range(count):
        graph = Graph(np.random.default_rng([seed, number]), dtype)
        domain(graph)
        try:
            found.append(rewritten(graph, pipeline, **options))
        except Exception as error:
            error.add_note(f"graph {number} of {domain.__name__}, seed {seed}")
            raise
    return found


def fired(found: Sequence[Rewritten], rule: str) -> int:
    """In how many of the graphs the rule did something."""
    return sum(1 for f in found if f.rules.get(rule))
