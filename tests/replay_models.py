"""The models and the samples of tests/replay.py: small, of many kinds, and made once per machine, so that two checkouts read the same files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from models import _cache, minilm, parse  # type: ignore[import-not-found]
from tiny import tiny  # type: ignore[import-not-found]

Array = np.ndarray[Any, Any]
HEAD = '<ir_version: 10, opset_import: ["": 23]>'
FOLDERS: dict[str, tuple[str, dict[str, Any], bool]] = {  # class, options, with a key/value cache
    "llama_past": ("LlamaForCausalLM", {
        "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}, True),
    "bart": ("BartModel", {
        "vocab_size": 100, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64, "use_cache": False}, False),
    "t5": ("T5Model", {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "use_cache": False}, False),
}  # fmt: skip
BRANCHES = f"""{HEAD} g (bool go, float[B,S,32] x) => (float[B,S,32] y) <int64[4] apart = {{0, 0, 4, 8}}, int64[3] together = {{0, 0, 32}}, int64 n = {{3}}, bool yes = {{1}}> {{
  q1 = MatMul(x, wq)  q2 = Reshape(q1, apart)  q = Transpose<perm=[0,2,1,3]>(q2)
  k1 = MatMul(x, wk)  k2 = Reshape(k1, apart)  kt = Transpose<perm=[0,2,3,1]>(k2)
  v1 = MatMul(x, wv)  v2 = Reshape(v1, apart)  v = Transpose<perm=[0,2,1,3]>(v2)
  s1 = MatMul(q, kt)  s2 = Mul(s1, scale)  p = Softmax<axis=-1>(s2)  c1 = MatMul(p, v)  c2 = Transpose<perm=[0,2,1,3]>(c1)
  c = Reshape(c2, together)  o = MatMul(c, wo)  h = Add(o, x)
  z = If(go) <then_branch = t () => (float[B,S,32] a) {{ u = MatMul(h, up)  e = Gelu(u)  d = MatMul(e, down)  a = Add(d, h) }},
              else_branch = e () => (float[B,S,32] b) {{ b = Neg(h) }}>
  y = Loop(n, yes, z) <body = l (int64 i, bool more, float[B,S,32] state) => (bool again, float[B,S,32] next) {{
    again = Identity(more)  m = MatMul(state, turn)  next = Tanh(m) }}> }}"""
EXPERTS = f"""{HEAD} g (float[B,S,32] x) => (float[B,S,32] y) {{
  n = RMSNormalization<axis=-1>(x, g0)  r = MatMul(n, router)  w = Softmax<axis=-1>(r)  p0, p1 = Split<axis=-1, num_outputs=2>(w)
  a0 = MatMul(n, gate0)  s0 = Sigmoid(a0)  i0 = Mul(a0, s0)  j0 = MatMul(n, up0)  c0 = Mul(i0, j0)  d0 = MatMul(c0, down0)  e0 = Mul(d0, p0)
  a1 = MatMul(n, gate1)  s1 = Sigmoid(a1)  i1 = Mul(a1, s1)  j1 = MatMul(n, up1)  c1 = Mul(i1, j1)  d1 = MatMul(c1, down1)  e1 = Mul(d1, p1)
  f = Add(e0, e1)  h = Add(x, f)  y = RMSNormalization<axis=-1>(h, g1) }}"""
MLP = f"""{HEAD} g (float[B,32] x) => (float[B,32] y) {{
  a = Gemm<transB=1>(x, w0, b0)  r = Relu(a)  c = Gemm(r, w1, b1)  h = Add(c, x)  m = ReduceMean<keepdims=1>(h, last)  d = Sub(h, m)
  s = Mul(d, d)  v = ReduceMean<keepdims=1>(s, last)  e = Add(v, eps)  t = Sqrt(e)  z = Div(d, t)  k = Mul(z, g0)  y = Add(k, g1) }}"""
CACHED = f"""{HEAD} g (float[B,S,32] x, float[B,2,P,8] past_k, float[B,2,P,8] past_v)
  => (float[B,S,32] y, float[B,2,T,8] present_k, float[B,2,T,8] present_v) {{
  n = RMSNormalization<axis=-1>(x, g0)  q = MatMul(n, wq)  k = MatMul(n, wkn)  v = MatMul(n, wvn)
  a, present_k, present_v = Attention<q_num_heads=4, kv_num_heads=2, is_causal=1>(q, k, v, "", past_k, past_v)
  o = MatMul(a, wo)  h = Add(o, x)  m = RMSNormalization<axis=-1>(h, g1)
  u = MatMul(m, up)  r = Relu(u)  d = MatMul(r, down)  y = Add(h, d) }}"""
TIED = f"""{HEAD} g (int64[B,S] input_ids) => (float[B,S,100] y) <int64[4] apart = {{0, 0, 4, 8}}, int64[3] together = {{0, 0, 32}}> {{
  e = Gather(table, input_ids)  x = LayerNormalization<axis=-1>(e, g0, h0)
  q1 = MatMul(x, wq)  q2 = Reshape(q1, apart)  q = Transpose<perm=[0,2,1,3]>(q2)
  k1 = MatMul(x, wk)  k2 = Reshape(k1, apart)  kt = Transpose<perm=[0,2,3,1]>(k2)
  v1 = MatMul(x, wv)  v2 = Reshape(v1, apart)  v = Transpose<perm=[0,2,1,3]>(v2)
  s1 = MatMul(q, kt)  s2 = Mul(s1, scale)  p = Softmax<axis=-1>(s2)  c1 = MatMul(p, v)  c2 = Transpose<perm=[0,2,1,3]>(c1)
  c = Reshape(c2, together)  o = MatMul(c, wo)  h = Add(o, x)  n = LayerNormalization<axis=-1>(h, g1, h1)
  u = MatMul(n, up)  a = Gelu(u)  d = MatMul(a, down)  z = Add(d, n)  f = LayerNormalization<axis=-1>(z, g0, h0)
  t = Transpose<perm=[1,0]>(table)  y = MatMul(f, t) }}"""
SIZES = {
    "table": (100, 32), "wq": (32, 32), "wk": (32, 32), "wv": (32, 32), "wo": (32, 32), "wkn": (32, 16), "wvn": (32, 16), "up": (32, 64),
    "down": (64, 32), "turn": (32, 32), "router": (32, 2), "gate0": (32, 48), "gate1": (32, 48), "up0": (32, 48), "up1": (32, 48),
    "down0": (48, 32), "down1": (48, 32), "w0": (64, 32), "w1": (64, 32), "b0": (64,), "b1": (32,), "g0": (32,), "g1": (32,), "h0": (32,), "h1": (32,),
}  # fmt: skip


def _text(text: str) -> onnx.ModelProto:
    """The graph with the stored weights that it names and nothing in it makes."""
    rng = np.random.default_rng(7)
    stored = {name: np.asarray(rng.standard_normal(size) / (4 if len(size) > 1 else 1), np.float32) for name, size in SIZES.items()}
    stored |= {"scale": np.array(8**-0.5, np.float32), "eps": np.array(1e-5, np.float32), "last": np.array([-1])}
    words = set(text.replace("(", " ").replace(")", " ").replace(",", " ").split())
    model: onnx.ModelProto = parse(text, **{name: array for name, array in stored.items() if name in words})
    return model


def _kept(name: str, make: Callable[[Path], None]) -> Path:
    """A file of the cache, whole or not at all."""
    path: Path = _cache() / f"replay_{name}.onnx"
    if not path.exists():
        part = path.with_name(f"{path.name}.{os.getpid()}.onnx")
        make(part)
        os.replace(part, path)
    return path


def folder(name: str, into: Path) -> Path:
    """A Hugging Face folder with seeded random weights."""
    import torch
    import transformers

    cls = getattr(transformers, FOLDERS[name][0])
    torch.manual_seed(0)
    cls(cls.config_class(**FOLDERS[name][1])).eval().save_pretrained(into)
    return into


def _from_folder(name: str) -> Path:
    import graphopt

    def make(path: Path) -> None:
        with tempfile.TemporaryDirectory() as own:
            graphopt.optimize(folder(name, Path(own)), level=0, with_past=FOLDERS[name][2], promise=False).save_input(path)

    return _kept(name, make)


def _static(path: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    source = tiny("bert", "eager", "ts17")

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = feeds(source)

        def get_next(self) -> dict[str, Array] | None:
            return self.left.pop() if self.left else None

    quantize_static(source, path, Reader(), quant_format=QuantFormat.QDQ)


def _dynamic(path: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(tiny("bert", "sdpa", "18"), path)


MODELS: dict[str, Callable[[], Any]] = {
    "bert_ts17": lambda: tiny("bert", "eager", "ts17"),
    "bert": lambda: tiny("bert", "sdpa", "18"),
    "distilbert": lambda: tiny("distilbert", "eager", "18"),
    "gpt2": lambda: tiny("gpt2", "eager", "18"),
    "llama": lambda: tiny("llama", "sdpa", "18"),
    "llama_ts17": lambda: tiny("llama", "sdpa", "ts17"),
    "qwen3": lambda: tiny("qwen3", "eager", "18"),
    "vit": lambda: tiny("vit", "sdpa", "18"),
    "llama_past": lambda: _from_folder("llama_past"),
    "bart": lambda: _from_folder("bart"),
    "t5": lambda: _from_folder("t5"),
    "qdq": lambda: _kept("qdq", _static),
    "dynamic": lambda: _kept("dynamic", _dynamic),
    "branches": lambda: _text(BRANCHES),
    "experts": lambda: _text(EXPERTS),
    "mlp": lambda: _text(MLP),
    "cached": lambda: _text(CACHED),
    "tied": lambda: _text(TIED),
    "minilm_ts17": lambda: minilm("eager_ts17"),
    "minilm": lambda: minilm("sdpa_18"),
}
SMALL = [name for name in MODELS if not name.startswith("minilm")]


def feeds(source: Any, count: int = 3) -> list[dict[str, Array]]:
    """Seeded batches of 4 rows and several lengths; masks have padding on the right (row 1), on the left (row 2) and a hole (row 3)."""
    proto = source if isinstance(source, onnx.ModelProto) else onnx.load(source, load_external_data=False)
    stored = {t.name for t in proto.graph.initializer}
    return [_feed([v for v in proto.graph.input if v.name not in stored], k) for k in range(count)]


def _feed(inputs: list[onnx.ValueInfoProto], turn: int) -> dict[str, Array]:
    rng, batch, length, past = np.random.default_rng(turn), 4, 12 - 2 * turn, 3 + turn
    cached = any(v.name.startswith("past") for v in inputs)
    found: dict[str, Array] = {}
    for value in inputs:
        shape = [_size(k, d, batch, length, past) for k, d in enumerate(value.type.tensor_type.shape.dim)]
        kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        if "mask" in value.name:
            mask = np.ones((batch, length + past * cached), kind)
            mask[1, -3:], mask[2, :3], mask[3, 4] = 0, 0, 0
            found[value.name] = mask
        elif kind == np.bool_:
            found[value.name] = np.array(turn % 2 == 0)
        elif np.issubdtype(kind, np.integer):
            found[value.name] = rng.integers(4, 99, shape).astype(kind)
        else:
            found[value.name] = np.asarray(rng.standard_normal(shape), kind)
    return found


def _size(axis: int, dim: Any, batch: int, length: int, past: int) -> int:
    if dim.HasField("dim_value"):
        return int(dim.dim_value)
    if axis == 0:
        return batch
    return past if dim.dim_param in ("P", "past_sequence") else length
