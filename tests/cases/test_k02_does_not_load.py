"""Kind 2: what was written does not load, or differs at the runtime's default level. Every artifact is tried in a process that may die."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import assert_same, parse, to_proto  # type: ignore[import-not-found]
from onnx import TensorProto, helper, numpy_helper

import graphopt
from graphopt.core.errors import TargetError
from graphopt.graph.questions import all_nodes
from graphopt.run import guarded, ort
from graphopt.run.guarded import Died

Array = np.ndarray[Any, Any]
WIDTH = 32


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def ops(model: Any) -> list[str]:
    return [node.op_type for node in all_nodes(model)]


def both(model: Any, feed: Mapping[str, Array]) -> list[dict[str, Array]]:
    """The outputs with runtime optimizations off, and at the default level."""
    return [guarded.probe(model, feed, ort.settings(optimize=optimize)) for optimize in (False, True)]


def optimized(source: onnx.ModelProto, pipeline: str | None, *feeds: Mapping[str, Array], tolerance: float = 1e-5, **options: Any) -> graphopt.Result:
    """What is written, without the gate's help: it loads, and gives at both levels what the input gives with runtime optimizations off."""
    result = graphopt.optimize(source, pipeline, target="cpu{tune=off}", gate=False, **options)
    artifact = to_proto(result.model)
    for feed in feeds:
        base = guarded.probe(source, feed, ort.settings(optimize=False))
        for found in both(artifact, feed):
            assert_same(base, found, tolerance)
    gated = graphopt.optimize(source, pipeline, target="cpu{tune=off}", samples=list(feeds), **options)
    assert gated.report.gate.passed is True
    assert ops(gated.model) == ops(result.model), "there was nothing to take back"
    return result


# ---- K2.2: signed codes, a layout operator, and an opset that rises -------------------------------------------------------------------

LAYOUT = {  # none is so that canonicalize takes it away
    "Transpose": "l = Transpose<perm=[1,0,2]>(d)  h = Neg(l)",
    "Reshape": "l = Reshape(d, narrow)  n = Neg(l)  h = Reshape(n, keep)",
    "Unsqueeze": "l = Unsqueeze(d, one)  n = Neg(l)  h = Squeeze(n, one)",
    "Squeeze": "u = Unsqueeze(c, one)  d1 = DequantizeLinear(u, s ZERO)  l = Squeeze(d1, one)  h = Add(l, d)",
    "Slice": "l = Slice(d, nought, two, one)  h = Neg(l)",
    "several": "l = Reshape(d, narrow)  l2 = Transpose<perm=[0,2,1]>(l)  n = Neg(l2)  l3 = Transpose<perm=[0,2,1]>(n)  h = Reshape(l3, keep)",
    "two readers": "l = Reshape(d, narrow)  n = Neg(l)  l2 = Reshape(n, keep)  t = Transpose<perm=[0,2,1]>(d)  e = Exp(t)  l3 = Transpose<perm=[0,2,1]>(e)  h = Add(l2, l3)",
}
MAKES = {
    "table": ("int64[B,S] ids", "c = Gather(table, ids)"),
    "input": ("int8[B,S,32] c", ""),
    "quantize": ("float[B,S,32] f", "c = QuantizeLinear(f, s, z)"),
}
ATTENTION = """q = MatMul(h, wq)  k = MatMul(h, wk)  v = MatMul(h, wv)
  q4 = Reshape(q, split)  k4 = Reshape(k, split)  v4 = Reshape(v, split)
  qt = Transpose<perm=[0,2,1,3]>(q4)  kt = Transpose<perm=[0,2,3,1]>(k4)  vt = Transpose<perm=[0,2,1,3]>(v4)
  a = MatMul(qt, kt)  b = Mul(a, half)  p = Softmax<axis=-1>(b)  o = MatMul(p, vt)  w = Transpose<perm=[0,2,1,3]>(o)  y = Reshape(w, keep)"""
CONSTANTS = """int64[3] keep = {0,-1,32}, int64[3] narrow = {0,-1,16}, int64[4] split = {0,0,4,8}, int64[1] one = {1}, int64[1] nought = {0}, int64[1] two = {2},
  float s = {0.02}, float half = {0.5}, int8[50,32] table, float[32,32] wq, float[32,32] wk, float[32,32] wv"""


