"""cpu{opset=17}: what older runtimes load, with the numbers of the operators that were taken apart; vendor=false (cases G02, G05)."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from models import Array, assert_same, minilm, parse, run, text_feeds  # type: ignore[import-not-found]

import graphopt
from graphopt.core.contract import Context
from graphopt.core.errors import TargetError
from graphopt.core.pipeline import PassManager
from graphopt.core.pipeline import parse as parse_pipeline
from graphopt.core.registry import targets
from graphopt.run.ort import session

LOWEST = float(np.finfo(np.float32).min)
NEWER = {"Attention": 23, "RotaryEmbedding": 23, "RMSNormalization": 23, "Gelu": 20, "LayerNormalization": 17}


def ops(model: onnx.ModelProto) -> collections.Counter[str]:
    return collections.Counter(n.op_type for n in model.graph.node)


def written(result: graphopt.Result, folder: Path) -> onnx.ModelProto:
    path = folder / "out.onnx"
    result.save(path)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    return model


def numbers(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def lowered(source: onnx.ModelProto, opset: int = 17) -> Any:
    """The graph as `cpu{opset=..}` spells it, before it is written."""
    model = graphopt.load(source)
    (target,) = parse_pipeline(f"cpu{{opset={opset}}}", targets(), "target")
    PassManager(list(target.lowerings())).run(model, Context(model, target=target))
    return model


def save_within(model: Any, path: Path) -> None:
    (target,) = parse_pipeline("cpu{opset=17}", targets(), "target")
    target.save(model, path)


def same(source: onnx.ModelProto, feeds: dict[str, Array], gone: str) -> None:
    model = lowered(source)
    assert gone not in {n.op_type for n in model.graph}, "it was not taken apart"
    expected = run(source, feeds)
    for optimize in (False, True):
        assert_same(expected, session(model, optimize=optimize).run(feeds))


# ---- one operator at a time ---------------------------------------------------------------------------------------------------------------

HEADER = '<ir_version: 10, opset_import: ["": 23]>\n'


def attention(heads: int, kv_heads: int, mask: str | None, packed: bool, attributes: str = "", past: bool = False) -> onnx.ModelProto:
    q, k = (f"float[B,S,{4 * heads}]", f"float[B,T,{4 * kv_heads}]") if packed else (f"float[B,{heads},S,4]", f"float[B,{kv_heads},T,4]")
    counts = f"q_num_heads = {heads}, kv_num_heads = {kv_heads}" if packed else ""
    options = ", ".join(o for o in (counts, attributes) if o)
    inputs = f"{q} q, {k} k, {k} v" + ("" if mask is None else f", {mask} mask")
    call, outputs, results = "q, k, v" + ("" if mask is None else ", mask"), f"{q} y", "y"
    if past:
        inputs += f", float[B,{kv_heads},P,4] past_k, float[B,{kv_heads},P,4] past_v"
        call += (', ""' if mask is None else "") + ", past_k, past_v"
        outputs += f", float[B,{kv_heads},U,4] present_k, float[B,{kv_heads},U,4] present_v"
        results += ", present_k, present_v"
    return parse(HEADER + f"g ({inputs}) => ({outputs}) {{ {results} = Attention <{options}> ({call}) }}".replace("<>", ""))


def qkv(heads: int, kv_heads: int, packed: bool, rows: int = 3, keys: int = 3, batch: int = 2) -> dict[str, Array]:
    found = {}
    for seed, (name, count, size) in enumerate((("q", heads, rows), ("k", kv_heads, keys), ("v", kv_heads, keys))):
        found[name] = numbers(seed, *((batch, size, 4 * count) if packed else (batch, count, size, 4)))
    return found


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2)])
@pytest.mark.parametrize("attributes", ["", "is_causal = 1", "scale = 0.3, softcap = 1.5"])
def test_attention(packed: bool, heads: int, kv_heads: int, attributes: str) -> None:
    same(attention(heads, kv_heads, None, packed, attributes), qkv(heads, kv_heads, packed), "Attention")


@pytest.mark.parametrize("fill", [-1e4, -1e30, -3.3e38, -np.inf])
def test_rows_without_any_key_keep_what_they_gave(fill: float) -> None:
    """Row 0 of the first text may read nothing: an average for finite fills, zero for -inf. (The lowest float: tests/test_repair.py.)"""
    mask = np.zeros((2, 1, 3, 3), np.float32)
    mask[0, 0, 0], mask[1, 0, 1, 1] = fill, fill
    same(attention(2, 2, "float[B,1,S,T]", True), qkv(2, 2, True) | {"mask": mask}, "Attention")


def test_a_boolean_mask_and_causality() -> None:
    mask = np.ones((2, 1, 3, 3), np.bool_)
    mask[0, 0, 0], mask[1, 0, 2, 1] = False, False
    for attributes in ("", "is_causal = 1"):
        same(attention(4, 2, "bool[B,1,S,T]", True, attributes), qkv(4, 2, True) | {"mask": mask}, "Attention")


def test_a_mask_of_a_row_without_any_key_in_16_bits() -> None:
    text = onnx.printer.to_text(attention(2, 2, "bool[B,1,S,T]", True)).replace("float[", "float16[")
    feeds = {name: x.astype(np.float16) for name, x in qkv(2, 2, True).items()} | {"mask": np.ones((2, 1, 3, 3), np.bool_)}
    feeds["mask"][0, 0, 0] = False
    found = session(lowered(parse(text)), optimize=False).run(feeds)
    wide = {name: x if name == "mask" else x.astype(np.float32) for name, x in feeds.items()}
    expected = run(attention(2, 2, "bool[B,1,S,T]", True), wide)["y"]
    assert np.abs(found["y"] - expected).max() < 5e-3
    assert not found["y"][0, 0].any()


@pytest.mark.parametrize("count", [0, 2])
def test_a_cache(count: int) -> None:
    """B08: past of length 0 and more."""
    feeds = qkv(4, 2, True) | {name: numbers(9, 2, 2, count, 4) for name in ("past_k", "past_v")}
    for attributes in ("", "is_causal = 1"):
        same(attention(4, 2, None, True, attributes, past=True), feeds, "Attention")


def test_the_probabilities_are_an_output() -> None:
    text = (
        "g (float[B,2,S,4] q, float[B,2,S,4] k, float[B,2,S,4] v, bool[S,S] mask) => (float[B,2,S,4] y, float[B,2,S,S] p) "
        '{ y, "", "", p = Attention <qk_matmul_output_mode = 3> (q, k, v, mask) }'
    )
    mask = np.array([[0, 0, 0], [1, 1, 0], [1, 1, 1]], np.bool_)
    same(parse(HEADER + text), qkv(2, 2, False) | {"mask": mask}, "Attention")


def test_scores_that_are_read_in_between_stay_and_saving_says_so(tmp_path: Path) -> None:
    text = (
        "g (float[B,2,S,4] q, float[B,2,S,4] k, float[B,2,S,4] v) => (float[B,2,S,4] y, float[B,2,S,S] p) "
        '{ y, "", "", p = Attention <qk_matmul_output_mode = 1, softcap = 2.0> (q, k, v) }'
    )
    with pytest.raises(TargetError, match=r"cannot write opset 17: node .*Attention"):
        save_within(lowered(parse(HEADER + text)), tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("turned", [8, 4])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("positions", [True, False])
def test_rotary(interleaved: int, turned: int, packed: bool, positions: bool) -> None:
    x = "float[B,S,16]" if packed else "float[B,2,S,8]"
    cache, extra = (f"float[M,{turned // 2}]", ", int64[B,S] ids") if positions else (f"float[B,S,{turned // 2}]", "")
    options = f"interleaved = {interleaved}" + (f", rotary_embedding_dim = {turned}, num_heads = 2" if turned < 8 or packed else "")
    call = "x, cos, sin, ids" if positions else "x, cos, sin"
    source = parse(HEADER + f"g ({x} x, {cache} cos, {cache} sin{extra}) => ({x} y) {{ y = RotaryEmbedding <{options}> ({call}) }}")
    shape = (5, turned // 2) if positions else (2, 3, turned // 2)
    feeds = {"x": numbers(1, *((2, 3, 16) if packed else (2, 2, 3, 8))), "cos": numbers(2, *shape), "sin": numbers(3, *shape)}
    same(source, feeds | ({"ids": np.array([[0, 4, 2], [1, 1, 3]])} if positions else {}), "RotaryEmbedding")


@pytest.mark.parametrize("axis", [-1, 1])
def test_rms_norm(axis: int) -> None:
    size = "8" if axis == -1 else "5,8"
    text = f"g (float[B,5,8] x) => (float[B,5,8] y) <float[{size}] w> {{ y = RMSNormalization <axis = {axis}, epsilon = 1e-6> (x, w) }}"
    same(parse(HEADER + text, w=numbers(1, *map(int, size.split(",")))), {"x": numbers(2, 2, 5, 8) * 30}, "RMSNormalization")


@pytest.mark.parametrize("kind", ["none", "tanh"])
def test_gelu(kind: str) -> None:
    same(parse(HEADER + f'g (float[B,8] x) => (float[B,8] y) {{ y = Gelu <approximate = "{kind}"> (x) }}'), {"x": numbers(1, 3, 8) * 3}, "Gelu")


def test_group_norm() -> None:
    text = "g (float[B,6,5,S] x) => (float[B,6,5,S] y) <float[6] w, float[6] b> { y = GroupNormalization <num_groups = 3> (x, w, b) }"
    source = parse(HEADER + text, w=numbers(1, 6), b=numbers(2, 6))
    same(source, {"x": numbers(3, 2, 6, 5, 4) * 5 + 2}, "GroupNormalization")


def test_layer_norm_below_opset_17() -> None:
    """G02: no operator at an opset that has none such."""
    text = "g (float[B,8] x) => (float[B,8] y) <float[8] w, float[8] b> { y = LayerNormalization <epsilon = 1e-12> (x, w, b) }"
    source = parse(HEADER + text, w=numbers(1, 8), b=numbers(2, 8))
    feeds = {"x": numbers(3, 3, 8)}
    model = lowered(source, opset=14)
    assert "LayerNormalization" not in {n.op_type for n in model.graph}
    for optimize in (False, True):
        assert_same(run(source, feeds), session(model, optimize=optimize).run(feeds))


# ---- whole models -------------------------------------------------------------------------------------------------------------------------


def check(source: Any, opset: int, names: list[str], folder: Path) -> collections.Counter[str]:
    result = graphopt.optimize(source, target=f"cpu{{opset={opset} vendor=false tune=off}}", promise=False)
    model = written(result, folder)
    assert [(i.domain, i.version <= opset) for i in model.opset_import] == [("", True)]
    assert model.ir_version <= (8 if opset == 17 else 10)
    found = ops(model)
    assert not [op for op, since in NEWER.items() if since > opset and found[op]]
    for size in ((4, 6), (1, 3)):  # with rows that are masked everywhere
        feeds = text_feeds(names, *size)
        feeds["input_ids"] = feeds["input_ids"] % 100
        expected = run(result.original, feeds)
        for optimize in (False, True):
            assert_same(expected, session(folder / "out.onnx", optimize=optimize).run(feeds))
    return found


@pytest.mark.parametrize("route", ["sdpa_18", "sdpa_23", "sdpa_ts17"])
def test_minilm_at_opset_17(route: str, tmp_path: Path) -> None:
    """G05."""
    found = check(minilm(route), 17, ["input_ids", "attention_mask"], tmp_path)
    assert (found["Softmax"], found["LayerNormalization"], found["Erf"]) == (6, 13, 6)


def llama(folder: Path) -> Path:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()

    class Logits(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    ids, path = torch.arange(12).reshape(2, 6), folder / "llama.onnx"
    axes = {name: {0: "batch", 1: "seq"} for name in ("input_ids", "attention_mask", "logits")}
    torch.onnx.export(
        Logits().eval(), (ids, torch.ones_like(ids)), str(path), dynamo=False, opset_version=17, dynamic_axes=axes,
        input_names=["input_ids", "attention_mask"], output_names=["logits"],
    )  # fmt: skip
    return path


@pytest.mark.parametrize("opset", [17, 20])
def test_a_decoder_with_shared_key_heads(opset: int, tmp_path: Path) -> None:
    found = check(llama(tmp_path), opset, ["input_ids", "attention_mask"], tmp_path)
    assert found["Softmax"] == 2


def test_without_vendor_operators(tmp_path: Path) -> None:
    """Quantized, and no operator of the runtime anywhere; a vendor operator of the input is refused by name."""
    model = written(graphopt.optimize(minilm("sdpa_18"), level=2, target="quantized{vendor=false opset=17 tune=off}", promise=False), tmp_path)
    assert {n.domain for n in model.graph.node} == {""}
    assert ops(model)["MatMulInteger"] == 36
    session(tmp_path / "out.onnx")
    text = (
        '<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>\n'
        "g (float[B,8] x) => (float[B,8] y) { z = com.microsoft.Trilu (x)\n y = Neg (z) }"
    )
    result = graphopt.optimize(parse(text), "", target="cpu{vendor=false}")
    with pytest.raises(TargetError, match=r"without vendor operators: node `.*` is com.microsoft::Trilu"):
        result.save(tmp_path / "other.onnx")
    assert not (tmp_path / "other.onnx").exists()


def test_the_limit_is_never_taken_back(tmp_path: Path) -> None:
    """However slow the older operators are: what the user limits is not a choice."""
    (target,) = parse_pipeline("cpu{opset=17}", targets(), "target")
    limits = [step for step in target.lowerings() if step.binding]
    names = {step.name for step in limits}
    assert names >= {"decompose-attention", "decompose-rotary", "decompose-rms", "decompose-gelu", "keep-within"}
    (free,) = parse_pipeline("cpu", targets(), "target")
    assert not [step for step in free.lowerings() if step.binding]
    result = graphopt.optimize(minilm("sdpa_23"), target="cpu{opset=17 tune=off}")  # timed against its input
    assert written(result, tmp_path).opset_import[0].version == 17


def test_the_limit_holds_where_nothing_else_changes(tmp_path: Path) -> None:
    source = parse(HEADER + "g (float[B,8] x) => (float[B,8] y) { y = Neg (x) }")
    result = graphopt.optimize(source, "", target="cpu{opset=17}")
    assert written(result, tmp_path).opset_import[0].version <= 17
    assert result.report.changes == 1
    assert not graphopt.optimize(source, "", target="cpu").report.changes
