"""Kind 11: what was left of older cases, and their siblings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from harness import build, check, compare  # type: ignore[import-not-found]
from tiny import tiny  # type: ignore[import-not-found]

import graphopt
from graphopt.core.contract import Context
from graphopt.core.pipeline import PassManager
from graphopt.core.pipeline import parse as parse_pipeline
from graphopt.core.registry import passes
from graphopt.core.remarks import Remarks
from graphopt.run.ort import session

RUNTIME = '<ir_version: 10, opset_import: ["": 17, "com.microsoft": 1]>\ng '
EXACT = "canonicalize, simplify-masks, fuse-norm, fuse-activation, fuse-rotary, fuse-attention, canonicalize"

# ---- operators of the runtime in the input ---------------------------------------------------------------------------------------------------

BITS = "i = Cast<to = 6>(m)\n o = Mod(i, two)\n n = Abs(o)"  # int32 zeros and ones
LENGTHS = f"{BITS.replace(' n = ', ' n0 = ')}\n n = Add(n0, one)"
QKV, SELF = "float[B,S,32] q, float[B,T,32] k, float[B,T,32] v", "float[B,S,32] q, float[B,S,32] k, float[B,S,32] v"
CACHE = "float[B,4,P,8] pk, float[B,4,P,8] pv) => (float[B,S,32] y, float[B,4,T,8] nk, float[B,4,T,8] nv)"
PACKED = "float[B,S,32] x, float[2,B,4,P,8] past"
WEIGHTS: dict[str, tuple[int, ...] | np.ndarray] = {
    "b8": (8,), "c8": (8,), "g8": (8,), "b96": (96,), "w96": (32, 96), "w80": (32, 80), "b80": (80,), "w": (4, 3, 3, 3), "b4": (4,), "we": (10, 8),
    "pe": (9, 8), "se": (2, 8), "cos4": (16, 4), "sin4": (16, 4), "cos2": (16, 2), "sin2": (16, 2), "w32": (32, 16), "b16": (16,),
    "two": np.array(2, np.int32), "one": np.array(1, np.int32), "ten": np.array(10, np.int32), "start": np.array([3]), "n16": np.array(16),
    "one64": np.array([1]),
}  # fmt: skip
READ = {
    "Gelu": ("(float[B,S,8] x) => (float[B,S,8] y) { y = com.microsoft.Gelu(x) }", "Gelu"),
    "FastGelu": ("(float[B,S,8] x) => (float[B,S,8] y) { y = com.microsoft.FastGelu(x, b8) }", "Gelu"),
    "BiasGelu": ("(float[B,S,8] x) => (float[B,S,8] y) { y = com.microsoft.BiasGelu(x, b8) }", "Gelu"),
    "QuickGelu": ("(float[B,S,8] x) => (float[B,S,8] y) { y = com.microsoft.QuickGelu<alpha = 1.5>(x) }", "Sigmoid"),
    "FusedMatMul": (
        "(float[B,S,8] x, float[B,T,8] u) => (float[B,S,T] y) { y = com.microsoft.FusedMatMul<transB = 1, alpha = 0.5>(x, u) }", "MatMul"
    ),
    "FusedConv": (
        '(float[B,3,8,8] x, float[B,4,8,8] z) => (float[B,4,8,8] y) { y = com.microsoft.FusedConv<activation = "Relu", pads = [1,1,1,1]>(x, w, b4, z) }',
        "Conv",
    ),
    "FusedGemm": ('(float[B,32] x) => (float[B,16] y) { y = com.microsoft.FusedGemm<activation = "Tanh", alpha = 0.5>(x, w32, b16) }', "Gemm"),
    "SkipLayerNormalization": (
        "(float[B,S,8] x, float[B,S,8] u) => (float[B,S,8] y, float[B,S,8] z) "
        "{ y, m, v, z = com.microsoft.SkipLayerNormalization<epsilon = 1e-5>(x, u, g8, b8, c8) }",
        "LayerNormalization",
    ),
    "SkipSimplified": (
        "(float[B,S,8] x, float[B,S,8] u) => (float[B,S,8] y) { y = com.microsoft.SkipSimplifiedLayerNormalization<epsilon = 1e-5>(x, u, g8) }",
        "RMSNormalization",
    ),
    "Simplified": ("(float[B,S,8] x) => (float[B,S,8] y) { y = SimplifiedLayerNormalization<epsilon = 1e-5>(x, g8) }", "RMSNormalization"),
    "Embed": (
        f"(int64[B,S] a, int64[B,S] m) => (float[B,S,8] y, int32[B] z) {{ {BITS}\n a0 = Cast<to = 6>(a)\n a1 = Mod(a0, ten)\n ids = Abs(a1)\n"
        " y, z = com.microsoft.EmbedLayerNormalization<epsilon = 1e-5>(ids, n, we, pe, se, g8, b8, n) }",
        "LayerNormalization",
    ),
    "Rotary": (
        "(float[B,S,32] x, int64[B,S] p) => (float[B,S,32] y) { p0 = Mod(p, n16)\n p1 = Abs(p0)\n y = com.microsoft.RotaryEmbedding(x, p1, cos4, sin4) }",
        "RotaryEmbedding",
    ),
    "Rotary of four axes, from a start on": (
        "(float[B,4,S,8] x) => (float[B,4,S,8] y) { y = com.microsoft.RotaryEmbedding<interleaved = 1>(x, start, cos4, sin4) }", "RotaryEmbedding"
    ),
    "Rotary of a part": (
        "(float[B,S,32] x, int64[B,S] p) => (float[B,S,32] y) { p0 = Mod(p, n16)\n p1 = Abs(p0)\n"
        " y = com.microsoft.RotaryEmbedding<num_heads = 4, rotary_embedding_dim = 4>(x, p1, cos2, sin2) }",
        "RotaryEmbedding",
    ),
    "MHA": (f"({QKV}) => (float[B,S,32] y) {{ y = com.microsoft.MultiHeadAttention<num_heads = 4>(q, k, v, b96) }}", "Attention"),
    "MHA with padding": (
        f"({QKV}, int64[B,T] m) => (float[B,S,32] y) {{ {BITS}\n y = com.microsoft.MultiHeadAttention<num_heads = 4, scale = 0.3>(q, k, v, , n) }}",
        "Attention",
    ),
    "MHA with lengths": (
        f"({QKV}, int64[B] m) => (float[B,S,32] y) {{ {LENGTHS}\n y = com.microsoft.MultiHeadAttention<num_heads = 4>(q, k, v, , n) }}", "Attention"
    ),
    "MHA with a mask for each row": (
        f"({QKV}, int64[B,S,T] m) => (float[B,S,32] y) {{ {BITS}\n y = com.microsoft.MultiHeadAttention<num_heads = 4>(q, k, v, , n) }}", "Attention"
    ),
    "MHA with padding and a bias": (
        f"({QKV}, int64[B,T] m, float[B,4,S,T] a) => (float[B,S,32] y) {{ {BITS}\n"
        " y = com.microsoft.MultiHeadAttention<num_heads = 4, mask_filter_value = -3.0>(q, k, v, , n, a) }",
        "Attention",
    ),
    "MHA, causal": (f"({SELF}) => (float[B,S,32] y) {{ y = com.microsoft.MultiHeadAttention<num_heads = 4, unidirectional = 1>(q, k, v) }}", "Attention"),
    "MHA, causal with padding": (
        f"({SELF}, int64[B,S] m) => (float[B,S,32] y) {{ {BITS}\n"
        " y = com.microsoft.MultiHeadAttention<num_heads = 4, unidirectional = 1>(q, k, v, , n) }",
        "Attention",
    ),
    "MHA behind a cache": (
        f"({SELF}, {CACHE} {{ y, nk, nv = com.microsoft.MultiHeadAttention<num_heads = 4, unidirectional = 1>(q, k, v, b96, , , pk, pv) }}",
        "Attention",
    ),
    "Attention": ("(float[B,S,32] x) => (float[B,S,32] y) { y = com.microsoft.Attention<num_heads = 4>(x, w96, b96) }", "Attention"),
    "Attention with padding": (
        f"(float[B,S,32] x, int64[B,S] m) => (float[B,S,32] y) {{ {BITS}\n"
        " y = com.microsoft.Attention<num_heads = 4, mask_filter_value = -3.4028234663852886e+38>(x, w96, b96, n) }",
        "Attention",
    ),
    "Attention with lengths": (
        f"(float[B,S,32] x, int64[B] m) => (float[B,S,32] y) {{ {LENGTHS}\n y = com.microsoft.Attention<num_heads = 4>(x, w96, b96, n) }}", "Attention"
    ),
    "Attention of three widths": (
        "(float[B,S,32] x) => (float[B,S,48] y) { y = com.microsoft.Attention<num_heads = 4, qkv_hidden_sizes = [16,16,48]>(x, w80, b80) }", "Attention"
    ),
    "Attention behind a cache": (
        f"({PACKED}, int64[B,T] m) => (float[B,S,32] y, float[2,B,4,T,8] z) {{ {BITS}\n"
        " y, z = com.microsoft.Attention<num_heads = 4, unidirectional = 1>(x, w96, b96, n, past) }",
        "Attention",
    ),
    "GroupQueryAttention": (
        "(float[B,S,32] q, float[B,S,16] k, float[B,S,16] v) => (float[B,S,32] y) {\n"
        " n = Shape<start = 0, end = 1>(q)\n s = Shape<start = 1, end = 2>(q)\n s1 = Sub(s, one64)\n t = Expand(s1, n)\n l = Cast<to = 6>(t)\n"
        " t2 = Squeeze(s)\n total = Cast<to = 6>(t2)\n"
        " y, pk, pv = com.microsoft.GroupQueryAttention<num_heads = 4, kv_num_heads = 2>(q, k, v, , , l, total) }",
        "Attention",
    ),
}  # fmt: skip
KEPT = {
    "the batch axis": ("(float[S,B,8] x, float[B,8,T] u) => (float y) { y = com.microsoft.FusedMatMul<transBatchA = 1>(x, u) }", "transBatchA"),
    "statistics": (
        "(float[B,S,8] x, float[B,S,8] u) => (float[B,S,8] y, float m) { y, m = com.microsoft.SkipLayerNormalization(x, u, g8, b8) }",
        "its output mean is read",
    ),
    "another activation": (
        '(float[B,32] x) => (float[B,16] y) { y = com.microsoft.FusedGemm<activation = "LeakyRelu">(x, w32, b16) }', "its activation is LeakyRelu"
    ),
    "packed operands": ("(float[B,S,4,3,8] q) => (float[B,S,32] y) { y = com.microsoft.MultiHeadAttention<num_heads = 4>(q) }", "it reads packed"),
    "causal over other keys": (
        f"({QKV}) => (float[B,S,32] y) {{ y = com.microsoft.MultiHeadAttention<num_heads = 4, unidirectional = 1>(q, k, v) }}",
        "not proved to have as many rows as keys",
    ),
    "a mask of unproved length": (
        "(float[B,S,32] x, int32[C] m) => (float[B,S,32] y) { y = com.microsoft.Attention<num_heads = 4>(x, w96, b96, m) }",
        "not proved to hold one length for each row",
    ),
    "a cache by lengths": (
        "(float[B,S,32] q, float[B,S,16] k, float[B,S,16] v, float[B,2,P,8] pk, float[B,2,P,8] pv, int32[B] l, int32 t) => (float[B,S,32] y) "
        "{ y, nk, nv = com.microsoft.GroupQueryAttention<num_heads = 4, kv_num_heads = 2>(q, k, v, pk, pv, l, t) }",
        "it writes each row of its cache where seqlens_k says",
    ),
}  # fmt: skip


def of_runtime(text: str) -> onnx.ModelProto:
    model, rng = onnx.parser.parse_model(RUNTIME + text), np.random.default_rng(0)
    read = {name for node in model.graph.node for name in node.input}
    for name, shape in WEIGHTS.items():
        if name in read:
            array = shape if isinstance(shape, np.ndarray) else (rng.standard_normal(shape) * 0.3).astype(np.float32)
            model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


@pytest.mark.parametrize("name", READ)
def test_an_operator_of_the_runtime_is_read_as_what_it_is(name: str) -> None:
    """The numbers are those of the original operator in the runtime."""
    text, standard = READ[name]
    sizes = [{"B": 2, "S": 3, "P": 4, "T": 7}, {"B": 1, "S": 1, "P": 2, "T": 3}, {"B": 2, "S": 3, "P": 0, "T": 3}] if "behind" in name else ()
    outcome = check(of_runtime(text), "canonicalize", sizes=sizes, again=False)
    assert {node.domain for node in outcome.model.graph} == {""}
    assert outcome.ops[standard] == 1
    assert outcome.said("applied", "of the runtime is read as")


@pytest.mark.parametrize("name", KEPT)
def test_what_has_no_exact_form_stays_with_the_reason(name: str) -> None:
    text, reason = KEPT[name]
    remarks = Remarks()
    model = graphopt.load(of_runtime(text), remarks=remarks)
    assert "com.microsoft" in {node.domain for node in model.graph}
    (said,) = [r for r in remarks if "is kept as it is" in r.message or "shapes end here" in r.message]
    assert reason in said.message


def test_attention_of_the_runtime_is_pruned() -> None:
    text = (
        "(float[B,S,32] x) => (float[B,S,32] y) { a = com.microsoft.Attention<num_heads = 4>(x, w96, b96)\n p = MatMul(a, wo)\n"
        " y = com.microsoft.SkipLayerNormalization<epsilon = 1e-5>(p, x, gamma) }"
    )
    proto, rng = of_runtime(text), np.random.default_rng(1)
    for name, shape in (("wo", (32, 32)), ("gamma", (32,))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    outcome = check(proto, f"{EXACT}, prune-heads{{ratio=0.5 importance=magnitude refit=false}}", loss=2.0)
    assert {v.const_value.shape.numpy() for v in outcome.model.graph.initializers.values() if v.const_value is not None} >= {(32, 48), (16, 32)}


def test_an_artifact_without_operators_of_the_runtime(tmp_path: Path) -> None:
    """Also where no pass changes what the door read; without that limit the file stays what it was."""
    proto = of_runtime(READ["MHA with padding"][0])
    for options, domains in (("vendor=false tune=off", {""}), ("tune=off", {"", "com.microsoft"})):
        result = graphopt.optimize(proto, "", target=f"cpu{{{options}}}")
        result.save(tmp_path / "out.onnx")
        assert {node.domain for node in onnx.load(tmp_path / "out.onnx").graph.node} == domains


# ---- J05, E12 ------------------------------------------------------------------------------------------------------------------------------

BLOCK = """
  q{n} = MatMul({x}, wq)  k{n} = MatMul({x}, wk)  v{n} = MatMul({x}, wv)
  qh{n} = Reshape(q{n}, split)  kh{n} = Reshape(k{n}, split)  vh{n} = Reshape(v{n}, split)
  qt{n} = Transpose<perm = [0,2,1,3]>(qh{n})  kt{n} = Transpose<perm = [0,2,3,1]>(kh{n})  vt{n} = Transpose<perm = [0,2,1,3]>(vh{n})
  s{n} = MatMul(qt{n}, kt{n})  c{n} = Mul(s{n}, scale)  p{n} = Softmax<axis = -1>(c{n})  a{n} = MatMul(p{n}, vt{n})
  b{n} = Transpose<perm = [0,2,1,3]>(a{n})  m{n} = Reshape(b{n}, merge)  o{n} = MatMul(m{n}, wo)  y{n} = Add({x}, o{n})