def embedded(makes: str, layout: str, zero: int, opset: int = 17) -> onnx.ModelProto:
    """Signed codes, decoded, moved, and read as floats by one attention, for which the opset rises to 23."""
    given, made = MAKES[makes]
    z = ", z" if zero >= 0 else ""
    text = f"""<ir_version: 10, opset_import: ["": {opset}]> g ({given}) => (float[P,Q,32] y) <int8 z = {{{max(zero, 0)}}}, {CONSTANTS}> {{
  {made} d = DequantizeLinear(c, s{z}) {LAYOUT[layout].replace(" ZERO", z)}
  {ATTENTION} }}"""
    draw = rng()
    weights = {name: (draw.standard_normal((WIDTH, WIDTH)) * 0.2).astype(np.float32) for name in ("wq", "wk", "wv")}
    return parse(text, table=draw.integers(-128, 128, (50, WIDTH)).astype(np.int8), **weights)


def codes_feeds(makes: str) -> list[dict[str, Array]]:
    draw, sizes = rng(), [(2, 5), (3, 7)]
    if makes == "table":
        return [{"ids": draw.integers(0, 50, size)} for size in sizes]
    if makes == "input":
        return [{"c": draw.integers(-128, 128, (*size, WIDTH)).astype(np.int8)} for size in sizes]
    return [{"f": (3 * draw.standard_normal((*size, WIDTH))).astype(np.float32)} for size in sizes]


def test_k2_2_the_fault_is_there() -> None:
    """If this fails, ONNX Runtime was mended: the spellings of targets/_refused.py are not needed with its new version."""
    feed = codes_feeds("table")[0]
    risen = embedded("table", "Reshape", 3, 23)
    guarded.probe(risen, feed, ort.settings(optimize=False))
    with pytest.raises(TargetError, match="output_dtype INT8 does not match"):
        guarded.probe(risen, feed)


WAYS = [(makes, layout, 3) for makes in MAKES for layout in LAYOUT] + [(makes, "Reshape", zero) for makes in ("table", "input") for zero in (-1, 0)]


@pytest.mark.parametrize(("makes", "layout", "zero"), WAYS)
def test_k2_2_signed_codes_in_front_of_layout(makes: str, layout: str, zero: int) -> None:
    """Zero -1: there is no zero point."""
    result = optimized(embedded(makes, layout, zero), None, *codes_feeds(makes))
    assert ops(result.model).count("Attention") == 1
    told = [r for r in result.report.remarks("applied") if r.pass_name == "spell-signed" and "cannot load signed codes" in r.message]
    assert bool(told) == (zero >= 0)


def test_k2_2_signed_codes_without_a_zero_point_at_an_old_opset() -> None:
    """ONNX Runtime computes the input wrongly at its default level: it takes the codes that it moves for unsigned ones. What is written is right."""
    text = """<ir_version: 8, opset_import: ["": 17]> g (int64[B,S] ids) => (float[B,Q,16] y)
<int64[3] narrow = {0,-1,16}, float s = {0.02}, int8[50,32] table> { c = Gather(table, ids)  d = DequantizeLinear(c, s)  l = Reshape(d, narrow)  y = Neg(l) }"""
    source, feeds = parse(text, table=rng().integers(-128, 128, (50, WIDTH)).astype(np.int8)), codes_feeds("table")
    off, default = both(source, feeds[0])
    assert np.abs(off["y"] - default["y"]).max() > 1
    result = optimized(source, None, *feeds)
    assert "DequantizeLinear" not in ops(result.model)


