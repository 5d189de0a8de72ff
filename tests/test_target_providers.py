"""cuda, tensorrt and openvino: spellings, what would fall back, and honest errors, without any of them; execution where they are."""

from __future__ import annotations

import collections
import functools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import Array, assert_same, minilm, parse, run, text_feeds  # type: ignore[import-not-found]
from test_portable import llama  # type: ignore[import-not-found]

import graphopt
from graphopt.core.contract import Context, Target
from graphopt.core.errors import PipelineError, TargetError
from graphopt.core.pipeline import PassManager
from graphopt.core.pipeline import parse as parse_pipeline
from graphopt.core.registry import targets
from graphopt.core.remarks import Remark
from graphopt.graph.interface import interface
from graphopt.graph.verify import verify
from graphopt.run.ort import session
from graphopt.run.reference import session as reference

HEADER = '<ir_version: 10, opset_import: ["": 23]>\n'
NAMES = ["input_ids", "attention_mask"]


def target(text: str) -> Target:
    (made,) = parse_pipeline(text, targets(), "target")
    return made


@functools.cache
def here() -> tuple[str, ...]:
    import onnxruntime

    return tuple(onnxruntime.get_available_providers())


def numbers(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def lower(source: onnx.ModelProto, text: str) -> tuple[ir.Model, list[Remark]]:
    model, where = graphopt.load(source), target(text)
    public, context = interface(model), Context(model, target=where)
    PassManager(list(where.lowerings())).run(model, context)
    verify(model, interface=public)
    return model, list(context.remarks)


def ops(model: ir.Model) -> collections.Counter[str]:
    return collections.Counter(n.op_type for n in model.graph)


def told(result: graphopt.Result) -> dict[str, Any]:
    found: dict[str, Any] = result.report.as_dict()["target"]
    return found


# ---- cuda: the CPU provider has the same kernels in float32, and so the numbers can be checked ------------------------------------------------


@pytest.mark.parametrize("route", ["sdpa_18", "sdpa_23", "eager_ts17"])
def test_cuda_minilm(route: str) -> None:
    result = graphopt.optimize(minilm(route), target="cuda")
    attention = {} if route == "sdpa_23" else {"MultiHeadAttention": 6}  # its boolean mask may leave a row without a key
    assert told(result)["vendor_ops"] == attention | {"SkipLayerNormalization": 12, "BiasGelu": 6}
    assert told(result)["falls_back"] == []
    if "CUDAExecutionProvider" not in here():
        assert told(result)["known_from"] == "the documentation of the provider"
    feeds = text_feeds(NAMES, 3, 9)
    assert_same(run(minilm(route), feeds), session(result.model, optimize=False).run(feeds))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_cuda_in_16_bits(dtype: str) -> None:
    result = graphopt.optimize(minilm("sdpa_18"), target=f"cuda{{dtype={dtype}}}")
    assert told(result)["vendor_ops"] == {"MultiHeadAttention": 6, "SkipLayerNormalization": 12, "BiasGelu": 6}
    kinds = {v.dtype for n in result.model.graph if n.domain for v in (*n.inputs, *n.outputs) if v is not None}
    assert kinds == {ir.DataType[dtype.upper()]}
    assert result.report.output.bytes < 0.51 * result.report.input.bytes
    assert {v.dtype for v in result.model.graph.outputs} == {ir.DataType.FLOAT}
    assert [f["op"] for f in told(result)["falls_back"]] == []


def test_cuda_decoder(tmp_path: Path) -> None:
    path = llama(tmp_path)
    result = graphopt.optimize(path, target="cuda")
    assert told(result)["vendor_ops"] == {"SkipSimplifiedLayerNormalization": 4, "QuickGelu": 2}
    refused = {f["op"]: f["reason"] for f in told(result)["falls_back"]}
    if "CUDAExecutionProvider" not in here():
        assert refused == {op: f"no kernel for {op} of opset 22; with opset=21 there is one" for op in ("Cos", "Sin")}
    feeds = text_feeds(NAMES, 3, 6)
    feeds["input_ids"] = feeds["input_ids"] % 100
    assert_same(run(path, feeds), session(result.model, optimize=False).run(feeds))
    older = graphopt.optimize(path, target="cuda{opset=21}")
    assert told(older)["falls_back"] == []
    assert_same(run(path, feeds), session(older.model, optimize=False).run(feeds))


@pytest.mark.parametrize("name", ["cuda{vendor=false}", "cuda{vendor=false dtype=float16}", "tensorrt", "openvino"])
def test_standard_operators_only(name: str, tmp_path: Path) -> None:
    result = graphopt.optimize(minilm("sdpa_18"), target=name)
    result.save(tmp_path / "out.onnx")
    assert {n.domain for n in onnx.load(tmp_path / "out.onnx").graph.node} == {""}
    assert told(result)["vendor_ops"] == {}


GQA = """g (float16[B,S,32] q, float16[B,S,16] k, float16[B,S,16] v) => (float16[B,S,32] y)
{ y = Attention <q_num_heads = 4, kv_num_heads = 2, is_causal = 1, scale = 0.4> (q, k, v) }"""


def test_group_query_attention_in_half_precision_only() -> None:
    feeds = {name: numbers(seed, 2, 5, 32 if name == "q" else 16).astype(np.float16) for seed, name in enumerate("qkv")}
    model, _ = lower(parse(HEADER + GQA), "cuda")
    assert ops(model)["GroupQueryAttention"] == 1
    assert_same(run(parse(HEADER + GQA), feeds), run(model, feeds), 5e-3)
    wide, remarks = lower(parse(HEADER + GQA.replace("float16", "float")), "cuda")
    assert ops(wide)["Attention"] == 1
    assert any("no kernel for float" in r.message for r in remarks if r.kind == "missed")
    narrow, _ = lower(parse(HEADER + GQA.replace(",32]", ",16]").replace(",16] k", ",8] k").replace(",16] v", ",8] v")), "cuda")
    assert ops(narrow)["Attention"] == 1
    free, remarks = lower(parse(HEADER + GQA.replace("is_causal = 1, ", "")), "cuda")
    assert ops(free)["Attention"] == 1
    assert any("not causal" in r.message for r in remarks if r.kind == "missed")


@pytest.mark.parametrize("slope", ["", "1.702"])
def test_quick_gelu(slope: str) -> None:
    scaled = "t = Mul (x, c)\n" if slope else "t = Identity (x)\n"
    constant = f"<float c = {{{slope}}}>" if slope else ""
    source = parse(HEADER + f"g (float[B,8] x) => (float[B,8] y) {constant} {{ {scaled} s = Sigmoid (t)\n y = Mul (x, s) }}")
    model, _ = lower(source, "cuda")
    if slope:
        assert dict(ops(model)) == {"QuickGelu": 1}
    feeds = {"x": numbers(1, 3, 8) * 3}
    assert_same(run(source, feeds), run(model, feeds))


@pytest.mark.parametrize("kind", ["uint4", "int4", "uint8", "int8"])
@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("where", ["cuda", "cpu{tune=off}"])
def test_blocked_weights(kind: str, zero: bool, where: str) -> None:
    """MatMul of a weight stored in blocks: the same numbers as decoded, and not those of another weight."""
    rng, dtype = np.random.default_rng(5), onnx.TensorProto.DataType.Value(kind.upper())
    low, high = {"uint4": (0, 16), "int4": (-8, 8), "uint8": (0, 256), "int8": (-128, 128)}[kind]
    codes, zeros = rng.integers(low, high, (48, 6)), rng.integers(low, high, (3, 6))
    source = parse(HEADER + "g (float[B,48] x) => (float[B,6] y) { y = MatMul (x, d) }")
    source.graph.node.insert(0, onnx.helper.make_node("DequantizeLinear", ["w", "s", *(["z"] if zero else [])], ["d"], axis=0, block_size=16))
    pick = onnx.helper.make_tensor
    source.graph.initializer.extend([pick("w", dtype, codes.shape, codes.reshape(-1)), pick("z", dtype, zeros.shape, zeros.reshape(-1))])
    source.graph.initializer.append(onnx.numpy_helper.from_array(rng.random((3, 6)).astype(np.float32) / 10, "s"))
    model, _ = lower(source, where)
    assert dict(ops(model)) == {"MatMulNBits": 1}
    feeds = {"x": numbers(2, 4, 48)}
    assert_same(run(source, feeds), run(model, feeds))
    with pytest.raises(AssertionError):
        assert_same(run(source, feeds), {"y": run(model, {"x": feeds["x"][:, ::-1].copy()})["y"]})


def test_what_has_no_kernel_is_named() -> None:
    text = "g (float16[B,8] x, int64[1] k) => (float16[B,8] y, float16[B,8] z) { e = Range (a, b, c)\n y = Mul (x, e)\n z = Mish (x) }"
    source = parse(HEADER + text, a=np.float16(0), b=np.float16(8), c=np.float16(1))
    result = graphopt.optimize(source, "canonicalize", target="cuda{opset=22}")
    if "CUDAExecutionProvider" not in here():
        assert {f["op"]: f["reason"] for f in told(result)["falls_back"]}["Mish"] == "no kernel for Mish"
    quantized = parse(HEADER + "g (float[B,8] x) => (uint8[B,8] q, float s, uint8 z) { q, s, z = DynamicQuantizeLinear (x) }")
    result = graphopt.optimize(quantized, "", target="cuda")
    assert [f["op"] for f in told(result)["falls_back"]] == ["DynamicQuantizeLinear"]
    where = target("cuda")
    assert not where.supports(graphopt.load(quantized).graph[0])
    add = graphopt.load(parse(HEADER + "g (float[B] x) => (float[B] y) { y = Add (x, x) }")).graph[0]
    assert where.supports(add)


@pytest.mark.parametrize("text", ["cuda", "tensorrt", "openvino"])
def test_a_provider_that_is_not_here(text: str) -> None:
    where: Any = target(text)
    if where.provider in here():
        pytest.skip(f"{where.provider} is here; the tests of execution use it")
    source = parse(HEADER + "g (float[B] x) => (float[B] y) { y = Neg (x) }")
    with pytest.raises(TargetError, match=f"target {text} cannot run here: .* no {where.provider}; pip install") as error:
        where.session(graphopt.load(source))
    assert "\n" not in str(error.value)
    result = graphopt.optimize(minilm("sdpa_18"), target=text)
    assert "cannot run here" in str(result.measure(quick=True).speed_up.reason)


def test_levels_and_options() -> None:
    with pytest.raises(TargetError, match="cuda has no level 2: dynamic int8 would fall back"):
        target("cuda").pipeline(2)
    with pytest.raises(TargetError, match="tensorrt has the levels 0, 1"):
        target("tensorrt").pipeline(2)
    with pytest.raises(PipelineError, match="float32, float16, bfloat16"):
        target("cuda{dtype=fp16}")
    for text in ("cuda{threads=2 opset=21 vendor=false dtype=float16}", "tensorrt{dtype=float16}", "openvino{threads=4}"):
        assert str(target(text)) == text


def test_the_registry_of_the_runtime_is_read() -> None:
    """By the provider that is always here."""
    from dataclasses import dataclass
    from typing import ClassVar

    from graphopt.driver.lowering.ort_target import OrtTarget

    @dataclass(frozen=True)
    class Plain(OrtTarget):
        provider: ClassVar[str] = "CPUExecutionProvider"

        def pipeline(self, level: int) -> str:
            return ""

    source = parse(HEADER + "g (float[B,2,S,8] q, bfloat16[B] x) => (y, z) { y = Attention (q, q, q)\n z = Neg (x) }")
    graph = graphopt.load(source)
    assert [Plain().refusal(n) for n in graph.graph] == [None, "no kernel for Neg of bfloat16"]
    assert Plain().refusal(graph.graph[0], 25) == "no kernel for Attention of opset 25; with opset=24 there is one"
    assert Plain().report(graph)["known_from"] == "the registry of the installed runtime"


# ---- tensorrt -----------------------------------------------------------------------------------------------------------------------------


def test_tensorrt_keeps_qdq() -> None:
    text = """g (float[B,8] x) => (float[B,4] y)
<float sx = {0.05}, int8 zx = {0}, int8[8,4] w, float[4] sw = {0.1, 0.2, 0.1, 0.1}, int8[4] zw = {0,0,0,0}>
{ q = QuantizeLinear (x, sx, zx)
  d = DequantizeLinear (q, sx, zx)
  dw = DequantizeLinear <axis = 1> (w, sw, zw)
  y = MatMul (d, dw) }"""
    source = parse(HEADER + text, w=np.random.default_rng(1).integers(-127, 127, (8, 4)).astype(np.int8))
    result = graphopt.optimize(source, target="tensorrt")
    assert ops(result.model) == {"QuantizeLinear": 1, "DequantizeLinear": 2, "MatMul": 1}
    assert told(result)["falls_back"] == []
    shifted = parse(HEADER + text.replace("zx = {0}", "zx = {3}"), w=np.zeros((8, 4), np.int8))
    reasons = [f["reason"] for f in told(graphopt.optimize(shifted, target="tensorrt"))["falls_back"]]
    assert reasons == [f"TensorRT takes {op} with the zero point 0 only" for op in ("QuantizeLinear", "DequantizeLinear")]


@pytest.mark.parametrize("text", ["tensorrt", "openvino"])
def test_primitives_have_the_same_numbers(text: str, tmp_path: Path) -> None:
    for path, most in ((minilm("sdpa_18"), 30000), (llama(tmp_path), 100)):
        result = graphopt.optimize(path, target=text)
        assert told(result)["falls_back"] == []
        assert not {"Attention", "RotaryEmbedding", "RMSNormalization"} & set(ops(result.model))
        feeds = text_feeds(NAMES, 4, 6)
        feeds["input_ids"] = feeds["input_ids"] % most
        assert_same(run(path, feeds), session(result.model).run(feeds))


def test_scores_stay_in_the_range_of_float16() -> None:
    """60 * 60 * 64 is beyond 65504; scaled first, it is not."""
    text = "g (float[B,2,S,64] q, float[B,2,S,64] k, float[B,2,S,64] v) => (float[B,2,S,64] y) { y = Attention (q, k, v) }"
    result = graphopt.optimize(parse(HEADER + text), target="tensorrt{dtype=float16}")
    assert {n.op_type for n in result.model.graph} >= {"MatMul", "Softmax"}
    feeds = {"q": np.full((1, 2, 3, 64), 60, np.float32), "k": np.full((1, 2, 3, 64), 60, np.float32), "v": numbers(1, 1, 2, 3, 64)}
    feeds["k"][:, :, 1] = 59
    expected = run(parse(HEADER + text), feeds)["y"]
    for engine in (session(result.model, optimize=False), reference(result.model)):
        assert np.abs(engine.run(feeds)["y"] - expected).max() <= 5e-3


# ---- execution ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["cuda", "cuda{dtype=float16}", "cuda{dtype=bfloat16}", "tensorrt"])
def test_execution_on_a_gpu(text: str) -> None:
    where: Any = target(text)
    if where.provider not in here():
        pytest.skip(f"no {where.provider} here: {text} was lowered and checked, but not run")
    result = graphopt.optimize(minilm("sdpa_18"), target=text)
    feeds = text_feeds(NAMES, 2, 16)
    expected, found = run(minilm("sdpa_18"), feeds)["last_hidden_state"], where.session(result.model).run(feeds)["last_hidden_state"]
    kept = feeds["attention_mask"].astype(np.bool_)
    cosine = (found * expected).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert cosine[kept].min() > (0.99999 if text == "cuda" else 0.999)


OPENVINO = """
import json, sys
import numpy as np
import onnxruntime
import graphopt

path, out = sys.argv[1:]
feeds = dict(np.load(path + ".npz"))
result = graphopt.optimize(path, target="openvino")
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
result.save(out)
onnxruntime.InferenceSession(out, options, providers=["OpenVINOExecutionProvider"])  # fails if one node is left to the CPU provider
found = result.session().run(feeds)
np.savez(out + ".npz", **found)
print(json.dumps(result.report.as_dict()["target"]))
"""


@pytest.mark.parametrize("which", ["minilm", "llama"])
def test_openvino_in_an_environment_of_its_own(which: str, tmp_path: Path) -> None:
    python = os.environ.get("GRAPHOPT_OPENVINO_PYTHON")
    if not python:
        pytest.skip("GRAPHOPT_OPENVINO_PYTHON names no python with onnxruntime-openvino and graphopt: openvino was lowered and checked, but not run")
    path = tmp_path / "model.onnx"
    path.write_bytes(minilm("sdpa_18").read_bytes() if which == "minilm" else llama(tmp_path).read_bytes())
    feeds = text_feeds(NAMES, 4, 9)
    feeds["input_ids"] = feeds["input_ids"] % (30000 if which == "minilm" else 100)
    np.savez(f"{path}.npz", **feeds)
    script = [python, "-c", OPENVINO, str(path), str(tmp_path / "out.onnx")]
    done = subprocess.run(script, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["falls_back"] == []
    assert_same(run(path, feeds), dict(np.load(tmp_path / "out.onnx.npz")), 2e-5)
