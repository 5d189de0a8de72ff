"""Damage to the structure of a model: names, order, operators, attributes, types, shapes, weights, versions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from random import Random

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

_NUMBERS = (-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 7, 64, 2**31, 2**62)
_NAMES = ("", "2", "a b", "x:0", "?", "\u00fc", "n" * 300, "/layer.0/MatMul", "0", "_d0")
_OPS = (
    "Add",
    "MatMul",
    "Relu",
    "Reshape",
    "Concat",
    "Gather",
    "If",
    "Softmax",
    "Split",
    "Cast",
    "Shape",
    "Identity",
    "NoSuchOp",
    "Loop",
    "Transpose",
)
_DOMAINS = ("", "ai.onnx", "com.microsoft", "ai.onnx.ml", "some.where")
_TYPES = (0, TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.FLOAT16, TensorProto.BOOL, TensorProto.STRING, TensorProto.INT4,
          TensorProto.BFLOAT16, TensorProto.DOUBLE, TensorProto.UINT8, TensorProto.INT8, 99)  # fmt: skip


def plan(rng: Random) -> tuple[str, ...]:
    """One to four mutations as text: the kind and the seed of its places."""
    return tuple(f"{rng.choice(list(MUTATIONS))} {rng.randrange(1 << 30)}" for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))))


def apply(data: bytes, mutations: Sequence[str]) -> bytes:
    """A mutation that finds nothing to change changes nothing."""
    model = onnx.load_model_from_string(data)
    for text in mutations:
        kind, _, seed = text.partition(" ")
        MUTATIONS[kind](model, Random(int(seed)))
    return model.SerializeToString()


def _graphs(graph: GraphProto) -> list[GraphProto]:
    found = [graph]
    for node in graph.node:
        for attribute in node.attribute:
            for body in [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs:
                found.extend(_graphs(body))
    return found


def _graph(model: ModelProto, rng: Random) -> GraphProto:
    return rng.choice(_graphs(model.graph))


def _node(model: ModelProto, rng: Random) -> NodeProto | None:
    nodes = [node for graph in _graphs(model.graph) for node in graph.node]
    return rng.choice(nodes) if nodes else None


def _known(model: ModelProto) -> list[str]:
    """The names of all values."""
    names: list[str] = []
    for graph in _graphs(model.graph):
        names += [v.name for v in (*graph.input, *graph.initializer)] + [o for n in graph.node for o in n.output]
    return names or ["x"]


def _name(model: ModelProto, rng: Random) -> str:
    return rng.choice(_known(model)) if rng.random() < 0.7 else rng.choice(_NAMES)


# ---- names and order ----------------------------------------------------------------------------------------------------------------------


def rename_use(model: ModelProto, rng: Random) -> None:
    """One input of one node reads another value."""
    node = _node(model, rng)
    if node is not None and node.input:
        node.input[rng.randrange(len(node.input))] = _name(model, rng)


def rename_output(model: ModelProto, rng: Random) -> None:
    node = _node(model, rng)
    if node is not None and node.output:
        node.output[rng.randrange(len(node.output))] = _name(model, rng)


def rename_everywhere(model: ModelProto, rng: Random) -> None:
    """A value, consistently: a legal model stays one."""
    old, new = rng.choice(_known(model)), rng.choice(_NAMES[1:])
    for graph in _graphs(model.graph):
        for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
            if value.name == old:
                value.name = new
        for node in graph.node:
            for field in (node.input, node.output):
                field[:] = [new if name == old else name for name in field]


def rename_node(model: ModelProto, rng: Random) -> None:
    nodes = [node for graph in _graphs(model.graph) for node in graph.node]
    if nodes:
        rng.choice(nodes).name = rng.choice([*(n.name for n in nodes), *_NAMES])


def rename_port(model: ModelProto, rng: Random) -> None:
    """A graph input, an output or a weight, and nothing that reads it."""
    graph = _graph(model, rng)
    ports = [*graph.input, *graph.output, *graph.initializer]
    if ports:
        rng.choice(ports).name = _name(model, rng)


def reorder(model: ModelProto, rng: Random) -> None:
    nodes = _graph(model, rng).node
    kept = list(map(copy.deepcopy, nodes))
    rng.shuffle(kept)
    del nodes[:]
    nodes.extend(kept)


def drop_node(model: ModelProto, rng: Random) -> None:
    graph = _graph(model, rng)
    if graph.node:
        del graph.node[rng.randrange(len(graph.node))]


def duplicate_node(model: ModelProto, rng: Random) -> None:
    """With outputs of its own, or, not legally, with the same."""
    graph = _graph(model, rng)
    if not graph.node:
        return
    at = rng.randrange(len(graph.node))
    twin = copy.deepcopy(graph.node[at])
    if rng.random() < 0.7:
        twin.output[:] = [f"{name}_twin" for name in twin.output]
    graph.node.insert(at + rng.randint(0, 1), twin)


def move_node(model: ModelProto, rng: Random) -> None:
    """Into another graph of the model, or to another place."""
    graph = _graph(model, rng)
    if not graph.node:
        return
    at = rng.randrange(len(graph.node))
    node = copy.deepcopy(graph.node[at])
    del graph.node[at]
    place = _graph(model, rng)
    place.node.insert(rng.randint(0, len(place.node)), node)


def add_output(model: ModelProto, rng: Random) -> None:
    """Some value of the graph is an output as well."""
    name = rng.choice(_known(model))
    model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))


def drop_port(model: ModelProto, rng: Random) -> None:
    graph = _graph(model, rng)
    ports = rng.choice((graph.input, graph.output))
    if ports:
        del ports[rng.randrange(len(ports))]


# ---- operators ----------------------------------------------------------------------------------------------------------------------------


def change_operator(model: ModelProto, rng: Random) -> None:
    node = _node(model, rng)
    if node is not None:
        node.op_type = rng.choice(_OPS)


def change_domain(model: ModelProto, rng: Random) -> None:
    node = _node(model, rng)
    if node is not None:
        node.domain = rng.choice(_DOMAINS)


def change_attribute(model: ModelProto, rng: Random) -> None:
    nodes = [node for graph in _graphs(model.graph) for node in graph.node if node.attribute]
    if not nodes:
        return
    attribute = rng.choice(rng.choice(nodes).attribute)
    if attribute.type == AttributeProto.INT:
        attribute.i = rng.choice(_NUMBERS)
    elif attribute.type == AttributeProto.FLOAT:
        attribute.f = rng.choice((0.0, -1.0, 1e30, float("nan"), float("inf")))
    elif attribute.type == AttributeProto.INTS and attribute.ints:
        attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(_NUMBERS)
    elif attribute.type == AttributeProto.STRING:
        attribute.s = rng.choice((b"", b"\xff\xfe", b"tanh", b"linear", b"bsd,df->bsf"))


def retype_attribute(model: ModelProto, rng: Random) -> None:
    node = _node(model, rng)
    if node is None or not node.attribute:
        return
    attribute = rng.choice(node.attribute)
    value = rng.choice((1, 1.5, "text", [1, 2], [0.5], [-1], []))
    attribute.CopyFrom(helper.make_attribute(attribute.name, value) if value != [] else AttributeProto(name=attribute.name))


def drop_attribute(model: ModelProto, rng: Random) -> None:
    node = _node(model, rng)
    if node is not None and node.attribute:
        del node.attribute[rng.randrange(len(node.attribute))]


def add_attribute(model: ModelProto, rng: Random) -> None:
    node = _node(model, rng)
    if node is not None:
        name = rng.choice(("axis", "axes", "keepdims", "perm", "to", "epsilon", "transB", "no_such", *(a.name for a in node.attribute)))
        node.attribute.append(helper.make_attribute(name, rng.choice((0, 1, -1, 0.5, "s", [0, 1]))))


def swap_inputs(model: ModelProto, rng: Random) -> None:
    node = _node(model, rng)
    if node is not None and len(node.input) > 1:
        i, j = rng.sample(range(len(node.input)), 2)
        node.input[i], node.input[j] = node.input[j], node.input[i]


def change_count(model: ModelProto, rng: Random) -> None:
    """One input or output more or less."""
    node = _node(model, rng)
    if node is None:
        return
    field = rng.choice((node.input, node.output))
    if field and rng.random() < 0.5:
        del field[-1]
    else:
        field.append(_name(model, rng) if field is node.input else f"extra_{rng.randrange(99)}")


# ---- types and shapes ---------------------------------------------------------------------------------------------------------------------


def _typed(model: ModelProto, rng: Random) -> onnx.ValueInfoProto | None:
    graph = _graph(model, rng)
    typed = [v for v in (*graph.input, *graph.output, *graph.value_info) if v.type.HasField("tensor_type")]
    return rng.choice(typed) if typed else None


def lie_about_type(model: ModelProto, rng: Random) -> None:
    value = _typed(model, rng)
    if value is not None:
        value.type.tensor_type.elem_type = rng.choice(_TYPES)


def lie_about_shape(model: ModelProto, rng: Random) -> None:
    value = _typed(model, rng)
    if value is None:
        return
    tensor = value.type.tensor_type
    kind = rng.random()
    if kind < 0.15:
        tensor.ClearField("shape")
    elif kind < 0.3 or not tensor.shape.dim:
        tensor.shape.dim.add().dim_value = rng.choice((1, 2, 5))
    elif kind < 0.4:
        del tensor.shape.dim[-1]
    else:
        dim = rng.choice(tensor.shape.dim)
        if rng.random() < 0.5:
            dim.dim_value = rng.choice(_NUMBERS)
        else:
            dim.dim_param = rng.choice((*_NAMES, "B", "S", "B*S", "B+1", "-1"))


def lie_inside(model: ModelProto, rng: Random) -> None:
    """A value_info that says something of a value which others know better."""
    graph = _graph(model, rng)
    made = [o for n in graph.node for o in n.output]
    if made:
        shape = rng.choice((None, [], [1], [2, 3], ["B", 4], [0], ["q", "r", 32]))
        graph.value_info.append(helper.make_tensor_value_info(rng.choice(made), rng.choice((1, 7, 10)), shape))


def no_tensor(model: ModelProto, rng: Random) -> None:
    """An input or output is a sequence, an optional or nothing at all."""
    graph = _graph(model, rng)
    ports = [*graph.input, *graph.output]
    if not ports:
        return
    port, kind = rng.choice(ports), rng.randrange(3)
    port.type.Clear()
    if kind == 0:
        port.type.sequence_type.elem_type.tensor_type.elem_type = 1
    elif kind == 1:
        port.type.optional_type.elem_type.tensor_type.elem_type = 1


# ---- weights ------------------------------------------------------------------------------------------------------------------------------


def _weight(model: ModelProto, rng: Random) -> TensorProto | None:
    weights = [w for graph in _graphs(model.graph) for w in graph.initializer]
    return rng.choice(weights) if weights else None


def weight_to_input(model: ModelProto, rng: Random) -> None:
    """A weight is listed as an input: a caller may replace it, or must give it."""
    weight = _weight(model, rng)
    if weight is None:
        return
    model.graph.input.append(helper.make_tensor_value_info(weight.name, weight.data_type, list(weight.dims)))
    if rng.random() < 0.4 and weight in model.graph.initializer:
        model.graph.initializer.remove(weight)


def weight_to_constant(model: ModelProto, rng: Random) -> None:
    weights = list(model.graph.initializer)
    if not weights:
        return
    weight = rng.choice(weights)
    node = helper.make_node("Constant", [], [weight.name], value=copy.deepcopy(weight))
    model.graph.initializer.remove(weight)
    model.graph.node.insert(0 if rng.random() < 0.8 else len(model.graph.node), node)


def drop_weight(model: ModelProto, rng: Random) -> None:
    graph = _graph(model, rng)
    if graph.initializer:
        del graph.initializer[rng.randrange(len(graph.initializer))]


def duplicate_weight(model: ModelProto, rng: Random) -> None:
    weight = _weight(model, rng)
    if weight is not None:
        _graph(model, rng).initializer.append(copy.deepcopy(weight))


def reshape_weight(model: ModelProto, rng: Random) -> None:
    """Its shape or type changes, and its data do not."""
    weight = _weight(model, rng)
    if weight is None:
        return
    kind = rng.randrange(4)
    if kind == 0:
        weight.data_type = rng.choice(_TYPES)
    elif kind == 1 and weight.dims:
        weight.dims[rng.randrange(len(weight.dims))] = rng.choice(_NUMBERS)
    elif kind == 2:
        weight.dims[:] = [] if rng.random() < 0.5 else [*weight.dims, 1]
    elif len(weight.dims) > 1:
        weight.dims[:] = list(reversed(weight.dims))


def damage_weight(model: ModelProto, rng: Random) -> None:
    """Its data are cut, or hold NaN or infinity, or are said to lie elsewhere."""
    weight = _weight(model, rng)
    if weight is None:
        return
    kind = rng.randrange(4)
    if kind == 0:
        weight.raw_data = weight.raw_data[: len(weight.raw_data) // 2]
    elif kind == 1 and weight.data_type == TensorProto.FLOAT and len(weight.raw_data) >= 4:
        weight.raw_data = rng.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\xff")) + weight.raw_data[4:]
    elif kind == 2:
        weight.float_data.extend([1.0, 2.0])
    else:
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value=rng.choice(("no-such-file", "../x", "/etc/hostname", "", "model.onnx")))


# ---- the frame ----------------------------------------------------------------------------------------------------------------------------


def change_version(model: ModelProto, rng: Random) -> None:
    kind = rng.randrange(4)
    if kind == 0:
        model.ir_version = rng.choice((0, 1, 3, 4, 8, 10, 13, 99))
    elif kind == 1 and model.opset_import:
        rng.choice(model.opset_import).version = rng.choice((-1, 0, 1, 6, 7, 9, 11, 13, 17, 20, 21, 24, 26, 99))
    elif kind == 2:
        del model.opset_import[:]
    else:
        model.opset_import.add(domain=rng.choice(_DOMAINS), version=rng.choice((1, 13, 21)))


def wrap_in_if(model: ModelProto, rng: Random) -> None:
    """A node moves into both branches of an If."""
    graph = model.graph
    if not graph.node:
        return
    at = rng.randrange(len(graph.node))
    node = copy.deepcopy(graph.node[at])
    outputs = [name for name in node.output if name]
    branches = []
    for tag in ("yes", "no"):
        inner = copy.deepcopy(node)
        inner.output[:] = [f"{name}_{tag}" if name else "" for name in node.output]
        typed = [helper.make_tensor_value_info(f"{name}_{tag}", _type_of(graph, name), None) for name in outputs]
        branches.append(helper.make_graph([inner], tag, [], typed))
    fed = rng.random() < 0.6
    if fed:
        graph.input.append(helper.make_tensor_value_info("which", TensorProto.BOOL, []))
    else:
        graph.initializer.append(helper.make_tensor("which", TensorProto.BOOL, [], [True]))
    graph.node[at].CopyFrom(helper.make_node("If", ["which"], outputs, then_branch=branches[0], else_branch=branches[1]))


def _type_of(graph: GraphProto, name: str) -> int:
    known = [v for v in (*graph.value_info, *graph.output) if v.name == name]
    return int(known[0].type.tensor_type.elem_type) if known else TensorProto.FLOAT


def drop_value_info(model: ModelProto, rng: Random) -> None:
    for graph in _graphs(model.graph):
        del graph.value_info[:]


Mutation = Callable[[ModelProto, Random], None]
_ALL: tuple[Mutation, ...] = (
    rename_use, rename_output, rename_everywhere, rename_node, rename_port, reorder, drop_node, duplicate_node, move_node, add_output, drop_port,
    change_operator, change_domain, change_attribute, retype_attribute, drop_attribute, add_attribute, swap_inputs, change_count, lie_about_type,
    lie_about_shape, lie_inside, no_tensor, weight_to_input, weight_to_constant, drop_weight, duplicate_weight, reshape_weight, damage_weight,
    change_version, wrap_in_if, drop_value_info,
)  # fmt: skip
MUTATIONS: dict[str, Mutation] = {mutation.__name__.replace("_", "-"): mutation for mutation in _ALL}