@pytest.mark.parametrize("zero", [-1, 3])
def test_k2_2_codes_that_only_move_stay_codes(zero: int) -> None:
    """Between QuantizeLinear nodes the runtime moves codes, and nothing is decoded."""
    z = ", z" if zero >= 0 else ""
    text = f"""<ir_version: 10, opset_import: ["": 21]> g (float[B,S,32] f) => (float[B,S,32] y) <int8 z = {{3}}, {CONSTANTS}> {{
  c = QuantizeLinear<output_dtype=3>(f, s{z})  d = DequantizeLinear(c, s{z})  l = Reshape(d, keep)
  e = QuantizeLinear<output_dtype=3>(l, s{z})  y = DequantizeLinear(e, s{z}) }}"""
    result = graphopt.optimize(parse(text), "canonicalize", target="cpu{tune=off}")
    assert ops(result.model).count("QuantizeLinear") in (1, 2)
    assert not {"Cast", "Mul"} & set(ops(result.model))
    assert not [r for r in result.report.remarks("applied") if r.pass_name == "spell-signed"]


def speech(layers: int = 12) -> onnx.ModelProto:
    """An int8 embedding, a convolution along time, and attention layers, at opset 17: the shape of a real speech model."""
    draw = rng()
    names = [(f"w{what}{n}", (WIDTH, WIDTH)) for n in range(layers) for what in "qkvo"]
    weights = {name: (draw.standard_normal(shape) * 0.2).astype(np.float32) for name, shape in names}
    weights |= {
        "table": draw.integers(-128, 128, (50, WIDTH)).astype(np.int8),
        "kernel": (draw.standard_normal((WIDTH, WIDTH, 3)) * 0.1).astype(np.float32),
    }
    body = "c = Gather(table, ids)  d = DequantizeLinear(c, s, z)  t0 = Transpose<perm=[0,2,1]>(d)  t1 = Conv<pads=[1,1]>(t0, kernel)  x0 = Transpose<perm=[0,2,1]>(t1)\n"
    for n in range(layers):
        block = ATTENTION.replace("wq", f"wq{n}").replace("wk", f"wk{n}").replace("wv", f"wv{n}")
        for name in ("q4", "k4", "v4", "qt", "kt", "vt", "q", "k", "v", "a", "b", "p", "o", "w", "y"):
            block = (
                block.replace(f"  {name} =", f"  {name}_{n} =")
                .replace(f"({name},", f"({name}_{n},")
                .replace(f", {name})", f", {name}_{n})")
                .replace(f"({name})", f"({name}_{n})")
            )
        block = block.replace("q = MatMul", f"q_{n} = MatMul", 1).replace("(h,", f"(x{n},")
        body += f"{block}  z{n} = MatMul(y_{n}, wo{n})  x{n + 1} = Add(z{n}, x{n})\n"
    text = f"""<ir_version: 10, opset_import: ["": 17]> g (int64[B,S] ids) => (float[B,S,32] out)
<int8 z = {{3}}, int64[3] keep = {{0,0,32}}, int64[4] split = {{0,0,4,8}}, float s = {{0.02}}, float half = {{0.5}}> {{ {body} out = Identity(x{layers}) }}"""
    return parse(text, **weights)


def test_k2_2_an_int8_embedding_a_convolution_and_twelve_layers() -> None:
    source = speech()
    result = optimized(source, None, *codes_feeds("table"), tolerance=3e-5)
    assert ops(result.model).count("Attention") == 12


# ---- K2.3: sequence-first models in 16 bits -------------------------------------------------------------------------------------------

HALF = {"x": [(3, 4, 8), (2, 5, 8)], "x4": [(3, 2, 4, 8), (2, 3, 2, 8)]}


def half_model(nodes: list[onnx.NodeProto], weights: dict[str, Array], rank: int = 3) -> onnx.ModelProto:
    name, dims = ("x", ["s", "b", 8]) if rank == 3 else ("x4", ["s", "b", "c", 8])
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, dims), helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)]
    stored = [numpy_helper.from_array(array, key) for key, array in weights.items()]
    return helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], stored), opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def halves(*shape: int) -> Array:
    return (rng().standard_normal(shape) * 0.3).astype(np.float16)


