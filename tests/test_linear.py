"""What counts as a multiply with a stored weight, or a lookup in a stored table, and how it is read."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import graphopt
from graphopt.analysis.linear import Embeddings, Linear, Linears
from graphopt.core.contract import Context

RNG = np.random.default_rng(0)
W = RNG.standard_normal((6, 4)).astype(np.float32)


def model(
    nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], inputs: str = "x:B,6", outputs: str = "y", overridable: tuple[str, ...] = ()
) -> ir.Model:
    given = []
    for text in inputs.split(" "):
        name, _, dims = text.partition(":")
        kind = TensorProto.INT64 if name.startswith("ids") else TensorProto.BOOL if name == "cond" else TensorProto.FLOAT
        given.append(helper.make_tensor_value_info(name, kind, [int(d) if d.isdigit() else d for d in dims.split(",") if d]))
    given += [helper.make_tensor_value_info(n, TensorProto.FLOAT, weights[n].shape) for n in overridable]
    made = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs.split(" ")]
    graph = helper.make_graph(nodes, "g", given, made, [numpy_helper.from_array(a, n) for n, a in weights.items()])
    return graphopt.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


def linears(*args: object, **kwargs: object) -> tuple[Linear, ...]:
    m = model(*args, **kwargs)  # type: ignore[arg-type]
    return Context(m).get(Linears())


def node(op: str, inputs: str, output: str = "y", **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(" "), [output], name=f"/{output}/{op}", **attributes)


def test_matmul_with_a_bias() -> None:
    bias = np.arange(4, dtype=np.float32)
    (found,) = linears([node("MatMul", "x w", "t"), node("Add", "b t")], {"w": W, "b": bias}, inputs="x:B,S,6")
    assert (found.in_features, found.out_features, found.transposed, found.channel_axis) == (6, 4, False, 1)
    assert found.bias is not None
    assert (found.bias.name, found.output.name) == ("b", "y")
    assert found.bias_node is not None
    np.testing.assert_array_equal(found.matrix(), W)


@pytest.mark.parametrize(
    ("shape", "is_bias"),
    [((4,), True), ((1, 4), True), ((1, 1, 4), False), ((1,), True), ((), True), ((3, 4), False), ((5, 1), False), ((8, 1, 4), False)],
)
def test_what_a_bias_may_look_like(shape: tuple[int, ...], is_bias: bool) -> None:
    """The result is [B, 4]: a bias that adds an axis, or differs between rows, is no bias."""
    (found,) = linears([node("MatMul", "x w", "t"), node("Add", "t b")], {"w": W, "b": np.ones(shape, np.float32)})
    assert (found.bias is not None) is is_bias


def test_a_narrow_product_is_not_widened_by_its_bias() -> None:
    (found,) = linears([node("MatMul", "x w", "t"), node("Add", "t b")], {"w": W[:, :1].copy(), "b": np.ones((1, 6), np.float32)})
    assert (found.out_features, found.bias) == (1, None)


def test_a_bias_needs_the_product_for_itself() -> None:
    nodes = [node("MatMul", "x w", "t"), node("Add", "t b"), node("Relu", "t", "z")]
    (found,) = linears(nodes, {"w": W, "b": np.ones(4, np.float32)}, outputs="y z")
    assert found.bias is None
    (found,) = linears(nodes[:2], {"w": W, "b": np.ones(4, np.float32)}, outputs="y t")
    assert found.bias is None


def test_gemm_reads_its_attributes() -> None:
    weights = {"w": W.T.copy(), "c": np.ones((1, 4), np.float32)}
    (found,) = linears([node("Gemm", "x w c", alpha=0.5, beta=2.0, transA=1, transB=1)], weights, inputs="x:6,B")
    assert (found.transposed, found.channel_axis, found.alpha, found.beta, found.trans_x) == (True, 0, 0.5, 2.0, True)
    assert (found.in_features, found.out_features) == (6, 4)
    assert found.bias is not None
    np.testing.assert_array_equal(found.matrix(), W)


def test_gemm_with_a_matrix_to_add() -> None:
    (found,) = linears([node("Gemm", "x w c")], {"w": W}, inputs="x:B,6 c:B,4", outputs="y")
    assert found.bias is None
    assert found.addend is not None
    assert found.addend.name == "c"


def test_a_transpose_of_the_weight_is_seen_through() -> None:
    nodes = [node("Transpose", "w", "wt", perm=[1, 0]), node("MatMul", "x wt")]
    (found,) = linears(nodes, {"w": W.T.copy()})
    assert (found.transposed, found.weight.name, len(found.path)) == (True, "w", 1)
    np.testing.assert_array_equal(found.matrix(), W)


@pytest.mark.parametrize(("axis", "block"), [(None, 0), (1, 0), (0, 3)])
def test_a_quantized_weight_is_seen_through(axis: int | None, block: int) -> None:
    codes = RNG.integers(-127, 128, (6, 4)).astype(np.int8)
    scale = {None: np.float32(0.1), 1: np.array([0.1, 0.2, 0.3, 0.4], np.float32), 0: np.array([[0.1] * 4, [0.2] * 4], np.float32)}[axis]
    attributes = {} if axis is None else {"axis": axis, **({"block_size": block} if block else {})}
    (found,) = linears([node("DequantizeLinear", "q s", "w", **attributes), node("MatMul", "x w")], {"q": codes, "s": np.asarray(scale)})
    assert found.quantized
    assert found.grid is not None
    assert (found.grid.axis, found.grid.block) == (axis, block)
    expected = codes * (np.repeat(scale, 3, axis=0) if block else scale)
    np.testing.assert_allclose(found.matrix(), expected, rtol=1e-6)
    with pytest.raises(AssertionError):  # scales along the other axis are another matrix
        np.testing.assert_allclose(found.matrix(), codes * np.linspace(0.1, 0.4, 6)[:, None], rtol=1e-2)


def test_batched_weights_have_their_channels_last() -> None:
    (found,) = linears([node("MatMul", "x w")], {"w": np.ones((4, 6, 5), np.float32)}, inputs="x:4,S,6")
    assert (found.batch, found.in_features, found.out_features, found.channel_axis) == ((4,), 6, 5, 2)


def test_no_linear_without_a_stored_second_operand() -> None:
    assert not linears([node("MatMul", "x v")], {}, inputs="x:B,6 v:6,4")
    assert not linears([node("MatMul", "w x")], {"w": W}, inputs="x:4,B")
    assert not linears([node("MatMul", "x w")], {"w": W[:, 0].copy()})
    assert not linears([node("MatMul", "x w")], {"w": W}, overridable=("w",))


def test_order_and_subgraphs() -> None:
    branches = [
        helper.make_graph([node("MatMul", f"x {w}", w[0] + "o")], w, [], [helper.make_tensor_value_info(w[0] + "o", TensorProto.FLOAT, None)])
        for w in ("aw", "bw")
    ]
    nodes = [helper.make_node("If", ["cond"], ["t"], name="if", then_branch=branches[0], else_branch=branches[1]), node("MatMul", "t v")]
    weights = {"aw": W, "bw": W + 1, "v": np.ones((4, 3), np.float32)}
    found = linears(nodes, weights, inputs="x:B,6 cond:")
    assert sorted(x.weight.name or "" for x in found) == ["aw", "bw", "v"]


def test_embeddings() -> None:
    nodes = [
        node("Gather", "table ids", "y"),
        node("Gather", "table ids", "columns", axis=1),
        node("Gather", "cube ids", "z"),
        node("DequantizeLinear", "codes scale", "table2", axis=0),
        node("Gather", "table2 ids", "u"),
    ]
    weights = {
        "table": RNG.standard_normal((9, 5)).astype(np.float32),
        "cube": np.ones((9, 2, 2), np.float32),
        "codes": np.ones((9, 5), np.int8),
        "scale": np.ones(9, np.float32),
    }
    found = Context(model(nodes, weights, inputs="ids:B,S", outputs="y columns z u")).get(Embeddings())
    assert [(e.node.outputs[0].name, e.rows, e.width, e.quantized) for e in found] == [("y", 9, 5, False), ("u", 9, 5, True)]
