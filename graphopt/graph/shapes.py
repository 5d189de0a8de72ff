"""Symbolic shapes, dtypes and the contents of small integer tensors, recomputed from the graph's inputs and weights.

The work is done by onnx-shape-inference, with some rules of our own (shape_rules.py). Nothing that a file merely *claims* (value_info, output
shapes) is believed.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import onnx_ir as ir

from graphopt.graph.dims import symbolic
from graphopt.graph.questions import static_dim
from graphopt.graph.shape_rules import INITIAL, Contents, register

_CONTENTS, _DECLARED = "graphopt.contents", "graphopt.declared"
_SERIAL = itertools.count(1_000_000, 1_000)  # numbers for symbols made up outside of a whole-model run; never used twice in one process


def infer_shapes(model: ir.Model) -> str | None:
    """Write shape and dtype to every value of the model, in place.

    The declared shapes of graph outputs are kept aside (see `declared_shape`): they belong to the interface, not to the facts.

    Returns:
        None, or the reason why inference ended early; the values behind that place have no shape then.
    """
    from onnx_shape_inference import infer_symbolic_shapes

    register()
    for value in model.graph.outputs:
        value.meta.setdefault(_DECLARED, value.shape)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain in ("", "ai.onnx"):
            for value in node.outputs:
                value.shape = None
                value.meta.pop(_CONTENTS, None)
    try:
        with _defaults_hidden(model), _states_hidden(model):
            infer_symbolic_shapes(model, policy="override", warn_on_missing=False, adopt_declared_symbols=False)
    except Exception as error:  # noqa: BLE001 -- the library raises many kinds; the reason goes into a remark, and every fact not set stays unknown
        return str(error).splitlines()[0]
    finally:
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            _tidy(node.outputs)
    return None


def infer_nodes(model: ir.Model, nodes: Iterable[ir.Node]) -> None:
    """Write shapes and dtypes to the outputs of new nodes, in order, from the facts on their inputs."""
    from onnx_shape_inference import ShapeInferenceContext, registry

    register()
    ctx = ShapeInferenceContext(model.opset_imports, policy="override")
    ctx._allocator.counter = next(_SERIAL)  # two runs never make up the same symbol for different dimensions
    registry.collect()
    for node in nodes:
        for value in node.inputs:
            if value is not None and (known := value.meta.get(_CONTENTS)) is not None:
                ctx._symbolic_values[value] = known
        rule = registry.get(node.domain, node.op_type, version=ctx.get_opset_version(node.domain))
        if rule is not None:
            rule(ctx, node)
        _tidy(node.outputs)


def contents(value: ir.Value | None) -> Contents | None:
    """The elements of a small integer tensor (rank 0 or 1) as ints and symbolic expressions, where known."""
    if value is None or value.is_graph_input():
        return None
    known: Contents | None = value.meta.get(_CONTENTS)
    if known is not None:
        return known
    tensor = value.const_value
    if tensor is None or len(tensor.shape) > 1 or tensor.size > 64 or not tensor.dtype.is_integer():
        return None
    return [int(x) for x in tensor.numpy().reshape(-1)]


class SliceBounds(NamedTuple):
    """What a Slice is told, entry by entry; None for what is not known."""

    axes: Contents | None
    starts: Contents | None
    ends: Contents | None
    steps: Contents | None


def slice_bounds(node: ir.Node) -> SliceBounds:
    """The operands of a Slice; axes and steps that are left out have their defaults."""
    starts, ends, axes, steps = (*node.inputs[1:], None, None)[:4]
    count = static_dim(starts, 0)
    every = None if count is None else list[int | ir.SymbolicDim](range(count))
    return SliceBounds(
        every if axes is None else contents(axes), contents(starts), contents(ends), [1] * (count or 1) if steps is None else contents(steps)
    )


def declared_shape(value: ir.Value) -> ir.Shape | None:
    """The shape that the model's author wrote at a graph output."""
    shape: ir.Shape | None = value.meta.get(_DECLARED, value.shape)
    return shape


@contextlib.contextmanager
def _defaults_hidden(model: ir.Model) -> Iterator[None]:
    """An overridable initializer has only a default: the library must not take it for a constant."""
    hidden = {v: v.const_value for v in model.graph.inputs if v.const_value is not None}
    for value in hidden:
        value.const_value = None
    try:
        yield
    finally:
        for value, tensor in hidden.items():
            value.const_value = tensor


@contextlib.contextmanager
def _states_hidden(model: ir.Model) -> Iterator[None]:
    """The state of a Loop or Scan may grow: what is known of its initial value holds in the first iteration only."""
    hidden: list[tuple[ir.Node, int, ir.Value]] = []
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain == "" and node.op_type in ("Loop", "Scan"):
            states = range(2, len(node.inputs)) if node.op_type == "Loop" else range(len(node.inputs) - node.attributes["num_scan_inputs"].as_int())
            hidden += [(node, k, value) for k in states if (value := node.inputs[k]) is not None]
    for node, k, value in hidden:
        blank = ir.Value(name=value.name, type=value.type)
        blank.meta[INITIAL] = value
        node.replace_input_with(k, blank)
    try:
        yield
    finally:
        for node, k, value in hidden:
            node.replace_input_with(k, value)


def _tidy(values: Sequence[ir.Value]) -> None:
    """Symbols that are numbers become numbers; known contents move from the (serialized) metadata to `value.meta`."""
    from onnx_shape_inference import SYM_DATA_KEY

    for value in values:
        value.const_value = None  # the library leaves known integers there; in the normal form only initializers have a const_value
        if value.shape is not None and any(_is_number(d) for d in value.shape):
            value.shape = ir.Shape([int(str(d)) if _is_number(d) else d for d in value.shape])
        text = value.metadata_props.pop(SYM_DATA_KEY, None)
        if text is not None:
            import json

            value.meta[_CONTENTS] = [int(x) if isinstance(x, int) or x.lstrip("-").isdigit() else symbolic(x) for x in json.loads(text)]


def _is_number(dim: int | ir.SymbolicDim) -> bool:
    return not isinstance(dim, int) and dim.value is not None and dim.value.isdigit()