"""


@pytest.mark.parametrize("foreign", ["my.Foo", "Identity"])
def test_j05_attention_behind_an_operator_without_schema_is_fused(foreign: str) -> None:
    """The exporter stated a rank, and that is enough; the sizes that it stated are not believed."""
    head = '<ir_version: 8, opset_import: ["": 17, "my": 1]>\ng (float[B,S,32] x) => (float[B,S,32] y1) <float[B,S,32] f, float scale = {0.35}> {'
    text = f"{head}{BLOCK.format(n=0, x='x')} f = {foreign}(y0) {BLOCK.format(n=1, x='f')} }}"
    proto, rng = onnx.parser.parse_model(text), np.random.default_rng(0)
    weights = {name: rng.standard_normal((32, 32)).astype(np.float32) * 0.1 for name in ("wq", "wk", "wv", "wo")}
    for name, array in (weights | {"split": np.array([0, 0, 4, 8]), "merge": np.array([0, 0, 32])}).items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    if foreign == "Identity":
        assert check(proto, EXACT).ops["Attention"] == 2
        return
    result = graphopt.optimize(proto, EXACT)
    found = [node for node in result.graph.graph if node.op_type == "Attention"]
    assert len(found) == 2, [str(r) for r in result.report.remarks("missed")]


def test_e12_empty_arms_of_a_concat() -> None:
    """A Slice that takes nothing, by its bounds, by clamping, or from the end; also at length 0, and where all arms but one are empty."""
    text = """(float[N,8] x) => (float[N,8] y, float[N,8] z) <int64[1] one = {1}, int64[1] zero = {0}, int64[1] far = {99}, int64[1] last = {-1}> {
      a = Slice(x, one, one, zero)
      b = Slice(x, one, zero, zero)
      c = Slice(x, last, last, zero)
      y = Concat<axis = 0>(a, x, b)
      d = Concat<axis = 0>(c, x)
      z = Relu(d)
    }"""
    outcome = check(build(text), "canonicalize", sizes=[{"N": 3}, {"N": 1}, {"N": 0}])
    assert outcome.ops["Concat"] == outcome.ops["Slice"] == 0


# ---- multi-query attention -------------------------------------------------------------------------------------------------------------------

QUERIES = """
  q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
  qh = Reshape(q, split)  kh = Reshape(k, one)  vh = Reshape(v, one)
  qt = Transpose<perm = [0,2,1,3]>(qh)  kt = Transpose<perm = [0,2,1,3]>(kh)  vt = Transpose<perm = [0,2,1,3]>(vh)
