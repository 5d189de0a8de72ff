"""Every rule of the normal form, broken once; the interface; and the text that errors and tests print."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.core.errors import VerifyError
from graphopt.graph import shapes
from graphopt.graph.interface import check_interface, interface
from graphopt.graph.text import diff, graph_text, neighbourhood, node_text
from graphopt.graph.verify import RULES, verify

TEXT = """<ir_version: 10, opset_import: ["": 23, "com.microsoft": 1]>
g (float[b,s,4] x, bool c, float[4] bias) => (float[b,s,4] y, float[b,s,4] z) <float[4,4] w, float[4] bias = {1, 2, 3, 4}> {
  [mul] h = MatMul(x, w)
  [gelu] q = com.microsoft.FastGelu(h)
  [add] y = Add(q, bias)
  [choose] z = If(c) <
    then_branch = t () => (float[b,s,4] yes) { [yes] yes = Relu(y) },
    else_branch = e () => (float[b,s,4] no) { [no] no = Add(y, bias) }
  >
}"""


def good() -> ir.Model:
    """A vendor op, an If whose branches capture, a large weight and an overridable one."""
    model = ir.from_onnx_text(TEXT, initializers=[ir.tensor(np.ones((4, 4), np.float32), name="w")])
    contrib = next(n for n in model.graph if n.domain)
    contrib.outputs[0].type, contrib.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["b", "s", 4])
    shapes.infer_shapes(model)
    return model


def node(model: ir.Model, name: str) -> ir.Node:
    return next(n for n in ir.traversal.RecursiveGraphIterator(model.graph) if n.name == name)


def stored(name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)


def add_dead_node(model: ir.Model) -> None:
    extra = ir.node("Relu", [model.graph.inputs[0]], name="extra")
    extra.outputs[0].name = "unread"
    model.graph.append(extra)


def add_dead_weight(model: ir.Model) -> None:
    model.graph.register_initializer(stored("spare", np.ones(2, np.float32)))


def foreign_producer(model: ir.Model) -> None:
    """The name is the same, the object is not: what a stale match leaves behind."""
    twin = node(good(), "mul")
    node(model, "gelu").replace_input_with(0, twin.outputs[0])


def out_of_thin_air(model: ir.Model) -> None:
    value = ir.Value(name="ghost", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([4]))
    node(model, "add").replace_input_with(1, value)


def out_of_a_branch(model: ir.Model) -> None:
    node(model, "add").replace_input_with(1, node(model, "yes").outputs[0])


def cycle(model: ir.Model) -> None:
    node(model, "mul").replace_input_with(0, node(model, "add").outputs[0])


def unsorted(model: ir.Model) -> None:
    moved = node(model, "mul")
    model.graph.remove(moved)
    model.graph.append(moved)


def constant_node(model: ir.Model) -> None:
    made = ir.node("Constant", [], {"value": ir.tensor(np.ones(4, np.float32))}, name="constant")
    made.outputs[0].name = "ones"
    made.outputs[0].type, made.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([4])
    model.graph.insert_before(node(model, "mul"), made)
    node(model, "add").replace_input_with(1, made.outputs[0])


def function(model: ir.Model) -> None:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 23})
    model.functions[("local", "f", "")] = ir.Function("local", "f", graph=graph, attributes=[])


def subgraph_weight(model: ir.Model) -> None:
    branch = node(model, "no").graph
    assert branch is not None
    branch.register_initializer(stored("inner", np.ones(4, np.float32)))
    node(model, "no").replace_input_with(1, branch.initializers["inner"])


def declared_otherwise(model: ir.Model) -> None:
    model.graph.initializers["w"].shape = ir.Shape([4, 5])


def no_data(model: ir.Model) -> None:
    model.graph.initializers["w"].const_value = None


def same_value_name(model: ir.Model) -> None:
    node(model, "gelu").outputs[0].name = "h"


def same_node_name(model: ir.Model) -> None:
    node(model, "gelu").name = "mul"


def no_import(model: ir.Model) -> None:
    del model.graph.opset_imports["com.microsoft"]


def no_dtype(model: ir.Model) -> None:
    node(model, "mul").outputs[0].type = None


def lying_size(model: ir.Model) -> None:
    node(model, "mul").outputs[0].shape = ir.Shape(["b", "s", 5])


def lying_symbol(model: ir.Model) -> None:
    node(model, "mul").outputs[0].shape = ir.Shape(["b", "t", 4])


def lost_shape(model: ir.Model) -> None:
    node(model, "mul").outputs[0].shape = None


def unknown_op(model: ir.Model) -> None:
    node(model, "mul").op_type = "MatMuul"


def given_twice(model: ir.Model) -> None:
    model.graph.outputs[1] = model.graph.outputs[0]


def branch_gives_an_outer_value(model: ir.Model) -> None:
    branch = node(model, "yes").graph
    assert branch is not None
    branch.outputs[0] = node(model, "gelu").outputs[0]


BREAKS: list[tuple[Callable[[ir.Model], None], str]] = [
    (function, "functions: function local::f is not inlined"),
    (foreign_producer, "sources: node `gelu` reads `h`, whose producer `mul` is not in the graph"),
    (out_of_thin_air, "sources: node `add` reads `ghost`, which nothing makes, feeds or stores"),
    (out_of_a_branch, "sources: node `add` reads `yes`, whose producer `yes` is not in the graph"),
    (cycle, "order: the graph is in a cycle: node `mul` reads `y`"),
    (unsorted, "order: the graph is not topologically sorted: node `gelu` reads `h`"),
    (given_twice, "outputs: graph `g` gives one value as two outputs"),
    (branch_gives_an_outer_value, "outputs: graph output `q` is not made in its graph"),
    (same_value_name, "names: two values are called `h`"),
    (same_node_name, "names: two nodes are called `mul`"),
    (add_dead_node, "dead: node `extra` is dead"),
    (add_dead_weight, "dead: weight `spare` is dead"),
    (constant_node, "constants: node `constant` is a Constant"),
    (subgraph_weight, "initializers: weight `inner` belongs to a subgraph"),
    (no_data, "initializers: weight `w` has no data"),
    (declared_otherwise, r"initializers: weight `w` is declared float\[4,5\], but its data is float\[4, 4\]"),
    (no_import, "opsets: node `gelu` is of domain `com.microsoft`"),
    (no_dtype, "types: `h` has no dtype"),
    (lying_size, r"shapes: `h` is marked float\[b,s,5\], but inference gives float\[b,s,4\]"),
    (lying_symbol, r"shapes: `h` is marked float\[b,t,4\], but inference gives float\[b,s,4\]"),
    (lost_shape, "shapes: `h` is marked float.*, but inference gives"),
    (unknown_op, "checker: the ONNX checker says: No Op registered for MatMuul"),
]


def test_a_good_graph_passes_and_is_not_changed() -> None:
    model = good()
    before = graph_text(model)
    verify(model, interface=interface(model))
    assert graph_text(model) == before


def test_a_heavy_weight_is_left_out_of_the_checked_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    model = good()
    monkeypatch.setattr("graphopt.graph.serialize._HEAVY", 0)
    verify(model, interface=interface(model))
    assert model.graph.initializers["w"].const_value is not None


@pytest.mark.parametrize(("damage", "expected"), BREAKS, ids=[b[0].__name__ for b in BREAKS])
def test_each_rule(damage: Callable[[ir.Model], None], expected: str) -> None:
    model = good()
    damage(model)
    with pytest.raises(VerifyError, match="^" + expected):
        verify(model)


def test_every_rule_is_broken_by_a_test() -> None:
    untested = {rule.name for rule in RULES} - {expected.partition(":")[0] for _, expected in BREAKS}
    assert untested == {"owners"}, "the ir library itself keeps nodes and graphs together"


def test_an_error_shows_the_neighbourhood() -> None:
    model = good()
    lying_size(model)
    with pytest.raises(VerifyError) as caught:
        verify(model)
    lines = str(caught.value).splitlines()
    assert lines[1:] == [
        "    %x: f32[b,s,4]  (input)",
        "    %w: f32[4,4]  (weight)",
        "  > %h: f32[b,s,5] = MatMul(%x, %w)",
        "    %q: f32[b,s,4] = com.microsoft::FastGelu(%h)",
    ]
    assert neighbourhood(model.graph.inputs[0]) == "  > %x: f32[b,s,4]\n    %h: f32[b,s,5] = MatMul(%x, %w)"


def rename_input(model: ir.Model) -> None:
    model.graph.inputs[0].name = "data"


def swap_outputs(model: ir.Model) -> None:
    first, second = list(model.graph.outputs)
    model.graph.outputs.clear()
    model.graph.outputs.extend([second, first])


def retype(model: ir.Model) -> None:
    model.graph.inputs[0].type = ir.TensorType(ir.DataType.FLOAT16)


def rename_symbol(model: ir.Model) -> None:
    model.graph.inputs[0].shape = ir.Shape(["batch", "s", 4])


def fold_default(model: ir.Model) -> None:
    del model.graph.initializers["bias"]
    model.graph.inputs[2].const_value = None


def drop_input(model: ir.Model) -> None:
    model.graph.inputs.pop()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (rename_input, "the inputs were x, c, bias, and are now data, c, bias"),
        (drop_input, "the inputs were x, c, bias, and are now x, c"),
        (swap_outputs, "the outputs were y, z, and are now z, y"),
        (retype, r"input `x: float\[b,s,4\]` has become `x: float16\[b,s,4\]`"),
        (rename_symbol, r"input `x: float\[b,s,4\]` has become `x: float\[batch,s,4\]`"),
        (fold_default, "the overridable inputs were bias, and are now none"),
    ],
)
def test_interface(change: Callable[[ir.Model], None], expected: str) -> None:
    model = good()
    before = interface(model)
    check_interface(before, model)
    change(model)
    with pytest.raises(VerifyError, match=f"interface: {expected}"):
        check_interface(before, model)


def test_an_output_that_was_not_declared_may_become_known() -> None:
    text = '<ir_version: 10, opset_import: ["": 23]> g (float[?,4] x) => (float[?,?] y) { [n] y = Relu(x) }'
    model = ir.from_onnx_text(text)
    before = interface(model)
    shapes.infer_shapes(model)
    check_interface(before, model)


def test_graph_text() -> None:
    assert graph_text(good()) == (
        "graph (%x: f32[b,s,4], %c: bool[], %bias: f32[4]) -> (%y: f32[b,s,4], %z: f32[b,s,4]) {\n"
        "  %bias = f32[4] {1.0, 2.0, 3.0, 4.0}\n"
        "  %w = f32[4,4] #6ce2ac63\n"
        "  %h: f32[b,s,4] = MatMul(%x, %w)\n"
        "  %q: f32[b,s,4] = com.microsoft::FastGelu(%h)\n"
        "  %y: f32[b,s,4] = Add(%q, %bias)\n"
        "  %z: f32[b,s,4] = If(%c) else_branch:1 nodes then_branch:1 nodes\n"
        "    else_branch () -> (%no: f32[b,s,4]) {\n"
        "      %no: f32[b,s,4] = Add(%y, %bias)\n"
        "    }\n"
        "    then_branch () -> (%yes: f32[b,s,4]) {\n"
        "      %yes: f32[b,s,4] = Relu(%y)\n"
        "    }\n"
        "}\n"
    )


def chain(names: str, first: str, second: str, attribute: str = "") -> ir.Model:
    a, b, w = names.split()
    text = f"g (float[b,4] x) => (float[b,4] y) <float[4] {w} = {{1, 2, 3, 4}}> {{ {first} {second} y = Sub({a}, {b}) }}"
    return ir.from_onnx_text('<ir_version: 10, opset_import: ["": 23]>\n' + text)


def test_canonical_text_knows_neither_names_nor_order_nor_spelled_defaults() -> None:
    one = chain("p q w", "p = Softmax(x)", "q = Add(x, w)")
    other = chain("u v bias", "v = Add(x, bias)", "u = Softmax<axis=-1>(x)")
    assert graph_text(one) != graph_text(other)
    assert graph_text(one, canonical=True) == graph_text(other, canonical=True)
    for different in (
        chain("p q w", "p = Softmax<axis=0>(x)", "q = Add(x, w)"),
        chain("q p w", "p = Softmax(x)", "q = Add(x, w)"),
        chain("p q w", "p = Softmax(x)", "q = Add(w, x)"),
    ):
        assert graph_text(different, canonical=True) != graph_text(one, canonical=True)


def test_canonical_text_sees_one_changed_weight() -> None:
    one, other = good(), good()
    array = np.ones((4, 4), np.float32)
    array[2, 1] = 2
    other.graph.initializers["w"].const_value = ir.tensor(array, name="w")
    assert graph_text(one, canonical=True) != graph_text(other, canonical=True)
    assert graph_text(one, canonical=True, weights=False) == graph_text(other, canonical=True, weights=False)


def test_diff() -> None:
    model = good()
    before = graph_text(model)
    assert diff(before, before) == ""
    node(model, "mul").op_type = "Add"
    lines = diff(before, graph_text(model)).splitlines()
    assert [line for line in lines if line[0] in "+-"] == ["-  %h: f32[b,s,4] = MatMul(%x, %w)", "+  %h: f32[b,s,4] = Add(%x, %w)"]
    assert node_text(node(model, "mul")) == "%h: f32[b,s,4] = Add(%x, %w)"
