"""drop-layers: what is left is the model that was built without the layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from models import assert_same, minilm, parse, run, text_feeds  # type: ignore[import-not-found]
from tiny import tiny  # type: ignore[import-not-found]

import graphopt
from graphopt.analysis.stream import Streams
from graphopt.core.contract import Context
from graphopt.core.errors import GraphoptError, PassError, PipelineError
from graphopt.core.pipeline import PassManager
from graphopt.core.pipeline import parse as pipeline
from graphopt.core.registry import passes
from graphopt.graph.interface import interface
from graphopt.graph.verify import verify
from graphopt.run.samples import Samples

Array = np.ndarray[Any, Any]
HEAD = '<ir_version: 10, opset_import: ["": 23]>'
WIDTH = 16
FUSED = "q{k} = MatMul({x}, wq{k})  a{k} = Attention<q_num_heads=2, kv_num_heads=2>(q{k}, {keys}, {keys})"
UNFUSED = """q{k} = MatMul({x}, wq{k})  t{k} = Transpose<perm=[0,2,1]>({keys})  s{k} = MatMul(q{k}, t{k})  p{k} = Softmax<axis=-1>(s{k})  a{k} = MatMul(p{k}, {keys})"""
FFN = "u{k} = MatMul({x}, wu{k})  g{k} = Relu(u{k})  f{k} = MatMul(g{k}, wd{k})"


def weights(count: int) -> dict[str, Array]:
    """Layer k changes the stream by about 2^k."""
    rng = np.random.default_rng(3)
    found = {"scale": np.ones(WIDTH, np.float32)}
    for k in range(count):
        for name, size in (("wq", 1.0), ("wo", 0.5 * 2**k), ("wu", 1.0), ("wd", 0.5 * 2**k), ("b", 0.1)):
            array = size * rng.standard_normal((WIDTH, WIDTH)) / 4 if name != "b" else size * rng.standard_normal(WIDTH)
            found[f"{name}{k}"] = array.astype(np.float32)
    return found


def model(keep: Sequence[int], style: str = "pre", attention: str = FUSED, skip: str = "", count: int = 3, kept_outputs: bool = False) -> Any:
    """A stack of the layers `keep`; `skip`: attention or ffn, which those layers named in `gone` lack."""
    gone = [k for k in range(count) if k not in keep] if skip else []
    body, x = ["e = LayerNormalization<axis=-1>(x, scale)"], "e"
    for k in range(count) if skip else keep:
        own = {"k": k, "x": x, "keys": x}
        if style == "pre":
            body.append(f"n{k} = RMSNormalization<axis=-1>({x}, scale)")
            own |= {"x": f"n{k}", "keys": f"n{k}"}
        if not (k in gone and skip == "attention"):
            body.append(attention.format(**own) + f"  o{k} = MatMul(a{k}, wo{k})  ob{k} = Add(o{k}, b{k})  z{k} = Add({x}, ob{k})")
            x = f"z{k}"
            if style == "post":
                body.append(f"y{k} = LayerNormalization<axis=-1>(z{k}, scale)")
                x = f"y{k}"
        if k in gone and skip == "ffn":
            continue
        inner = x
        if style == "pre":
            body.append(f"m{k} = RMSNormalization<axis=-1>({x}, scale)")
            inner = f"m{k}"
        body.append(FFN.format(k=k, x=inner) + f"  v{k} = Add(f{k}, {x})")
        x = f"v{k}"
        if style == "post":
            body.append(f"w{k} = LayerNormalization<axis=-1>(v{k}, scale)")
            x = f"w{k}"
    body.append(f"y = LayerNormalization<axis=-1>({x}, scale)" if style == "pre" else f"y = Identity({x})")
    text = "\n".join(body)
    stored = {name: array for name, array in weights(count).items() if name in text.replace(",", " ").replace(")", " ").split() or f"({name}" in text}
    return parse(f"{HEAD} g (float[B,S,{WIDTH}] x) => (float[B,S,{WIDTH}] y) {{ {text} }}", **stored)


def feeds(count: int = 2) -> list[dict[str, Array]]:
    rng = np.random.default_rng(7)
    return [{"x": rng.standard_normal((2, 5 + k, WIDTH)).astype(np.float32)} for k in range(count)]


def dropped(source: Any, text: str, samples: Any = None) -> tuple[Any, Any]:
    found = graphopt.load(source)
    public = interface(found)
    records = PassManager(pipeline(text, passes())).run(found, Context(found, samples=None if samples is None else Samples(samples)))
    verify(found, interface=public)
    return found, records[-1]


def said(record: Any, text: str) -> bool:
    return any(text in str(r) for r in record.remarks)


@pytest.mark.parametrize("attention", [FUSED, UNFUSED], ids=["fused", "unfused"])
@pytest.mark.parametrize("style", ["pre", "post"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_dropped_layer_is_as_if_it_had_never_been(style: str, layer: int, attention: str) -> None:
    source = model(range(3), style, attention)
    layers = Context(graphopt.load(source)).get(Streams())
    assert [[b.kind for s in found.steps for b in s.branches] for found in layers] == [["attention", "ffn"]] * 3
    found, record = dropped(source, f"drop-layers{{layers={layer}}}")
    assert record.changes == 2
    expected = model([k for k in range(3) if k != layer], style, attention)
    for feed in feeds():
        assert_same(run(expected, feed), run(found, feed), 1e-6)
    assert not any(name.endswith(str(layer)) for name in found.graph.initializers), "its weights are gone"


@pytest.mark.parametrize("style", ["pre", "post"])
@pytest.mark.parametrize("what", ["attention", "ffn"])
def test_only_attentions_or_ffns(style: str, what: str) -> None:
    found, record = dropped(model(range(3), style), f"drop-layers{{layers=0+2 what={what}}}")
    assert record.changes == 2
    for feed in feeds():
        assert_same(run(model([1], style, skip=what), feed), run(found, feed), 1e-6)


def test_the_layers_that_change_least_go() -> None:
    """Layer k was made to change the stream by 2^k."""
    found, record = dropped(model(range(3)), "drop-layers{count=2}", feeds())
    gone = [r.facts for r in record.remarks if r.kind == "applied"]
    assert {f["number"] for f in gone} == {0, 1}
    assert said(record, "1 of 3 stay: they change the stream more")
    assert_same(run(model([2]), feeds()[0]), run(found, feeds()[0]), 1e-6)
    stream = {n: run(graphopt.load(_exposed(n)), feeds()[0])["y"].reshape(-1, WIDTH).astype(np.float64) for n in ("e", "v0")}
    cosine = np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(stream["e"], stream["v0"], strict=True)])
    told = next(f["cosine"] for f in gone if f["number"] == 0)
    one = dropped(model(range(3)), "drop-layers", feeds(1))[1]
    assert told == pytest.approx(next(r.facts["cosine"] for r in one.remarks if r.kind == "applied"), abs=0.05)
    assert next(r.facts["cosine"] for r in one.remarks if r.kind == "applied") == pytest.approx(cosine, abs=1e-4)


def _exposed(name: str) -> Any:
    """The model whose output is the stream at one place."""
    source = model(range(3))
    for node in source.graph.node:
        if node.output[0] == "y":
            node.op_type = "Identity"
            del node.attribute[:]
            del node.input[:]
            node.input.append(name)
    return source


def test_ratio_rounds_down_and_one_layer_stays() -> None:
    assert dropped(model(range(3)), "drop-layers{ratio=0.7}", feeds())[1].changes == 4
    _, record = dropped(model(range(3)), "drop-layers{ratio=0.3}", feeds())
    assert record.changes == 0
    assert said(record, "ratio=0.3 of 3 is less than one")
    _, record = dropped(model(range(3)), "drop-layers{count=9}", feeds())
    assert record.changes == 4
    assert said(record, "it is the last of its stream")


PARALLEL = f"""{HEAD} g (float[B,S,16] x) => (float[B,S,16] y) <float[16,16] wq0, float[16,16] wu0, float[16] scale> {{
  n = RMSNormalization<axis=-1>(x, scale)  {FUSED.format(k=0, x="n", keys="n")}
  {FFN.format(k=0, x="n").replace(", wd0", ", wu0")}  s = Add(a0, f0)  z = Add(x, s)  y = RMSNormalization<axis=-1>(z, scale) }}"""


@pytest.mark.parametrize(("what", "rest"), [("attention", "Add(x, f0)"), ("ffn", "Add(x, a0)")])
def test_parallel_branches_go_one_by_one(what: str, rest: str) -> None:
    stored = {name: array for name, array in weights(1).items() if name in ("wq0", "wu0", "scale")}
    found, record = dropped(parse(PARALLEL, **stored), f"drop-layers{{what={what}}}", feeds())
    assert record.changes == 1
    expected = parse(PARALLEL.replace("Add(x, s)", rest), **stored)
    assert_same(run(expected, feeds()[0]), run(found, feeds()[0]), 1e-6)
    assert ("Attention" in {n.op_type for n in found.graph}) == (what == "ffn")


CACHE = f"""{HEAD} g (float[B,S,16] x, float[B,P,16] past0, float[B,P,16] past1) => (float[B,S,16] y, float[B,T,16] present0, float[B,T,16] present1)
<float[16,16] wq0, float[16,16] wk0, float[16,16] wq1, float[16,16] wk1> {{
  k0 = MatMul(x, wk0)  present0 = Concat<axis=1>(past0, k0)  {FUSED.format(k=0, x="x", keys="present0")}  z0 = Add(x, a0)
  k1 = MatMul(z0, wk1)  present1 = Concat<axis=1>(past1, k1)  {FUSED.format(k=1, x="z0", keys="present1")}  y = Add(z0, a1) }}"""


def test_the_cache_of_a_dropped_layer_stays_and_is_told() -> None:
    stored = {name: weights(2)[name.replace("wk", "wu")] for name in ("wq0", "wk0", "wq1", "wk1")}
    source = parse(CACHE, **stored)
    found, record = dropped(source, "drop-layers{layers=0}")
    assert record.changes == 1
    assert said(record, "layer 0 is dropped, but still computed in part for the output present0")
    feed = feeds()[0] | {f"past{k}": np.ones((2, 3, 16), np.float32) * k for k in range(2)}
    expected = run(parse(CACHE.replace("z0 = Add(x, a0)", "z0 = Identity(x)"), **stored), feed)
    assert_same(expected, run(found, feed), 1e-6)
    assert [n.op_type for n in found.graph].count("Attention") == 1


CROSS = f"""{HEAD} g (float[B,S,16] x, float[B,T,16] d) => (float[B,T,16] y) <float[16,16] wq0, float[16,16] wq1, float[16,16] wq2, float[16,16] wk2, float[16,16] wu0,
float[16,16] wd0> {{
  {FUSED.format(k=0, x="x", keys="x")}  h = Add(x, a0)
  {FUSED.format(k=1, x="d", keys="d")}  z1 = Add(d, a1)
  keys = MatMul(h, wk2)  {FUSED.format(k=2, x="z1", keys="keys")}  z2 = Add(z1, a2)
  {FFN.format(k=0, x="z2")}  y = Add(z2, f0) }}"""


def test_encoder_and_decoder_are_two_streams() -> None:
    stored = weights(3)
    source = parse(CROSS, wk2=stored["wo0"], **{n: stored[n] for n in ("wq0", "wq1", "wq2", "wu0", "wd0")})
    found = graphopt.load(source)
    layers = Context(found).get(Streams())
    assert [(layer.stream, [b.kind for s in layer.steps for b in s.branches]) for layer in layers] == [
        (0, ["attention"]),
        (1, ["attention", "cross", "ffn"]),
    ]
    cut, record = dropped(source, "drop-layers{layers=1 what=ffn}")
    assert record.changes == 1
    _, record = dropped(source, "drop-layers{count=2}", [{"x": feeds()[0]["x"], "d": feeds()[1]["x"]}])
    assert record.changes == 0
    assert said(record, "it is the last of its stream")
    feed = {"x": feeds()[0]["x"], "d": feeds()[1]["x"]}
    expected = run(
        parse(CROSS.replace("y = Add(z2, f0)", "y = Identity(z2)"), wk2=stored["wo0"], **{n: stored[n] for n in ("wq0", "wq1", "wq2", "wu0", "wd0")}),
        feed,
    )
    assert_same(expected, run(cut, feed), 1e-6)


@pytest.mark.parametrize("name", ["bert", "distilbert", "vit", "gpt2", "llama", "qwen3"])
def test_real_architectures_show_two_layers(name: str) -> None:
    found = graphopt.load(tiny(name, "sdpa", "18"))
    for text in ("canonicalize", "canonicalize, fuse-norm, fuse-activation, fuse-rotary, fuse-attention, canonicalize"):
        PassManager(pipeline(text, passes())).run(found, Context(found))
        layers = Context(found).get(Streams())
        assert [[b.kind for s in layer.steps for b in s.branches] for layer in layers] == [["attention", "ffn"]] * 2, text


def test_a_graph_without_layers_says_so() -> None:
    text = f"{HEAD} g (float[B,8] x) => (float[B,8] y) <float[8,8] w> {{ m = MatMul(x, w)  y = Relu(m) }}"
    _, record = dropped(parse(text, w=np.eye(8, dtype=np.float32)), "drop-layers{layers=0}")
    assert record.changes == 0
    assert said(record, "no residual stream with layers; put `canonicalize` before")


@pytest.mark.parametrize(("text", "message"), [
    ("count=1 ratio=0.5", "to stand alone"), ("ratio=1.5", "between 0 and 1"), ("count=0", "1 or more"), ("what=heads", "one of layer, attention, ffn"),
])  # fmt: skip
def test_errors(text: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        pipeline(f"drop-layers{{{text}}}", passes())


def test_errors_of_a_run() -> None:
    with pytest.raises((PassError, GraphoptError), match="expects numbers of 0, 1, 2, found 7"):
        dropped(model(range(3)), "drop-layers{layers=7}")
    with pytest.raises((PassError, GraphoptError), match="add --samples"):
        dropped(model(range(3)), "drop-layers{count=1}")


def test_weaker_settings_drop_less() -> None:
    for text, milder in (
        ("{count=3}", "drop-layers{count=2}"),
        ("{layers=3+1}", "drop-layers{layers=3}"),
        ("{ratio=0.5}", "drop-layers{ratio=0.35}"),
    ):
        step: Any = pipeline(f"drop-layers{text}", passes())[0]
        assert str(step.weaker()) == milder
    assert pipeline("drop-layers", passes())[0].weaker() is None  # type: ignore[attr-defined]


@pytest.mark.slow
def test_minilm_loses_a_layer_and_still_quantizes() -> None:
    path = minilm("sdpa_18")
    samples = [text_feeds(["input_ids", "attention_mask"], 1, 24 + k) for k in range(3)]
    found, record = dropped(path, "canonicalize, drop-layers{count=1}, quantize", samples)
    assert record.changes == 30 + 2
    assert run(found, samples[0])["last_hidden_state"].shape == (1, 24, 384)
