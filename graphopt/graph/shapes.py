"""Symbolic shapes, dtypes and the contents of small integer tensors, recomputed from the graph's inputs and weights.

The work is done by onnx-shape-inference, with some rules of our own (shape_rules.py). Nothing that a file merely *claims* (value_info, output
shapes) is believed.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import onnx_ir as ir

from graphopt.graph.dims import symbolic
from graphopt.graph.questions import ISLAND, all_nodes, closed_nodes, is_graph, static_dim
from graphopt.graph.serialize import DECLARED, light
from graphopt.graph.shape_rules import INITIAL, Contents, register

if TYPE_CHECKING:
    import onnx

_CONTENTS = "graphopt.contents"
_CONTRADICTED = "graphopt.contradicted"  # node.meta: ONNX says something else about its outputs than our rules do; graph.meta: of some node
_FAILURES = 8  # nodes that are passed over; each costs one more run
_SERIAL = itertools.count(1_000_000, 1_000)  # numbers for symbols made up outside of a whole-model run; never used twice in one process


def infer_shapes(model: ir.Model) -> str | None:
    """Write shape and dtype to every value of the model, in place.

    The declared shapes of graph outputs are kept aside (see `declared_shape`): they belong to the interface, not to the facts. Closed bodies
    are not looked into, and what ONNX contradicted once (see `drop_contradicted`) stays unknown.

    Returns:
        None, or why a rule failed; the values behind that place may have no shape then.
    """
    register()
    for value in model.graph.outputs:
        value.meta.setdefault(DECLARED, value.shape)
    closed = set(closed_nodes(model))
    held = {v: v.type for node in all_nodes(model) for v in node.outputs}
    for node in all_nodes(model):
        if node.domain in ("", "ai.onnx", ISLAND) and node not in closed:
            for value in node.outputs:
                value.shape = None
                value.meta.pop(_CONTENTS, None)
    try:
        with _defaults_hidden(model), _states_hidden(model), _bodies_hidden(model):
            reason = _infer(model)
    finally:
        for node in all_nodes(model):
            _tidy(node.outputs)
            for value in node.outputs:
                if value.type is not None and value.dtype is None:  # (a sequence) of what is not known, behind an operator of a vendor
                    value.type = held.get(value)
    if reason is not None:
        _find_types(model)
    return reason


def _infer(model: ir.Model) -> str | None:
    """Run the rules; a node whose rule fails is passed over, and the first reason returned."""
    from onnx_shape_inference import OpUsageError, ShapeInferenceError, infer_symbolic_shapes

    reasons: list[str] = []
    with contextlib.ExitStack() as hidden:
        doubted = [n for n in all_nodes(model) if n.meta.get(_CONTRADICTED)] if model.graph.meta.get(_CONTRADICTED) else []
        for node in {*doubted, *closed_nodes(model)}:
            hidden.enter_context(_unknown(node))
        while len(reasons) <= _FAILURES:
            try:
                infer_symbolic_shapes(model, policy="override", warn_on_missing=False, adopt_declared_symbols=False)
                break
            except (OpUsageError, ShapeInferenceError) as error:
                reasons.append(f"{error} ({error.__cause__})" if error.__cause__ is not None else str(error))
                name = error.node.name if isinstance(error, OpUsageError) else error.node_name
                culprits = [n for n in all_nodes(model) if n.name == name]
                if not name or len(culprits) != 1:
                    break
                hidden.enter_context(_unknown(culprits[0]))
            except Exception as error:  # noqa: BLE001 -- the library raises many kinds; the reason goes into a remark, and every fact not set stays unknown
                reasons.append(str(error))
                break
    return reasons[0].splitlines()[0] if reasons else None


@contextlib.contextmanager
def _unknown(node: ir.Node) -> Iterator[None]:
    """No rule is found for the node."""
    domain, node.domain = node.domain, "graphopt.unknown"
    try:
        yield
    finally:
        node.domain = domain


@contextlib.contextmanager
def _bodies_hidden(model: ir.Model) -> Iterator[None]:
    """Closed bodies are not looked into: what is written there is what their author wrote."""
    hidden = [(node, dict(node.attributes)) for node in closed_nodes(model)]
    for node, attributes in hidden:
        for name in [name for name, attribute in attributes.items() if is_graph(attribute)]:
            del node.attributes[name]
    try:
        yield
    finally:
        for node, attributes in hidden:
            node.attributes.clear()
            node.attributes.update(attributes)


# ---- what ONNX says -----------------------------------------------------------------------------------------------------------------------


def drop_contradicted(model: ir.Model) -> list[tuple[ir.Value, str, str]]:
    """Forget the shapes that ONNX contradicts, and what followed from them: (value, what we had, what ONNX has).

    Either may be wrong, and so nothing may be built on it; the nodes are marked, and stay unknown in every later run.
    """
    dropped: list[tuple[ir.Value, str, str]] = []
    for _ in range(_FAILURES):
        facts = _onnx_facts(model)
        values = (v for n in all_nodes(model) if n.domain in ("", ISLAND) for v in n.outputs)
        wrong = {v: other for v in values if (other := _clash(v, facts.get(v.name or ""))) is not None}
        first = [v for v in wrong if (node := v.producer()) and not any(i in wrong for i in node.inputs)]
        if not first:
            break
        for value in first:
            dropped.append((value, str(value.shape), wrong[value]))
            node = value.producer()
            assert node is not None
            node.meta[_CONTRADICTED] = model.graph.meta[_CONTRADICTED] = True
        infer_shapes(model)
    return dropped


def _clash(value: ir.Value, other: onnx.TypeProto | None) -> str | None:
    """The other shape as text, if the two cannot both be right."""
    if value.shape is None or other is None or not other.tensor_type.HasField("shape"):
        return None
    dims = other.tensor_type.shape.dim
    pairs = zip(value.shape, dims, strict=False)
    if len(value.shape) == len(dims) and not any(isinstance(a, int) and b.HasField("dim_value") and a != b.dim_value for a, b in pairs):
        return None
    return f"[{','.join(str(d.dim_value) if d.HasField('dim_value') else d.dim_param or '?' for d in dims)}]"


def _onnx_facts(model: ir.Model) -> dict[str, onnx.TypeProto]:
    """What the inference of ONNX itself makes of the inputs and weights, by the names of the values; empty where it fails."""
    import onnx

    proto = light(model)
    del proto.graph.output[:]
    try:
        known = onnx.shape_inference.infer_shapes(proto).graph
    except Exception:  # noqa: BLE001 -- it raises several kinds, and who asks can do without an answer; the checker gives the reason
        return {}
    found: dict[str, onnx.TypeProto] = {}
    todo = [known]
    while todo:
        graph = todo.pop()
        found.update((info.name, info.type) for info in (*graph.value_info, *graph.output))
        for attribute in (a for node in graph.node for a in node.attribute):
            todo += [attribute.g] if attribute.HasField("g") else attribute.graphs
    return found


def _find_types(model: ir.Model) -> None:
    """Types that our rules did not reach, as a rule failed, by the inference of ONNX."""
    missing = [v for n in all_nodes(model) for v in n.outputs if v.type is None and v.name]
    facts = _onnx_facts(model) if missing else {}
    for value in missing:
        known = facts.get(str(value.name))
        if known is not None and known.WhichOneof("value") is not None:
            value.type = ir.serde.deserialize_type_proto_for_type(known)


def infer_nodes(model: ir.Model, nodes: Iterable[ir.Node]) -> None:
    """Write shapes and dtypes to the outputs of new nodes, in order, from the facts on their inputs; what a rule refuses stays unknown."""
    from onnx_shape_inference import ShapeInferenceContext, ShapeInferenceError, registry

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
            with contextlib.suppress(ShapeInferenceError):  # an input that contradicts itself; whoever checks the graph says so
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
    shape: ir.Shape | None = value.meta.get(DECLARED, value.shape)
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
    for node in all_nodes(model):
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