def transposed(perm: list[int], first: str, last: str) -> onnx.ModelProto:
    """A 16-bit value, transposed by `perm`, times a weight, and something behind it."""
    rank, node = len(perm), helper.make_node
    source = "x" if rank == 3 else "x4"
    begin = [node("LayerNormalization", [source, "gamma"], ["h"])] if first == "norm" else [node("Concat", [source, source], ["h"], axis=0)]
    begin = begin if first != "input" else []
    middle = [node("Transpose", ["h" if begin else source], ["t"], perm=perm), node("MatMul", ["t", "w"], ["m"])]
    end = [node("Add", ["m", "beta"], ["y"])] if last == "add" else [node("Transpose", ["m"], ["y"], perm=perm)]
    return half_model([*begin, *middle, *end], {"w": halves(8, 8), "gamma": np.ones(8, np.float16), "beta": halves(8)}, rank)


def test_k2_3_the_fault_is_there() -> None:
    """If this fails, ONNX Runtime was mended: the spellings of targets/_refused.py are not needed with its new version."""
    feed = {"x": halves(3, 4, 8)}
    guarded.probe(transposed([1, 0, 2], "norm", "add"), feed, ort.settings(optimize=False))
    with pytest.raises(Died, match="SIGSEGV"):
        guarded.probe(transposed([1, 0, 2], "norm", "add"), feed)


PERMS = [[1, 0, 2], [1, 2, 0], [1, 2, 0, 3], [1, 2, 3, 0]]
TURNED = [(perm, "norm", "add") for perm in PERMS] + [([1, 0, 2], "input", "add"), ([1, 0, 2], "concat", "transpose")]


@pytest.mark.parametrize(("perm", "first", "last"), TURNED)
def test_k2_3_a_product_of_what_was_transposed(perm: list[int], first: str, last: str) -> None:
    source = transposed(perm, first, last)
    features = 8 if perm[-1] != 0 else 4 if first != "concat" else 8
    name = "x" if len(perm) == 3 else "x4"
    if perm[-1] == 0:  # the first axis becomes the features: it has one size
        source.graph.initializer[0].CopyFrom(numpy_helper.from_array(halves(features, 8), "w"))
        sizes = [(4, 3, *(2,) * (len(perm) - 3), 8), (4, 2, *(3,) * (len(perm) - 3), 8)]
    else:
        sizes = HALF[name]
    optimized(source, "canonicalize", *({name: halves(*size)} for size in sizes), tolerance=2e-3)


def sequence_first(layers: int = 4) -> onnx.ModelProto:
    """float32 layers of a sequence-first model, as WavLM and nn.Transformer have them: norm, turn, project with a bias, turn back."""
    draw = rng()
    weights: dict[str, Array] = {"gamma": np.ones(WIDTH, np.float32), "beta": np.zeros(WIDTH, np.float32)}
    body = ""
    for n in range(layers):
        weights |= {f"{name}{n}": (draw.standard_normal((WIDTH, WIDTH)) * 0.2).astype(np.float32) for name in ("wq", "wk", "wv", "wo")}
        body += f"""l{n} = LayerNormalization(x{n}, gamma, beta)  t{n} = Transpose<perm=[1,0,2]>(l{n})
  q{n} = MatMul(t{n}, wq{n})  k{n} = MatMul(t{n}, wk{n})  v{n} = MatMul(t{n}, wv{n})
  kt{n} = Transpose<perm=[0,2,1]>(k{n})  a{n} = MatMul(q{n}, kt{n})  p{n} = Softmax<axis=-1>(a{n})  o{n} = MatMul(p{n}, v{n})
  m{n} = MatMul(o{n}, wo{n})  mb{n} = Add(m{n}, beta)  b{n} = Transpose<perm=[1,0,2]>(mb{n})  x{n + 1} = Add(b{n}, x{n})\n"""
    text = f'<ir_version: 10, opset_import: ["": 18]> g (float[s,b,32] x0) => (float[s,b,32] y) {{ {body} y = Identity(x{layers}) }}'
    return parse(text, **weights)


@pytest.mark.parametrize("pipeline", ["to-half", "canonicalize, to-half", "canonicalize, fuse-norm, fuse-attention, canonicalize, to-half"])
def test_k2_3_four_layers(pipeline: str) -> None:
    feeds = [{"x0": (0.5 * rng().standard_normal(size)).astype(np.float32)} for size in ((4, 3, WIDTH), (6, 2, WIDTH))]
    optimized(sequence_first(), pipeline, *feeds, tolerance=1e-2)