"""
MULTI_QUERY = {
    "operator": "a = Attention(qt, kt, vt)",
    "packed": "ap = Attention<q_num_heads = 8, kv_num_heads = 1>(q, k, v)  as = Reshape(ap, split)  a = Transpose<perm = [0,2,1,3]>(as)",
    "broadcast": "kk = Transpose<perm = [0,1,3,2]>(kt)  s = MatMul(qt, kk)  c = Mul(s, scale)  p = Softmax<axis = -1>(c)  a = MatMul(p, vt)",
    "expanded": "ke = Expand(kt, eight)  ve = Expand(vt, eight)  kk = Transpose<perm = [0,1,3,2]>(ke)  s = MatMul(qt, kk)  c = Mul(s, scale)"
    "  p = Softmax<axis = -1>(c)  a = MatMul(p, ve)",
}


def multi_query(form: str) -> str:
    return f"""(float[B,S,32] x) => (float[B,S,32] y)
    <float[32,32] wq, float[32,4] wk, float[32,4] wv, float[32,32] wo, float scale = {{0.5}}, int64[4] split = {{0,0,8,4}}, int64[4] one = {{0,0,1,4}},
     int64[4] eight = {{1,8,1,1}}, int64[3] merge = {{0,0,32}}> {{ {QUERIES} {MULTI_QUERY[form]}
      b = Transpose<perm = [0,2,1,3]>(a)  m = Reshape(b, merge)  o = MatMul(m, wo)  y = Add(x, o) }}"""


@pytest.mark.parametrize("form", MULTI_QUERY)
def test_what_is_left_of_the_queries_is_exact(form: str) -> None:
    """As if the heads that went had given zeros."""
    proto, zeroed = build(multi_query(form)), build(multi_query(form))
    outcome = check(proto, "canonicalize, prune-heads{heads=0:1+0:2+0:6 refit=false}", loss=5.0)
    (output,) = [t for t in zeroed.graph.initializer if t.name == "wo"]
    array = onnx.numpy_helper.to_array(output).copy()
    array.reshape(8, 4, 32)[[1, 2, 6]] = 0
    output.CopyFrom(onnx.numpy_helper.from_array(array, "wo"))
    compare(zeroed, outcome.model, [{"x": np.random.default_rng(n).standard_normal((n, 5, 32)).astype(np.float32)} for n in (1, 3)])


@pytest.mark.parametrize("form", ["operator", "packed"])
def test_as_many_named_queries_of_each_key_head_go_alone(form: str) -> None:
    """Two key heads of four queries each: one query of each goes, and both key heads stay; uneven names are completed, as before."""
    text = multi_query(form).replace("float[32,4] wk, float[32,4] wv", "float[32,8] wk, float[32,8] wv").replace("{0,0,1,4}", "{0,0,2,4}")
    proto, zeroed = (build(text.replace("kv_num_heads = 1", "kv_num_heads = 2")) for _ in range(2))
    outcome = check(proto, "canonicalize, prune-heads{heads=0:1+0:6 refit=false}", loss=5.0)
    (output,) = [t for t in zeroed.graph.initializer if t.name == "wo"]
    array = onnx.numpy_helper.to_array(output).copy()
    array.reshape(8, 4, 32)[[1, 6]] = 0
    output.CopyFrom(onnx.numpy_helper.from_array(array, "wo"))
    compare(zeroed, outcome.model, [{"x": np.random.default_rng(n).standard_normal((n, 5, 32)).astype(np.float32)} for n in (1, 3)])
    whole = check(proto, "canonicalize, prune-heads{heads=0:1 refit=false}", loss=5.0)
    assert whole.said("warning", "heads go in groups of 4")


@pytest.mark.parametrize(("form", "fused"), [("operator", False), ("packed", True), ("broadcast", False), ("broadcast", True), ("expanded", True)])
def test_queries_of_an_only_key_head_go_alone(form: str, fused: bool) -> None:
    """Two of eight are left, and the key head."""
    pipeline = f"{EXACT if fused else 'canonicalize'}, prune-heads{{ratio=0.75}}"
    outcome = check(build(multi_query(form)), pipeline, loss=5.0, samples=3)
    assert [len(r.facts["removed"]) for r in outcome.remarks if r.kind == "applied" and "removed" in r.facts] == [6]
    shapes = {v.const_value.shape.numpy() for v in outcome.model.graph.initializers.values() if v.const_value is not None}
    assert {(32, 8), (32, 4), (8, 32)} <= shapes


# ---- simplify ------------------------------------------------------------------------------------------------------------------------------


def test_simplify_leaves_random_nodes_apart() -> None:
    text = """(float[B,8] x) => (float[B,8] y, float[B,8] z) <float one = {1}> {
      a = RandomNormalLike(x)
      b = RandomNormalLike(x)
      i = Identity(a)
      y = Add(i, x)
      j = Identity(b)
      k = Mul(j, one)
      z = Add(k, x)
    }"""
    pytest.importorskip("onnxsim", reason="onnxsim is not installed")
    model = graphopt.load(build(text))
    PassManager(parse_pipeline("simplify", passes())).run(model, Context(model))
    assert [n.op_type for n in model.graph].count("RandomNormalLike") == 2


def test_simplify_writes_no_operator_of_a_runtime_and_nothing_larger() -> None:
    """C15: quantize then sees the projections of query, key and value."""
    pytest.importorskip("onnxsim", reason="onnxsim is not installed")
    blocks = BLOCK.format(n=0, x="x") + BLOCK.format(n=1, x="y0")
    weights = ", ".join(f"float[32,32] {name}" for name in ("wq", "wk", "wv", "wo"))
    sizes = "float scale = {0.35}, int64[4] split = {0,0,4,8}, int64[3] merge = {0,0,32}"
    proto = build(f"(float[B,S,32] x) => (float[B,S,32] y1) <{weights}, {sizes}> {{ {blocks} }}")
    model, remarks = graphopt.load(proto), Remarks()
    before = len(list(model.graph))
    (record,) = PassManager(parse_pipeline("simplify", passes())).run(model, Context(model, remarks=remarks))
    after = list(model.graph)
    assert {n.domain for n in after} == {""}
    assert (len(after) < before) if record.changes else (len(after) == before)
    outcome = check(proto, "simplify, quantize", loss=0.2, again=False)
    assert outcome.ops["MatMul"] == 12


# ---- rows without a visible key --------------------------------------------------------------------------------------------------------------

TWO_MASKS = {
    "one after the other": "t = Add(s, causal)  u = Add(t, padding)",
    "their sum": "m = Add(causal, padding)  u = Add(s, m)",
    "their sum, floored": "m = Add(causal, padding)  f = Max(m, low)  u = Add(s, f)",
    "the scores floored": "t = Add(s, causal)  w = Add(t, padding)  u = Max(w, low)",
    "a fill behind a sum": "t = Add(s, causal)  u = Where(seen, t, low)",
    "a fill before a sum": "t = Where(seen, s, low)  u = Add(t, causal)",
    "two fills": "t = Where(seen, s, low)  u = Where(past, t, low)",
    "one fill for both": "b = And(seen, past)  u = Where(b, s, low)",
    "a fill between sums": "t = Add(s, causal)  w = Where(seen, t, low)  u = Add(w, padding)",
}


@pytest.mark.parametrize("masks", TWO_MASKS)
def test_a_row_without_a_visible_key_gives_what_it_gave(masks: str) -> None:
    """Keys that two masks hide at the lowest number are at -inf, or not: that decides what such a row averages. (One that gave NaN gives a number.)"""
    text = f"""(float[B,4,S,8] q, float[B,4,S,8] k, float[B,4,S,8] v, bool[B,S] mask) => (float[B,4,S,8] y)
    <float low = {{-3.4028234663852886e38}}, float none = {{0}}, int64[2] two = {{1,2}}, int64 zero = {{0}}, int64 one = {{1}}, int64[1] first = {{0}}, int64[1] second = {{1}}> {{
      n0 = Shape<start = 1, end = 2>(mask)  n = Squeeze(n0)  r = Range(zero, n, one)
      row = Unsqueeze(r, second)  column = Unsqueeze(r, first)
      past = LessOrEqual(column, row)  causal = Where(past, none, low)
      seen = Unsqueeze(mask, two)  padding = Where(seen, none, low)
      kt = Transpose<perm = [0,1,3,2]>(k)  s = MatMul(q, kt)
      {TWO_MASKS[masks]}
      p = Softmax<axis = -1>(u)  y = MatMul(p, v)
    }}"""
    rng, feeds = np.random.default_rng(0), []
    for batch, size in ((3, 6), (2, 4)):
        feed = {name: (rng.standard_normal((batch, 4, size, 8)) * 0.5).astype(np.float32) for name in "qkv"}
        mask = np.ones((batch, size), bool)
        mask[0, :2] = mask[1, :] = False
        mask[0, -1] = False
        feeds.append(feed | {"mask": mask})
    proto = build(text)
    model = graphopt.load(proto)
    PassManager(parse_pipeline(EXACT, passes())).run(model, Context(model))
    assert "Attention" in [n.op_type for n in model.graph]
    for optimize in (False, True):
        for feed in feeds:
            before, after = session(proto, optimize=False).run(feed)["y"], session(model, optimize=optimize).run(feed)["y"]
            known = np.isfinite(before)
            assert known.any(axis=(1, 2, 3)).sum() >= len(before) - 1
            np.testing.assert_allclose(after[known], before[known], atol=1e-5)
            assert np.isfinite(after).all()


@pytest.mark.parametrize("by", ["the runtime at load", "the runtime's optimizer"])
def test_a_file_that_was_optimized_for_the_runtime_is_read_whole(by: str, tmp_path: Path) -> None:
    """A small BERT as ONNX Runtime writes it: both attentions, five norms and two GELUs are there again."""
    import onnxruntime

    source, written = tiny("bert", "eager", "ts17"), tmp_path / "optimized.onnx"
    if by == "the runtime at load":
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath, options.log_severity_level = str(written), 3
        onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    else:
        optimizer = pytest.importorskip("onnxruntime.transformers.optimizer", reason="onnxruntime.transformers is not installed")
        optimizer.optimize_model(str(source), "bert", num_heads=4, hidden_size=32, opt_level=0).save_model_to_file(str(written))
    proto = onnx.load(written)
    assert "com.microsoft" in {node.domain for node in proto.graph.node}
    outcome = check(proto, EXACT, sizes=[{"batch": 2, "seq": 5}, {"batch": 1, "seq": 7}], again=False)
    assert {node.domain for node in outcome.model.graph} == {""}
    assert (outcome.ops["Attention"], outcome.ops["LayerNormalization"], outcome.ops["Gelu"]) == (2, 5, 2)
