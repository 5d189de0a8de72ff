"""Cases G: opset, IR version and domains of what is written."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import assert_same, parse, run, to_proto  # type: ignore[import-not-found]

from graphopt.core.errors import TargetError
from graphopt.graph.questions import all_nodes
from graphopt.io.load import load
from graphopt.io.save import finish


def imports(proto: onnx.ModelProto) -> list[tuple[str, int]]:
    return [(o.domain, o.version) for o in proto.opset_import]


def to_vendor(model: ir.Model, op_type: str) -> None:
    """Stands for a lowering that spells a node with an operator of a runtime."""
    node = next(n for n in all_nodes(model) if n.op_type == op_type)
    node.domain, node.op_type = "com.microsoft", "Gelu"


BRANCH = """<ir_version: 8, opset_import: ["" : 17]> g (bool c, float[2] x) => (float[2] y) {
  y = If (c) <then_branch = t () => (float[2] p) { p = Erf (x) }, else_branch = e () => (float[2] q) { q = Neg (x) }> }"""


@pytest.mark.parametrize("text", ['<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[2] y) { y = Erf (x) }', BRANCH])
def test_g01_a_domain_is_imported_once_exactly_if_it_is_used(text: str) -> None:
    model = load(parse(text))
    assert imports(to_proto(model)) == [("", 17)]
    to_vendor(model, "Erf")
    proto = to_proto(model)
    assert imports(proto) == [("", 17), ("com.microsoft", 1)]
    feeds = {"x": np.array([1, -1], np.float32)} | ({"c": np.array(True)} if "If" in text else {})
    run(proto, feeds)
    again = load(proto)  # the front door reads it as the standard operator, which needs a later opset
    assert imports(to_proto(again)) == [("", 20)]


LAYER_NORM = """<ir_version: 7, opset_import: ["" : 12]> g (float[N,4] x) => (float[N,4] y)
<float two = {2.0}, float eps = {0.00001}, float[4] gamma = {1.0,2.0,3.0,4.0}> {
  m = ReduceMean <axes = [-1]> (x)  d = Sub (x, m)  p = Pow (d, two)  v = ReduceMean <axes = [-1]> (p)  e = Add (v, eps)  s = Sqrt (e)  n = Div (d, s)
  y = Mul (n, gamma) }"""


@pytest.mark.parametrize(("op_type", "needs"), [("LayerNormalization", 17), ("RMSNormalization", 23)])
def test_g02_a_new_operator_lifts_the_opset_and_converts_the_rest(op_type: str, needs: int) -> None:
    """A fused norm in a model of opset 12 whose other nodes are spelled the old way."""
    text = LAYER_NORM.replace("=> (float[N,4] y)", "=> (float[N,4] y, float[N,1] w)").rstrip("} \n") + "  w = ReduceSum <axes = [-1]> (x) }"
    proto = parse(text)
    model = load(proto)
    div, gamma = next(n for n in model.graph if n.op_type == "Div"), model.graph.initializers["gamma"]
    norm = ir.node(op_type, [model.graph.inputs[0], gamma], {"axis": -1, "epsilon": 1e-5}, name="fused")
    last = next(n for n in model.graph if n.op_type == "Mul")
    model.graph.insert_before(div, norm)
    last.outputs[0].replace_all_uses_with(norm.outputs[0], replace_graph_outputs=True)
    norm.outputs[0].name, last.outputs[0].name = "y", "old"
    norm.outputs[0].type, norm.outputs[0].shape = last.outputs[0].type, last.outputs[0].shape
    copy, rises = finish(model)
    assert copy.opset_imports[""] == needs
    assert [(r.what, r.before, r.after) for r in rises] == [("opset", 12, needs)]
    assert "node `fused`" in rises[0].reason
    out = ir.to_proto(copy)
    onnx.checker.check_model(out, full_check=True)
    x = {"x": np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)}
    if op_type == "LayerNormalization":
        assert_same(run(proto, x), run(out, x))
    with pytest.raises(TargetError, match="`fused`"):
        finish(model, opset=12)


@pytest.mark.parametrize(("ir_version", "opset"), [(8, 17), (4, 9), (10, 21), (7, 12), (8, 13)])
def test_g03_versions_are_those_of_the_input(ir_version: int, opset: int) -> None:
    head = f'<ir_version: {ir_version}, opset_import: ["" : {opset}]>'
    text = head + "g (float[N,4] x) => (float[N,4] y) <float[4,4] w> { h = MatMul (x, w)  y = Relu (h) }"
    copy, rises = finish(load(parse(text, w=np.eye(4, dtype=np.float32))))
    assert (copy.ir_version, copy.opset_imports[""], rises) == (ir_version, opset, ())


@pytest.mark.parametrize("opset", [11, 17, 18, 20, 23])
def test_g05_standard_operators_only_from_their_opset_on(opset: int) -> None:
    text = f'<ir_version: 8, opset_import: ["" : {opset}]> g (float[N,4] x) => (float[N,4] y) {{ [f] h = Relu (x)  y = Neg (h) }}'
    for op_type, needs in (("Gelu", 20), ("RMSNormalization", 23), ("LayerNormalization", 17)):
        model = load(parse(text))
        node = next(n for n in model.graph if n.op_type == "Relu")
        node.op_type = op_type
        if op_type != "Gelu":
            scale = ir.Value(
                name="s", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([4]), const_value=ir.tensor(np.ones(4, np.float32), name="s")
            )
            model.graph.register_initializer(scale)
            node.resize_inputs(2)
            node.replace_input_with(1, scale)
        copy, rises = finish(model)
        assert copy.opset_imports[""] == max(opset, needs)
        assert bool(rises) == (opset < needs), "no opset is raised silently"
        onnx.checker.check_model(ir.to_proto(copy), full_check=True)