@pytest.mark.slow
def test_k2_3_an_encoder_layer_of_torch() -> None:
    """nn.TransformerEncoderLayer(64, 4, 128).half() by dynamo kills ONNX Runtime as it comes; what is made of it runs, timed as well."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    layer = torch.nn.TransformerEncoderLayer(64, 4, 128).half().eval()
    example = torch.randn(6, 2, 64).half()
    program = torch.onnx.export(layer, (example,), dynamo=True, verbose=False)
    source = program.model_proto
    (name,) = [value.name for value in source.graph.input]
    feed = {name: example.numpy()}
    base = guarded.probe(source, feed, ort.settings(optimize=False))
    result = graphopt.optimize(source, target="cpu{tune=off}", samples=[feed], promise=True)
    assert result.report.gate.passed is True
    for found in both(to_proto(result.model), feed):
        for got, expected in zip(found.values(), base.values(), strict=True):
            assert np.abs(got.astype(np.float64) - expected).max() <= 1e-2


# ---- K2.4, and what else ONNX Runtime fuses in 16 bits --------------------------------------------------------------------------------

NORM = """m = ReduceMean<keepdims=1>(x, ax)  d = Sub(x, m)  SQUARE  v = ReduceMean<keepdims=1>(p, ax)  ve = Add(v, eps)  sd = Sqrt(ve)
  n = Div(d, sd)  ng = Mul(n, gamma)  l = Add(ng, beta)"""
BLOCKS = {
    "norm": NORM.replace("SQUARE", "p = Pow(d, two)"),
    "norm of a product": NORM.replace("SQUARE", "p = Mul(d, d)"),
    "rms": "p = Pow(x, two)  v = ReduceMean<keepdims=1>(p, ax)  ve = Add(v, eps)  sd = Sqrt(ve)  n = Div(x, sd)  l = Mul(gamma, n)",
    "gelu": "e1 = Div(x, root)  e2 = Erf(e1)  e3 = Add(e2, unit)  e4 = Mul(x, e3)  l = Mul(e4, half)",
    "bias gelu": "e0 = Add(x, beta)  e1 = Div(e0, root)  e2 = Erf(e1)  e3 = Add(e2, unit)  e4 = Mul(e0, e3)  l = Mul(e4, half)",
    "silu": "e = Sigmoid(x)  l = Mul(x, e)",
    "softmax": "e = ReduceMax<keepdims=1>(x, ax)  e1 = Sub(x, e)  e2 = Exp(e1)  e3 = ReduceSum<keepdims=1>(e2, ax)  l = Div(e2, e3)",
}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("pipeline", ["to-half", "to-half{keep-io=false}", "canonicalize, to-half"])
def test_k2_4_a_block_on_a_graph_input_in_half(block: str, pipeline: str) -> None:
    text = f"""<ir_version: 10, opset_import: ["": 18]> g (float[b,s,32] x) => (float[b,s,32] y)
<int64[1] ax = {{-1}}, float two = {{2.0}}, float eps = {{0.00001}}, float root = {{1.4142135}}, float unit = {{1.0}}, float half = {{0.5}}> {{
  {BLOCKS[block]}  y = MatMul(l, w) }}"""
    draw = rng()
    weights = {"gamma": np.full(WIDTH, 1.1), "beta": np.full(WIDTH, 0.1), "w": 0.2 * draw.standard_normal((WIDTH, WIDTH))}
    source = parse(text, **{name: array.astype(np.float32) for name, array in weights.items()})
    result = graphopt.optimize(source, pipeline, target="cpu{tune=off}")
    assert result.report.gate.passed is True
    assert ir.DataType.FLOAT16 in {v.dtype for n in all_nodes(result.model) for v in n.outputs}
    for size in ((2, 3), (1, 5)):
        feed = {"x": draw.standard_normal((*size, WIDTH)).astype(np.float32)}
        base = guarded.probe(source, feed, ort.settings(optimize=False))["y"]
        given = feed if "false" not in pipeline else {"x": feed["x"].astype(np.float16)}
        for found in both(to_proto(result.model), given):
            assert np.abs(found["y"].astype(np.float64) - base).max() <= 1e-2 * (1 + np.abs(base).max())
